"""Levels of width and depth: sizes, what fits a capacity, nested parts, and networks that are what is taken."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.levels import Levels, submodel, weighted
from polyfed.models.exits import each_depth
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build

RESNET = build("resnet18(width=16)", input_shape=(3, 32, 32), num_classes=10)
VIT = build("vit(width=16, depth=4)", input_shape=(3, 16, 16), num_classes=10)


class Grouped(nn.Module):
    """A later layer couples channels in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


GROUPED = SplitModel("grouped", Grouped, input_shape=(1, 8, 8), classifier="fc")


@pytest.mark.parametrize("model", [RESNET, VIT, GROUPED], ids=lambda model: model.name)
@pytest.mark.parametrize("width", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("head", ["", "mlp(hidden=(10,))"])
def test_the_network_of_a_level_runs_what_is_taken(model: SplitModel, width: float, head: str) -> None:
    """Catches channels that only a deeper layer couples, wrong sizes, and tensors of deeper layers."""
    levels = Levels.of(model, 4, head)
    full = each_depth(model, 4, head)[-1]
    params = full.init(Rng((0,)))
    for depth in range(1, len(levels.names) + 1):
        held, net = levels.take(params, width, depth), submodel(model, 4, head, width, depth)
        assert {name: value.shape for name, value in held.items()} == dict(net.shapes)
        assert net(held, torch.randn(2, *model.input_shape)).shape == (2, depth * model.num_classes)
        assert levels.sizes(width)[depth - 1] == sum(held[name].numel() for name in net.parameter_names)
    assert submodel(model, 4, head, 1.0, len(levels.names)) is full


@cache
def sizes(model: SplitModel) -> dict[float, list[int]]:
    """Those of every width."""
    return {k / 100: Levels.of(model, 4, "").sizes(k / 100) for k in range(1, 101)}


@pytest.mark.parametrize("model", [RESNET, VIT], ids=lambda model: model.name)
@pytest.mark.parametrize("capacity", [1.0, 0.5, 0.25, 0.0625, 0.015625])
def test_a_level_fits_its_capacity_and_is_balanced(model: SplitModel, capacity: float) -> None:
    """Catches a level that is too large, one that wastes capacity, and one that shrinks a single dimension."""
    whole = sizes(model)[1.0][-1]
    found = {}
    for e in range(1, 5):
        fits = [width for width, size in sizes(model).items() if size[e - 1] <= capacity * whole]
        if fits:
            found[e] = max(fits)
    best = min(found, key=lambda e: (round(abs(found[e] - e / 4), 9), -e))
    assert Levels.of(model, 4, "").fitting(capacity) == (found[best], best)


def test_levels_of_a_resnet() -> None:
    """Catches levels of another rule: these are in the documentation."""
    levels = Levels.of(build("resnet18", input_shape=(3, 32, 32), num_classes=10), 4, "")
    assert [levels.fitting(c) for c in (1.0, 0.25, 0.0625, 0.015625)] == [(1.0, 4), (1.0, 3), (0.5, 3), (0.5, 2)]


def test_what_fits_nothing_has_the_smallest_level() -> None:
    """Catches a width of 0."""
    assert Levels.of(GROUPED, 4, "").fitting(1e-6) == (0.01, 1)


def test_a_table_is_heeded() -> None:
    """Catches the rule where a table says something else, and a row of another capacity."""
    levels = Levels.of(VIT, 4, "")
    table = ((1.0, 1.0, 4), (0.1, 0.4, 2))
    assert levels.level(0.1, table) == (0.4, 2)
    assert levels.level(0.1, ()) == levels.fitting(0.1)
    with pytest.raises(ModelError, match=r"no row for capacity 0\.2"):
        levels.level(0.2, table)
    with pytest.raises(ModelError, match=r"capacity 1 5 exits; expected at most 4"):
        levels.level(1.0, ((1.0, 1.0, 5),))


def test_the_scaler_is_for_outputs_that_a_width_narrows() -> None:
    """Catches a Scaler of classifiers' outputs."""
    levels = Levels.of(GROUPED, 4, "mlp(hidden=(6,))")
    found = levels.scaler(each_depth(GROUPED, 4, "mlp(hidden=(6,))")[-1].init(Rng((0,))), 0.5)
    assert sorted(found) == [
        f"{layer}.{kind}" for layer in ("heads.0.fc1", "net.conv1", "net.conv2") for kind in ("bias", "weight")
    ]
    assert {float(value) for value in found.values()} == {0.5}


def test_weights_of_exits() -> None:
    """Catches weights that do not add up to 1, or that favour early exits."""
    toy = [weighted(torch.eye(3)[exit_].unbind()) for exit_ in range(3)]
    assert torch.allclose(torch.stack(toy), torch.tensor([1 / 6, 2 / 6, 3 / 6]))


def test_a_capacity_has_one_row() -> None:
    """Catches a second row that is dropped in silence."""
    levels = Levels.of(build("resnet8(width=8)", input_shape=(1, 8, 8), num_classes=4), 3, "")
    with pytest.raises(ModelError, match=r"has 2 rows for capacity 0\.25; expected one"):
        levels.level(0.25, ((0.25, 0.5, 2), (0.25, 0.75, 3)))
