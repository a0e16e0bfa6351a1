"""Means: the true ones, whatever the order, and by masks rather than by what happened to move."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyfed.base import tree
from polyfed.blocks import aggregate
from polyfed.blocks.aggregate import by_name_mean, coverage_mean, weighted_mean


def models(seed: int, count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(3, 2, generator=generator, dtype=dtype),
            "b": torch.randn(2, generator=generator, dtype=dtype),
        }
        for _ in range(count)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 10**6), min_size=1, max_size=5))
def test_the_mean_of_equal_models_is_that_model(seed: int, weights: list[int]) -> None:
    """Catches weights that do not sum to one: bitwise in float32, whose mean is taken in float64."""
    (model,) = models(seed, 1)
    assert tree.same(weighted_mean([model] * len(weights), weights), model)


def test_the_mean_is_weighted_and_true() -> None:
    """Catches the released FedMRL's fault B1 (the last client's weights) and a plain mean."""
    many = models(0, 3, torch.float64)
    weights = [1, 10, 100]
    for name in many[0]:
        expected = sum(w * m[name] for w, m in zip(weights, many, strict=True)) / 111
        assert torch.allclose(weighted_mean(many, weights)[name], expected, rtol=1e-14, atol=1e-15)


def test_the_sum_runs_in_double_precision() -> None:
    """Catches a float32 sum, in which a thousand small contributions beside a large one are lost."""
    many = [{"w": torch.tensor([1e8])}, *({"w": torch.tensor([1.0])} for _ in range(1000))]
    exact = torch.tensor([(1e8 + 1000) / 1001], dtype=torch.float64).float()
    assert torch.equal(weighted_mean(many, [1.0] * 1001)["w"], exact)


def test_what_comes_in_is_not_written() -> None:
    """Catches an accumulator that is the first client's own tensor."""
    many = models(1, 3)
    before = [tree.map_leaves(torch.clone, m) for m in many]
    out = weighted_mean(many, [1, 2, 3])
    coverage_mean(many, [{}, {}, {}])
    assert all(tree.same(a, b) for a, b in zip(many, before, strict=True))
    single = weighted_mean(many[:1], [5])
    single["w"].add_(1)
    out["w"].add_(1)
    assert tree.same(many[0], before[0])


def test_counters_are_averaged_and_rounded() -> None:
    """Catches BatchNorm's counter that turns into a float or is cut off."""
    out = weighted_mean([{"n": torch.tensor(10)}, {"n": torch.tensor(11)}, {"n": torch.tensor(11)}], [1, 1, 1])
    assert out["n"].dtype == torch.int64
    assert int(out["n"]) == 11


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_counter_halfway_between_two_is_rounded_alike_in_every_order(order: tuple[int, ...]) -> None:
    """Catches shares of one half that a sum in another order, or fused with its product, rounds down or up."""
    counts, weights = [10, 11, 12], [1, 1, 4]  # the mean is 11.5
    models = [{"n": torch.tensor(counts[i])} for i in order]
    assert int(weighted_mean(models, [weights[i] for i in order])["n"]) == 12


def test_each_layer_is_averaged_over_those_that_own_it() -> None:
    """Catches a denominator of all clients, and layers nobody owns that vanish, move or are copied."""
    default = {"stem": torch.zeros(2), "deep": torch.zeros(2), "nobody": torch.full((2,), 7.0)}
    one = {"stem": torch.ones(2)}
    two = {"stem": torch.full((2,), 4.0), "deep": torch.full((2,), 8.0)}
    out = by_name_mean([one, two], [2, 1], default=default)
    assert out["stem"].tolist() == [2.0, 2.0]
    assert out["deep"].tolist() == [8.0, 8.0]
    assert out["nobody"] is default["nobody"]
    assert list(out) == list(default)


def test_numbers_of_models_and_weights_must_agree() -> None:
    """Catches a zip that drops the last client in silence."""
    with pytest.raises(ValueError, match="zip"):
        weighted_mean(models(0, 2), [1])
    with pytest.raises(ValueError, match="zip"):
        coverage_mean(models(0, 2), [{}])


def covered(seed: int, count: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    masks = [{"w": torch.rand(3, 2, generator=generator) < 0.5} for _ in range(count)]
    deltas = [
        {name: value * mask[name] if name in mask else value for name, value in delta.items()}
        for delta, mask in zip(models(seed, count), masks, strict=True)
    ]
    return deltas, masks


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(4)))
def test_the_coverage_mean_does_not_depend_on_the_order(seed: int, order: list[int]) -> None:
    """Catches a mean that forgets or favours a client by its place."""
    deltas, masks = covered(seed, 4)
    straight = coverage_mean(deltas, masks)
    shuffled = coverage_mean([deltas[i] for i in order], [masks[i] for i in order])
    for name, value in straight.items():
        assert torch.allclose(value, shuffled[name], rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_coverage_mean_is_a_mean_over_holders(seed: int) -> None:
    """Catches another denominator; computed here coordinate by coordinate in plain Python."""
    deltas, masks = covered(seed, 3)
    out = coverage_mean(deltas, masks)
    for i in range(3):
        for j in range(2):
            holders = [float(d["w"][i, j]) for d, m in zip(deltas, masks, strict=True) if m["w"][i, j]]
            expected = sum(holders) / len(holders) if holders else 0.0
            assert float(out["w"][i, j]) == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(out["b"], torch.stack([d["b"] for d in deltas]).mean(0), rtol=1e-6, atol=1e-6)


def test_a_covered_weight_that_did_not_move_counts() -> None:
    """Catches the released FIARSE's count of non-zero deltas."""
    deltas = [{"w": torch.tensor([4.0, 0.0])}, {"w": torch.tensor([0.0, 0.0])}]
    held = [{"w": torch.tensor([True, False])}, {"w": torch.tensor([True, False])}]
    assert coverage_mean(deltas, held)["w"].tolist() == [2.0, 0.0]


def test_a_mean_of_nothing_or_of_different_models_is_refused() -> None:
    """Catches FedAvg replacing its model by nothing."""
    one = {"a": torch.ones(1)}
    for models in ([], [one, {"b": torch.ones(1)}]):
        with pytest.raises(ValueError, match="expected at least one, all with the same names"):
            aggregate.weighted_mean(models, [1.0] * len(models))
    assert tree.same(aggregate.weighted_mean([one, one], [1, 3]), one)
