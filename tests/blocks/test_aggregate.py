"""Sums: the true means, whatever the order, by masks rather than by what happened to move, and as small as they say."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import Upload, gathered, uploads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.blocks.aggregate import CoverageMean, Mean, MeanByName, by_name_mean
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Gather
from polyfed.testing.compare import digest

SEEDS, WEIGHTS = st.integers(0, 10**6), st.lists(st.integers(1, 10**6), min_size=1, max_size=5)
PROPERTY = settings(max_examples=30, deadline=None)


def models(seed: int, count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(3, 2, generator=generator, dtype=dtype),
            "b": torch.randn(2, generator=generator, dtype=dtype),
        }
        for _ in range(count)
    ]


def weighted_mean(many: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> Any:
    return gathered(Mean("n"), many, weights)


# --------------------------------------------------------------------------------------------------------------- Mean


@PROPERTY
@given(SEEDS, WEIGHTS)
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


@PROPERTY
@given(SEEDS, WEIGHTS)
def test_the_mean_is_its_formula(seed: int, weights: list[int]) -> None:
    """Catches a weight of another client, and a mean of equal weights that has any."""
    many = models(seed, len(weights), torch.float64)
    for name in many[0]:
        expected = sum(w * m[name] for w, m in zip(weights, many, strict=True)) / sum(weights)
        assert torch.allclose(weighted_mean(many, weights)[name], expected, rtol=1e-12, atol=1e-13)
        alike = torch.stack([m[name] for m in many]).mean(0)
        assert torch.allclose(gathered(Mean(), many, weights)[name], alike, rtol=1e-12, atol=1e-13)


def test_the_sum_runs_in_double_precision() -> None:
    """Catches a float32 sum, in which a thousand small contributions beside a large one are lost."""
    many = [{"w": torch.tensor([1e8])}, *({"w": torch.tensor([1.0])} for _ in range(1000))]
    exact = torch.tensor([(1e8 + 1000) / 1001], dtype=torch.float64).float()
    assert torch.equal(weighted_mean(many, [1.0] * 1001)["w"], exact)


def test_what_is_averaged_may_be_made_of_the_field() -> None:
    """Catches ``of`` that is ignored."""
    many = models(3, 2, torch.float64)
    out = gathered(Mean("n", of=lambda model: {"sum": model["w"].sum(0)}), many, [1, 3])
    assert list(out) == ["sum"]
    assert torch.allclose(out["sum"], (many[0]["w"] + 3 * many[1]["w"]).sum(0) / 4, rtol=1e-14)


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


def test_a_mean_of_nothing_or_of_different_models_is_refused() -> None:
    """Catches FedAvg replacing its model by nothing, and a mean over some of the clients."""
    one = {"a": torch.ones(1)}
    with pytest.raises(ValueError, match="a mean of no uploads; expected at least one"):
        weighted_mean([], [])
    for other in ({"b": torch.ones(1)}, {}, {"a": torch.ones(1), "b": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"client 1 sent other names than the clients before it; expected \['a'\]"):
            weighted_mean([one, other], [1.0, 1.0])
    assert tree.same(weighted_mean([one, one], [1, 3]), one)


@pytest.mark.parametrize("gather", [Mean("n"), MeanByName("n")])
def test_weights_that_add_up_to_nothing_are_refused(gather: Gather) -> None:
    """Catches a model of NaN where no client has an example."""
    with pytest.raises(ValueError, match="the weights of 'w' add up to 0"):
        gathered(gather, [{"w": torch.ones(2)}] * 2, [0, 0])


# --------------------------------------------------------------------------------------------------------- MeanByName


def test_each_layer_is_averaged_over_those_that_own_it() -> None:
    """Catches a denominator of all clients, and layers nobody owns that vanish, move or are copied."""
    default = {"stem": torch.zeros(2), "deep": torch.zeros(2), "nobody": torch.full((2,), 7.0)}
    one = {"stem": torch.ones(2)}
    two = {"stem": torch.full((2,), 4.0), "deep": torch.full((2,), 8.0)}
    for out in (
        by_name_mean([one, two], [2, 1], default=default),
        gathered(MeanByName("n", default), [one, two], [2, 1]),
    ):
        assert out["stem"].tolist() == [2.0, 2.0]
        assert out["deep"].tolist() == [8.0, 8.0]
        assert out["nobody"] is default["nobody"]
        assert list(out) == list(default)


@PROPERTY
@given(SEEDS, st.lists(st.tuples(st.integers(1, 1000), st.sets(st.sampled_from("wb"))), min_size=1, max_size=5))
def test_the_mean_by_name_is_its_formula(seed: int, clients: list[tuple[int, set[str]]]) -> None:
    """Catches owners that are taken from another name."""
    many = models(seed, len(clients) + 1, torch.float64)
    default = many.pop()
    sent = [tree.pick(model, names) for model, (_, names) in zip(many, clients, strict=True)]
    out = gathered(MeanByName("n", default), sent, [weight for weight, _ in clients])
    for name, own in default.items():
        owners = [(n, model[name]) for (n, names), model in zip(clients, many, strict=True) if name in names]
        expected = sum(n * value for n, value in owners) / sum(n for n, _ in owners) if owners else own
        assert torch.allclose(out[name], expected, rtol=1e-12, atol=1e-13)


def test_numbers_of_models_and_weights_must_agree() -> None:
    """Catches a zip that drops the last client in silence."""
    with pytest.raises(ValueError, match="zip"):
        by_name_mean(models(0, 2), [1], default={})


# -------------------------------------------------------------------------------------- CoverageMean, leading blocks


def full(seed: int = 0) -> dict[str, Tensor]:
    (model,) = models(seed, 1, torch.float64)
    return model


@PROPERTY
@given(SEEDS, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=4))
def test_the_nested_mean_is_a_mean_over_holders(seed: int, clients: list[tuple[int, int, int]]) -> None:
    """Catches another denominator or block; computed here coordinate by coordinate in plain Python."""
    default, sent = full(seed), []
    for model, (_, rows, columns) in zip(models(seed + 1, len(clients), torch.float64), clients, strict=True):
        sent.append({"w": model["w"][:rows, :columns]})
    out = gathered(CoverageMean(None, "n", default), sent, [weight for weight, _, _ in clients])
    assert torch.equal(out["b"], default["b"])
    for i in range(3):
        for j in range(2):
            holders = [(n, float(m["w"][i, j])) for m, (n, r, c) in zip(sent, clients, strict=True) if i < r and j < c]
            expected = sum(n * v for n, v in holders) / sum(n for n, _ in holders) if holders else default["w"][i, j]
            assert float(out["w"][i, j]) == pytest.approx(float(expected), rel=1e-12, abs=1e-13)


# ----------------------------------------------------------------------------------------------- CoverageMean, masks


def covered(seed: int, count: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Changes at full shape, zero outside their masks; and the masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = [{"w": torch.rand(3, 2, generator=generator) < 0.5} for _ in range(count)]
    deltas = [
        {name: value * mask[name] if name in mask else value for name, value in delta.items()}
        for delta, mask in zip(models(seed, count), masks, strict=True)
    ]
    return deltas, masks


def kept(delta: dict[str, Tensor], mask: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is sent of a change."""
    return {name: value[mask[name]] if name in mask else value for name, value in delta.items()}


def coverage_mean(deltas: Sequence[dict[str, Tensor]], masks: Sequence[dict[str, Tensor]]) -> Any:
    sent = [kept(delta, mask) for delta, mask in zip(deltas, masks, strict=True)]
    return gathered(CoverageMean(lambda client: masks[client.id]), sent)


@PROPERTY
@given(SEEDS, st.permutations(range(4)))
def test_the_coverage_mean_does_not_depend_on_the_order(seed: int, order: list[int]) -> None:
    """Catches a mean that forgets or favours a client by its place."""
    deltas, masks = covered(seed, 4)
    straight = coverage_mean(deltas, masks)
    shuffled = coverage_mean([deltas[i] for i in order], [masks[i] for i in order])
    for name, value in straight.items():
        assert torch.allclose(value, shuffled[name], rtol=1e-6, atol=0)


@PROPERTY
@given(SEEDS)
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


def test_a_mean_change_of_a_counter_need_not_be_whole() -> None:
    """Catches a change of one half that is rounded before it is added."""
    out = coverage_mean([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}], [{}, {}])
    assert (out["n"].dtype, float(out["n"])) == (torch.float64, 1.5)


# ----------------------------------------------------------------------------------------------------------- all sums

MASK = {"w": torch.tensor([[True, False], [True, True], [False, False]])}
#: Each sum, with the shape of ``w`` that a client sends.
SUMS: dict[str, tuple[Gather, tuple[int, ...]]] = {
    "mean": (Mean("n"), (3, 2)),
    "by name": (MeanByName("n"), (3, 2)),
    "nested": (CoverageMean(None, "n", full()), (2, 1)),
    "coverage": (CoverageMean(lambda client: MASK), (3,)),
}
BY_NAME = pytest.mark.parametrize("name", SUMS)


def sent(name: str, count: int, seed: int = 5) -> list[dict[str, Tensor]]:
    shape = SUMS[name][1] if name in SUMS else (3, 2)
    generator = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(shape, generator=generator)} for _ in range(count)]


@BY_NAME
def test_what_comes_in_is_not_written(name: str) -> None:
    """Catches an accumulator that is the first client's own tensor, and a result that is a client's."""
    for count in (1, 3):
        many = sent(name, count)
        before = digest(uploads(many)[0]), [tree.map_leaves(torch.clone, m) for m in many]
        out = gathered(SUMS[name][0], many, [1, 2, 3][:count])
        assert all(tree.same(a, b) for a, b in zip(many, before[1], strict=True))
        out["w"].add_(1)
        assert digest(uploads(many)[0]) == before[0]


@BY_NAME
def test_what_comes_out_is_not_the_default(name: str) -> None:
    """Catches a total that is written into what clients were sent."""
    default = full()
    gather = CoverageMean(None, "n", default) if name == "nested" else MeanByName("n", default)
    before = tree.map_leaves(torch.clone, default)
    gathered(gather, [{"w": default["w"][:2]} if name == "nested" else {"w": default["w"]}] * 2, [1, 2])["w"].zero_()
    assert tree.same(default, before)


@BY_NAME
def test_clients_may_change_places(name: str) -> None:
    """Catches weights that are taken from a neighbour, and a first or last client that counts for more."""
    many, weights = sent(name, 4), [1, 7, 2, 30]
    straight = gathered(SUMS[name][0], many, weights)
    for order in permutations(range(4)):
        other = gathered(SUMS[name][0], [many[i] for i in order], [weights[i] for i in order])
        assert torch.allclose(straight["w"], other["w"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "other", "error", "message"),
    [
        ("mean", {"w": torch.zeros(2, 3)}, ModelError, r"'w' came with the shapes \[\(2, 3\), \(3, 2\)\]"),
        ("mean", {"v": torch.zeros(3, 2)}, ValueError, "client 1 sent other names"),
        ("by name", {"w": torch.zeros(3)}, ModelError, r"'w' came with the shapes \[\(3,\), \(3, 2\)\]"),
        ("by name", {"w": torch.zeros(3, 1)}, ModelError, r"shapes \[\(3, 1\), \(3, 2\)\]"),
        (
            "nested",
            {"w": torch.zeros(4, 2)},
            MessageError,
            r"'w' came with shape \(4, 2\); .* block of \(3, 2\)",
        ),
        ("nested", {"w": torch.zeros(3)}, MessageError, r"'w' came with shape \(3,\)"),
        ("nested", {"v": torch.zeros(3)}, MessageError, r"'v' came with shape \(3,\)"),
        (
            "coverage",
            {"w": torch.zeros(4)},
            MessageError,
            r"'w' came with shape \(4,\); expected \(3,\), .* of \(3, 2\)",
        ),
        (
            "coverage",
            {"w": torch.zeros(3, 2)},
            MessageError,
            r"'w' came with shape \(6,\); expected \(3,\), .* of \(3, 2\)",
        ),
        ("whole", {"w": torch.zeros(())}, MessageError, r"'w' came with shape \(\); expected \(3, 2\)"),
        ("whole", {"w": torch.zeros(3)}, MessageError, r"'w' came with shape \(3,\)"),
    ],
)
def test_other_names_and_shapes_are_refused(
    name: str, other: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    """Catches shapes that broadcast, and a tensor that is left out of the mean in silence."""
    with pytest.raises(error, match=message):
        gathered(CoverageMean(lambda client: {}) if name == "whole" else SUMS[name][0], [*sent(name, 1), other])


class Sizes(TorchDispatchMode):
    """The most numbers that a tensor made meanwhile has; totals that are written in place are not made."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, made.untyped_storage().nbytes() // made.element_size())
        return out


@contextmanager
def nothing_larger_than(numbers: int, *known: Tensor) -> Iterator[None]:
    with Sizes(known) as sizes:
        yield
    assert 0 < sizes.most <= numbers


def test_a_nested_upload_is_never_made_dense() -> None:
    """Catches blocks that are padded to the full shape, one full model for every client."""
    gather = CoverageMean(None, "n", {"w": torch.zeros(300, 200)})
    total = gather.add(gather.init(), ClientInfo(0), {"w": torch.ones(4, 3)}, Upload({}, 1))
    with nothing_larger_than(12, *total["w"][:2]):
        gather.add(total, ClientInfo(1), {"w": torch.ones(4, 3)}, Upload({}, 1))


def test_a_masked_upload_is_never_made_dense() -> None:
    """Catches values that are put back into their places at full shape, for every client."""
    mask = {"w": torch.zeros(300, 200, dtype=torch.bool)}
    mask["w"][0, :12] = True
    gather = CoverageMean(lambda client: mask)
    total = gather.add(gather.init(), ClientInfo(0), {"w": torch.ones(12)}, Upload({}, 1))
    with nothing_larger_than(12, mask["w"], *total["w"][:2]):
        gather.add(total, ClientInfo(1), {"w": torch.ones(12)}, Upload({}, 1))
