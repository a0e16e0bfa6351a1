"""Which weights a submodel is chosen from, for which budget, and by which score; against brute force."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.importance import (
    MeanSquare,
    best,
    budget_threshold,
    competing,
    misplaced,
    paced,
    remembered,
    spread,
    thresholds,
)
from polyfed.blocks.submodel import above, top_k_threshold
from polyfed.blocks.weightwise import masked_names
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Fold
from polyfed.core.message import Message
from polyfed.models.zoo import build


class Upload(Message):
    delta: Params


def tensors(*values: list[float]) -> dict[str, Tensor]:
    return {f"w{number}": torch.tensor(value) for number, value in enumerate(values)}


def kept(weights: Params, theta: float) -> dict[str, list[bool]]:
    return {name: (value.abs() >= theta).tolist() for name, value in weights.items()}


def test_the_stages_of_the_resnet_are_the_six_groups_of_released_code() -> None:
    names = masked_names(build("resnet18(width=4)", input_shape=(3, 32, 32), num_classes=10))
    group = competing(names, "stage")
    heads = {number: {n.split(".")[0] for n, g in zip(names, group, strict=True) if g == number} for number in range(6)}
    assert list(heads.values()) == [{"conv1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}, {"fc"}]
    assert set(group) == set(range(6))


def test_where_tensors_compete() -> None:
    names = ("a.weight", "b.0.weight", "b.0.bias", "c.weight")
    assert competing(names, "model") == (0, 0, 0, 0)
    assert competing(names, "layer") == (0, 1, 2, 3)
    assert competing(names, "stage") == (0, 1, 1, 2)
    assert competing(names, "groups", (("c", "b.0.b"), ("a", "b.0.w"))) == (1, 1, 0, 0)
    assert competing((), "model") == ()


def test_all_faults_of_groups_are_told() -> None:
    names = ("a.weight", "b.weight", "c.weight")
    assert misplaced(names, (("a", "b"), ("b.w", "d"))) == [
        "no masked tensor begins with 'd'",
        "groups 0 and 1 both have 'b.weight'",
        "no group has 'c.weight'",
    ]
    assert misplaced(("a.0.weight", "a.0.bias", "a.1.weight", "b.weight"), (("b",),)) == [
        "no group has 'a.0.weight' and 2 more tensors of 'a'"
    ]
    assert misplaced(names, ((), ("a", "b", "c"), ())) == [
        "group 0 is empty; expected beginnings of names",
        "group 2 is empty; expected beginnings of names",
    ]
    assert misplaced(names, (("a",), ("b", "c"))) == []


def test_the_threshold_of_a_tensor_is_that_of_its_group() -> None:
    assert spread((0.5,), (0, 1, 1)) == (0.5, 0.5, 0.5)
    assert spread((0.5, 0.25), (0, 1, 1)) == (0.5, 0.25, 0.25)
    assert spread((0.5,), ()) == ()
    with pytest.raises(MessageError, match="3 thresholds came for 2 groups"):
        spread((0.5, 0.25, 0.1), (0, 1, 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99), st.booleans())
def test_a_budget_is_kept_and_used(seed: int, capacity: float, ties: bool) -> None:
    """Catches a budget that is exceeded, one more weight that would fit, and weights of equal size kept in part."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"w{number}": torch.randn(4, 5, generator=generator) for number in range(3)}
    if ties:
        weights = {name: (2 * value).round() for name, value in weights.items()}
    macs = {"w0": 100.0, "w1": 1.0}  # w2 costs nothing
    theta = budget_threshold(weights, macs)(capacity)

    def cost(theta: float) -> float:
        return sum(macs.get(name, 0.0) * int((value.abs() >= theta).sum()) for name, value in weights.items())

    sizes = sorted({float(v) for value in weights.values() for v in value.abs().flatten() if v})
    budget = capacity * 20 * 101
    assert cost(theta) <= budget or theta == sizes[-1]
    below = [size for size in sizes if size < theta]
    assert not below or cost(below[-1]) > budget


def test_a_budget_by_hand() -> None:
    weights, macs = tensors([4.0, 1.0, -3.0], [2.0, 0.5]), {"w0": 10.0, "w1": 1.0}
    assert budget_threshold(weights, macs)(21 / 32) == 2.0
    assert budget_threshold(weights, macs)(20.9 / 32) == 3.0
    assert budget_threshold(weights, macs)(0.01) == 4.0  # one weight is always kept
    assert budget_threshold(weights, macs)(1.0) == 0.0
    assert budget_threshold(weights, {})(0.5) == 0.0  # nothing costs anything
    assert budget_threshold(tensors([0.0, 0.0, 1.0]), {"w0": 1.0})(0.99) == 1.0
    assert 0 < budget_threshold({"w0": torch.zeros(3)}, {"w0": 1.0})(0.5) < 1e-30  # zeros stay out, as of top-k


def test_each_group_has_its_own_threshold_and_budget() -> None:
    weights = tensors([4.0, 1.0], [2.0, 0.5], [8.0, 7.0])
    assert thresholds(weights, (0, 0, 1), None)(0.5) == (2.0, 8.0)
    assert thresholds(weights, (0, 0, 1), {"w0": 5.0, "w1": 1.0, "w2": 1.0})(0.5) == (2.0, 8.0)
    assert thresholds(weights, (0, 0, 1), {"w0": 1.0, "w1": 9.0, "w2": 1.0})(0.5) == (2.0, 8.0)
    assert thresholds(weights, (0, 0, 1), {"w0": 1.0, "w1": 9.0, "w2": 1.0})(0.4) == (4.0, 8.0)
    assert thresholds(weights, (0, 0, 0), None)(0.5) == (top_k_threshold(weights, 0.5),)


@pytest.mark.parametrize("capacity", [0.0, -1.0, 2.0, float("nan")])
def test_a_capacity_that_is_no_fraction_is_refused(capacity: float) -> None:
    """Catches a silent submodel of one weight, or of all."""
    weights = tensors([4.0, 1.0], [2.0, 0.5])
    for made in (
        thresholds(weights, (0, 0), None),
        thresholds(weights, (0, 0), {"w0": 1.0}),
        best(weights, weights, (0, 0), None),
    ):
        with pytest.raises(ValueError, match="expected a fraction"):
            made(capacity)


def test_without_scores_the_best_are_the_largest() -> None:
    """Catches a first round that is chosen by place, as all scores are 0."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(6, 7, generator=generator) for name in ("a", "b")}
    nothing = {name: torch.zeros_like(value) for name, value in weights.items()}
    for capacity in (0.05, 0.3, 0.9, 1.0, 59 / 84):  # 59 / 84 * 84 is 58.999...
        mask = best(nothing, weights, (0, 0), None)(capacity)
        theta = top_k_threshold(weights, capacity)
        assert {name: value.tolist() for name, value in mask.items()} == kept(weights, theta)


def test_one_order_serves_all_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sort for each capacity: it is what a choice costs."""
    weights, macs, sorts = tensors([4.0, 1.0, 3.0], [2.0, 0.5]), {"w0": 2.0, "w1": 1.0}, list[str]()
    for name in ("argsort", "lexsort"):
        sort: Any = getattr(np, name)
        monkeypatch.setattr(np, name, lambda x, name=name, sort=sort: (sorts.append(name), sort(x))[1])
    cut, mask = thresholds(weights, (0, 0), macs), best(weights, weights, (0, 0), macs)
    assert [cut(capacity) for capacity in (1.0, 0.5, 0.25)] == [(0.0,), (3.0,), (4.0,)]
    assert [sum(int(m.sum()) for m in mask(capacity).values()) for capacity in (1.0, 0.5, 0.25)] == [5, 2, 1]
    assert sorts == ["lexsort", "argsort"]


def test_a_score_comes_before_magnitude_and_ties_are_by_magnitude_then_place() -> None:
    scores, weights = tensors([0.0, 1.0], [0.0, 2.0, 0.0]), tensors([9.0, 0.1], [9.0, 0.2, 9.0])
    found = [best(scores, weights, (0, 0), None)(k / 5) for k in range(1, 6)]
    order = [[mask["w0"].tolist() + mask["w1"].tolist()] for mask in found]
    assert [sum(one[0]) for one in order] == [1, 2, 3, 4, 5]
    assert order[0] == [[False, False, False, True, False]]
    assert order[1] == [[False, True, False, True, False]]
    assert order[2] == [[True, True, False, True, False]]
    assert order[3] == [[True, True, True, True, False]]


def test_the_best_of_groups_and_of_a_budget() -> None:
    scores = tensors([3.0, 1.0], [2.0, 4.0])
    apart = best(scores, scores, (0, 1), None)(0.5)
    assert {name: value.tolist() for name, value in apart.items()} == {"w0": [True, False], "w1": [False, True]}
    cheap = best(scores, scores, (0, 0), {"w0": 1.0, "w1": 10.0})(0.2)
    assert int(sum(value.sum() for value in cheap.values())) == 1  # the best alone exceeds it: one is kept all the same
    most = best(scores, scores, (0, 0), {"w0": 1.0, "w1": 10.0})(0.5)
    assert {name: value.tolist() for name, value in most.items()} == {"w0": [True, False], "w1": [False, True]}


def test_running_means() -> None:
    """Catches a first value that counts for a tenth, and coordinates that fade while nobody trains them."""
    scores, new = tensors([0.0, 4.0, 4.0]), tensors([2.0, 2.0, 2.0])
    covered = {"w0": torch.tensor([True, True, False])}
    assert remembered(scores, new, covered, 0.75)["w0"].tolist() == [2.0, 3.5, 4.0]


@pytest.mark.parametrize(
    ("capacity", "seconds", "next_"),
    [
        (0.2, 10.0, 0.2),
        (0.2, 8.0, 0.25),
        (0.2, 20.0, 0.1),
        (0.2, 1.0, 0.4),
        (0.2, 1000.0, 0.1),
        (0.2, float("inf"), 0.1),
        (0.2, 0.0, 0.4),
        (0.4, 1.0, 0.5),
        (0.05, 1000.0, 0.04),
    ],
)
def test_the_pace(capacity: float, seconds: float, next_: float) -> None:
    assert paced(capacity, seconds, 10.0, 0.04, 0.5) == pytest.approx(next_)
    assert paced(0.01, 1000.0, 10.0, 0.04, 0.02) == 0.02  # a declared capacity below the bound stays the most


def folded(gather: Any, *values: list[float]) -> list[float]:
    fold = Fold({"delta": gather})
    for number, value in enumerate(values):
        fold.add(ClientInfo(number), Upload({"w0": torch.tensor(value)}))
    return fold.finish({})["delta"]["w0"].tolist()


def test_means_of_squares_and_of_what_moved() -> None:
    def everything(_: ClientInfo) -> dict[str, Tensor]:
        return {"w0": torch.tensor([True, True, True])}

    values = [2.0, 0.0, 0.0], [4.0, 1.0, 0.0]
    assert folded(CoverageMean(everything), *values) == [3.0, 0.5, 0.0]
    assert folded(CoverageMean(everything, nonzero=True), *values) == [3.0, 1.0, 0.0]
    assert folded(MeanSquare(everything), *values) == [10.0, 0.5, 0.0]


def test_a_mask_of_a_budget_has_at_most_its_share_of_all_multiplications() -> None:
    """On networks: a ResNet at 1/16 by parameters has far more multiplications, and by multiplications fewer."""
    from polyfed.base.rng import Rng
    from polyfed.models.flops import multiplications

    model = build("resnet18(width=8)", input_shape=(3, 32, 32), num_classes=10)
    names, macs = masked_names(model), multiplications(model)
    params = model.init(Rng(("test", 1)))
    weights = {name: params[name] for name in names}

    def share(theta: float) -> float:
        held = above(weights, dict.fromkeys(names, torch.tensor(theta)))
        total = sum(macs.get(n, 0) * v.numel() for n, v in weights.items())
        return sum(macs.get(n, 0) * int(held[n].sum()) for n in names) / total

    assert share(top_k_threshold(weights, 1 / 16)) > 3 / 16
    assert 0.99 / 16 < share(budget_threshold(weights, macs)(1 / 16)) <= 1 / 16
