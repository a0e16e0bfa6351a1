"""The first stages of a network, with a classifier after each: weights, logits, what is left out, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.exits import depth_of, stage_ends, with_exits
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build

IMAGE = (3, 16, 16)
SPECS = {"resnet8(width=4)": 3, "cnn5(rep_dim=9)": 3, "vit(width=16, depth=4)": 4, "mlp(hidden=(12, 6))": 2}


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
    ):
        assert with_exits(model, stage_ends(model), 1).shapes["heads.0.fc.weight"] == shape
    model = net(Signal, (2, 9))
    small = with_exits(model, ("conv",), 1)
    w, x = small.init(Rng((0,))), torch.randn(4, 2, 9)
    features = nn.functional.conv1d(x, w["net.conv.weight"], w["net.conv.bias"], padding=1).mean(2)
    assert torch.allclose(small(w, x), features @ w["heads.0.fc.weight"].T + w["heads.0.fc.bias"], atol=1e-6)
    tokens = build("vit(width=8)", input_shape=IMAGE, num_classes=5)
    small = with_exits(tokens, ("patches",), 1)
    w, x = small.init(Rng((0,))), torch.randn(4, *IMAGE)
    features = nn.functional.conv2d(x, w["net.patches.map.weight"], w["net.patches.map.bias"], 4).flatten(2)
    features = (features.transpose(1, 2) + w["net.patches.places"]).mean(1)
    assert torch.allclose(small(w, x), features @ w["heads.0.fc.weight"].T + w["heads.0.fc.bias"], atol=1e-6)


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


def test_stages_are_the_networks_the_extractor_or_ones_own() -> None:
    """Catches an exit behind the last stage, which has the network's own classifier already."""
    assert stage_ends(build("resnet18(width=4)", input_shape=IMAGE, num_classes=5)) == ("layer1", "layer2", "layer3")
    assert stage_ends(net(Signal, (2, 9))) == ("conv",)
    assert stage_ends(net(Backwards)) == ()
    assert stage_ends(net(Backwards, classifier="last", extractor="blocks.1")) == ("blocks.1",)
    assert stage_ends(net(Backwards), ("blocks.0",)) == ("blocks.0",)
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


class Branches(nn.Module):
    """What comes behind one layer also reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


class Pair(nn.Module):
    """A layer that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x)[0].mean(1))


@pytest.mark.parametrize(
    ("make", "shape", "ends", "message"),
    [
        (Branches, (5,), ("a",), "a single tensor may pass a cut"),
        (Backwards, (5,), ("blocks.3", "blocks.1"), "'blocks.1' does not come after 'blocks.3' and before the output"),
        (Backwards, (5,), ("blocks.1", "blocks.1"), "each once"),
        (Backwards, (5,), ("last",), "not the last layer"),
        (Backwards, (5,), ("block",), "has no submodule 'block' to be its exit"),
        (Backwards, (5,), ("unused",), "calls the exit 'unused' 0 times"),
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
