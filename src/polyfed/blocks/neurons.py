"""Channels chosen by their weights: how many fit a capacity, which these are, and their gate while they train."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.text import alternatives
from polyfed.base.types import Params
from polyfed.blocks.submodel import Layout, Mask, Slice, apply_mask
from polyfed.core.message import Record
from polyfed.core.net import Nets
from polyfed.models.flops import multiplications
from polyfed.models.split import SplitModel

#: How far a threshold is below the weakest channel's score: drivers round scores in different ways.
_BELOW = 1 - 1e-5


class Neurons(Record):
    """What a server knows of a network whose channels it chooses by their weights.

    Args:
        layout: the channels.
        costs: the cost per weight, by tensor; what is not named costs nothing.
        weights: the tensors whose outputs are channels that they give scores: weights of layers, no biases.
        normalise: whether scores weigh all layers of a group alike.
    """

    layout: Layout
    costs: Mapping[str, float]
    weights: tuple[str, ...]
    normalise: bool

    @classmethod
    def of(cls, model: SplitModel, capacity_in: str, table: Mapping[str, float], normalise: bool) -> "Neurons":
        """Those of a network.

        Args:
            model: the full network.
            capacity_in: ``"parameters"``, ``"macs"`` (multiply-accumulates of an example) or ``"table"``.
            table: for the latter, by layer, such as ``"layer1.0.conv1"``, the cost at full size in any unit, of which a
                smaller layer has the kept share of inputs times outputs; other layers cost nothing.
            normalise: as above.

        Raises:
            ModelError: the network cannot be sliced, or the table does not fit; all faults of the table at once.
        """
        layout = Layout.of(model)
        faults: list[str] = []
        if table and capacity_in != "table":
            faults.append(
                f"it has {len(table)} layers where algorithm.capacity_in is {capacity_in!r}; only 'table' reads it"
            )
        layers = [name.removesuffix(".weight") for name in model.shapes if name.endswith(".weight")]
        if capacity_in == "table" and not table:
            key = layers[0] if layers[0].isidentifier() else f'"{layers[0]}"'  # as TOML writes it
            raise ModelError(f"algorithm.capacity_in is 'table'; give algorithm.table, such as {{{key} = 1.0}}")
        unknown = [layer for layer in table if layer not in layers]
        faults += [f"no layer {one!r} has a weight; nearest: {alternatives(one, layers)}" for one in unknown]
        if table and not any(table.values()):
            faults.append("no layer costs anything")
        if faults:
            raise ModelError("; ".join(f"algorithm.table: {fault}" for fault in faults))
        if table:
            costs = {f"{one}.weight": own / model.shapes[f"{one}.weight"].numel() for one, own in table.items()}
        elif capacity_in == "macs":
            costs = multiplications(model)
        else:
            costs = dict.fromkeys(sorted(model.parameter_names), 1.0)
        names = layout.scaling(model.parameter_names - model.norm_names)
        return cls(layout, costs, tuple(name for name in names if len(model.shapes[name]) > 1), normalise)

    def sizes(self, capacity: float) -> dict[str, int]:
        """How many channels of each group fit a capacity: about the same share of every group, at least one channel.

        Channels are added one at a time, always to the group of which the smallest share would be there, as long as the
        cost is at most ``capacity`` times that of all. So a smaller capacity has at most as many of each group.

        Args:
            capacity: the fraction of the cost that fits, in (0, 1].

        Raises:
            ModelError: one channel of each group costs more.
        """
        groups, steps = self.layout.groups, self._steps()
        cost = self._cost()
        budget = capacity * cost(groups) * (1 + 1e-9)
        fitting = bisect_right(range(len(steps) + 1), budget, key=lambda number: cost(self._after(steps, number)))
        if not fitting:
            raise ModelError(
                f"capacity {capacity:g} is too small for this network, of which one channel of each group costs "
                f"{self.least():.4g}; give at least that in clients.capacities, or as the capacity asked for"
            )
        return self._after(steps, fitting - 1)

    def part(self, order: Mapping[str, Tensor], capacity: float) -> Slice:
        """The channels that come first in an order of each group's, as many as fit; errors as of `sizes`."""
        return Slice(self.layout, {g: order[g][:k].sort().values for g, k in self.sizes(capacity).items()})

    def least(self) -> float:
        """The smallest capacity: the share of the cost that one channel of each group has."""
        cost = self._cost()
        return cost(dict.fromkeys(self.layout.groups, 1)) / cost(self.layout.groups)

    def _steps(self) -> list[str]:
        """The groups, in the order in which each gets a second channel, a third and so on."""
        groups = self.layout.groups.items()
        return [
            g for *_, g in sorted((k / n, place, g) for place, (g, n) in enumerate(groups) for k in range(2, n + 1))
        ]

    def _after(self, steps: list[str], number: int) -> dict[str, int]:
        more = Counter(steps[:number])
        return {g: 1 + more[g] for g in self.layout.groups}

    def _cost(self) -> Callable[[Mapping[str, int]], float]:
        """The cost by numbers of channels."""
        sizes = torch.tensor(list(self.layout.groups.values()))
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        # Of each tensor the cost per weight; of its dimensions positions that stay, and those of a channel by group.
        terms: list[tuple[float, list[tuple[int, Tensor]]]] = []
        for name, cost in self.costs.items():
            axes: list[tuple[int, Tensor]] = []
            for axis, size in zip(self.layout.positions[name], self.layout.shapes[name], strict=True):
                each = torch.bincount(owner[axis[axis >= 0]], minlength=len(sizes))
                axes.append((size - int(each.sum()), each.double() / sizes))
            terms.append((cost, axes))

        def total(kept: Mapping[str, int]) -> float:
            channels = torch.tensor([kept[g] for g in self.layout.groups], dtype=torch.float64)
            return sum(
                cost * math.prod(stay + round(float(each @ channels)) for stay, each in axes) for cost, axes in terms
            )

        return total

    def scores(self, model: Params) -> dict[str, Tensor]:
        """s_c = sqrt(sum_l ||W_lc||^2 / z_l), W_lc the weights of channel c's outputs in layer l; by group, float64.

        z_l is the mean of ||W_lc||^2 over the layer's channels; without ``normalise`` 1, so that layers with larger
        weights count more in a group of several layers. A group that no layer puts out, such as the columns of an
        embedding, has scores 0.

        Args:
            model: tensors at full size.
        """
        squares: dict[str, Tensor] = {}
        for name in self.weights:
            square, dim = model[name].detach().double().square(), self.layout.outputs.get(name, 0)
            axis = self.layout.positions[name][dim]
            squares[name] = square * self.scale(square.movedim(dim, 0), axis, axis >= 0)
        return {group: total.sqrt() for group, total in self.layout.totals(squares).items()}

    def scale(self, squares: Tensor, axis: Tensor, counts: Tensor) -> float:
        """1 / z_l, or 1 without ``normalise``; 0 where z_l is.

        Args:
            squares: of the layer's weights, float64; its outputs first.
            axis: the channel of each output.
            counts: whether each output is of a channel that can be left out.
        """
        if not self.normalise:
            return 1.0
        total = float(squares.cpu()[counts].sum())
        return len(axis[counts].unique()) / total if total else 0.0


def ranked(
    scores: Mapping[str, Tensor],
    sizes: Iterable[Mapping[str, int]],
    before: Mapping[str, Tensor] | None = None,
    hysteresis: float = 1.0,
) -> dict[str, Tensor]:
    """An order of the channels of each group, whose first k are what a capacity with k of them holds.

    A capacity holds the k strongest, where the score of a channel counts ``hysteresis`` times if the same capacity held
    it ``before``: so a newcomer needs a score above ``hysteresis`` times that of the channel whose place it takes, the
    weakest. Ties go to the channel held before, then to the lower number. Submodels nest: if k channels beat one at a
    capacity, then at least k' of them beat it at a smaller one with k', as at most k - k' of them lose the factor.

    Args:
        scores: of each group, (n,).
        sizes: the numbers of channels that capacities hold, by group.
        before: the order until now.
        hysteresis: 1 or more.
    """
    out: dict[str, Tensor] = {}
    for group, score in scores.items():
        s, number = score.numpy(), np.arange(len(score))
        level = np.zeros(len(s))  # by how many capacities a channel is held
        for k in {held[group] for held in sizes}:
            old = np.isin(number, [] if before is None else before[group][:k].numpy())
            level[np.lexsort((number, ~old, -np.where(old, s * hysteresis, s)))[:k]] += 1
        out[group] = torch.from_numpy(np.lexsort((number, -s, -level)))
    return out


def prefix_of(layout: Layout, sizes: Mapping[str, int]) -> Slice:
    """The first channels of each group: a small network has the form of this slice, whichever channels it holds."""
    return Slice(layout, {group: torch.arange(k) for group, k in sizes.items()})


@lru_cache(maxsize=256)
def _rows(full: SplitModel, sizes: tuple[tuple[str, int], ...]) -> tuple[dict[str, Tensor], Tensor]:
    """The channel of each row of the small network's tensors; and of each channel the rows, among all of parameters.

    A row is what a tensor has of one output: its part at one place of the dimension of its outputs, along which the
    first has that dimension's size, and 1 along others. Channels have the numbers of the full network, and C, their
    number, is what rows have that always stay. The second is (C + 1, most), filled up with the number of rows.
    """
    layout = Layout.of(full)
    held = prefix_of(layout, dict(sizes))
    last, rows = sum(layout.groups.values()), dict[str, Tensor]()
    for name in layout.scaling(layout.shapes):
        dim = layout.outputs.get(name, 0)
        axis, stays = layout.positions[name][dim], held.kept[name][dim]
        axis = axis if stays is None else axis[stays]
        sizes_at = [-1 if place == dim else 1 for place in range(len(layout.shapes[name]))]
        rows[name] = torch.where(axis < 0, last, axis).reshape(sizes_at)
    channel = torch.cat([axis.reshape(-1) for name, axis in rows.items() if name in full.parameter_names])
    order, each = channel.argsort(stable=True), torch.bincount(channel, minlength=last + 1)
    each[last] = 0  # these have no score
    members = torch.full((last + 1, int(each.max())), len(channel))
    for c, found in enumerate(order[: int(each.sum())].split(each[:last].tolist())):
        members[c, : len(found)] = found
    return rows, members


def gate_parts(neurons: Neurons, full: SplitModel, sizes: Mapping[str, int], model: Params) -> dict[str, Params]:
    """What the gate of a small network needs beside its weights, as parts that a step reads.

    Scores, z_l included, are those of the small network at the round's start. theta of a group is just below the
    smallest of them; it is 0 where all channels are held, and for the strongest of a group, so that no group empties.

    Args:
        neurons: those of the full network.
        full: the full network.
        sizes: the number of channels that the small one has of each group.
        model: the small network's tensors.

    Returns:
        ``"rows"``: the channel of each row, by tensor, so that it broadcasts; ``"scale"``: 1 / z_l by parameter, 0 for
        one that gives no scores; ``"gate"``: ``"members"``, the rows of each channel, and ``"threshold"``, that of each
        channel.
    """
    rows, members = _rows(full, tuple(sizes.items()))
    scale: dict[str, Tensor] = {}
    for name in (name for name in rows if name in full.parameter_names):
        value, axis = 0.0, rows[name].reshape(-1)
        if name in neurons.weights:
            squares = _rows_first(model[name].detach().double().square(), rows[name])
            value = neurons.scale(squares, axis, axis < len(members) - 1)
        scale[name] = torch.tensor(value, dtype=model[name].dtype)
    parts: dict[str, Params] = {"rows": rows, "scale": scale, "gate": {"members": members}}
    s, start = _scores(model, parts), 0
    threshold = torch.zeros_like(s)
    for group, n in neurons.layout.groups.items():
        own = s[start : start + sizes[group]]
        if sizes[group] < n:
            threshold[start : start + n] = own.min() * _BELOW
            threshold[start + int(own.argmax())] = 0
        start += n
    return {**parts, "gate": {"members": members, "threshold": threshold}}


def _rows_first(value: Tensor, rows: Tensor) -> Tensor:
    return value.movedim(next((dim for dim, size in enumerate(rows.shape) if size > 1), 0), 0)


def _gathered(values: Params, parts: Mapping[str, Params]) -> Tensor:
    """Sums over each channel's rows, (C + 1,), as a gather: sums by scattering are not repeatable on a GPU."""
    apart = [_rows_first(value, parts["rows"][name]) for name, value in values.items()]
    flat = [value.reshape(len(value), -1).sum(1) for value in apart]
    return torch.cat([*flat, flat[0].new_zeros(1)])[parts["gate"]["members"]].sum(1)


def _scores(model: Params, parts: Mapping[str, Params]) -> Tensor:
    """Scores of each channel at the current weights, (C + 1,)."""
    squares = {n: scale * model[n].square() for n, scale in parts["scale"].items()}
    return _gathered(squares, parts).sqrt()


def open_channels(model: Params, parts: Mapping[str, Params]) -> Mask:
    """M of each tensor whose outputs are channels, of its size along these, and 1 along others: 1[s >= theta]."""
    return _open(_scores(model, parts), parts)


def _open(s: Tensor, parts: Mapping[str, Params]) -> Mask:
    held = s >= parts["gate"]["threshold"]
    return {n: held[axis] for n, axis in parts["rows"].items()}


def settled(model: Params, before: Params, parts: Mapping[str, Params]) -> dict[str, Tensor]:
    """``model`` with the running statistics of closed channels as they were ``before``.

    A closed channel is 0, and its running variance goes to 0 with it. When its weights are back, after the round, they
    would be divided by that.
    """
    held = {n: mask for n, mask in open_channels(model, parts).items() if n not in parts["scale"]}
    return {n: torch.where(held[n], value, before[n]) if n in held else value for n, value in model.items()}


def open_rows(nets: Nets) -> Mask:
    """`open_channels` of the parameters of the part ``model``, with the parts of `gate_parts`."""
    held = open_channels(nets["model"].params, {name: net.params for name, net in nets.items()})
    return {n: held[n] for n in nets["scale"].params}


def gated(nets: Nets) -> dict[str, Tensor]:
    """The part ``model`` with the parameters of closed channels at 0: w * M(w)."""
    return apply_mask(nets["model"].params, open_rows(nets))


def through_gate(grad: Params, nets: Nets) -> dict[str, Tensor]:
    """The gradient of F(w * M(s(w))) by w, from ``grad``, that by the product, with a surrogate for M's derivative.

    With M taken as clip((s - theta) / (s + theta), 0, 1) where it is differentiated, dM/ds = 2 theta / (s + theta)^2
    for s >= theta, and ds/dw = scale * w / s, a weight of an open channel has

        g + <g, w>_c * 2 theta / (s + theta)^2 * scale * w / s,

    where the product runs over everything that the channel's M multiplies. Weights of closed channels have 0.
    """
    model, parts = nets["model"].params, {name: net.params for name, net in nets.items()}
    theta, s = parts["gate"]["threshold"], _scores(model, parts)
    held = _open(s, parts)
    inner = _gathered({n: grad[n] * model[n] for n in parts["scale"]}, parts)
    tiny = torch.finfo(s.dtype).tiny
    slope = inner * 2 * theta / (s + theta).square().clamp_min(tiny) / s.clamp_min(tiny)
    out = dict(grad)
    for n, scale in parts["scale"].items():
        along = slope[parts["rows"][n]] * scale * model[n]
        out[n] = torch.where(held[n], grad[n] + along, 0)
    return out
