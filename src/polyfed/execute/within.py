"""Tensors of which only some coordinates are trained: these are a tensor (k,) of their own, in the order of memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyfed.base.types import Params

#: Of each tensor of which only some coordinates are trained, their positions in memory, (k,) int64 ascending.
Places = Mapping[str, Tensor]


def places(mask: Tensor, base: Tensor) -> Tensor:
    """Return where the True coordinates of ``mask`` lie in the memory of ``base``, a tensor of the same shape."""
    return _flat(torch.empty_like(base, dtype=torch.bool, device="cpu").copy_(mask)).nonzero().reshape(-1)


def inside(base: Tensor, where: Tensor) -> Tensor:
    """Return the values (k,) of ``base`` at the positions ``where``, as a copy."""
    return _flat(base).index_select(0, where)


def whole(params: Params, bases: Params, where: Places) -> dict[str, Tensor]:
    """Return ``params`` with whole tensors for values: ``bases`` elsewhere, in the layout of ``bases``.

    It is differentiable by the values, and may run under vmap. It costs a copy of each base.
    """
    return {n: _spread(bases[n], where[n], value) if n in where else value for n, value in params.items()}


def _spread(base: Tensor, where: Tensor, value: Tensor) -> Tensor:
    return _shaped(_flat(base).scatter(0, where, value), base)


def _flat(base: Tensor) -> Tensor:
    """Return all coordinates in the order of memory, where images' kernels may have the channels innermost."""
    return base.permute(0, 2, 3, 1).reshape(-1) if _innermost(base) else base.reshape(-1)


def _innermost(base: Tensor) -> bool:
    return base.dim() == 4 and not base.is_contiguous() and base.is_contiguous(memory_format=torch.channels_last)


def _shaped(flat: Tensor, base: Tensor) -> Tensor:
    """Return the inverse of `_flat`."""
    if not _innermost(base):
        return flat.reshape(base.shape)
    out, channels, height, width = base.shape
    return flat.reshape(out, height, width, channels).permute(0, 3, 1, 2)
