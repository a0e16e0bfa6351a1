"""The channels of a network that can be left out, which of them belong together, and the network with fewer of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.text import alternatives
from polyfed.models.binding import listed, places
from polyfed.models.labels import Follower
from polyfed.models.split import SplitModel

_RNG = Rng(("polyfed.models", "channels"))
#: The attribute by which a network names submodules whose channels all stay.
_WHOLE = "unsliced"


class Channels(NamedTuple):
    """The channels of one network.

    A channel is what can be left out of a network by itself: one output of a layer, with its bias, its share of the
    normalisation behind it, and the columns of every layer that reads it; one head of an attention; one group of a
    grouped convolution or of GroupNorm. Channels that belong to the same tensors form a group, from which a capacity
    takes a share; channels that are added to one another, as in a residual stream, are one.

    Args:
        groups: the number of channels of each group, at least 2, by the name of the tensor and the dimension where the
            group first occurs, such as ``"conv1.weight[0]"``.
        positions: of each tensor and dimension the number of the channel at each position, (n,) int64; -1 where the
            position always stays; (0,) where all do. Groups number their channels one after another, in order.
        outputs: the dimension of a weight's outputs where it is not the first, such as 1 of a transposed convolution
            and of ``x @ weight``.
    """

    groups: Mapping[str, int]
    positions: Mapping[str, tuple[Tensor, ...]]
    outputs: Mapping[str, int] = MappingProxyType({})

    def kept(self, chosen: Mapping[str, Tensor]) -> dict[str, tuple[Tensor | None, ...]]:
        """Return the positions that stay of each dimension of each tensor, ascending; None where all do.

        Args:
            chosen: numbers of channels of each group, from 0; a group that is not named keeps all.

        Raises:
            ModelError: a group is unknown, or a choice is empty, doubled, or has a number that there is not.
        """
        unknown = [name for name in chosen if name not in self.groups]
        if unknown:
            raise ModelError(f"no group of channels {unknown[0]!r}; nearest: {alternatives(unknown[0], self.groups)}")
        stays = torch.ones(sum(self.groups.values()) + 1, dtype=torch.bool)  # the last is that of -1
        start = 0
        for name, size in self.groups.items():
            if name in chosen:
                numbers = chosen[name]
                if not numbers.numel() or numbers.unique().numel() != numbers.numel():
                    raise ModelError(f"{name!r}: {numbers.tolist()} chooses no channel, or one twice")
                if not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
                    raise ModelError(f"{name!r} has the channels 0 to {size - 1}; {numbers.tolist()} are chosen")
                stays[start : start + size] = False
                stays[start + numbers] = True
            start += size
        out: dict[str, tuple[Tensor | None, ...]] = {}
        for tensor, axes in self.positions.items():
            staying = [stays[axis] for axis in axes]
            out[tensor] = tuple(None if bool(some.all()) else some.nonzero()[:, 0] for some in staying)
        return out


@lru_cache(maxsize=256)
def channels(model: SplitModel) -> Channels:
    """Find the channels of a network by following a forward pass in evaluation mode.

    A network that polyfed cannot follow names the submodules at fault in an attribute ``unsliced``, such as
    ``unsliced = ("gru",)``: these keep all their channels, and so does what they read.

    Raises:
        ModelError: an operation is unknown, a layer is recurrent, or nothing can be left out; the text says what to do.
    """
    found = _follow(model)
    if not found.groups:
        raise ModelError(
            f"model {model.name!r} cannot be sliced: none of its channels can be left out. Its inputs and its outputs "
            f"always stay, frozen layers do, and so do the submodules that it names in {_WHOLE}, and features that a "
            "convolution, a pooling or a normalisation of channels reads as positions; what a slice makes smaller is a "
            "hidden layer between two others"
        )
    return found


@lru_cache(maxsize=1024)
def narrowed(model: SplitModel, sizes: tuple[tuple[str, int], ...]) -> SplitModel:
    """Return the network with fewer channels; its weights are those that a slice of these sizes takes.

    Its ``whole`` is that of ``model``.

    Args:
        model: the full network.
        sizes: the number of channels of each group, at least 1; a group that is not named keeps all.

    Raises:
        ModelError: the network does not run with fewer channels, or computes something else; the text says why.
    """
    known = channels(model)
    chosen = {name: torch.arange(size) for name, size in sizes if size < known.groups.get(name, size + 1)}
    if not chosen:
        known.kept({name: torch.arange(size) for name, size in sizes})  # its checks
        return model
    kept = known.kept(chosen)
    shares = ", ".join(f"{len(n)} of {known.groups[group]} channels of {group}" for group, n in chosen.items())
    text = f"{model.name} with {shares}"
    short = f"{model.name} cut to {sum(len(n) for n in chosen.values())} channels in {len(chosen)} groups"
    try:
        small = SplitModel(
            short,
            partial(_narrow_module, model, kept),
            input_shape=model.input_shape,
            classifier=model.cuts[0],
            extractor=model.cuts[1],
            signature=("narrowed", model.signature, tuple(sorted((g, len(n)) for g, n in chosen.items()))),
            dtype=model.dtype,
            whole=model.whole,
        )
    except ModelError as error:
        raise ModelError(
            f"model {text} does not run: {error}. Does its forward use a number of channels, such as that of a "
            "view, that __init__ stored? Read it from a tensor's shape, or name the submodule in the network's "
            f"attribute {_WHOLE}"
        ) from error
    fault = _difference(known, chosen, kept, _follow(small))
    if fault:
        raise ModelError(
            f"model {text} runs, but groups the channels of {fault} in another way than the full network does; does "
            "its forward use a number, such as that of heads, that __init__ stored? Read it from a tensor's shape (-1 "
            f"in a view), or name the submodule in the network's attribute {_WHOLE}"
        )
    return small


# ---------------------------------------------------------------------------------------------------- following


def _follow(model: SplitModel) -> Channels:
    """Return the channels of a network, perhaps none."""
    with _RNG.fork():
        module = model.new_module().eval()
    named = dict(cast("Iterable[tuple[str, nn.Module]]", module.named_modules()))
    whole = _whole(named, model.name)
    for path, child in named.items():
        if isinstance(child, nn.RNNBase | nn.RNNCellBase) and not any(_inside(path, one) for one in whole):
            raise ModelError(
                f"model {model.name!r} cannot be sliced: {path or 'it'!r} is recurrent ({type(child).__name__}), and "
                "its gates and its state share channels in ways that polyfed does not follow; keep it whole by the "
                f"network's attribute {_WHOLE} = ({path!r},), or choose another network"
            )
    follower = Follower(model.name)
    axes: dict[str, list[Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for place in places(module):
        if place.name in model.shapes and place.name not in axes and not any(_inside(place.name, one) for one in whole):
            tensors[place.name] = place.tensor
            axes[place.name] = follower.element(place.tensor)
    by_tensor = {id(value): axes[name] for name, value in tensors.items()}
    for child in named.values():
        if isinstance(child, nn.MultiheadAttention) and id(child.out_proj.weight) in by_tensor:
            # What it reads and gives is as wide as its heads together, so a head goes with its part of these.
            rows, columns = by_tensor[id(child.out_proj.weight)]
            follower.unite(rows, columns)
            heads = columns.reshape(child.num_heads, -1)
            for weight in (child.in_proj_weight, child.q_proj_weight, child.k_proj_weight, child.v_proj_weight):
                if id(weight) in by_tensor:
                    made, read = by_tensor[id(weight)]
                    follower.unite(made.reshape(-1, *heads.shape), heads[:, :1])
                    if len(read) == len(rows):
                        follower.unite(read, rows)
            follower.unite(heads, heads[:, :1])
    for path in whole:
        _keep_what_is_read(follower, named[path])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _plainly(), follower:
        follower.fix(module(example(model)))
    for name, value in tensors.items():
        if id(value) not in follower.used:
            for axis in axes[name]:
                follower.unite(axis)
    found = _grouped(model, {name: [follower.roots(axis) for axis in found] for name, found in axes.items()})
    made = {name: follower.outputs.get(id(value), 0) for name, value in tensors.items()}
    return found._replace(outputs=MappingProxyType({name: dim for name, dim in made.items() if dim}))


def _grouped(model: SplitModel, axes: Mapping[str, list[Tensor]]) -> Channels:
    """Number the channels, group by group: those that occur in the same dimensions of the same tensors."""
    where: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, found in axes.items():
        for dim, axis in enumerate(found):
            for root in dict.fromkeys(axis.tolist()):
                where[root].append((name, dim))
    groups: defaultdict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for root, occurs in where.items():  # in order of first occurrence
        if root:
            groups[tuple(occurs)].append(root)
    number = np.full(max(where, default=0) + 1, -1)
    names: dict[str, int] = {}
    start = 0
    for occurs, roots in groups.items():
        if len(roots) > 1:  # a single channel always stays
            name, more = "{}[{}]".format(*occurs[0]), 2
            while name in names:
                name, more = "{}[{}] ({})".format(*occurs[0], more), more + 1
            names[name] = len(roots)
            number[roots] = range(start, start + len(roots))
            start += len(roots)
    positions: dict[str, tuple[Tensor, ...]] = {}
    for name, shape in model.shapes.items():
        numbers = [torch.from_numpy(number[axis.numpy()]) for axis in axes.get(name, ())]
        none = torch.zeros(0, dtype=torch.int64)
        positions[name] = tuple(a if bool((a >= 0).any()) else none for a in numbers or [none] * len(shape))
    return Channels(MappingProxyType(names), MappingProxyType(positions))


def example(model: SplitModel) -> Tensor:
    """Return an input of two examples, the same in every process."""
    shape = (2, *model.input_shape)
    if model.dtype is not None and not model.dtype.is_floating_point:
        return torch.zeros(shape, dtype=model.dtype, device=model.device)
    return torch.randn(shape, dtype=model.dtype, generator=_RNG.at("x").torch()).to(model.device)


def _inside(path: str, submodule: str) -> bool:
    return f"{path}.".startswith(f"{submodule}.")


def _whole(named: Mapping[str, nn.Module], model: str) -> list[str]:
    """Return the submodules that the network keeps whole.

    Raises:
        ModelError: there is no submodule of that name, or the attribute is a single string.
    """
    found: list[str] = []
    for path, child in named.items():
        names: object = getattr(child, _WHOLE, ())
        if not isinstance(names, list | tuple):
            raise ModelError(f"model {model!r}: {_WHOLE} is {names!r}; expected a tuple of names, such as ({names!r},)")
        for name in cast("tuple[str, ...]", names):
            full = f"{path}.{name}" if path else name
            if full not in named:
                raise ModelError(
                    f"model {model!r}: {_WHOLE} names {name!r}, which is no submodule; nearest: "
                    f"{alternatives(full, named)}"
                )
            found.append(full)
    return found


def _keep_what_is_read(follower: Follower, module: nn.Module) -> None:
    """Keep all channels that a submodule reads; as its own tensors have no labels, what it gives has none either."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        follower.fix((args, kwargs))

    module.register_forward_pre_hook(enter, with_kwargs=True)


@contextmanager
def _plainly() -> Generator[None]:
    """Have attention layers run step by step, not as one call."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ----------------------------------------------------------------------------------------------------- narrowing


def _narrow_module(model: SplitModel, kept: Mapping[str, tuple[Tensor | None, ...]]) -> nn.Module:
    """Return a new module of a network with some positions of its tensors only; it has values even if that has none."""
    module = model.new_module()
    made: dict[str, Tensor] = {}
    old: dict[str, torch.Size] = {}
    for place in list(places(module)):
        old[place.alias] = place.tensor.shape
        if place.name in kept:
            if place.name not in made:
                small = place.tensor.detach()
                for dim, stays in enumerate(kept[place.name]):
                    small = small if stays is None else small.index_select(dim, stays.to(small.device))
                if small.is_meta:
                    small = _stand_in(small, isinstance(place.tensor, nn.Parameter))
                made[place.name] = nn.Parameter(small) if isinstance(place.tensor, nn.Parameter) else small
            place.owner[place.local] = made[place.name]
    for path, child in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        _resize(child, path, old)
    return module


def _stand_in(small: Tensor, parameter: bool) -> Tensor:
    """Return values for the slice of a tensor that has none, to test the small network: small numbers, or zeros."""
    made = torch.zeros(small.shape, dtype=small.dtype)
    return made.normal_(0, 0.02) if parameter else made


def _resize(layer: Any, path: str, old: Mapping[str, torch.Size]) -> None:
    """Set the attributes of a layer of PyTorch to the shapes of its weights."""
    weight: Tensor | None = getattr(layer, "weight", None)
    if isinstance(layer, nn.RNNBase):  # it reads its weights from a list of its own
        layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]  # pyright: ignore[reportPrivateUsage]
    if isinstance(layer, nn.MultiheadAttention):
        size = layer.out_proj.weight.shape[0]
        layer.num_heads, layer.embed_dim = size // layer.head_dim, size
        own = layer._qkv_same_embed_dim  # pyright: ignore[reportPrivateUsage]
        layer.kdim, layer.vdim = (size, size) if own else (layer.k_proj_weight.shape[1], layer.v_proj_weight.shape[1])
    if weight is None:
        return
    before = old.get(f"{path}.weight" if path else "weight", weight.shape)
    if isinstance(layer, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        of, per = (0, 1) if layer.transposed else (1, 0)
        if layer.groups > 1:  # whole groups stay
            outer = 0 if layer.transposed else per
            layer.groups = layer.groups * weight.shape[outer] // before[outer]
        layer.in_channels, layer.out_channels = weight.shape[of], weight.shape[per]
        if layer.transposed:
            layer.out_channels *= layer.groups
        else:
            layer.in_channels *= layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = weight.shape[1]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * len(weight) // before[0]
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):  # pyright: ignore[reportPrivateUsage]
        layer.num_features = len(weight)


def _occurrences(positions: Mapping[str, tuple[Tensor, ...]]) -> dict[int, frozenset[tuple[str, int, int]]]:
    """Return where each channel is: tensor, dimension and position."""
    found: defaultdict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for name, axes in positions.items():
        for dim, axis in enumerate(axes):
            for position, channel in enumerate(axis.tolist()):
                if channel >= 0:
                    found[channel].append((name, dim, position))
    return {channel: frozenset(where) for channel, where in found.items()}


def _difference(
    full: Channels, chosen: Mapping[str, Tensor], kept: Mapping[str, tuple[Tensor | None, ...]], small: Channels
) -> str | None:
    """Name tensors in which the smaller network couples other channels than a part of the full one does; None if none.

    A group of which one channel is left always stays, so there the smaller network has more freedom: such a channel may
    come apart, into pieces that are in places of it alone, but never into equal parts, as by a view of a wrong size.
    """
    expected = {
        name: tuple(
            axis[stays] if len(axis) and stays is not None else axis
            for axis, stays in zip(full.positions[name], kept[name], strict=True)
        )
        for name in full.positions
    }
    single: set[int] = set()
    start = 0
    for name, size in full.groups.items():
        if name in chosen and len(chosen[name]) == 1:
            single.add(start + int(chosen[name][0]))
        start += size
    want = _occurrences(expected)
    have = _occurrences(small.positions)
    free = {place for channel in single for place in want[channel]}
    wanted = {where for channel, where in want.items() if channel not in single}
    missing = wanted - set(have.values())
    wrong = [where for where in have.values() if where not in wanted and not where & free]
    parts = [where for where in have.values() if where not in wanted and where & free]
    for channel in single:
        counts = [len({where for where in parts if place in where}) for place in want[channel]]
        inside = [where for where in parts if where & want[channel]]
        if any(counts) and all(max(_multiplicity(where).values()) > 1 for where in inside):
            wrong += inside
    names = dict.fromkeys(name for where in (*missing, *wrong) for name, _, _ in sorted(where))
    return listed(sorted(names)) if names else None


def _multiplicity(where: frozenset[tuple[str, int, int]]) -> dict[tuple[str, int], int]:
    counts: defaultdict[tuple[str, int], int] = defaultdict(int)
    for name, dim, _ in where:
        counts[name, dim] += 1
    return counts
