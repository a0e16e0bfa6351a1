"""Low-rank updates and nested blocks: the ranks, the numbers that travel, and what comes out of them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sums import gathered
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.aggregate import CoverageMean, Mean
from polyfed.blocks.lowrank import LowRank, canonical, rank
from polyfed.blocks.submodel import leading, put, take
from polyfed.core.message import Message, size


class Sent(Message):
    update: LowRank


def draw(*shape: int, seed: int = 0, rank: int = 0) -> Tensor:
    generator = Rng((seed, *shape)).torch()
    if not rank:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    left, right = draw(shape[0], rank, seed=seed + 1), draw(rank, int(torch.tensor(shape[1:]).prod()), seed=seed + 2)
    return (left @ right).reshape(shape)


def restored(value: Tensor, energy: float, of: Any = LowRank.of) -> Tensor:
    return of({"w": value}, energy).full({"w": value})["w"]


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 0.9, 0.95, 1.0]), st.integers(0, 99))
def test_the_energy_is_held_with_as_few_values_as_can_be(m: int, n: int, energy: float, seed: int) -> None:
    value = draw(m, n, seed=seed)
    sigma = torch.linalg.svdvals(value)
    r = rank(sigma, energy)
    assert 1 <= r <= len(sigma)
    assert float((sigma[:r] ** 2).sum()) >= energy * float((sigma**2).sum()) * (1 - 1e-12)
    assert r == 1 or float((sigma[: r - 1] ** 2).sum()) < energy * float((sigma**2).sum())
    error = float((restored(value, energy) - value).norm() / value.norm())
    assert error <= (1 - energy) ** 0.5 + 1e-7
    assert size(Sent(LowRank.of({"w": value}, energy))).values <= 8 * m * n, "larger than dense"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.integers(0, 63))
def test_signs_do_not_depend_on_who_decomposed(m: int, n: int, seed: int, flips: int) -> None:
    """Bitwise the same factors from (u, v) and (-u, -v), and the same product. Catches signs left as they come."""
    u, sigma, v = torch.linalg.svd(draw(m, n, seed=seed), full_matrices=False)
    flip = torch.tensor([-1.0 if flips >> k & 1 else 1.0 for k in range(len(sigma))], dtype=torch.float64)
    ours, theirs = canonical(u, sigma, v), canonical(u * flip, sigma, v * flip[:, None])
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal((ours[0] * sigma) @ ours[1], (u * sigma) @ v)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=2, max_size=5), st.integers(0, 99))
def test_signs_do_not_turn_with_rounding_where_entries_tie(rows: list[list[int]], seed: int) -> None:
    """Small whole numbers make entries of one magnitude and opposite signs. Catches signs by the largest entry."""
    value = torch.tensor(rows, dtype=torch.float64)
    noise = 1 + 1e-14 * draw(*value.shape, seed=seed)
    factors = [torch.linalg.svd(x, full_matrices=False) for x in (value, value * noise)]
    sigma = factors[0][1]
    ends = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    # Neither zero nor, nearly, the next one: there the vectors themselves turn with rounding.
    apart = (ends[:-1] - ends[1:] > 1e-2) & (torch.cat([ends[:1] + 1, ends[:-2]]) - ends[:-1] > 1e-2)
    (u, v), (other_u, other_v) = (canonical(*found) for found in factors)
    assert torch.allclose(u[:, apart], other_u[:, apart], atol=1e-9)
    assert torch.allclose(v[apart], other_v[apart], atol=1e-9)


def test_factors_travel_with_canonical_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches factors that are sent as the decomposition gave them."""
    value, decompose = {"w": draw(16, 30, rank=2)}, torch.linalg.svd
    here = LowRank.of(value, 0.9999)
    monkeypatch.setattr(
        torch.linalg, "svd", lambda x, **options: (lambda u, s, v: (-u, s, -v))(*decompose(x, **options))
    )
    there = LowRank.of(value, 0.9999)
    assert torch.equal(here.u["w"], there.u["w"])
    assert torch.equal(here.v["w"], there.v["w"])


def test_a_singular_value_of_zero_has_no_vectors() -> None:
    """Catches the vectors of nothing, which are whatever the decomposition began with."""
    nothing = LowRank.of({"w": torch.zeros(20, 30)}, 0.95)
    assert not nothing.u["w"].any()
    assert not nothing.v["w"].any()


def check_full_spectrum(of: Any) -> None:
    """A matrix whose every singular value is needed comes out as it went in."""
    value = torch.eye(40, 4, dtype=torch.float64)
    assert torch.allclose(restored(value, 0.98, of), value)


def check_convolution(of: Any) -> None:
    """A convolution of rank 2 as (out, in * k * k) takes 2 (m + n + 1) numbers."""
    value = draw(16, 8, 5, 5, rank=2)
    assert size(Sent(of({"w": value}, 0.999999))).values == 8 * 2 * (16 + 200 + 1)


def released_rank(params: Any, energy: float) -> LowRank:
    """The released search: range(len(sigma)), strictly greater, else nothing is left of the matrix."""
    (value,) = params.values()
    u, s, v = torch.linalg.svd(value, full_matrices=False)
    r = next((r for r in range(len(s)) if (s[:r] ** 2).sum() > energy * (s**2).sum()), 0)
    return LowRank({}, {"w": u[:, :r]}, {"w": s[:r]}, {"w": v[:r]})


def per_kernel(params: Any, energy: float) -> LowRank:
    """The released decomposition of the last two axes: each 5x5 kernel by itself."""
    (value,) = params.values()
    u, s, v = torch.linalg.svd(value, full_matrices=False)
    return LowRank({}, {"w": u[..., :4]}, {"w": s[..., :4]}, {"w": v[..., :4, :]})


def test_a_full_spectrum_is_not_wiped_out() -> None:
    """Catches the released rank search, which sends such a matrix empty and restores it as zeros."""
    check_full_spectrum(LowRank.of)
    with pytest.raises(AssertionError):
        check_full_spectrum(released_rank)


def test_convolutions_are_reshaped_first() -> None:
    """Catches the released decomposition per kernel, which sends more than the tensor has."""
    check_convolution(LowRank.of)
    assert torch.allclose(restored(draw(16, 8, 5, 5, rank=2), 0.999999), draw(16, 8, 5, 5, rank=2))
    with pytest.raises(AssertionError):
        check_convolution(per_kernel)


def test_vectors_counters_and_nothing_at_all() -> None:
    params = {"bias": draw(5), "count": torch.tensor(3), "w": torch.zeros(20, 30, dtype=torch.float64)}
    sent = LowRank.of(params, 0.95)
    assert set(sent.whole) == {"bias", "count"}
    assert sent.sigma["w"].shape == (1,)  # a rank of at least one, of nothing too
    assert tree.same(sent.full(params), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": {}}, "expected"),
        ({"whole": {"w": torch.zeros(3, 3, dtype=torch.float64)}}, r"shape \(3, 3\); expected \(20, 30\)"),
        ({"sigma": {"w": torch.zeros(2)}}, r"factors of 'w'"),
        ({"u": {"w": torch.zeros(19, 1)}}, r"shape \(19, 30\); expected \(20, 30\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    value = {"w": draw(20, 30, rank=1).float()}
    sent = LowRank.of(value, 0.9)
    fields = {"whole": sent.whole, "u": sent.u, "sigma": sent.sigma, "v": sent.v}
    with pytest.raises(MessageError, match=message):
        LowRank(**{**fields, **change}).full(value)


# ------------------------------------------------------------------------------------------------------- nested blocks


def test_leading_blocks_are_put_back() -> None:
    params = {"w": draw(4, 3), "b": draw(4)}
    part = leading({"w": (2, 3), "b": (2,)})
    block = take(params, part)
    assert torch.equal(block["w"], params["w"][:2])
    block["b"] += 1  # a tensor of its own
    assert not torch.equal(block["b"], params["b"][:2])
    back = put({"w": block["w"]}, part, tree.shapes(params))["w"]
    assert torch.equal(back[:2], params["w"][:2])
    assert not back[2:].any()
    with pytest.raises(ModelError, match=r"'w' has shape \(4, 3\), in which there are no places up to \(5, 3\)"):
        take(params, leading({"w": (5, 3)}))
    for wrong in ({"w": draw(4, 4)}, {"w": draw(4)}, {"c": draw(4)}):
        with pytest.raises(MessageError, match="came with shape"):
            put(wrong, part, tree.shapes(params))
    assert tree.same(put(block, None, params), put(block, part, params))
    with pytest.raises(MessageError, match=r"'w' came with shape \(5, 3\); expected a block of \(4, 3\)"):
        put({"w": draw(5, 3)}, None, tree.shapes(params))


def test_each_coordinate_is_averaged_over_who_holds_it() -> None:
    """Catches zeros averaged in, counts instead of weights, and coordinates of nobody's that move."""
    default = {"w": draw(4, 2), "n": torch.tensor(7)}
    models = [{"w": draw(k, 2, seed=k), "n": torch.tensor(k)} for k in (1, 3)]
    mean = gathered(CoverageMean(None, "n", default), models, [1, 3])
    expected = default["w"].clone()
    expected[0] = (models[0]["w"][0] + 3 * models[1]["w"][0]) / 4
    expected[1:3] = models[1]["w"][1:3]
    assert torch.allclose(mean["w"], expected, rtol=1e-15)
    assert torch.equal(mean["w"][3], default["w"][3])
    assert int(mean["n"]) == round((1 + 9) / 4)
    zeros = gathered(Mean("n", of=lambda m: put(m, None, tree.shapes(default))), models, [1, 3])
    assert not torch.allclose(zeros["w"], expected)
    whole = [{"w": draw(4, 2, seed=k)} for k in (1, 2)]
    nested = gathered(CoverageMean(None, "n", default), whole, [2, 5])
    assert torch.allclose(nested["w"], gathered(Mean("n"), whole, [2, 5])["w"])
    assert int(nested["n"]) == int(default["n"]) == 7
