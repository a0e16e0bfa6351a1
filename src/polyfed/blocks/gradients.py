"""Ending the conflict of two gradients: the one-constraint projection, in closed form."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from polyfed.base.types import Params

Align: TypeAlias = Literal["none", "local_primary", "in_primary_sum", "always"]
#: What is one vector of the projection: each tensor; each kernel, which is what a convolution has for one input and one
#: output channel; or all tensors together.
Granularity: TypeAlias = Literal["tensor", "kernel", "whole"]


def inner(g: Tensor, r: Tensor, axes: tuple[int, ...] = ()) -> Tensor:
    """The inner product of two tensors; over ``axes`` alone if these are given, which stay as axes of length 1."""
    return (g * r).sum(axes, keepdim=True) if axes else (g * r).sum()


def nearest_unopposed(g: Tensor, r: Tensor, axes: tuple[int, ...] = ()) -> Tensor:
    """argmin_z ||g - z||^2 subject to <z, r> >= 0: z = g where b = <g, r> >= 0, else g - (b / <r, r>) r.

    The dual of the problem has one variable, lambda* = max(0, -2b / <r, r>), and z = g + (lambda* / 2) r: Theorem 3.1
    of Chan et al., InCo Aggregation, ICLR 2024 (https://arxiv.org/abs/2308.11464). A zero ``r`` constrains nothing.
    With ``axes`` there is one such problem for each place on the other axes.
    """
    return g - inner(g, r, axes).clamp(max=0.0) / _square(r, axes) * r


def combine(g_local: Tensor, g_in: Tensor, align: Align, weight: float, axes: tuple[int, ...] = ()) -> Tensor:
    """One step from the gradients of a client's own loss and of the IN loss, for one tensor.

    ``none``: their weighted sum. ``local_primary``: the local one, made not to oppose the other. ``in_primary_sum``:
    the local one plus the other made not to oppose it, so that the step never opposes the local one. ``always``: the
    local one less its component along the other, whatever its sign (the sibling paper says it does this in practice).
    ``axes`` are those of `nearest_unopposed`.
    """
    if align == "none":
        return g_local + weight * g_in
    if align == "local_primary":
        return nearest_unopposed(g_local, g_in, axes)
    if align == "in_primary_sum":
        return g_local + weight * nearest_unopposed(g_in, g_local, axes)
    return g_local - inner(g_local, g_in, axes) / _square(g_in, axes) * g_in


def combine_all(g_local: Params, g_in: Params, align: Align, weight: float, granularity: Granularity) -> Params:
    """`combine` for many tensors of the same names: gradients, or the changes of the weights in a round.

    ``kernel`` takes the axes from the third on, so a tensor without them, such as a dense layer's, is one vector.
    ``whole`` holds the tensors a second time, end to end.
    """
    if granularity != "whole" or not g_local:
        per = {n: tuple(range(2, g.dim())) if granularity == "kernel" else () for n, g in g_local.items()}
        return {n: combine(g, g_in[n], align, weight, per[n]) for n, g in g_local.items()}
    local, foreign = (torch.cat([params[n].reshape(-1) for n in g_local]) for params in (g_local, g_in))
    pieces = combine(local, foreign, align, weight).split([g.numel() for g in g_local.values()])
    return {n: piece.reshape(g.shape) for (n, g), piece in zip(g_local.items(), pieces, strict=True)}


def _square(r: Tensor, axes: tuple[int, ...]) -> Tensor:
    """<r, r>, above 0."""
    return inner(r, r, axes).clamp_min(torch.finfo(r.dtype).tiny)
