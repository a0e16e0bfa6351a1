"""Submodels of a network with early exits, by width and depth: what each holds, and which fits a capacity."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.types import Params
from polyfed.blocks.submodel import Layout, Slice
from polyfed.core.message import Record
from polyfed.models.exits import each_depth
from polyfed.models.split import SplitModel

#: Widths are multiples of 1 / 100.
_STEPS = 100


class Levels(Record):
    """The channels of a network with exits, and what each depth holds, as a server's state keeps them.

    Args:
        layout: of the network with all exits.
        names: for 1, 2, ... exits, the tensors that a network of this depth holds.
        weights: the tensors that are parameters.
    """

    layout: Layout
    names: tuple[tuple[str, ...], ...]
    weights: tuple[str, ...]

    @classmethod
    def of(cls, model: SplitModel, exits: int | tuple[str, ...], head: str) -> "Levels":
        """Those of a network; arguments and errors as of `polyfed.models.exits.each_depth`."""
        return _levels(model, exits, head)

    def part(self, width: float) -> Slice:
        """The first channels of every group of the whole network: nested over widths."""
        return Slice.prefix(self.layout, width)

    def take(self, params: Params, width: float, exits: int) -> dict[str, Tensor]:
        """Of ``params`` at full size those that a submodel holds, with the channels that it holds."""
        return self.part(width).take(tree.pick(params, self.names[exits - 1]))

    def sizes(self, width: float) -> list[int]:
        """The number of weights of submodels of this width with 1, 2, ... exits."""
        kept, shapes = self.part(width).kept, self.layout.shapes
        held = {
            n: math.prod(size if axis is None else len(axis) for size, axis in zip(shapes[n], kept[n], strict=True))
            for n in self.weights
        }
        return [sum(held.get(n, 0) for n in names) for names in self.names]

    def fitting(self, capacity: float) -> tuple[float, int]:
        """Choose (width, exits) for a capacity, the share of the weights of the whole network that may be held.

        For each number e of exits the width s_e is the largest that fits, in steps of 1/100. Of all e the one is taken
        whose s_e is closest to its share e / E of the exits, so that neither dimension shrinks alone; of equally close
        ones the deepest. Where nothing fits, one exit and the smallest width.
        """
        allowed = capacity * self.sizes(1.0)[-1] * (1 + 1e-9)
        best: tuple[float, float, int] | None = None
        known: dict[int, list[int]] = {}
        for e in range(len(self.names), 0, -1):
            low, high = 0, _STEPS  # `low` fits, what is above `high` does not
            while low < high:
                middle = (low + high + 1) // 2
                if middle not in known:
                    known[middle] = self.sizes(middle / _STEPS)
                low, high = (middle, high) if known[middle][e - 1] <= allowed else (low, middle - 1)
            apart = round(abs(low / _STEPS - e / len(self.names)), 9)
            if low and (best is None or apart < best[0]):
                best = apart, low / _STEPS, e
        return best[1:] if best else (1 / _STEPS, 1)

    def level(self, capacity: float, table: tuple[tuple[float, float, int], ...]) -> tuple[float, int]:
        """Return (width, exits) of a capacity: those of its row (capacity, width, exits); without rows `fitting`.

        Raises:
            ModelError: there is no row for the capacity, or two, or it has more exits than the network.
        """
        if not table:
            return self.fitting(capacity)
        rows = [(width, exits) for c, width, exits in table if abs(c - capacity) < 1e-9]
        if not rows:
            raise ModelError(
                f"algorithm.levels has no row for capacity {capacity:g}; expected [{capacity:g}, width, exits], too"
            )
        if len(rows) > 1:
            raise ModelError(f"algorithm.levels has {len(rows)} rows for capacity {capacity:g}; expected one")
        if rows[0][1] > len(self.names):
            raise ModelError(
                f"algorithm.levels gives capacity {capacity:g} {rows[0][1]} exits; expected at most {len(self.names)}, "
                "as many as the network has"
            )
        return rows[0]

    def scaler(self, params: Params, width: float) -> dict[str, Tensor]:
        """The width for each of ``params`` whose outputs it narrows, by which `divided` divides."""
        return {name: torch.tensor(width, dtype=params[name].dtype) for name in self.layout.scaling(params)}


def weighted(losses: Sequence[Tensor]) -> Tensor:
    """ScaleFL's mean of the losses of exits 1, ..., e, each a scalar: ``sum_j j l_j / (e (e + 1) / 2)``."""
    e = len(losses)
    return torch.stack([j * loss for j, loss in enumerate(losses, 1)]).sum() / (e * (e + 1) / 2)


@lru_cache(maxsize=64)
def _levels(model: SplitModel, exits: int | tuple[str, ...], head: str) -> Levels:
    nets = each_depth(model, exits, head)
    names = tuple(tuple(net.shapes) for net in nets)
    return Levels(Layout.of(nets[-1]), names, tuple(sorted(nets[-1].parameter_names)))


@lru_cache(maxsize=256)
def submodel(model: SplitModel, exits: int | tuple[str, ...], head: str, width: float, depth: int) -> SplitModel:
    """Return the small dense network of ``depth`` exits on the tensors that `Levels.part` takes at this width.

    Raises:
        ModelError: as of `polyfed.models.exits.each_depth` and `polyfed.blocks.submodel.Slice.network`.
    """
    part, net = Levels.of(model, exits, head).part(width), each_depth(model, exits, head)[depth - 1]
    layout = Layout.of(net)
    # What couples channels behind the last exit, such as a grouped convolution, couples them here, too.
    stays = torch.ones(sum(layout.groups.values()), dtype=torch.bool)
    for name in net.shapes:
        for axis, kept in zip(layout.positions[name], part.kept[name], strict=True):
            if axis.numel() and kept is not None:
                lost = torch.ones(len(axis), dtype=torch.bool)
                lost[kept] = False
                stays[axis[lost & (axis >= 0)]] = False
    chosen, start = dict[str, Tensor](), 0
    for group, n in layout.groups.items():
        chosen[group] = stays[start : start + n].nonzero()[:, 0]
        start += n
    return Slice(layout, chosen).network(net)
