"""Masks and their sparse form: nothing kept is lost, nothing dropped comes back, positions cost what they must."""

import math
from collections.abc import Mapping
from fractions import Fraction

import gaps_by_hand
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyfed.base import positions, tree
from polyfed.base.errors import MessageError
from polyfed.blocks.submodel import Sparse, above, bias_factor, gates, put, take, top_k_threshold
from polyfed.blocks.weightwise import masked_names
from polyfed.core.message import Message, decode, encode, size
from polyfed.models.zoo import build


class Carrier(Message):
    submodel: Sparse


@st.composite
def masked_params(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Some tensors, most of them with a mask; all, none or some of each kept."""
    count = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    params, mask = {}, {}
    for i in range(count):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        params[f"p{i}"] = torch.randn(shape, generator=generator)
        if draw(st.booleans()):
            density = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
            mask[f"p{i}"] = torch.rand(shape, generator=generator) < density
    return params, mask


@settings(max_examples=60, deadline=None)
@given(masked_params())
def test_what_is_spread_is_what_was_kept(case: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Catches values in wrong places, lost or doubled: put(take(p)) = p * mask."""
    params, mask = case
    expected = {name: value * mask[name] if name in mask else value for name, value in params.items()}
    assert tree.same(put(take(params, mask), mask, tree.shapes(params)), expected)


@settings(max_examples=60, deadline=None)
@given(masked_params())
def test_a_submodel_survives_the_wire(case: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Catches a mask or a shape that does not come back, with 0-dim, empty and unmasked tensors among them."""
    params, mask = case
    sent = Sparse.take(params, mask)
    got = decode(encode(Carrier(sent)), Carrier).submodel  # type: ignore[attr-defined]
    shapes = {name: value.shape for name, value in params.items()}
    assert tree.same(got.mask(shapes), {name: mask[name] for name in params if name in mask})
    assert tree.same(got.dense(shapes), put(take(params, mask), mask, shapes))


@pytest.mark.parametrize("kept_", [0, 1, 31, 32, 33, 512, 1023, 1024])
def test_positions_take_at_most_the_shorter_form(kept_: int) -> None:
    """Catches positions that are longer than a bitmap or a list of int32, and some where all or nothing is kept."""
    d = 1024
    mask = torch.zeros(d, dtype=torch.bool)
    mask[torch.randperm(d, generator=torch.Generator().manual_seed(0))[:kept_]] = True
    sparse = Sparse.take({"w": torch.ones(d)}, {"w": mask})
    told = size(Carrier(sparse))
    assert told.values == 4 * kept_
    assert told.indices == len(gaps_by_hand.code(mask.tolist()))
    assert told.indices <= (1 + min(4 * kept_, math.ceil(d / 8)) if 0 < kept_ < d else 0)
    assert torch.equal(sparse.mask({"w": (d,)})["w"], mask)


def test_each_tensor_has_positions_of_its_own() -> None:
    """Catches one code for tensors of unlike density, and bits that are read from the padding of the last byte."""
    params = {"b": torch.ones(2, 4), "a": torch.ones(5), "c": torch.ones(3)}
    mask = {"b": torch.arange(8).reshape(2, 4) != 7, "a": torch.arange(5) == 3, "c": torch.zeros(3, dtype=torch.bool)}
    sparse = Sparse.take(params, mask)
    by_hand = [gaps_by_hand.code(mask[name].flatten().tolist()) for name in ("b", "a", "c")]
    assert [bytes(where.tolist()) for where in sparse.positions] == by_hand
    assert sparse.names(tree.shapes(params)) == ("b", "a", "c")  # the order of the model, not that of the names
    assert tree.same(sparse.mask(tree.shapes(params)), mask)


def test_a_whole_model_travels_without_positions() -> None:
    """Catches positions that a full-size client pays for, and none that are read as nothing kept."""
    params = {"a": torch.randn(5), "b": torch.randn(2, 4)}
    whole = Sparse.take(params, {name: torch.ones_like(value, dtype=torch.bool) for name, value in params.items()})
    assert [where.numel() for where in whole.positions] == [0, 0]
    assert all(torch.equal(value, params[name]) for name, value in whole.dense({"a": (5,), "b": (2, 4)}).items())


def test_a_message_takes_at_most_a_hundredth_more_than_it_must() -> None:
    """Catches positions, names and shapes that a submodel of the paper's network could do without.

    The floor is the values and, for each tensor of n weights of which a share p is kept, n H(p) bits.
    """
    model = build("resnet18", input_shape=(3, 32, 32), num_classes=10)
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in model.shapes.items()}
    params = {name: value / math.sqrt(math.prod(value.shape[1:])) for name, value in params.items()}  # unlike densities
    weights = {name: params[name] for name in masked_names(model)}
    for capacity in (1 / 64, 1 / 16, 1 / 4):
        theta = top_k_threshold(weights, capacity)
        mask = {name: value.abs() >= theta for name, value in weights.items()}
        message = Carrier(Sparse.take(params, mask))
        told, data = size(message), encode(message)
        shares = [(held.numel(), float(held.double().mean())) for held in mask.values()]
        floor = told.values - sum(n * p * math.log2(p) / 8 for n, k in shares for p in (k, 1 - k) if p)
        assert told.values == 4 * sum(mask.get(n, value.new_ones(value.shape)).sum() for n, value in params.items())
        assert floor < told.total < 1.01 * floor
        assert told.total == len(data)
        got = decode(data, Carrier).submodel.dense(model.shapes)  # type: ignore[attr-defined]
        assert tree.same(got, {n: value * mask[n] if n in mask else value for n, value in params.items()})


KEPT = torch.tensor([0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
CODE = torch.from_numpy(positions.code(KEPT.numpy()))
SAME = Sparse.take({"w": torch.ones(4, 4)}, {"w": KEPT.reshape(4, 4)}).network


def sparse(where: Tensor, values: int = 2, network: str = SAME) -> Sparse:
    return Sparse(network, (torch.ones(values),), (where,), (0,))


@pytest.mark.parametrize(
    "damaged",
    [
        sparse(torch.tensor([4, 0, 15, 192], dtype=torch.uint8)),
        sparse(torch.tensor([0, 16, 0, 8], dtype=torch.uint8)),
        sparse(CODE[:-1]),
        sparse(torch.cat([CODE, CODE[-1:]])),
        sparse(CODE, values=1),
        sparse(CODE, values=3),
        sparse(torch.zeros(0, dtype=torch.uint8)),
        sparse(CODE.reshape(1, -1)),
        sparse(CODE.float()),
        sparse(CODE.int()),
    ],
    ids=[
        *("k too large", "beyond the end", "a byte too few", "a byte too many", "too few values", "too many values"),
        *("none", "of two dimensions", "of floats", "of integers"),
    ],
)
def test_damaged_positions_are_a_message_error(damaged: Sparse) -> None:
    """Catches an IndexError, or values that silently land elsewhere, from what a stranger sent."""
    with pytest.raises(MessageError, match=r"'w'.* came"):
        damaged.dense({"w": (4, 4)})


@pytest.mark.parametrize(
    "foreign",
    [
        sparse(CODE, network=Sparse.take({"w": torch.ones(16)}, {}).network),
        sparse(CODE, network=Sparse.take({"w": torch.ones(2, 8)}, {}).network),
        sparse(CODE, network=Sparse.take({"v": torch.ones(4, 4)}, {}).network),
        sparse(CODE, network=Sparse.take({"w": torch.ones(4, 4), "v": torch.ones(2)}, {}).network),
        Sparse(SAME, (torch.ones(2),), (CODE, CODE), (0, 0)),
        Sparse(SAME, (torch.ones(2),), (), (0,)),
        Sparse(SAME, (torch.ones(2),), (CODE,), ()),
        Sparse(SAME, (torch.ones(2),), (CODE,), (1,)),
        Sparse(SAME, (torch.ones(2),), (CODE,), (-1,)),
        Sparse(SAME, (torch.ones(2), torch.ones(2)), (CODE,), (0,)),
        Sparse(SAME, (torch.ones(2),), (), ()),  # held whole, of another shape
    ],
)
def test_a_submodel_of_another_network_is_a_message_error_before_anything_is_made(foreign: Sparse) -> None:
    """Catches a mask as large as a stranger says, and zips and splits that fall over its lists."""
    with pytest.raises(MessageError, match="came"):
        foreign.dense({"w": (4, 4)})


SHAPES = {"w": (3, 2), "v": (4,), "b": (2,)}
numbers = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 4), max_size=2),
    st.sampled_from([torch.float32, torch.uint8, torch.int32, torch.int64, torch.bool]),
    st.integers(0, 12),
)
codes = st.binary(max_size=4).map(lambda data: torch.tensor([*data], dtype=torch.uint8))
forged = st.builds(
    Sparse,
    network=st.just(Sparse.take({n: torch.ones(s) for n, s in SHAPES.items()}, {}).network) | st.text(max_size=3),
    values=st.tuples(*(st.just(torch.zeros(SHAPES[name])) | numbers for name in sorted(SHAPES)))
    | st.lists(numbers, max_size=4).map(tuple),
    positions=st.lists(codes | numbers, max_size=3).map(tuple),
    masked=st.lists(st.integers(-1, 3) | st.just(2**62), max_size=3).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(forged)
def test_forged_submodels_are_the_networks_or_a_message_error(sent: Sparse) -> None:
    """Catches any other exception, and tensors of other shapes than the network's."""
    got = decode(encode(Carrier(sent)), Carrier).submodel  # type: ignore[attr-defined]
    try:
        dense = got.dense(SHAPES)
    except MessageError:
        return
    assert {name: tuple(value.shape) for name, value in dense.items()} == SHAPES


def test_values_that_do_not_fit_their_mask_are_a_message_error() -> None:
    """Catches a client that uploads another number of values than its mask holds."""
    mask = {"w": torch.tensor([True, False, True])}
    for count in (1, 3):
        with pytest.raises(MessageError, match=rf"'w' came with shape \({count},\); expected \(2,\)"):
            put({"w": torch.ones(count)}, mask, {"w": (3,)})
    with pytest.raises(MessageError, match=r"'w' came with shape \(2, 1\); expected \(2,\)"):
        put({"w": torch.ones(2, 1)}, mask, {"w": (3,)})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0.02, 1.0), st.integers(0, 10**6))
def test_the_threshold_is_the_kth_largest_magnitude(d: int, capacity: float, seed: int) -> None:
    """Catches an off-by-one in k, a threshold per tensor, signs, and too few kept."""
    generator = torch.Generator().manual_seed(seed)
    params = {"a": torch.randn(d, generator=generator), "b": torch.randn(2, 3, generator=generator)}
    k = max(1, math.floor(Fraction(str(capacity)) * (d + 6)))  # the released code fails where nothing would be left
    everything = torch.cat([params["a"], params["b"].reshape(-1)]).abs().sort(descending=True).values
    theta = top_k_threshold(params, capacity)
    assert theta == (0.0 if capacity == 1.0 else float(everything[k - 1]))
    mask = above(params, gates(params, ("a", "b"), (theta, theta)))
    assert sum(int(m.sum()) for m in mask.values()) == (d + 6 if capacity == 1.0 else k)


@pytest.mark.parametrize(("capacity", "k"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.285, 28)])
def test_a_share_is_not_one_weight_short_by_rounding(capacity: float, k: int) -> None:
    """Catches floor(0.29 * 100) = 28: 0.29 * 100 is 28.999... in floating point."""
    assert top_k_threshold({"w": torch.arange(1.0, 101.0)}, capacity) == 101 - k


def test_zeros_of_any_type_are_below_the_least_threshold() -> None:
    """Catches a least threshold of the first tensor's type, which another's rounds to 0: every zero of it is kept."""
    for fine, coarse in ((torch.float32, torch.float16), (torch.float64, torch.float32)):
        params = {"a": torch.zeros(3, dtype=fine), "b": torch.zeros(3, dtype=coarse)}
        theta = top_k_threshold(params, 0.5)
        assert not any(mask.any() for mask in above(params, gates(params, ("a", "b"), (theta, theta))).values())


def test_ties_at_the_threshold_are_all_kept() -> None:
    """Catches a strict comparison, which would drop the k-th weight itself."""
    params = {"w": torch.tensor([1.0, -2.0, 2.0, 0.5, 2.0])}
    theta = top_k_threshold(params, 0.2)
    assert theta == 2.0
    assert above(params, gates(params, ("w",), (theta,)))["w"].tolist() == [False, True, True, False, True]


def test_full_capacity_keeps_everything_zeros_too() -> None:
    """Catches the released code's min|x| at capacity 1, and zeros (fresh biases) that are thrown out."""
    params = {"w": torch.tensor([0.0, -1.0, 3.0])}
    assert top_k_threshold(params, 1.0) == 0.0
    assert bool(above(params, gates(params, ("w",), (0.0,)))["w"].all())


@pytest.mark.parametrize("capacity", [0.0, -0.1, 1.0001, float("nan")])
def test_a_capacity_that_is_no_fraction_is_refused(capacity: float) -> None:
    """Catches a silent empty or full submodel."""
    with pytest.raises(ValueError, match="expected a fraction"):
        top_k_threshold({"w": torch.ones(4)}, capacity)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_smaller_submodels_lie_in_larger_ones(seed: int, one: float, other: float) -> None:
    """Catches sizes that disagree about which weights matter."""
    low, high = sorted((one, other))
    params = {"w": torch.randn(40, generator=torch.Generator().manual_seed(seed)).round(decimals=1)}
    small, large = (above(params, gates(params, ("w",), (top_k_threshold(params, c),)))["w"] for c in (low, high))
    assert bool((small <= large).all())


def test_the_numbers_of_the_method_card() -> None:
    """Catches another k than the released code's on the ResNet-18 of the paper: d = 11,164,362."""
    x = torch.randn(11_164_362, generator=torch.Generator().manual_seed(0))
    table = {1 / 64: 174_443, 0.04: 446_574, 1 / 16: 697_772, 0.16: 1_786_297, 0.25: 2_791_090}
    ordered = np.sort(x.abs().numpy())[::-1]
    for capacity, k in table.items():
        assert top_k_threshold({"w": x}, capacity) == float(ordered[k - 1])


def test_thresholds_are_those_of_their_tensors() -> None:
    """Catches thresholds that are dealt to the wrong tensors, and of another type than these."""
    params = {name: torch.zeros(2, dtype=torch.float64) for name in ("a", "b")}
    assert gates(params, ("a", "b"), (0.5, 0.25)) == {"a": 0.5, "b": 0.25}
    assert gates(params, ("a",), (0.1,))["a"].dtype == torch.float64


def test_tensors_without_a_threshold_are_not_masked() -> None:
    """Catches norm layers that get a mask."""
    masks: Mapping[str, Tensor] = above({"w": torch.ones(2), "norm": torch.ones(2)}, {"w": torch.tensor(0.5)})
    assert list(masks) == ["w"]


def test_the_bias_factor_is_its_formula() -> None:
    """Catches a factor that is not 1.5 at the threshold, not 1 far above, or NaN at theta = 0 (Eq. 3 of FIARSE)."""
    theta = torch.tensor(0.5, dtype=torch.float64)
    x = torch.tensor([0.5, -0.5, 1.0, 5e9, 0.0], dtype=torch.float64)
    expected = torch.tensor([1.5, 1.5, 1 + 2 * 0.5 / 2.25, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(torch.as_tensor(bias_factor(x, theta, True)), expected, rtol=0, atol=1e-9)
    assert torch.as_tensor(bias_factor(x, theta * 0, True)).tolist() == [1.0] * 5
    assert bias_factor(x, theta, False) == 1.0


def test_the_bias_factor_is_the_derivative_of_its_surrogate() -> None:
    """Catches a factor that is right at its ends and wrong between: d/dx of x * (|x| - t) / (|x| + t)."""
    theta = torch.tensor(0.3, dtype=torch.float64)
    x = torch.linspace(0.31, 4.0, 50, dtype=torch.float64).requires_grad_()
    gate = (x.abs() - theta) / (x.abs() + theta)
    slope = torch.autograd.grad(gate.sum(), x)[0]
    got = torch.as_tensor(bias_factor(x.detach(), theta, True))
    assert torch.allclose(got, 1 + x.detach() * slope, rtol=1e-12, atol=0)


def test_zeros_do_not_fill_a_submodel_beyond_its_capacity() -> None:
    """Catches a threshold of 0 below full capacity: fresh zero-initialised layers would all be kept."""
    params = {"w": torch.cat([torch.zeros(90), torch.ones(10)])}
    mask = above(params, gates(params, ("w",), (top_k_threshold(params, 0.25),)))
    assert int(mask["w"].sum()) == 10
