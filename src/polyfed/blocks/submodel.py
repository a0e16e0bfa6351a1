"""Parts of a model: weights chosen one by one (`Mask`) or by channel (`Slice`), and the form in which masks travel.

A part says of each tensor which places it holds. Three functions serve all parts: `take` gives the values there, `put`
puts values back, `coverage` says where. `polyfed.blocks.aggregate.CoverageMean` averages what parts cover.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, TypeAlias

import numpy as np
import torch
from torch import Tensor

from polyfed.base import positions, tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.core.message import INDICES, Record
from polyfed.models.channels import Channels, channels, narrowed
from polyfed.models.flops import multiplications
from polyfed.models.split import SplitModel

#: The places that are held of a tensor, as an index: one bool per weight; or for each dimension ``slice(0, n)`` or the
#: positions, reshaped so that they broadcast.
Index: TypeAlias = "Tensor | tuple[Tensor | slice, ...]"
#: What is held of a model, by tensor; a tensor that is not named is held whole.
Part: TypeAlias = Mapping[str, Index]
#: A part with one bool per weight of each tensor that it names.
Mask: TypeAlias = Mapping[str, Tensor]


def top_k_threshold(params: Params, capacity: float) -> float:
    """The magnitude of the k-th largest weight, k = max(1, floor(capacity * d)), over all of ``params`` together.

    Args:
        params: the d weights that compete.
        capacity: the fraction of them that fits, in (0, 1]; 1 gives the threshold 0, which keeps everything.

    Raises:
        ValueError: capacity outside (0, 1].
    """
    check_capacity(capacity)
    if capacity == 1.0:
        return 0.0
    magnitudes = flat({name: value.abs() for name, value in params.items()})
    k = max(1, int(capacity * magnitudes.size * (1 + 1e-12)))  # 0.29 * 100 is 28.999...
    # np.partition: 47 ms at 11 million weights, where torch.topk takes 160 and torch.kthvalue 135.
    return max(tiny(params), float(np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]))


def tiny(params: Params) -> float:
    """The least threshold: the least normal number of the coarsest type. One of 0 would keep every zero."""
    return max(torch.finfo(value.dtype).tiny for value in params.values())


def flat(values: Params) -> np.ndarray:
    """All values in a row; numpy has no bfloat16, so that these become float32, which is exact."""
    row = torch.cat([value.detach().reshape(-1) for value in values.values()])
    return (row.float() if row.dtype == torch.bfloat16 else row).cpu().numpy()


def check_capacity(capacity: float) -> None:
    """Raise ValueError outside (0, 1]."""
    if not 0.0 < capacity <= 1.0:
        raise ValueError(f"capacity is {capacity}; expected a fraction in (0, 1]")


def above(params: Params, threshold: Params) -> dict[str, Tensor]:
    """M(x) = 1[|x| >= threshold] for the tensors that have a threshold, each one number, (); ties are kept."""
    return {name: params[name].abs() >= value for name, value in threshold.items()}


def gates(params: Params, masked: Sequence[str], threshold: Sequence[float]) -> dict[str, Tensor]:
    """The threshold of each masked tensor, a tensor of no dimension and of the masked one's type."""
    return {n: torch.tensor(value, dtype=params[n].dtype) for n, value in zip(masked, threshold, strict=True)}


def apply_mask(params: Params, mask: Mask) -> dict[str, Tensor]:
    """X * M: zero where the mask does not hold a weight; what is not masked as it is."""
    return {name: value * mask[name] if name in mask else value for name, value in params.items()}


def divided(params: Params, by: Params) -> dict[str, Tensor]:
    """Each tensor that ``by`` names divided by its number: HeteroFL's Scaler, as (W / r) x + b / r = (W x + b) / r."""
    return {name: value / by[name] if name in by else value for name, value in params.items()}


def bias_factor(x: Tensor, theta: Tensor, bias: bool) -> Tensor | float:
    """1 + 2 |x| theta / (|x| + theta)^2 (FIARSE, Eq. 3): 1.5 at |x| = theta, towards 1 far above it, 1 at theta = 0.

    It is the derivative of x * clip((|x| - theta) / (|x| + theta), 0, 1) taken for the mask's; without ``bias``, 1.
    """
    if not bias:
        return 1.0
    return 1.0 + 2.0 * x.abs() * theta / (x.abs() + theta).square().clamp_min(torch.finfo(x.dtype).tiny)


def take(params: Params, part: Part) -> dict[str, Tensor]:
    """The values that are held of each tensor, in a tensor of their own; what ``part`` does not name, as it is.

    It is differentiable, and may run under vmap where the part is not a mask.

    Raises:
        ModelError: a tensor does not have the places.
    """
    return {name: _taken(name, value, part[name]) if name in part else value for name, value in params.items()}


def put(values: Params, part: Part | None, elsewhere: Mapping[str, Tensor | Sequence[int]]) -> dict[str, Tensor]:
    """The inverse of `take`: the values in their places.

    Args:
        values: what is held of each tensor; not all tensors need be there.
        part: what that is; None: leading blocks, as large as the values.
        elsewhere: tensors at full shape, whose values stay where the part has none; or their shapes, for zeros there. A
            tensor that ``values`` does not name stays, too.

    Raises:
        MessageError: a tensor is unknown, or has not the shape of what is held of it.
    """
    part = leading({name: value.shape for name, value in values.items()}) if part is None else part
    out = {name: value for name, value in elsewhere.items() if isinstance(value, Tensor)}
    for name, value in values.items():
        base = elsewhere.get(name, ())
        shape = tuple(base.shape if isinstance(base, Tensor) else base)
        check_fits(name, value, part, shape if name in elsewhere else None)
        out[name] = value
        if name not in part:
            continue
        out[name] = base.clone() if isinstance(base, Tensor) else value.new_zeros(shape)
        if isinstance(where := part[name], Tensor):
            flat = out[name].reshape(-1).index_copy(0, flat_places(where, value.device), value)
            out[name] = flat.reshape(shape)
        else:
            out[name][where] = value
    return out


def coverage(part: Part, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """One bool per weight, at full shape: whether the part holds it. It is a `Mask` of the same part."""
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        out[name] = torch.full(tuple(shape), name not in part)
        if name in part:
            out[name][part[name]] = True
    return out


def leading(shapes: Mapping[str, Sequence[int]]) -> dict[str, Index]:
    """The part that holds of every tensor the leading block of that shape: ``value[:a, :b, ...]``."""
    return {name: tuple(map(slice, shape)) for name, shape in shapes.items()}


def held_shape(where: Index, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of what is held of a tensor of that shape; None if the tensor does not have these places."""
    if isinstance(where, Tensor):
        return (int(where.sum()),) if where.shape == tuple(shape) else None
    if len(where) != len(shape):
        return None
    sizes = [index.stop if isinstance(index, slice) else index.numel() for index in where]
    ends = [index.stop if isinstance(index, slice) else int(index.max()) + 1 for index in where]
    return tuple(sizes) if all(end <= size for end, size in zip(ends, shape, strict=True)) else None


def _taken(name: str, value: Tensor, where: Index) -> Tensor:
    if isinstance(where, Tensor):
        return value.reshape(-1).index_select(0, flat_places(where, value.device))
    if held_shape(where, value.shape) is None:
        ends = tuple(index.stop if isinstance(index, slice) else int(index.max()) + 1 for index in where)
        raise ModelError(f"{name!r} has shape {tuple(value.shape)}, in which there are no places up to {ends}")
    return value[where].clone()  # a view would keep the whole alive


def flat_places(mask: Tensor, device: torch.device) -> Tensor:
    """The flat positions that a mask holds: 1 ms for 2.4 million weights, where an index of bools takes 5 to 40."""
    if mask.is_cuda:
        return mask.reshape(-1).nonzero()[:, 0].to(device)
    return torch.from_numpy(np.flatnonzero(mask.numpy())).to(device)


def check_fits(name: str, value: Tensor, part: Part, shape: tuple[int, ...] | None) -> None:
    """Raise MessageError unless a tensor is what a part holds of one of that shape; None: there is no such tensor."""
    expected = shape if shape is None or name not in part else held_shape(part[name], shape)
    if shape is None:
        raise MessageError(f"{name!r} came with shape {tuple(value.shape)}; there is no tensor of this name")
    if expected is None:
        raise MessageError(f"{name!r} came with shape {tuple(value.shape)}; expected a block of {shape}")
    if tuple(value.shape) != expected:
        raise MessageError(
            f"{name!r} came with shape {tuple(value.shape)}; expected {expected}, what is held of {shape} here"
        )


class Layout(Record):
    """The channels of a network, as a state keeps them: a server has no networks between its messages.

    Args:
        groups: as of `polyfed.models.channels.Channels`.
        positions: likewise.
        shapes: those of all tensors at full size.
        outputs: as ``groups``.
        macs: multiply-accumulates of one example per weight, as of `polyfed.models.flops.multiplications`; empty if
            nobody asked for them.
    """

    groups: Mapping[str, int]
    positions: Mapping[str, tuple[Tensor, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, int] = field(default_factory=dict[str, int])
    macs: Mapping[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of(cls, model: SplitModel, *, macs: bool = False) -> "Layout":
        """That of a network.

        Args:
            model: the network.
            macs: whether it has the multiply-accumulates of each weight.

        Raises:
            ModelError: none of its channels can be left out, or polyfed cannot follow its forward, or count in it.
        """
        found = channels(model)
        shapes = {name: tuple(shape) for name, shape in model.shapes.items()}
        return cls(found.groups, found.positions, shapes, found.outputs, multiplications(model) if macs else {})

    def scaling(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names, sorted, of tensors whose outputs are channels: weights and biases that a width scales."""
        made = {n: self.positions[n][self.outputs.get(n, 0)] for n in names if self.positions[n]}
        return tuple(sorted(n for n, axis in made.items() if bool((axis >= 0).any())))

    def totals(self, values: Params, *, dim: int | None = None) -> dict[str, Tensor]:
        """Sum ``values`` over what belongs to each channel along one dimension.

        Args:
            values: tensors at full shape, such as squared weights; not all need be there.
            dim: the dimension whose positions are assigned to channels; by default, that of each tensor's outputs.

        Returns:
            of each group the sums, (n,) float64.
        """
        sums = torch.zeros(sum(self.groups.values()), dtype=torch.float64)
        for name, value in values.items():
            along = self.outputs.get(name, 0) if dim is None else dim
            axis = self.positions[name][along] if value.dim() > along else torch.zeros(0)
            if axis.numel():
                each = value.detach().double().cpu().movedim(along, 0).reshape(len(axis), -1).sum(1)
                sums.index_add_(0, axis[axis >= 0], each[axis >= 0])
        return dict(zip(self.groups, sums.split(list(self.groups.values())), strict=True))


@dataclass(frozen=True, eq=False)
class Slice(Mapping[str, Index]):
    """Some channels of a network, as a part of its tensors that are small tensors of their own.

    It is a mapping from names to places, as any `Part`; a tensor that loses nothing is not in it. Both ends compute it
    from a share and a number, so that it never travels.

    Args:
        layout: that of the full network.
        chosen: the numbers of the channels that are held of each group, (m,) int64 ascending; a group that is not named
            is held whole.

    Example:
        >>> from polyfed import build
        >>> model = build("mlp(hidden=(6, 4))", input_shape=(5,), num_classes=3)
        >>> half = Slice.prefix(Layout.of(model), 0.5)
        >>> half.network(model).shapes["fc2.weight"], half["fc2.weight"]
        (torch.Size([2, 3]), (slice(0, 2, None), slice(0, 3, None)))
    """

    layout: Layout
    chosen: Mapping[str, Tensor]

    @classmethod
    def prefix(cls, layout: Layout, share: float) -> "Slice":
        """The first ``ceil(share * n)`` channels of every group of n: nested over shares (HeteroFL, FjORD)."""
        return cls.window(layout, share, 0)

    @classmethod
    def window(cls, layout: Layout, share: float, offset: int) -> "Slice":
        """The ``ceil(share * n)`` channels from number ``offset`` on, modulo n; nested over shares (FedRolex).

        Every tensor of a group has the same window, and groups of equal size have equal ones.
        """
        return cls(
            layout,
            {g: ((torch.arange(portion(share, n)) + offset) % n).sort().values for g, n in layout.groups.items()},
        )

    @classmethod
    def random(cls, layout: Layout, share: float, rng: Rng) -> "Slice":
        """``ceil(share * n)`` channels of every group, drawn by ``rng``; nested over shares (federated dropout)."""
        return cls(
            layout,
            {
                g: torch.randperm(n, generator=rng.at(g).torch())[: portion(share, n)].sort().values
                for g, n in layout.groups.items()
            },
        )

    @cached_property
    def kept(self) -> Mapping[str, tuple[Tensor | None, ...]]:
        """The positions that are held of each dimension of each tensor, ascending; None for all."""
        return Channels(self.layout.groups, self.layout.positions).kept(self.chosen)

    @cached_property
    def _index(self) -> dict[str, Index]:
        shapes = self.layout.shapes
        return {
            name: _mesh(axes, shapes[name])
            for name, axes in self.kept.items()
            if any(axis is not None for axis in axes)
        }

    def network(self, model: SplitModel) -> SplitModel:
        """The network that runs on the small tensors; the same object for all slices of these sizes.

        Args:
            model: the full network.

        Raises:
            ModelError: it does not run with fewer channels, or computes something else then.
        """
        return narrowed(model, tuple((g, len(n)) for g, n in self.chosen.items()))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes at full size."""
        return self.layout.shapes

    def take(self, params: Params) -> dict[str, Tensor]:
        """The small tensors; of tensors that the network does not have, the whole."""
        return take(params, self)

    def put(self, values: Params, onto: Params | None = None) -> dict[str, Tensor]:
        """Tensors at full size, with the values in their places and those of ``onto`` elsewhere; without it, zeros.

        Raises:
            MessageError: a tensor is unknown, or has not the shape of what is held of it.
        """
        return put(values, self, self.shapes if onto is None else onto)

    def coverage(self) -> dict[str, Tensor]:
        """One bool per weight at full size: whether the slice holds it."""
        return coverage(self, self.shapes)

    def inside(self, outer: "Slice") -> dict[str, Index]:
        """This slice as a part of the small tensors of a larger one, for a client that trains several widths.

        Raises:
            ModelError: the larger slice does not hold all of this one.
        """
        found: dict[str, Index] = {}
        for name, axes in self.kept.items():
            places: list[Tensor | None] = []
            for own, theirs, size in zip(axes, outer.kept[name], self.shapes[name], strict=True):
                mine = torch.arange(size) if own is None else own
                whole = torch.arange(size) if theirs is None else theirs
                if not bool(torch.isin(mine, whole).all()):
                    raise ModelError(
                        f"a slice holds channels of {name!r} that the other does not; expected nested slices"
                    )
                places.append(torch.searchsorted(whole, mine) if len(mine) < len(whole) else None)
            if any(place is not None for place in places):
                found[name] = _mesh(
                    places,
                    [s if a is None else len(a) for s, a in zip(self.shapes[name], outer.kept[name], strict=True)],
                )
        return found

    def __getitem__(self, name: str) -> Index:
        return self._index[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@lru_cache(maxsize=256)
def prefix_inside(model: SplitModel | None, inner: float, outer: float) -> Part:
    """`Slice.inside` of two prefixes, kept: to find the places takes as long as some steps of training.

    Args:
        model: the full network, or a slice of it.
        inner: the share of the channels that the smaller slice holds.
        outer: the share that the larger slice holds.

    Raises:
        TypeError: a part without a network, whose model is None.
    """
    if model is None:
        raise TypeError("this part has no network, of which there could be slices")
    layout = Layout.of(model.whole)
    return Slice.prefix(layout, inner).inside(Slice.prefix(layout, outer))


def portion(share: float, size: int) -> int:
    """``ceil(share * size)``, at least 1; a product that rounding puts just above a whole number is that number.

    Raises:
        ValueError: share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}; expected a fraction in (0, 1]")
    return max(1, math.ceil(share * size - 1e-9))


def _mesh(axes: Sequence[Tensor | None], shape: Sequence[int]) -> tuple[Tensor | slice, ...]:
    """The index of some positions of each dimension; None for all.

    Slices where all positions are leading ones, as these copy faster; else index tensors from the first to the last
    dimension that loses something, as torch would move dimensions that a slice separates.
    """
    if all(axis is None or int(axis[-1]) == len(axis) - 1 for axis in axes):
        return tuple(slice(0, n if axis is None else len(axis)) for axis, n in zip(axes, shape, strict=True))
    some = [dim for dim, axis in enumerate(axes) if axis is not None]
    first, last = some[0], some[-1]
    out: list[Tensor | slice] = []
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if first <= dim <= last:
            positions = torch.arange(size) if axis is None else axis
            out.append(positions.reshape([-1 if dim == place else 1 for place in range(first, last + 1)]))
        else:
            out.append(slice(0, size))
    return tuple(out)


class Sparse(Record):
    """Some weights of a model and where they belong, as they travel; both ends know names and shapes of all tensors.

    Args:
        network: a digest of these names and shapes, as the values of another network could fit by chance.
        values: of each tensor, in the order of the sorted names, what is held of it: (k,) of a masked one, else all.
        positions: of each masked tensor the code of `polyfed.base.positions`, (bytes,) uint8; (0,) where all or no
            weights of it are held.
        masked: the numbers of the masked tensors in the order of the sorted names.
    """

    network: str
    values: tuple[Tensor, ...]
    positions: Annotated[tuple[Tensor, ...], INDICES]
    masked: tuple[int, ...]

    @classmethod
    def take(cls, params: Params, mask: Mask) -> "Sparse":
        """The part of ``params`` that ``mask`` keeps."""
        names, held = sorted(params), take(params, mask)
        masked = tuple(names.index(name) for name in params if name in mask)
        where = tuple(torch.from_numpy(positions.code(mask[names[n]].reshape(-1).cpu().numpy())) for n in masked)
        return cls(_network(tree.shapes(params)), tuple(held[name] for name in names), where, masked)

    def names(self, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """The names of the masked tensors, in the order of the sender's model.

        Args:
            shapes: of all tensors of the network that this is a part of.

        Raises:
            MessageError: it is no part of that network.
        """
        names, some = sorted(shapes), set(self.masked)
        fits = len(names) == len(self.values) and len(some) == len(self.masked) == len(self.positions)
        if self.network != _network(shapes) or not fits or not some <= {*range(len(names))}:
            raise MessageError("a submodel of another network came: its names or shapes are not those of the one here")
        if any(value.shape != tuple(shapes[names[n]]) for n, value in enumerate(self.values) if n not in some):
            raise MessageError("a submodel came in which a tensor that is held whole has another shape than here")
        return tuple(names[n] for n in self.masked)

    def held(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """What is held of each tensor, by its name; argument and errors as of `names`."""
        self.names(shapes)
        return dict(zip(sorted(shapes), self.values, strict=True))

    def mask(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """One bool per weight of the masked tensors; argument and errors as of `names`, or the positions do not fit.

        Memory is allocated for ``shapes`` alone, whatever the message says.
        """
        return {
            name: _decoded(name, where, self.values[n].numel(), tuple(shapes[name]))
            for name, n, where in zip(self.names(shapes), self.masked, self.positions, strict=True)
        }

    def dense(self, shapes: Mapping[str, Sequence[int]], mask: Mask | None = None) -> dict[str, Tensor]:
        """All tensors at full shape, zero where nothing was sent, in the order of ``shapes``; errors as of `mask`.

        Args:
            shapes: as of `names`.
            mask: what `mask` gives, where it is known, as to decode the positions takes time.
        """
        held = self.held(shapes)
        return put({name: held[name] for name in shapes}, self.mask(shapes) if mask is None else mask, shapes)


def _network(shapes: Mapping[str, Sequence[int]]) -> str:
    """64 bits of a digest of names and shapes."""
    return hashlib.sha256(repr([(name, *shapes[name]) for name in sorted(shapes)]).encode()).hexdigest()[:16]


def _decoded(name: str, where: Tensor, held: int, shape: tuple[int, ...]) -> Tensor:
    """The mask of one tensor."""
    if where.dim() != 1 or where.dtype != torch.uint8:
        raise MessageError(f"{name!r} came with positions of shape {tuple(where.shape)} and type {where.dtype}")
    try:
        return torch.from_numpy(positions.mask(where.cpu().numpy(), held, math.prod(shape))).reshape(shape)
    except MessageError as error:
        raise MessageError(f"{name!r}: {error}") from error
