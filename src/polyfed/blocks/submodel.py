"""Submodels chosen weight by weight: masks, and the sparse form in which they travel."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

import numpy as np
import torch
from torch import Tensor

from polyfed.base.errors import MessageError, ModelError
from polyfed.base.types import Params
from polyfed.core.message import INDICES, Record

#: One bool per weight for the tensors that are masked; a tensor that is not named is held whole.
Mask: TypeAlias = Mapping[str, Tensor]


def top_k_threshold(params: Params, capacity: float) -> float:
    """The magnitude of the k-th largest weight, k = max(1, floor(capacity * d)), over all of ``params`` together.

    Args:
        params: the d weights that compete.
        capacity: the fraction of them that fits, in (0, 1]; 1 gives the threshold 0, which keeps everything.

    Raises:
        ValueError: capacity outside (0, 1].
    """
    if not 0.0 < capacity <= 1.0:
        raise ValueError(f"capacity is {capacity}; expected a fraction in (0, 1]")
    if capacity == 1.0:
        return 0.0
    magnitudes = torch.cat([value.detach().abs().reshape(-1) for value in params.values()])
    k = max(1, int(capacity * magnitudes.numel()))
    tiny = torch.finfo(magnitudes.dtype).tiny  # a threshold of 0 would keep every zero, and exceed the capacity
    # np.partition: 47 ms at 11 million weights, where torch.topk takes 160 and torch.kthvalue 135.
    return max(tiny, float(np.partition(magnitudes.cpu().numpy(), magnitudes.numel() - k)[magnitudes.numel() - k]))


def above(params: Params, threshold: Params) -> dict[str, Tensor]:
    """M(x) = 1[|x| >= threshold] for the tensors that have a threshold; ties are kept."""
    return {name: params[name].abs() >= value for name, value in threshold.items()}


def gates(params: Params, masked: tuple[str, ...], threshold: tuple[float, ...]) -> dict[str, Tensor]:
    """The threshold of each masked tensor, of its type; one number stands for all.

    Raises:
        MessageError: there are neither one nor as many thresholds as masked tensors.
    """
    each = threshold if len(threshold) > 1 else threshold * len(masked)
    if len(each) != len(masked):
        raise MessageError(f"{len(threshold)} thresholds came for {len(masked)} masked tensors")
    return {n: torch.tensor(value, dtype=params[n].dtype) for n, value in zip(masked, each, strict=True)}


def apply_mask(params: Params, mask: Mask) -> dict[str, Tensor]:
    """X * M: zero where the mask does not hold a weight; what is not masked as it is."""
    return {name: value * mask[name] if name in mask else value for name, value in params.items()}


def bias_factor(x: Tensor, theta: Tensor, bias: bool) -> Tensor | float:
    """1 + 2 |x| theta / (|x| + theta)^2 (FIARSE, Eq. 3): 1.5 at |x| = theta, towards 1 far above it, 1 at theta = 0.

    It is the derivative of x * clip((|x| - theta) / (|x| + theta), 0, 1) taken for the mask's; without ``bias``, 1.
    """
    if not bias:
        return 1.0
    return 1.0 + 2.0 * x.abs() * theta / (x.abs() + theta).square().clamp_min(torch.finfo(x.dtype).tiny)


def leading(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Of every tensor the leading block of that shape: ``value[:a, :b, ...]``, as a tensor of its own.

    Raises:
        ModelError: a block is larger than its tensor, or has another number of dimensions.
    """
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = params[name]
        if value.dim() != len(shape) or any(a > b for a, b in zip(shape, value.shape, strict=True)):
            raise ModelError(f"{name!r} has shape {tuple(value.shape)}, which has no leading block {tuple(shape)}")
        out[name] = value[tuple(map(slice, shape))].clone()
    return out


def padded(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The inverse of `leading`: every tensor as the leading block of one of that shape, zero elsewhere.

    Raises:
        MessageError: a tensor does not fit into its shape.
    """
    out: dict[str, Tensor] = {}
    for name, value in params.items():
        shape = tuple(shapes[name]) if name in shapes else ()
        if value.dim() != len(shape) or any(a > b for a, b in zip(value.shape, shape, strict=True)):
            raise MessageError(f"{name!r} came with shape {tuple(value.shape)}; expected a leading block of {shape}")
        out[name] = value.new_zeros(shape)
        out[name][tuple(map(slice, value.shape))] = value
    return out


def overlaid(value: Tensor, block: Tensor) -> Tensor:
    """``value`` with ``block`` in the place of its leading block of that shape."""
    out = value.clone()
    out[tuple(map(slice, block.shape))] = block
    return out


def take_kept(params: Params, mask: Mask) -> dict[str, Tensor]:
    """The values that the mask keeps, one flat tensor per name; what is not masked, whole."""
    return {name: value[mask[name]] if name in mask else value for name, value in params.items()}


def put_kept(values: Params, mask: Mask) -> dict[str, Tensor]:
    """The inverse of `take_kept`: the values in their places, zero elsewhere.

    Raises:
        MessageError: a tensor does not hold as many values as the mask keeps.
    """
    out = dict(values)
    for name, value in values.items():
        if name in mask:
            where, count = mask[name], int(mask[name].sum())
            if value.shape != (count,):
                raise MessageError(f"{name!r} came with shape {tuple(value.shape)}; its mask keeps {count} weights")
            out[name] = torch.zeros(where.shape, dtype=value.dtype, device=value.device)
            out[name][where] = value
    return out


class Sparse(Record):
    """Some weights of a model and where they belong, as they travel: positions once for all masked tensors.

    Positions are a bitmap (1 bit per weight) or int32 indices (4 bytes per kept weight), whichever is shorter:
    indices below 1 weight in 32. Where every weight is kept, there are none.
    """

    values: Mapping[str, Tensor]
    positions: Annotated[Tensor, INDICES]  # (ceil(d / 8),) or, for all, (0,) uint8 bitmap; or (k,) int32
    masked: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def take(cls, params: Params, mask: Mask) -> "Sparse":
        """The part of ``params`` that ``mask`` keeps."""
        masked = tuple(name for name in params if name in mask)
        flat = (
            torch.cat([mask[name].reshape(-1) for name in masked]).cpu() if masked else torch.zeros(0, dtype=torch.bool)
        )
        count = int(flat.sum())
        if count == flat.numel():
            positions = torch.empty(0, dtype=torch.uint8)  # everything: no positions are needed
        elif flat.numel() < 2**31 and 4 * count < (flat.numel() + 7) // 8:
            positions = flat.nonzero().reshape(-1).to(torch.int32)
        else:
            positions = torch.from_numpy(np.packbits(flat.numpy()))
        return cls(take_kept(params, mask), positions, masked, tuple(tuple(params[name].shape) for name in masked))

    def mask(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """One bool per weight of the masked tensors.

        Args:
            shapes: of all tensors of the network that this is a part of. What the record itself says of them is not
                believed, as a few bytes could ask for any amount of memory.

        Raises:
            MessageError: it is no part of that network, or the positions do not fit.
        """
        whole = {name: tuple(shape) for name, shape in shapes.items()}
        fits = self.values.keys() == whole.keys() and len(self.masked) == len(set(self.masked)) == len(self.shapes)
        if not fits or any(whole.get(n) != shape for n, shape in zip(self.masked, self.shapes, strict=True)):
            raise MessageError("a submodel of another network came: its names or shapes are not those of the one here")
        if any(tuple(value.shape) != whole[n] for n, value in self.values.items() if n not in self.masked):
            raise MessageError("a submodel came in which a tensor that is held whole has another shape than here")
        sizes = [math.prod(shape) for shape in self.shapes]
        total = sum(sizes)
        where = self.positions.cpu()
        if where.dim() != 1 or where.dtype not in (torch.uint8, torch.int32):
            raise MessageError(f"positions of shape {tuple(where.shape)} and type {where.dtype} came")
        if where.dtype == torch.uint8 and where.numel() == 0:
            flat = torch.ones(total, dtype=torch.bool)
        elif where.dtype == torch.uint8:
            if where.numel() != (total + 7) // 8:
                raise MessageError(f"a bitmap of {where.numel()} bytes came for {total} weights")
            flat = torch.from_numpy(np.unpackbits(where.numpy(), count=total)).bool()
        else:
            if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < total:
                raise MessageError(f"positions up to {int(where.max())} came for {total} weights")
            flat = torch.zeros(total, dtype=torch.bool)
            flat[where.long()] = True
        return {
            name: piece.reshape(shape)
            for name, shape, piece in zip(self.masked, self.shapes, flat.split(sizes), strict=True)
        }

    def dense(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """All tensors at full shape, zero where nothing was sent; arguments and errors as for `mask`."""
        device = next(iter(self.values.values())).device if self.values else torch.device("cpu")
        return put_kept(self.values, {name: where.to(device) for name, where in self.mask(shapes).items()})
