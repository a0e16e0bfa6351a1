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
from polyfed.models.text import Pool
from polyfed.models.trace import Piece, chain, stages
from polyfed.models.zoo import build

_RNG = Rng(("polyfed.models", "exits"))
#: The attribute in which a network names the submodules that its stages end with.
_STAGES = "stages"
#: The attribute by which a network says that channels are the last dimension of what its stages give, or the first.
_LAST = "channels_last"
#: The attribute by which a network of tokens says that a place of padding is a vector of zeros behind each stage.
_PADDED = "zero_padding"
#: Convolutions by the number of dimensions of what they give for one example.
_CONVS: dict[int, tuple[type[nn.Module], ...]] = {
    2: (nn.Conv1d, nn.ConvTranspose1d),
    3: (nn.Conv2d, nn.ConvTranspose2d),
    4: (nn.Conv3d, nn.ConvTranspose3d),
}


class Pooled(nn.Module):
    """The mean over all positions, and one linear layer.

    Args:
        shape: of the features of one example: ``(F,)``; channels first, ``(C, ...)``; or last, ``(..., C)``.
        num_classes: width of the linear layer.
        last: whether the channels are the last dimension.
        padded: whether positions that are zeros in all channels are padding, over which no mean goes: how many there
            are depends on the other rows of a batch.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, last: bool, padded: bool = False) -> None:
        super().__init__()
        self.last = last
        self.seen = Pool("mean") if padded else None
        self.fc = nn.Linear(shape[-1] if last else shape[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *shape)`` -> ``(B, num_classes)``."""
        if x.dim() > 2 and self.seen is not None:
            x = self.seen(x.flatten(1, -2) if self.last else x.flatten(2).mT)
        elif x.dim() > 2:
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
def stage_ends(model: SplitModel, exits: int | tuple[str, ...] = ()) -> tuple[str, ...]:
    """The submodules behind which a network has further classifiers; its depth is their number and 1.

    The stages of a network are those that its attribute ``stages`` names, a list of the submodules that they end with;
    without it, those of `polyfed.models.trace.stages`. Behind the last is the network's own classifier.

    Args:
        model: the network.
        exits: the submodules themselves; none: those of all stages but the last; or the number E of classifiers, the
            network's own included: they are equal numbers of stages apart, and as many as stages if those are fewer.

    Raises:
        ModelError: the network declares no stages and cannot be traced.
    """
    chosen = () if isinstance(exits, int) else exits
    if chosen:
        return chosen
    with _RNG.fork():
        net = model.new_module().eval()
        named: Any = getattr(net, _STAGES, None)
        if isinstance(named, list | tuple) and all(isinstance(name, str) for name in cast("Iterable[Any]", named)):
            ends = tuple(cast("Iterable[str]", named))[:-1]
        else:
            ends = stages(net, model.cuts[0], model.name)
            ends = tuple(n for n, v in zip(ends, _stages(model, ends)[1], strict=True) if isinstance(v, tuple))
    total = len(ends) + 1
    count = min(exits, total) if isinstance(exits, int) else total
    return tuple(ends[total - (count - j) * total // count - 1] for j in range(1, count))


@lru_cache(maxsize=256)
def with_exits(model: SplitModel, ends: tuple[str, ...], depth: int, head: str = "") -> SplitModel:
    """Return the first stages of a network, as a network that gives the logits of a classifier after each.

    It gives ``(B, depth * L)``: the classifiers' logits one after another; `depth_of` says how many. Names are
    ``net.`` and the name in ``model``, and ``heads.0.`` and so on. Weights and draws of a smaller depth are among those
    of a larger. Its ``whole`` is that of ``model``. Equal arguments return the same object.

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
    runs, features, last, padded = _stages(model, ends)
    for name, shape in zip(ends, features, strict=True):
        if isinstance(shape, str):
            raise ModelError(
                f"model {model.name!r}: the exit {name!r} gives {shape} for two samples, expected a tensor "
                "(2, ...); name a submodule that gives features"
            )
    kept = {mode: pieces[:depth] for mode, pieces in runs.items()}
    heads = [partial(_head, head, *at, padded, model.num_classes) for at in zip(features[:depth], last, strict=False)]
    return SplitModel(
        f"{model.name} to stage {depth} of {len(ends) + 1}",
        partial(_module, model, kept, heads, depth <= len(ends)),
        input_shape=model.input_shape,
        classifier=None,
        signature=("exits", depth, model.signature, ends, head),
        dtype=model.dtype,
        whole=model.whole,
        empty=model.empty,
    )


def channels_last(model: SplitModel, name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the channels of what a submodule of a network gives are the last of several dimensions.

    Args:
        model: the network.
        name: the submodule.
        shape: the shape of what it gives for one example.
    """
    with _RNG.fork():
        return len(shape) > 1 and _channels_last(model.new_module(), name, shape)


def inside(model: SplitModel) -> dict[str, str]:
    """What the tensors of a network are called in those of `with_exits`."""
    return {name: f"net.{name}" for name in model.shapes}


def each_depth(model: SplitModel, exits: int | tuple[str, ...], head: str) -> tuple[SplitModel, ...]:
    """The networks of depth 1, 2, ...; arguments and errors as of `stage_ends` and `with_exits`."""
    ends = stage_ends(model, exits)
    return tuple(with_exits(model, ends, depth, head) for depth in range(1, len(ends) + 2))


def depth_of(model: SplitModel) -> int:
    """The number of classifiers of a network of `with_exits`, or of one with fewer channels than such a network."""
    return model.num_classes // model.whole.num_classes


@lru_cache(maxsize=64)
def _stages(
    model: SplitModel, ends: tuple[str, ...]
) -> tuple[dict[bool, tuple[Piece, ...]], tuple[tuple[int, ...] | str, ...], tuple[bool, ...], bool]:
    """Cut a network behind ``ends``.

    Returns:
        the pieces in training and in evaluation mode; of each end the shape of one example's features, or what else is
        there; of each whether the channels are the last dimension; and whether zeros are padding.
    """
    runs: dict[bool, tuple[Piece, ...]] = {}
    with _RNG.fork():
        module = model.new_module()
        for mode in (True, False):  # functional dropout reads self.training during the trace
            module.train(mode)
            runs[mode] = chain(module, ends, model.name)
        features: list[tuple[int, ...] | str] = []
        value: Any = model.inputs(0)
        with torch.no_grad():
            for piece in runs[False][:-1]:
                value = piece.run(module, value)
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                features.append(shape[1:] if isinstance(shape, tuple) and len(shape) > 1 else str(shape))
    pairs = zip(ends, features, strict=True)
    last = [isinstance(shape, str) or _channels_last(module, name, shape) for name, shape in pairs]
    return runs, tuple(features), tuple(last), getattr(module, _PADDED, None) is True


def _channels_last(net: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the channels of what a submodule gives are the last dimension, of one example's ``shape``.

    The network's attribute ``channels_last`` says it. Without it they are the first where the submodule has a
    convolution over as many positions that gives so many channels, else the last where it has dense layers or
    LayerNorm. Any other submodule, such as an activation, keeps the dimensions of what came before: there the network's
    convolutions over as many positions decide.
    """
    if isinstance(told := getattr(net, _LAST, None), bool):
        return told
    convs, own = _CONVS.get(len(shape), ()), list(net.get_submodule(name).modules())
    if len(shape) > 1 and any(isinstance(m, convs) and m.out_channels == shape[0] for m in own):
        return False
    if any(isinstance(m, nn.Linear | nn.LayerNorm) for m in own):
        return True
    return not any(isinstance(m, convs) for m in net.modules())


def _head(spec: str, shape: tuple[int, ...], last: bool, padded: bool, num_classes: int) -> nn.Module:
    """A new classifier of features of a shape."""
    if not spec:
        return Pooled(shape, num_classes, last=last, padded=padded)
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
