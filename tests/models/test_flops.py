"""Multiplications per weight against hand counts. The counter itself is tested in tests/execute/test_cost.py."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.errors import ModelError
from polyfed.blocks.submodel import Layout
from polyfed.models.flops import Flops, multiplications
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


def counted(model: SplitModel, examples: int) -> float:
    """FLOPs of a forward pass, by the counter that follows no weight."""
    module, x = model.new_module().eval(), torch.randn(examples, *model.input_shape)
    with torch.no_grad(), Flops() as counter:
        module(x)
    return counter.total


def products(model: SplitModel) -> float:
    """Multiply-accumulates of all weights for one example."""
    return sum(macs * model.shapes[name].numel() for name, macs in multiplications(model).items())


def test_of_a_cnn_they_are_the_positions_of_a_convolution_and_1_of_a_dense_layer() -> None:
    model = build("cnn1(rep_dim=20)", input_shape=(3, 32, 28), num_classes=10)
    assert multiplications(model) == {
        "conv1.weight": 28 * 24,
        "conv2.weight": 10 * 8,
        "fc1.weight": 1,
        "fc2.weight": 1,
        "fc3.weight": 1,
    }
    assert 2 * products(model) == counted(model, 1)


def test_of_an_mlp_they_are_1() -> None:
    model = build("mlp(hidden=(6, 4))", input_shape=(5,), num_classes=3)
    assert multiplications(model) == {"fc1.weight": 1, "fc2.weight": 1, "fc3.weight": 1}


def test_of_a_resnet_they_fall_with_the_stride() -> None:
    model = build("resnet18(width=4)", input_shape=(3, 32, 32), num_classes=10)
    found = multiplications(model)
    assert {name: found[name] for name in found if "layer" not in name} == {"conv1.weight": 32 * 32, "fc.weight": 1}
    for number, side in enumerate((32, 16, 8, 4), 1):
        own = {value for name, value in found.items() if f"layer{number}" in name}
        assert own == {side * side}
    assert 2 * products(model) == counted(model, 1)


@pytest.mark.parametrize(
    ("depth", "macs"),
    [(10, 18_142_208), (14, 27_579_392), (18, 37_016_576), (22, 46_453_760), (26, 55_890_944)],
)
def test_of_the_family_of_fedin_they_are_those_of_the_card(depth: int, macs: int) -> None:
    """A block of 64 channels on 8x8, or of 128 on 4x4 and so on, has 4,718,592; with a stride 3,670,016."""
    model = build(f"in-resnet{depth}", input_shape=(3, 32, 32), num_classes=10)
    stem, fc, blocks = 16 * 16 * 3 * 64 * 7 * 7, 512 * 10, (depth - 2) // 2
    assert products(model) == macs == stem + fc + 4_718_592 * (blocks - 3) + 3_670_016 * 3


def test_of_a_network_of_signals_they_are_its_steps() -> None:
    """Catches steps that are counted as rows of an image, or not at all."""
    model = build("in-resnet10-1d(width=4)", input_shape=(9, 128), num_classes=6)
    found = multiplications(model)
    assert {name: found[name] for name in found if "layer" not in name} == {"conv1.weight": 64, "fc.weight": 1}
    for number, steps in enumerate((32, 16, 8, 4), 1):
        assert {value for name, value in found.items() if f"layer{number}" in name} == {steps}
    assert 2 * products(model) == counted(model, 1)


def test_of_a_transformer_they_are_the_tokens() -> None:
    """Catches products of queries, keys and values that are given to weights, and a head after the mean of tokens."""
    model = build("vit(width=16, depth=1, heads=4, patch=8)", input_shape=(3, 32, 32), num_classes=10)
    layers = ("attention.qkv", "attention.out", "fc1", "fc2")
    assert multiplications(model) == {
        "patches.map.weight": 16,
        **{f"block1.{layer}.weight": 16 for layer in layers},
        "fc.weight": 1,
    }
    attention = 2 * 4 * 16 * 16 * 4  # queries and keys, weights and values; 4 heads of 4
    assert products(model) + attention == counted(model, 3) / 6


class Own(nn.Module):
    def __init__(self, unknown: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.grouped = nn.Conv1d(6, 6, 3, groups=3)
        self.up = nn.ConvTranspose1d(6, 6, 2, stride=2)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.same = nn.Linear(6, 6, bias=False)
        self.free = nn.Parameter(torch.randn(6, 6))
        self.still = nn.Linear(6, 6).requires_grad_(False)
        self.fc = nn.Linear(6, 2)
        self.term, self.last = nn.Parameter(torch.randn(1, 2)), nn.Parameter(torch.randn(2, 2))
        self.unknown = unknown

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.grouped(self.words(x).transpose(1, 2))).transpose(1, 2)  # (B, 2 (T - 2), 6)
        h = self.still(self.same(self.same(self.lstm(h)[0]))) @ self.free
        h = h @ torch.linalg.inv(self.free) + torch.linalg.qr(self.free)[0][0] if self.unknown else h
        return torch.addmm(self.term, self.fc(h[:, 0]), self.last)


def own(unknown: bool) -> SplitModel:
    return SplitModel("own", lambda: Own(unknown), input_shape=(7,), classifier="fc", dtype=torch.int64)


def test_of_other_layers() -> None:
    """Catches transposed and grouped convolutions, layers that run twice, recurrent ones, constants, and terms."""
    found = multiplications(own(False))
    assert found == {
        "free": 10,
        "last": 1,
        "grouped.weight": 5,
        "up.weight": 5,
        "lstm.weight_ih_l0": 10,
        "lstm.weight_hh_l0": 10,
        "same.weight": 20,
        "fc.weight": 1,
    }


def test_an_operation_without_a_formula_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'own': the multiplications of 'free' cannot be counted"):
        multiplications(own(True))


def test_a_layout_has_them_where_they_are_asked_for() -> None:
    model = build("mlp(hidden=(6, 4))", input_shape=(5,), num_classes=3)
    assert Layout.of(model, macs=True).macs == multiplications(model)
    assert Layout.of(model).macs == {}


class Changed(nn.Module):
    """A network with a hidden layer whose weight is changed before its product, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 6), nn.Linear(6, 2)
        self.gain = nn.Parameter(torch.ones(1))
        self.how = how
        if how == "weight_norm":
            self.fc1: nn.Module = nn.utils.parametrizations.weight_norm(self.fc1)

    def forward(self, x: Tensor) -> Tensor:
        w, h = self.fc1.weight, x
        match self.how:
            case "times":
                h = functional.linear(x, w * 1.0)
            case "product":
                h = functional.linear(x, w / (w @ w.t()).norm())
            case "chain":
                h = x @ (w - w.mean(0)).tanh().t() * self.gain
            case "copy":
                h = x @ w.t().contiguous()
            case "term":
                h = self.fc1(x) + (w * 2).sum(1)
            case _:
                h = self.fc1(x)
        return self.fc2(h)


@pytest.mark.parametrize("how", ["times", "chain", "weight_norm", "product"])
def test_a_weight_that_is_changed_before_its_product_is_refused(how: str) -> None:
    """Catches a hidden layer that costs nothing, and a norm of a weight that passes for its product."""
    model = SplitModel("own", lambda: Changed(how), input_shape=(7,), classifier="fc2")
    with pytest.raises(ModelError, match=r"'own': the multiplications of 'fc1\.\S+' cannot be counted, .* from that"):
        multiplications(model)


@pytest.mark.parametrize("how", ["copy", "term"])
def test_copies_and_terms_are_no_changes(how: str) -> None:
    """Catches a refusal of a weight in another order of its numbers, and of one that is added to what data give."""
    model = SplitModel("own", lambda: Changed(how), input_shape=(7,), classifier="fc2")
    assert multiplications(model) == {"fc1.weight": 1, "fc2.weight": 1}


def test_a_network_without_multiplications_is_refused() -> None:
    """Catches a budget of nothing, by which every choice is divided."""

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.shift = nn.Linear(7, 2).requires_grad_(False), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.shift

    with pytest.raises(ModelError, match="'own' has no multiplications: no weight that it trains is a factor"):
        multiplications(SplitModel("own", Still, input_shape=(7,), classifier="fc"))
