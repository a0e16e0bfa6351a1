"""Networks with early exits: where the exits are, what each depth holds and computes, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.submodel import Layout, Slice
from polyfed.models.exits import exit_places, with_exits
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build

ZOO = {
    "mlp(hidden=(12, 6))": ((7,), ("fc2",)),
    "mlp(hidden=(12,))": ((7,), ()),
    "cnn5": ((3, 32, 32), ("conv2", "fc1", "fc2")),
    "resnet8(width=4)": ((1, 8, 8), ("layer1.0", "layer2.0", "layer3.0")),
    "resnet18(width=4)": ((3, 16, 16), ("layer2.0", "layer3.0", "layer4.0")),
    "in-resnet14-small(width=4)": ((3, 32, 32), ("layer2.0", "layer3.1", "layer4.1")),
    "vit(width=8, depth=8)": ((3, 16, 16), ("block3", "block5", "block7")),
}


@pytest.mark.parametrize("spec", ZOO)
def test_every_network_has_exits(spec: str) -> None:
    """Catches exits at branches, before the first layer or in the classifier, and another deepest exit."""
    shape, places = ZOO[spec]
    own = build(spec, input_shape=shape, num_classes=4)
    assert exit_places(own, 4) == places
    full = with_exits(own, 4)
    assert full.num_classes == 4 * (len(places) + 1)
    params, x = full.init(Rng((0,))), torch.randn(3, *shape)
    body = {name.removeprefix("net."): value for name, value in params.items() if name.startswith("net.")}
    for training in (False, True):
        for net in (own, full):
            net.train(training)
        logits = full({n: v.clone() for n, v in params.items()}, x)
        assert torch.equal(logits[:, -4:], own({n: v.clone() for n, v in body.items()}, x))
        for depth in range(1, len(places) + 1):
            net = with_exits(own, 4, depth)
            assert net.shapes.items() < full.shapes.items()
            assert f"exit{depth}.fc1.weight" in net.shapes
            assert f"exit{depth + 1}.fc1.weight" not in net.shapes
            net.train(training)
            part = {name: params[name].clone() for name in net.shapes}
            assert torch.equal(net(part, x), logits[:, : 4 * depth])
            net.train(False)
        for net in (own, full):
            net.train(False)


@pytest.mark.parametrize("spec", ["resnet8(width=4)", "vit(width=8, depth=8)", "cnn5"])
def test_a_depth_holds_what_its_exits_read(spec: str) -> None:
    """Catches tensors that a network holds and never uses, which would travel."""
    own = build(spec, input_shape=ZOO[spec][0], num_classes=4)
    for depth in range(1, 5):
        net = with_exits(own, 4, depth)
        params = {n: v.requires_grad_(n in net.parameter_names) for n, v in net.init(Rng((0,))).items()}
        leaves = {n: params[n] for n in net.parameter_names}
        found = torch.autograd.grad(net(params, torch.randn(3, *own.input_shape)).sum(), list(leaves.values()))
        assert all(g is not None for g in found)


def test_heads_read_channels() -> None:
    """Catches a mean over channels, and a head on a flattened map that is as wide as the map."""
    shapes = with_exits(build("vit(width=8, depth=8)", input_shape=(3, 16, 16), num_classes=4), 4).shapes
    assert shapes["exit1.fc1.weight"] == (8, 8)
    shapes = with_exits(build("resnet8(width=4)", input_shape=(1, 8, 8), num_classes=4), 4).shapes
    assert [shapes[f"exit{j}.fc1.weight"][1] for j in (1, 2, 3)] == [4, 4, 8]
    shapes = with_exits(build("cnn5", input_shape=(3, 32, 32), num_classes=4), 4).shapes
    assert shapes["exit2.fc1.weight"] == (256, 800)


class Own(nn.Module):
    """Sequences, a branch, a functional dropout, a tensor of a later layer, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU())
        self.first[0].weight.requires_grad_(False)
        self.second = nn.Sequential(nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU()), nn.Conv1d(6, 8, 1))
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.ones(5))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)).mean(2)
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.fc(torch.relu(self.left(x)) * self.right(x) + self.shift)


def own(classifier: str | None = "fc") -> SplitModel:
    return SplitModel("own", Own, input_shape=(2, 9), classifier=classifier)


def test_own_networks_have_exits() -> None:
    """Catches sequences that are single layers, exits between branches, and constants that are others than before."""
    assert exit_places(own(), 9) == ("second.0.0", "second.1", "left")
    assert exit_places(own(None), 9) == ("second.0.0", "second.1", "left")
    assert exit_places(own(), 2) == ("second.1",)
    net, model = with_exits(own(), 9), own()
    assert "net.first.0.weight" not in net.shapes
    assert torch.equal(net.constants["net.first.0.weight"], model.constants["first.0.weight"])
    shallow = with_exits(model, 9, 2)
    assert not [name for name in shallow.shapes if "second.1" in name or "shift" in name or "left" in name]
    assert shallow.shapes["exit1.fc1.weight"] == shallow.shapes["exit2.fc1.weight"] == (6, 6)
    shown = [layer for layer in ("first", "second", "left", "right") if f"({layer})" in shallow.described]
    assert shown == ["first", "second"]
    assert net.random
    assert not shallow.random


def test_the_user_names_exits() -> None:
    """Catches names that are not heeded, and heads that go by the order of the names."""
    net = with_exits(own(), ("left", "second.1"))
    assert net.num_classes == 9
    assert [net.shapes[f"exit{j}.fc1.weight"] for j in (1, 2)] == [(6, 6), (8, 8)]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("secnd",), r"no submodule 'secnd' to be its exit; nearest: 'second'"),
        (("first",), r"no exit before 'first': it reads the model's input 'x', expected one tensor that a layer gives"),
        (("left", "right"), r"no exit before 'right': it reads .*, and that no other exit reads"),
        (("second", "second.0"), r"no exits before 'second' and 'second.0', which is in it"),
    ],
)
def test_places_that_cannot_be_exits_are_refused(names: Any, text: str) -> None:
    """Catches an index error, or a head on the input."""
    with pytest.raises(ModelError, match=text):
        with_exits(own(), names)


def test_an_exit_beside_a_branch_is_refused() -> None:
    """Catches layers that read past an exit."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(torch.relu(h) + self.b(torch.tanh(h)))

    model = SplitModel("branch", Branch, input_shape=(4,), classifier=None)
    assert exit_places(model, 4) == ()
    with pytest.raises(ModelError, match=r"what follows also uses the output of 'a'"):
        with_exits(model, ("b",))


def test_a_network_with_exits_is_sliced() -> None:
    """Catches heads whose columns do not go with the channels that they read."""
    net = with_exits(build("resnet8(width=4)", input_shape=(1, 8, 8), num_classes=4), 4)
    half = Slice.prefix(Layout.of(net), 0.5)
    small = half.network(net)
    assert small.shapes["exit3.fc1.weight"] == (4, 4)
    assert small.shapes["exit3.fc2.weight"] == (4, 4)
    assert small(half.take(net.init(Rng((0,)))), torch.randn(2, 1, 8, 8)).shape == (2, 16)


def test_a_functional_dropout_of_an_early_stage_is_one_in_training() -> None:
    """Catches the graph of one mode that runs in both."""
    net = with_exits(own(), ("left",))
    params, x = net.init(Rng((0,))), torch.randn(4, 2, 9)
    net.train(True)
    some, others = (net({n: v.clone() for n, v in params.items()}, x) for _ in range(2))
    net.train(False)
    assert not torch.equal(some, others)
    assert torch.equal(net(params, x), net(params, x))
