"""The first stages of a network, with a classifier after each: weights, logits, what is left out, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.submodel import Layout, Slice
from polyfed.models.exits import depth_of, each_depth, stage_ends, with_exits
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build

IMAGE = (3, 16, 16)
SPECS = {"resnet8(width=4)": 3, "cnn5(rep_dim=9)": 3, "vit(width=16, depth=4)": 4, "mlp(hidden=(12, 6))": 2}
#: Where four exits are, by network.
FOUR = {
    "mlp(hidden=(12, 6))": ("act1",),
    "mlp(hidden=(12,))": (),
    "cnn5(rep_dim=9)": ("pool1", "pool2"),
    "resnet8(width=4)": ("layer1", "layer2"),
    "resnet18(width=4)": ("layer1", "layer2", "layer3"),
    "in-resnet14-small(width=4)": ("layer1", "layer2", "layer3"),
    "vit(width=8, depth=8)": ("block2", "block4", "block6"),
    "vit(width=8, depth=5)": ("block2", "block3", "block4"),
}


def net(make: Any, shape: tuple[int, ...] = (5,), **cuts: Any) -> SplitModel:
    return SplitModel(make.__name__, make, input_shape=shape, **{"classifier": None, **cuts})


class Backwards(nn.Module):
    """Layers that are made in another order than they run in, with one that nothing uses, and dropout by function."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.blocks = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.blocks(x), 0.5, self.training)
        return self.last(x * self.scale + self.shift)


class Signal(nn.Module):
    """A convolution along one axis: channels come first."""

    stages = ("conv", "act")

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).mean(2))


class Own(nn.Module):
    """Sequences, a branch, a functional dropout, a tensor of a later layer, a frozen layer, `stages` of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU())
        self.first[0].weight.requires_grad_(False)
        self.second = nn.Sequential(nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU()), nn.Conv1d(6, 8, 1))
        self.stages = nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])
        self.shift = nn.Parameter(torch.ones(5))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)).mean(2)
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.fc(torch.relu(self.stages[0](x)) * self.stages[1](x) + self.shift)


class Branches(nn.Module):
    """What comes behind one layer also reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.a(x)))


class Pair(nn.Module):
    """A layer that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.mid, self.fc = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.gru(x)[0].mean(1)))


class Flat(nn.Module):
    """A convolution, a flattening, dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.flat = nn.Conv1d(1, 6, 1), nn.ReLU(), nn.Flatten()
        self.tail = nn.Sequential(nn.Linear(24, 5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.flat(self.act(self.conv(x))))


class Tokens(nn.Module):
    """A convolution makes tokens, channels last; then a map of tokens, channels last, and a block with both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, padding=1)
        self.block, self.norm = nn.Sequential(nn.Linear(6, 6), nn.GELU()), nn.LayerNorm(6)
        self.mixed, self.fc = Mixed(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block(self.stem(x).transpose(1, 2)))
        return self.fc(self.mixed(x.transpose(1, 2).unflatten(2, (3, 3))).mean((2, 3)))


class Mixed(nn.Module):
    """A convolution, channels first, with a dense layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(6, 6, 1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gate(x.mean((2, 3)))[:, :, None, None]


@pytest.mark.parametrize("spec", FOUR)
def test_a_number_of_exits_are_equal_numbers_of_stages_apart(spec: str) -> None:
    """Catches exits that crowd at one end, one too many, and more than there are stages."""
    shape = (7,) if spec.startswith("mlp") else IMAGE
    model = build(spec, input_shape=shape, num_classes=5)
    assert stage_ends(model, 4) == FOUR[spec]
    assert stage_ends(model, 1) == ()
    assert [net.num_classes for net in each_depth(model, 4, "")] == [5 * j for j in range(1, len(FOUR[spec]) + 2)]


@pytest.mark.parametrize("spec", SPECS)
def test_a_smaller_depth_is_a_part_of_a_larger(spec: str) -> None:
    """Catches other draws, tensors of later stages that a shallow network still has, and a cut that changes logits."""
    model = build(spec, input_shape=IMAGE, num_classes=5)
    ends, x = stage_ends(model), model.inputs(0)
    assert len(ends) + 1 == SPECS[spec]
    nets = [with_exits(model, ends, depth) for depth in range(1, len(ends) + 2)]
    full = nets[-1].init(Rng((1,)))
    assert {n.removeprefix("net."): v.shape for n, v in full.items() if "heads" not in n} == dict(model.shapes)
    whole = {n.removeprefix("net."): v for n, v in full.items() if "heads" not in n}
    assert all(torch.equal(v, whole[n]) for n, v in model.init(Rng((1,))).items())
    logits, before = nets[-1](full, x), set[str]()
    assert torch.equal(logits[:, -5:], model(whole, x))
    for depth, small in enumerate(nets, 1):
        assert depth_of(small) == depth
        assert small is with_exits(model, ends, depth)
        own = {n: full[n] for n in small.shapes}
        assert all(torch.equal(v, own[n]) for n, v in small.init(Rng((1,))).items())
        assert torch.equal(small(own, x), logits[:, : 5 * depth])
        leaves = {n: v.clone().requires_grad_() if n in small.parameter_names else v for n, v in own.items()}
        weights = [leaves[n] for n in sorted(small.parameter_names)]
        assert all(g is not None for g in torch.autograd.grad(small(leaves, x).square().sum(), weights))
        assert before < set(small.shapes)
        before = set(small.shapes)


def test_where_a_head_reads() -> None:
    """Catches a mean over channels instead of positions, in maps, tokens, signals and rows."""
    for model, shape in (
        (build("resnet8(width=4)", input_shape=IMAGE, num_classes=5), (5, 4)),
        (build("vit(width=8)", input_shape=IMAGE, num_classes=5), (5, 8)),
        (build("mlp(hidden=(12, 6))", input_shape=(7,), num_classes=5), (5, 12)),
        (net(Signal, (2, 9)), (3, 6)),
        *((build(f"cnn-1d(width={w})", input_shape=(2, 32), num_classes=5), (5, w)) for w in (6, 8)),  # 8 steps
        (build("gru-1d(width=6, depth=2)", input_shape=(2, 32), num_classes=5), (5, 6)),
        (build("vit-1d(width=4)", input_shape=(2, 32), num_classes=5), (5, 4)),
    ):
        assert with_exits(model, stage_ends(model), 1).shapes["heads.0.fc.weight"] == shape
    model = net(Signal, (2, 9))
    small = with_exits(model, ("conv",), 1)
    w, x = small.init(Rng((0,))), torch.randn(4, 2, 9)
    features = nn.functional.conv1d(x, w["net.conv.weight"], w["net.conv.bias"], padding=1).mean(2)
    assert torch.allclose(small(w, x), features @ w["heads.0.fc.weight"].T + w["heads.0.fc.bias"], atol=1e-6)
    for make, end, width in ((Own, "second.0.1", 6), (Tokens, "block", 6), (Tokens, "norm", 6), (Tokens, "mixed", 6)):
        assert with_exits(net(make, (2, 9)), (end,), 1).shapes["heads.0.fc.weight"] == (3, width)
    tokens = build("vit(width=8)", input_shape=IMAGE, num_classes=5)
    small = with_exits(tokens, ("patches",), 1)
    w, x = small.init(Rng((0,))), torch.randn(4, *IMAGE)
    features = nn.functional.conv2d(x, w["net.patches.map.weight"], w["net.patches.map.bias"], 4).flatten(2)
    features = (features.transpose(1, 2) + w["net.patches.places"]).mean(1)
    assert torch.allclose(small(w, x), features @ w["heads.0.fc.weight"].T + w["heads.0.fc.bias"], atol=1e-6)


def test_a_network_says_where_its_channels_are() -> None:
    """Catches a mean over the channels of convolutions that turn a signal and turn it back, of as many steps."""
    model = build("cnn-1d(width=8, depth=2)", input_shape=(2, 32), num_classes=5)
    small = with_exits(model, ("conv1",), 1)
    w, x = small.init(Rng((0,))), torch.randn(4, 2, 32)
    stem = nn.functional.conv1d(x, w["net.stem.conv.weight"], w["net.stem.conv.bias"], 4, padding=2).relu()
    features = stem + nn.functional.conv1d(stem, w["net.conv1.conv.weight"], w["net.conv1.conv.bias"], padding=2).relu()
    expected = features.mean(2) @ w["heads.0.fc.weight"].T + w["heads.0.fc.bias"]
    torch.testing.assert_close(small(w, x), expected, rtol=1e-5, atol=1e-6)


def test_a_network_of_ones_own_is_cut_where_it_runs() -> None:
    """Catches stages by the order of construction, a prefix with what nothing uses, and dropout of one mode only."""
    model = net(Backwards)
    ends = ("blocks.1", "blocks.3")
    first, second, whole = (with_exits(model, ends, depth) for depth in (1, 2, 3))
    heads = {f"heads.{i}.fc.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert set(first.shapes) - heads == {"net.blocks.0.weight", "net.blocks.0.bias"}
    assert set(second.shapes) - heads == {f"net.blocks.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(whole.shapes) - heads == {f"net.{name}" for name in model.shapes}
    w, x = whole.init(Rng((0,))), torch.randn(8, 5)
    assert torch.equal(whole(w, x), whole(w, x))
    whole.train(True)
    one, other = whole(w, x), whole(w, x)
    whole.train(False)
    assert torch.equal(one[:, :6], other[:, :6])
    assert not torch.equal(one[:, 6:], other[:, 6:])


def test_stages_are_declared_found_or_chosen() -> None:
    """Catches an exit behind the last stage, which has the network's own classifier already."""
    assert stage_ends(build("resnet18(width=4)", input_shape=IMAGE, num_classes=5)) == ("layer1", "layer2", "layer3")
    assert stage_ends(net(Signal, (2, 9))) == ("conv",)
    assert stage_ends(net(Backwards)) == ("blocks.1",)
    assert stage_ends(net(Backwards), ("blocks.0",)) == ("blocks.0",)
    assert stage_ends(net(Backwards, classifier="blocks.2")) == ()
    assert stage_ends(net(Own, (2, 9))) == ("first.2", "second.0.1", "second.1")
    assert stage_ends(net(Own, (2, 9), classifier="fc")) == ("first.2", "second.0.1", "second.1")
    assert stage_ends(net(Own, (2, 9)), 2) == ("second.0.1",)
    assert stage_ends(net(Branches)) == stage_ends(net(Twice)) == stage_ends(net(Pair, (4, 2))) == ()
    assert stage_ends(net(Flat, (1, 4))) == ("act",)
    assert stage_ends(net(Flat, (1, 4), classifier="tail")) == ()
    only = with_exits(net(Backwards), (), 1)
    assert set(only.shapes) == {f"net.{name}" for name in net(Backwards).shapes}


def test_a_head_can_be_any_network() -> None:
    """Catches a head for pooled features, or one that all stages share."""
    model = build("resnet8(width=4)", input_shape=IMAGE, num_classes=5)
    two = with_exits(model, ("layer1", "layer2"), 2, "mlp(hidden=(3,))")
    assert two.shapes["heads.0.fc1.weight"] == (3, 4 * 16 * 16)
    assert two.shapes["heads.1.fc1.weight"] == (3, 8 * 8 * 8)
    with pytest.raises(ModelError, match=r"the head 'resnet8' does not take features of shape \(9,\)"):
        with_exits(build("mlp(hidden=(9, 8))", input_shape=(4,), num_classes=2), ("act1",), 1, "resnet8")


@pytest.mark.parametrize(
    ("make", "shape", "ends", "message"),
    [
        (Branches, (5,), ("a",), "a single tensor may pass a cut"),
        (Backwards, (5,), ("blocks.3", "blocks.1"), "'blocks.1' does not come after 'blocks.3' and before the output"),
        (Backwards, (5,), ("blocks.1", "blocks.1"), "each once"),
        (Backwards, (5,), ("last",), "not the last layer"),
        (Backwards, (5,), ("block",), "has no submodule 'block' to be its exit"),
        (Backwards, (5,), ("unused",), "calls the exit 'unused' 0 times"),
        (Own, (2, 9), ("second", "second.0"), "the exit 'second.0' is inside the exit 'second'"),
        (Own, (2, 9), ("stages.0",), "what follows also uses"),
        (Pair, (4, 2), ("gru",), "the exit 'gru' gives tuple for two samples"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Any, shape: Any, ends: tuple[str, ...], message: str) -> None:
    """Catches a network that is cut elsewhere than asked for, or fails only in training."""
    with pytest.raises(ModelError, match=message):
        with_exits(net(make, shape), ends, 1)


def test_a_depth_that_there_is_not_is_refused() -> None:
    """Catches an index that wraps round."""
    for depth in (0, 3):
        with pytest.raises(ModelError, match=f"has 2 stages, got a depth of {depth}"):
            with_exits(net(Signal, (2, 9)), ("conv",), depth)


def test_a_shallow_network_of_ones_own_holds_what_it_uses() -> None:
    """Catches deeper layers, parameters of none, constants that are others than before, and a deeper dropout."""
    model = net(Own, (2, 9), classifier="fc")
    first, second, third, whole = each_depth(model, (), "")
    for shallow in (first, second):
        assert not [name for name in shallow.shapes if "second.1" in name or "shift" in name or "stages" in name]
        assert [layer for layer in ("first", "second", "stages") if f"({layer})" in shallow.described] == (
            ["first"] if shallow is first else ["first", "second"]
        )
    assert "net.shift" not in third.shapes
    assert "net.first.0.weight" not in whole.shapes
    for each in (first, whole):
        assert torch.equal(each.constants["net.first.0.weight"], model.constants["first.0.weight"])
    assert whole.random
    assert not third.random


def test_statistics_of_the_mode_are_those_of_the_network() -> None:
    """Catches normalisation by the statistics of the other mode in a stage."""
    model = build("resnet8(width=4)", input_shape=IMAGE, num_classes=5)
    full, x = each_depth(model, (), "")[-1], model.inputs(0)
    w = full.init(Rng((0,)))
    body = {n.removeprefix("net."): v for n, v in w.items() if n.startswith("net.")}
    for training in (False, True):
        for each in (model, full):
            each.train(training)
        logits = full({n: v.clone() for n, v in w.items()}, x)
        assert torch.equal(logits[:, -5:], model({n: v.clone() for n, v in body.items()}, x))
    for each in (model, full):
        each.train(False)


@pytest.mark.parametrize(
    "spec", ["resnet8(width=8)", "vit(width=8, depth=3)", "mlp(hidden=(12, 6))", "cnn5(rep_dim=9)", "cnn-1d(width=8)"]
)
@pytest.mark.parametrize("head", ["", "mlp(hidden=(6,))"])
def test_a_network_with_exits_is_sliced(spec: str, head: str) -> None:
    """Catches heads whose columns do not go with the channels that they read: the others hold zeros of no effect."""
    shape = {"mlp": (7,), "cnn-1d": (2, 32)}.get(spec.partition("(")[0], IMAGE)
    full = each_depth(build(spec, input_shape=shape, num_classes=5), 4, head)[-1]
    half = Slice.prefix(Layout.of(full), 0.5)
    small, w, x = half.network(full), half.take(full.init(Rng((0,)))), torch.randn(2, *shape)
    name = "fc1" if head else "fc"
    rows, columns = full.shapes[f"heads.0.{name}.weight"]
    assert small.shapes[f"heads.0.{name}.weight"] == ((rows // 2 if head else rows), columns // 2)
    assert small(w, x).shape == (2, full.num_classes)
    if not spec.startswith("vit"):  # LayerNorm's mean is one over the channels that there are
        assert torch.allclose(small(w, x), full({**half.put(w), **zeros(full, half)}, x), atol=1e-5)


def zeros(full: SplitModel, half: Slice) -> dict[str, Tensor]:
    """Running variances of 1 where the slice has none."""
    kept = half.coverage()
    return {
        n: half.put(half.take({n: v}))[n] + (~kept[n]) for n, v in full.init(Rng((0,))).items() if "running_var" in n
    }
