"""The first stages of a network, with a classifier after each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.catalogue import ModelSpec
from polyfed.models.probe import fault
from polyfed.models.split import SplitModel
from polyfed.models.trace import Piece, chain
from polyfed.models.zoo import build

_RNG = Rng(("polyfed.models", "exits"))
#: The attribute in which a network names the submodules that its stages end with.
_STAGES = "stages"


class Pooled(nn.Module):
    """The mean over all positions, and one linear layer.

    Args:
        shape: of the features of one example: ``(F,)``; channels first, ``(C, ...)``; or tokens, ``(T, C)``.
        num_classes: width of the linear layer.
        tokens: whether the channels of features of two dimensions come last.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, tokens: bool) -> None:
        super().__init__()
        self.last = len(shape) == 1 or (len(shape) == 2 and tokens)
        self.fc = nn.Linear(shape[-1] if self.last else shape[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *shape)`` -> ``(B, num_classes)``."""
        if x.dim() > 2:
            x = x.flatten(1, -2).mean(1) if self.last else x.flatten(2).mean(2)
        return self.fc(x)


class Exits(nn.Module):
    """A network, or its first stages, that gives the logits of a classifier after each stage, side by side.

    Args:
        net: the network; what the stages do not use may be missing.
        runs: the stages, in training mode and in evaluation mode.
        heads: the classifiers behind the stages; where there is a stage more, it is the last of the network, which
            ends with a classifier of its own.
    """

    def __init__(self, net: nn.Module, runs: Mapping[bool, Sequence[Piece]], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.net = net
        self.heads = nn.ModuleList(heads)
        self._runs = runs

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *input_shape)`` -> ``(B, depth * num_classes)``."""
        logits: list[Tensor] = []
        for number, piece in enumerate(self._runs[self.training]):
            x = piece.run(self.net, x)
            logits.append(self.heads[number](x) if number < len(self.heads) else x)
        return torch.cat(logits, 1)


@lru_cache(maxsize=256)
def stage_ends(model: SplitModel, chosen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The submodules behind which a network has further classifiers; its depth is their number and 1.

    Args:
        model: the network.
        chosen: their names. If there are none: those in the network's attribute ``stages``, a list of names, but for
            the last, behind which the network's own classifier is; without that attribute, the extractor.
    """
    if chosen:
        return chosen
    with _RNG.fork():
        stages: Any = getattr(model.new_module(), _STAGES, None)
    if isinstance(stages, list | tuple) and all(isinstance(name, str) for name in cast("Iterable[Any]", stages)):
        return tuple(cast("Iterable[str]", stages))[:-1]
    return () if model.cuts[1] is None else (model.cuts[1],)


@lru_cache(maxsize=256)
def with_exits(model: SplitModel, ends: tuple[str, ...], depth: int, head: str = "") -> SplitModel:
    """Return the first stages of a network, as a network that gives the logits of a classifier after each.

    It gives ``(B, depth * L)``: the classifiers' logits one after another; `depth_of` says how many. Names are
    ``net.`` and the name in ``model``, and ``heads.0.`` and so on. Weights and draws of a smaller depth are among those
    of a larger. Equal arguments return the same object.

    Args:
        model: the network.
        ends: names of submodules, from `stage_ends`.
        depth: the number of stages, from 1 to ``len(ends) + 1``, the whole network.
        head: the network (see `polyfed.models.zoo.build`) that is built for the features behind each of ``ends``; ""
            for `Pooled`. The last stage of the network keeps the network's own classifier.

    Raises:
        ModelError: the network cannot be cut there, or a head does not take the features.
    """
    if not 1 <= depth <= len(ends) + 1:
        raise ModelError(f"model {model.name!r} has {len(ends) + 1} stages, got a depth of {depth}")
    runs, shapes, tokens = _stages(model, ends)
    kept = {mode: pieces[:depth] for mode, pieces in runs.items()}
    heads = [partial(_head, head, shape, model.num_classes, tokens) for shape in shapes[:depth]]
    return SplitModel(
        f"{model.name} to stage {depth} of {len(ends) + 1}",
        partial(_module, model, kept, heads, depth <= len(ends)),
        input_shape=model.input_shape,
        classifier=None,
        signature=("exits", depth, model.signature, ends, head),
        dtype=model.dtype,
    )


def depth_of(model: SplitModel) -> int:
    """The number of classifiers of a network of `with_exits`, which its signature holds."""
    return cast("tuple[str, int]", model.signature)[1]


@lru_cache(maxsize=64)
def _stages(
    model: SplitModel, ends: tuple[str, ...]
) -> tuple[dict[bool, tuple[Piece, ...]], tuple[tuple[int, ...], ...], bool]:
    """The pieces in training and in evaluation mode; the shapes of what is behind all but the last; Pooled's tokens."""
    runs: dict[bool, tuple[Piece, ...]] = {}
    with _RNG.fork():
        module = model.new_module()
        for mode in (True, False):  # functional dropout reads self.training during the trace
            module.train(mode)
            runs[mode] = chain(module, ends, model.name)
        shapes: list[tuple[int, ...]] = []
        value: Any = model.inputs(0)
        with torch.no_grad():
            for name, piece in zip(ends, runs[False], strict=False):
                value = piece.run(module, value)
                if not isinstance(value, Tensor) or value.dim() < 2:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ModelError(
                        f"model {model.name!r}: the exit {name!r} gives {got} for two samples, expected a tensor "
                        "(2, ...); name a submodule that gives features"
                    )
                shapes.append(tuple(value.shape[1:]))
    return runs, tuple(shapes), not any(isinstance(child, nn.Conv1d) for child in module.modules())


def _head(spec: str, shape: tuple[int, ...], num_classes: int, tokens: bool) -> nn.Module:
    """A new classifier of features of a shape."""
    if not spec:
        return Pooled(shape, num_classes, tokens=tokens)
    try:
        return build(ModelSpec.parse(spec), input_shape=shape, num_classes=num_classes).new_module()
    except ModelError as error:
        raise ModelError(f"the head {spec!r} does not take features of shape {shape}: {fault(error)}") from error


def _module(model: SplitModel, runs: Mapping[bool, Sequence[Piece]], heads: Sequence[Any], cut: bool) -> Exits:
    """Make the module; without what the stages do not use where it is ``cut``."""
    net = model.new_module()
    made = Exits(net, runs, [head() for head in heads])
    used = {target for pieces in runs.values() for piece in pieces for target in piece.targets}
    for path, owner in list(cast("Iterable[tuple[str, nn.Module]]", net.named_modules())) if cut else ():
        own = (
            dict(owner.named_children()),
            *(dict(find(recurse=False)) for find in (owner.named_parameters, owner.named_buffers)),
        )
        for name in {name for named in own for name in named}:
            place = f"{path}.{name}".lstrip(".")
            if not any(f"{place}.".startswith(f"{t}.") or f"{t}.".startswith(f"{place}.") for t in used):
                delattr(owner, name)
    return made
