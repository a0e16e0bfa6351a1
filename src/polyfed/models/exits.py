"""A network with early exits: small heads that classify what stages give, so that later layers may be missing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.models.binding import places
from polyfed.models.split import SplitModel
from polyfed.models.trace import Piece, chain, stages

#: The most hidden units of a head: a flattened map of a convolution would have tens of thousands.
_WIDEST = 256


class Head(nn.Module):
    """The mean over all positions of a feature map, two dense layers with a ReLU between: ``fc1``, ``fc2``.

    ``fc1`` has as many units as there are channels, at most 256.

    Args:
        axis: the dimension of the channels, 1 or -1.
        width: their number.
        num_classes: width of ``fc2``.
    """

    def __init__(self, axis: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.axis = axis
        self.fc1 = nn.Linear(width, min(width, _WIDEST))
        self.fc2 = nn.Linear(self.fc1.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, ...)``, ``(B, ..., C)`` or ``(B, C)`` -> logits ``(B, L)``."""
        if x.dim() > 2:
            x = x.mean(tuple(range(2, x.dim()) if self.axis == 1 else range(1, x.dim() - 1)))  # (B, C)
        return self.fc2(torch.relu(self.fc1(x)))  # (B, L)


class Exits(nn.Module):
    """The first stages of a network, each with its exit: ``net``, and the heads ``exit1``, ``exit2``, ...

    The last exit of all is the network's own classifier, which has no head.

    Args:
        model: the network; a new module of it is made, without the layers behind the last exit.
        before: the submodules at whose inputs the exits are.
        depth: the number of exits, 1 to ``len(before) + 1``.
        heads: the dimension and the number of the channels at each of ``before``.
    """

    def __init__(self, model: SplitModel, before: tuple[str, ...], depth: int, heads: tuple[tuple[int, int], ...]):
        super().__init__()
        net = model.new_module()
        self.net = net
        self.exits = [f"exit{number}" for number in range(1, len(before) + 1)][:depth]
        for name, (axis, width) in zip(self.exits, heads, strict=False):
            self.add_module(name, Head(axis, width, model.num_classes))
        self._pieces: dict[bool, tuple[Piece, ...]] = {}
        for mode in (True, False):  # functional dropout reads self.training during the trace
            net.train(mode)
            self._pieces[mode] = chain(net, before, model=model.name)[:depth]
        net.train(self.training)
        _keep(net, {target for pieces in self._pieces.values() for piece in pieces for target in piece.targets})

    def forward(self, x: Tensor) -> Tensor:
        """Inputs ``(B, ...)`` -> the logits of all exits beside one another, ``(B, depth * L)``, the deepest last."""
        found: list[Tensor] = []
        for number, piece in enumerate(self._pieces[self.training]):
            x = piece.run(self.net, x)
            found.append(self.get_submodule(self.exits[number])(x) if number < len(self.exits) else x)
        return torch.cat(found, dim=1)


def _keep(net: nn.Module, targets: set[str]) -> None:
    """Take out of a module the submodules and tensors that none of ``targets`` contains or is in."""

    def used(path: str) -> bool:
        return any(f"{t}.".startswith(f"{path}.") or path.startswith(f"{t}.") for t in targets)

    for path, child in list(cast("Iterable[tuple[str, nn.Module]]", net.named_modules())):
        for name in [name for name, _ in child.named_children() if not used(f"{path}.{name}".lstrip("."))]:
            delattr(child, name)
    for place in list(places(net)):
        if not used(place.alias):
            place.owner[place.local] = None


@lru_cache(maxsize=256)
def exit_places(model: SplitModel, exits: int | tuple[str, ...]) -> tuple[str, ...]:
    """Return the submodules at whose inputs a network has its early exits.

    Args:
        model: the network.
        exits: these, in any order; or the number of exits, the network's own classifier included: they lie after
            equal numbers of stages, and are as many as there are stages if those are fewer.

    Raises:
        ModelError: the network cannot be followed, or cannot be cut there.
    """
    if not isinstance(exits, int):
        return exits
    found = stages(model.new_module().eval(), model.cuts[0], model=model.name)  # S - 1 of S stages end before these
    count = min(exits, len(found) + 1)
    ends = [len(found) + 1 - (count - j) * (len(found) + 1) // count for j in range(1, count)]
    return tuple(found[end - 1] for end in ends)


def with_exits(model: SplitModel, exits: int | tuple[str, ...], depth: int | None = None) -> SplitModel:
    """Return the network whose logits are those of its first ``depth`` exits, by default of all, in a row.

    It holds no layer behind its last exit. Its tensors are ``"net."`` and the name in ``model``, and those of the
    heads, ``"exit1.fc1.weight"``; at smaller depths the same without some. Equal arguments return the same object.

    Args:
        model: the network.
        exits: as of `exit_places`.
        depth: the number of exits.

    Raises:
        ModelError: as of `exit_places`; or it does not run so.
    """
    before = exit_places(model, exits)
    return _with_exits(model, before, len(before) + 1 if depth is None else depth)


@lru_cache(maxsize=256)
def _with_exits(model: SplitModel, before: tuple[str, ...], depth: int) -> SplitModel:
    net = model.new_module().eval()
    pieces = chain(net, before, model=model.name)
    heads: list[tuple[int, int]] = []
    x = model.inputs(0)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    with torch.no_grad():
        for name, piece in zip(before, pieces, strict=False):
            x = piece.run(net, x)
            if not torch.is_tensor(x) or x.dim() < 2:
                raise ModelError(
                    f"model {model.name!r} has no exit before {name!r}: expected a tensor (B, C, ...) there"
                )
            maps = 3 <= x.dim() <= 5 and any(isinstance(m, kinds[x.dim() - 3]) for m in net.modules())
            heads.append((1, x.shape[1]) if maps else (-1, x.shape[-1]))
    return SplitModel(
        f"{model.name} with {depth} of {len(before) + 1} exits",
        partial(Exits, model, before, depth, tuple(heads)),
        input_shape=model.input_shape,
        classifier=None,
        signature=("exits", model.signature, before, depth),
        dtype=model.dtype,
    )
