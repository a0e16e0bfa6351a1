"""Distances are those of what records stand for; bitwise comparisons are of their fields."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyfed.blocks.lowrank import LowRank
from polyfed.core.message import Message, State, encode
from polyfed.testing import laws
from polyfed.testing.compare import differences, digest, furthest
from polyfed.testing.subject import Subject


class Sent(Message):
    update: LowRank
    by_client: dict[int, LowRank]


class Kept(State):
    last: LowRank


def low_rank(*, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(9, 2, generator=g, dtype=torch.float64) @ torch.randn(2, 12, generator=g, dtype=torch.float64)
    convolution = torch.randn(3, 2, 2, 2, generator=g, dtype=torch.float64)
    return LowRank.of({"w": made, "kernel": convolution, "b": torch.ones(9, dtype=torch.float64)}, 0.9999)


def other_signs(record: LowRank) -> LowRank:
    """The same matrices by (-u, -v)."""
    return replace(record, u={"w": -record.u["w"]}, v={"w": -record.v["w"]})


def all_whole(record: LowRank) -> LowRank:
    """The same matrices, none in factors."""
    return LowRank({**record.whole, "w": record.stands_for()["w"]}, {}, {}, {})


@pytest.mark.parametrize("form", [other_signs, all_whole])
def test_equal_forms_are_no_distance_apart_and_not_bitwise_the_same(form: Any) -> None:
    """Catches factors compared one by one, at whatever depth the record lies."""
    one = low_rank()
    assert set(one.u) == {"w"}
    for a, b in (
        (one, form(one)),
        (Sent(one, {3: one}), Sent(form(one), {3: form(one)})),
        (Kept(one), Kept(form(one))),
    ):
        gap, where = furthest(a, b)
        assert gap <= 1e-12, where
        assert differences(a, b)
        assert digest(a) != digest(b)


def test_what_means_something_else_is_found() -> None:
    """Catches a comparison that asks records what they stand for and then forgets to look."""
    one, two = low_rank(), low_rank(seed=1)
    assert furthest(Sent(one, {}), Sent(two, {}))[0] > 0.1
    turned = replace(one, u={"w": -one.u["w"]})
    assert furthest(Kept(one), Kept(turned)) == (pytest.approx(2.0), "last.w")
    assert furthest(one, replace(one, whole={}))[0] == math.inf
    assert furthest(Sent(one, {3: one}), Sent(one, {3: two}), per_client=False)[0] == 0.0


def test_the_wire_takes_the_factors_as_they_are() -> None:
    """Catches what a record stands for being sent in its place."""
    one = low_rank()
    assert encode(Sent(one, {})) != encode(Sent(other_signs(one), {}))


@pytest.mark.parametrize("law", [laws.test_examples_weigh, laws.test_order_of_the_answers_does_not_matter])
def test_laws_hold_whatever_signs_singular_vectors_have(
    law: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a decomposition whose signs turn with the last bit of the matrix, as on another processor."""
    decompose = torch.linalg.svd

    def fickle(value: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, sigma, v = decompose(value, **options)
        bits = hashlib.sha256(value.numpy().tobytes()).digest()
        flip = torch.tensor([1.0 - 2.0 * (bits[k % 32] >> k // 32 & 1) for k in range(len(sigma))], dtype=u.dtype)
        return u * flip, sigma, v * flip[:, None]

    monkeypatch.setattr(torch.linalg, "svd", fickle)
    law(Subject("fedkd", tmp_path))
