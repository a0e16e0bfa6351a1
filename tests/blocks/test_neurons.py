"""Channels chosen by their weights: what fits a budget, orders that nest, scores, and the gate's gradient."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed import build
from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.neurons import (
    Neurons,
    gate_parts,
    gated,
    open_channels,
    prefix_of,
    ranked,
    settled,
    through_gate,
)  # fmt: skip
from polyfed.blocks.submodel import Layout, Slice
from polyfed.core.net import Net
from polyfed.models.flops import multiplications
from polyfed.models.split import SplitModel

VIT = "vit(patch=4, width=8, depth=1, heads=4)"
NETS = ["mlp(hidden=(12, 6))", "resnet8(norm=batch, width=5)", "resnet8(norm=group, width=8)", VIT]
CAPACITIES = (0.3, 0.5, 0.77, 1.0)


def network(spec: str) -> SplitModel:
    return build(spec, input_shape=(1, 8, 8), num_classes=3)


def weights(model: SplitModel, seed: int = 0) -> dict[str, Tensor]:
    """Double-precision weights without zeros, so that biases count."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: v.double() + 0.3 * torch.rand(v.shape, generator=generator, dtype=torch.float64)
        if n in model.parameter_names
        else v.double()
        if v.is_floating_point()
        else v
        for n, v in model.init(Rng(("neurons",))).items()
    }


@pytest.mark.parametrize("capacity_in", ["parameters", "macs"])
@pytest.mark.parametrize("spec", NETS)
def test_what_is_chosen_fits_and_one_channel_more_does_not(spec: str, capacity_in: str) -> None:
    """Catches costs of another network than the small one, shares that are unlike, and budgets left unused."""
    model = network(spec)
    neurons = Neurons.of(model, capacity_in, {}, True)
    each = dict.fromkeys(model.parameter_names, 1.0) if capacity_in == "parameters" else multiplications(model)

    def total(sizes: Any) -> float:
        shapes = prefix_of(neurons.layout, sizes).network(model).shapes
        return sum(value * shapes[name].numel() for name, value in each.items())

    groups = neurons.layout.groups
    before: dict[str, int] | None = None
    for capacity in CAPACITIES:
        sizes = neurons.sizes(capacity)
        assert total(sizes) <= capacity * total(groups) * (1 + 1e-9)
        assert all(1 <= k <= groups[g] for g, k in sizes.items())
        if capacity < 1:
            g = min((g for g in groups if sizes[g] < groups[g]), key=lambda g: (sizes[g] + 1) / groups[g])
            assert total({**sizes, g: sizes[g] + 1}) > capacity * total(groups)
            assert max(sizes[g] / n for g, n in groups.items() if sizes[g] > 1) <= (sizes[g] + 1) / groups[g] + 1e-9
        else:
            assert sizes == dict(groups)
        assert before is None or all(k <= sizes[g] for g, k in before.items())
        before = sizes
    assert neurons.least() == pytest.approx(total(dict.fromkeys(groups, 1)) / total(groups), rel=1e-12)


def test_a_measured_table_replaces_counted_costs() -> None:
    """Catches a table that is not scaled by inputs times outputs, and layers that cost though they are not named."""
    model = network("mlp(hidden=(10, 10))")
    free = Neurons.of(model, "table", {"fc2": 4.0, "fc3": 0.0}, True)
    assert free.sizes(0.25) == {"fc1.weight[0]": 5, "fc2.weight[0]": 5}  # 5 * 5 of 10 * 10
    both = Neurons.of(model, "table", {"fc2": 1.0, "fc1": 100.0}, True)
    assert both.sizes(0.25) == {"fc1.weight[0]": 2, "fc2.weight[0]": 2}  # 20 + 0.04 of 101; with 3 of fc1 30 and more


def test_a_table_needs_no_multiplications_that_can_be_counted() -> None:
    """Catches a count that the table replaces, and that fails."""
    model = build("own_nets:Doubled", input_shape=(12,), num_classes=3)
    with pytest.raises(ModelError, match="cannot be counted"):
        Neurons.of(model, "macs", {}, True)
    assert Neurons.of(model, "table", {"first": 1.0}, True).sizes(0.5) == {"first.weight[0]": 4}


def test_faults_of_the_table_are_told_at_once() -> None:
    """Catches the first fault alone, and a table that nothing reads."""
    model = network("mlp(hidden=(10, 10))")
    with pytest.raises(ModelError, match=r"no layer 'fc9' has a weight; nearest: .*'fc8' has a weight.*no layer costs"):
        Neurons.of(model, "table", {"fc9": 0.0, "fc8": 0.0}, True)
    with pytest.raises(ModelError, match=r"algorithm.table: it has 1 layers where algorithm.capacity_in is 'macs'"):
        Neurons.of(model, "macs", {"fc1": 1.0}, True)
    with pytest.raises(
        ModelError, match=r"algorithm.capacity_in is 'table'; give algorithm.table, such as \{fc1 = 1.0\}"
    ):
        Neurons.of(model, "table", {}, True)


def test_a_capacity_below_one_channel_of_each_group_is_refused() -> None:
    """Catches a network above the budget, and a group without channels."""
    neurons = Neurons.of(network(NETS[0]), "parameters", {}, True)
    assert neurons.sizes(neurons.least() + 1e-6) == dict.fromkeys(neurons.layout.groups, 1)
    with pytest.raises(ModelError, match=r"capacity 0\.01 is too small .* one channel of each group costs 0\.0"):
        neurons.sizes(0.01)


@pytest.mark.parametrize("normalise", [True, False])
def test_scores_add_up_over_the_layers_of_a_stream(normalise: bool) -> None:
    """Catches a score of the first layer alone, biases or norms in it, and large layers that outweigh the others."""
    model = network("resnet8(norm=batch, width=5)")
    w = weights(model)
    names = ["layer2.0.conv2.weight", "layer2.0.downsample.0.weight"]
    each = [w[n].flatten(1).square().sum(1) for n in names]
    expected = sum((e / e.mean() if normalise else e for e in each), start=torch.zeros(())).sqrt()
    got = Neurons.of(model, "parameters", {}, normalise).scores(w)
    assert torch.allclose(got["layer2.0.conv2.weight[0]"], expected, rtol=1e-12, atol=0)
    zero = Neurons.of(model, "parameters", {}, normalise).scores({n: v * 0 for n, v in w.items()})
    assert not any(bool(s.any()) for s in zero.values())


def test_heads_and_tokens_of_a_transformer_have_scores() -> None:
    """Catches heads that come apart: a head's score has its rows of queries, keys and values."""
    model = network(VIT)
    w = weights(model)
    neurons = Neurons.of(model, "parameters", {}, True)
    qkv = w["block1.attention.qkv.weight"].reshape(3, 4, 2, 8).square().sum((0, 2, 3))
    assert torch.allclose(neurons.scores(w)["block1.attention.qkv.weight[0]"], (qkv / qkv.mean()).sqrt())
    assert set(neurons.layout.groups.values()) == {8, 4, 16}


def test_equal_scores_go_to_the_lower_number() -> None:
    """Catches an order that depends on the sort."""
    got = ranked({"g": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])}, [{"g": 2}, {"g": 5}])
    assert got["g"].tolist() == [1, 3, 0, 2, 4]


def test_a_channel_enters_above_the_weakest_by_the_factor() -> None:
    """Catches hysteresis that is off, that compares the wrong channel, or that keeps whoever was there for good."""
    before = {"g": torch.tensor([0, 1, 2, 3])}
    sizes = [{"g": 2}]
    for other, kept in ((1.05, [0, 1]), (1.1, [0, 1]), (1.11, [0, 2])):
        scores = {"g": torch.tensor([3.0, 1.0, other, 0.5], dtype=torch.float64)}
        assert sorted(ranked(scores, sizes, before, 1.1)["g"][:2].tolist()) == kept
        assert sorted(ranked(scores, sizes, before, 1.0)["g"][:2].tolist()) == [0, 2]
        assert sorted(ranked(scores, sizes)["g"][:2].tolist()) == [0, 2]


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_orders_nest_and_keep_the_rule_at_every_capacity(factor: float) -> None:
    """Catches a small capacity with a channel that a larger one lacks, over rounds in which scores change."""
    generator = torch.Generator().manual_seed(3)
    sizes = [{"g": k} for k in (2, 5, 9, 12)]
    order: dict[str, Tensor] | None = None
    moved = 0
    for _ in range(30):
        s = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
        new = ranked({"g": s}, sizes, order, factor)
        assert sorted(new["g"].tolist()) == list(range(12))
        for k in (2, 5, 9):
            old = set() if order is None else set(order["g"][:k].tolist())
            boosted = {float(s[c]) * (factor if c in old else 1): c for c in range(12)}
            held = set(new["g"][:k].tolist())  # of one order, so that capacities nest
            assert held == {boosted[score] for score in sorted(boosted, reverse=True)[:k]}
            moved += len(held - old)
        order = new
    assert 0 < moved < 30 * 16


@pytest.mark.parametrize("spec", NETS[:2])
def test_the_small_network_is_the_full_one_without_the_other_channels(spec: str) -> None:
    """Catches numbers of channels that mean others in the small network. BatchNorm's statistics stand still here."""
    model = network(spec)
    w = weights(model)
    neurons = Neurons.of(model, "parameters", {}, True)
    held = neurons.part(ranked(neurons.scores(w), []), 0.4)
    assert any(n.tolist() != list(range(len(n))) for n in held.chosen.values())
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    small = held.network(model)(held.take(w), x)
    masked = {n: torch.where(m, w[n], 1.0 if n.endswith("running_var") else 0.0) for n, m in held.coverage().items()}
    assert torch.allclose(small, model({n: v.to(w[n].dtype) for n, v in masked.items()}, x), rtol=1e-10, atol=1e-12)


class Gate:
    """A small network, its gate with some channels closed, and what autograd says of them."""

    def __init__(self, spec: str, capacity: float = 0.6) -> None:
        self.full = network(spec)
        self.neurons = Neurons.of(self.full, "parameters", {}, True)
        self.sizes = self.neurons.sizes(capacity)
        start = weights(self.full)
        held = self.neurons.part(ranked(self.neurons.scores(start), []), capacity)
        self.start, self.small = held.take(start), held.network(self.full)
        self.parts = gate_parts(self.neurons, self.full, self.sizes, self.start)
        factors = torch.tensor([1.05, 0.6, 1.2], dtype=torch.float64)  # rows grow and shrink, so that some close
        self.w = {
            n: v * factors[torch.arange(len(v)) % 3].reshape(-1, *[1] * (v.dim() - 1)) if v.dim() else v
            for n, v in self.start.items()
        }
        self.x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        self.y = torch.tensor([0, 1, 2, 0, 1, 2])

    def nets(self) -> dict[str, Net]:
        return {"model": Net(self.small, self.w), **{n: Net(None, p) for n, p in self.parts.items()}}

    def rows(self, group: str) -> list[tuple[str, Tensor]]:
        """Of a group the parameters whose rows are its channels, and the channel of each row in the small network."""
        layout = self.neurons.layout
        start = 0
        for g, n in layout.groups.items():
            if g == group:
                break
            start += n
        found: list[tuple[str, Tensor]] = []
        prefix = Slice(layout, {g: torch.arange(k) for g, k in self.sizes.items()})
        for name in self.full.shapes:
            if name in self.full.parameter_names and layout.positions[name] and len(layout.positions[name][0]):
                axis = layout.positions[name][0]
                stays = prefix.kept[name][0]
                axis = axis if stays is None else axis[stays]
                if bool(((axis >= start) & (axis < start + layout.groups[group])).any()):
                    found.append((name, axis - start))
        return found


@pytest.mark.parametrize("spec", NETS)
def test_the_gradient_is_that_of_the_surrogate(spec: str) -> None:
    """Catches a wrong derivative of the gate: autograd differentiates clip((s - theta) / (s + theta), 0, 1)."""
    gate = Gate(spec)
    leaves = {n: v.clone().requires_grad_(n in gate.small.parameter_names) for n, v in gate.w.items()}
    e = dict(leaves)
    closed = 0
    for group, n in gate.neurons.layout.groups.items():
        rows = gate.rows(group)
        k = gate.sizes[group]
        square = torch.zeros(k, dtype=torch.float64)
        first = torch.zeros(k, dtype=torch.float64)
        for name, axis in rows:
            if leaves[name].dim() > 1 and name not in gate.full.norm_names:
                each = gate.start[name].flatten(1).square().sum(1)
                own = torch.zeros(k, dtype=torch.float64).index_add(0, axis, each)
                first = first + own / own.mean()
                square = square + torch.zeros(k, dtype=torch.float64).index_add(
                    0, axis, leaves[name].flatten(1).square().sum(1) / own.mean()
                )
        s, theta = square.sqrt(), torch.full((k,), float(first.min()) ** 0.5 * (1 - 1e-5), dtype=torch.float64)
        theta[first.argmax()] = 0
        theta = theta * (k < n)
        soft = ((s - theta) / (s + theta)).clamp(0, 1)
        hard = (s.detach() >= theta).double()
        closed += int((hard == 0).sum())
        for name, axis in rows:
            m = (hard + soft - soft.detach())[axis]
            e[name] = e[name] * m.reshape(-1, *[1] * (leaves[name].dim() - 1))
    assert closed > 0
    gate.small.train(True)
    functional.cross_entropy(gate.small(dict(e), gate.x), gate.y).backward()

    own = {n: v.clone().requires_grad_(n in gate.small.parameter_names) for n, v in gated(gate.nets()).items()}
    functional.cross_entropy(gate.small(dict(own), gate.x), gate.y).backward()
    gate.small.train(False)
    grad = {n: v.grad for n, v in own.items() if v.grad is not None}
    got = through_gate(grad, gate.nets())
    differs = 0
    for name, value in leaves.items():
        if value.grad is not None:
            assert torch.allclose(got[name], value.grad, rtol=1e-9, atol=1e-13), name
            differs += int(not torch.allclose(got[name], grad[name], rtol=1e-6, atol=1e-13))
    assert differs > 0


@pytest.mark.parametrize("spec", NETS[:2])
def test_closed_channels_are_left_out(spec: str) -> None:
    """Catches a closed channel whose bias or whose normalisation still speaks."""
    gate = Gate(spec)
    held = open_channels(gate.w, gate.parts)
    open_, layout = {}, Layout.of(gate.small)
    for g, n in layout.groups.items():
        name = g.partition("[")[0]
        open_[g] = held[name].flatten().nonzero()[:, 0]
        assert 0 < len(open_[g]) <= n
    assert any(len(n) < layout.groups[g] for g, n in open_.items())
    part = Slice(layout, open_)
    gate.small.train(False)
    smaller = part.network(gate.small)(part.take(gate.w), gate.x)
    assert torch.allclose(gate.small(gated(gate.nets()), gate.x), smaller, rtol=1e-10, atol=1e-12)


def test_all_channels_are_open_at_the_start_and_the_strongest_for_good() -> None:
    """Catches thresholds above what was sent, by rounding too, and groups that empty."""
    for spec in NETS:
        gate = Gate(spec)
        assert all(bool(m.all()) for m in open_channels(gate.start, gate.parts).values())
        half = {n: v.float() if v.is_floating_point() else v for n, v in gate.start.items()}
        parts = {
            part: {n: v.float() if v.is_floating_point() else v for n, v in p.items()} for part, p in gate.parts.items()
        }
        assert all(bool(m.all()) for m in open_channels(half, parts).values())
        tiny = {n: v * 1e-3 if v.is_floating_point() else v for n, v in gate.start.items()}
        for name, mask in open_channels(tiny, gate.parts).items():
            assert bool(mask.any()), name
        whole = gate_parts(gate.neurons, gate.full, gate.neurons.layout.groups, weights(gate.full))
        assert not whole["gate"]["threshold"].any()


def test_statistics_of_closed_channels_are_those_of_before() -> None:
    """Catches a variance of a channel that is 0, by which its weights are divided when it is back."""
    gate = Gate("resnet8(norm=batch, width=5)")
    moved = {n: v + 1 if n.endswith(("running_mean", "running_var")) else v for n, v in gate.w.items()}
    got = settled(moved, gate.start, gate.parts)
    closed = 0
    for name, value in got.items():
        if name.endswith(("running_mean", "running_var")):
            conv = name.replace("bn", "conv").replace("downsample.1", "downsample.0").rpartition(".")[0]
            mask = open_channels(gate.w, gate.parts)[f"{conv}.weight"].flatten()
            assert torch.equal(value, torch.where(mask, moved[name], gate.start[name]))
            closed += int((~mask).sum())
        else:
            assert value is moved[name]
    assert closed > 0


def test_an_embedding_has_no_scores_and_keeps_its_first_channels() -> None:
    """Catches a division by zero where a group is the first dimension of no weight."""
    neurons = Neurons.of(network(NETS[0]), "parameters", {}, True)
    plain = Neurons(neurons.layout, neurons.costs, (), True)
    scores = plain.scores(weights(network(NETS[0])))
    assert all(not s.any() for s in scores.values())
    assert ranked(scores, [])["fc1.weight[0]"].tolist() == list(range(12))
    assert math.isfinite(plain.least())


class Turned(nn.Module):
    """A network whose hidden weights have their outputs in the second dimension, all without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 2, stride=2)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2, bias=False)
        self.norm = nn.GroupNorm(5, 5)
        self.own = nn.Parameter(torch.randn(5 * 64, 7) / 18)
        self.fc = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(self.conv(x).relu())).relu()
        return self.fc((h.flatten(1) @ self.own).relu())


def turned() -> SplitModel:
    return SplitModel("turned", Turned, input_shape=(1, 8, 8), classifier="fc")


def test_scores_are_of_outputs_wherever_a_weight_has_them() -> None:
    """Catches a score of what a transposed convolution or ``x @ weight`` reads, and a Scaler that follows it."""
    model = turned()
    w, neurons = weights(model), Neurons.of(model, "parameters", {}, False)
    assert neurons.layout.outputs == {"up.weight": 1, "own": 1}
    assert neurons.layout.scaling(model.parameter_names - model.norm_names) == (
        "conv.bias",
        "conv.weight",
        "own",
        "up.weight",
    )
    for got in (neurons, Neurons.of(model, "parameters", {}, True)):
        scores = got.scores(w)
        for name, dims in (("conv.weight", (1, 2, 3)), ("up.weight", (0, 2, 3)), ("own", (0,))):
            square = w[name].square().sum(dims)
            expected = (square / square.mean() if got.normalise else square).sqrt()
            found = next(s for s in scores.values() if len(s) == len(expected))
            assert torch.allclose(found, expected, rtol=1e-12, atol=0), name


def test_a_gate_closes_outputs_wherever_a_weight_has_them() -> None:
    """Catches a gate along what a layer reads: the channels that it closes would speak on."""
    gate = Gate.__new__(Gate)
    gate.full = model = turned()
    gate.neurons = Neurons.of(model, "parameters", {}, True)
    gate.sizes, start = gate.neurons.sizes(0.6), weights(model)
    held = gate.neurons.part(ranked(gate.neurons.scores(start), []), 0.6)
    gate.start, gate.small = held.take(start), held.network(model)
    gate.parts = gate_parts(gate.neurons, model, gate.sizes, gate.start)
    assert all(bool(m.all()) for m in open_channels(gate.start, gate.parts).values())
    gate.w = dict(gate.start)
    last = {"conv.weight": 0, "up.weight": 1, "own": 1}
    closed: dict[str, int] = {}
    for name, dim in last.items():  # the weakest channel falls below its threshold
        each = gate.w[name].square().sum([d for d in range(gate.w[name].dim()) if d != dim])
        closed[name] = int(each.argmin())
        gate.w[name] = gate.w[name].clone()
        gate.w[name].select(dim, closed[name]).mul_(0.9)
    nets = gate.nets()
    masks = open_channels(gate.w, gate.parts)
    for name, dim in last.items():
        assert masks[name].shape == tuple(n if d == dim else 1 for d, n in enumerate(gate.w[name].shape))
        assert (~masks[name]).flatten().nonzero().flatten().tolist() == [closed[name]]
    # d F(w M(w)) / dw: a channel's weights have g + <g, w> 2 theta / (s + theta)^2 ds/dw, the closed one's 0.
    grad = {
        n: torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(len(n)))
        for n, v in gate.w.items()
    }
    got, s = through_gate(grad, nets), gate.parts["gate"]["threshold"]
    square = gate.w["own"].square().sum(0) / gate.start["own"].square().sum(0).mean()
    place = sum(n for _, n in itertools.takewhile(lambda one: one[0] != "own[1]", gate.neurons.layout.groups.items()))
    theta = s[place : place + len(square)]
    slope = (grad["own"] * gate.w["own"]).sum(0) * 2 * theta / (square.sqrt() + theta).square() / square.sqrt()
    expected = grad["own"] + slope * gate.w["own"] / gate.start["own"].square().sum(0).mean()
    assert torch.allclose(got["own"], torch.where(masks["own"], expected, 0), rtol=1e-9, atol=1e-12)
    assert not got["up.weight"][:, closed["up.weight"]].any()


class Plain(nn.Module):
    """Two products ``x @ weight``: the first gives channels, the second reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Parameter(torch.randn(7, 6)), nn.Linear(4, 3)
        self.second = nn.Parameter(torch.randn(6, 4))
        self.unsliced = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x @ self.first).relu() @ self.second)


def test_a_width_scales_what_gives_its_channels_and_not_what_reads_them() -> None:
    """Catches a Scaler that divides the last weight of a narrower network, and not the first."""
    model = SplitModel("plain", Plain, input_shape=(7,), classifier="fc")
    assert Layout.of(model).scaling(model.parameter_names) == ("first",)
