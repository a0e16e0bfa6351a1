"""Ending the conflict of two gradients: the one-constraint projection, in closed form."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Align: TypeAlias = Literal["none", "local_primary", "in_primary_sum", "always"]


def nearest_unopposed(g: Tensor, r: Tensor) -> Tensor:
    """argmin_z ||g - z||^2 subject to <z, r> >= 0: z = g where b = <g, r> >= 0, else g - (b / <r, r>) r.

    The dual of the problem has one variable, lambda* = max(0, -2b / <r, r>), and z = g + (lambda* / 2) r: Theorem 3.1
    of Chan et al., InCo Aggregation, ICLR 2024 (https://arxiv.org/abs/2308.11464). A zero ``r`` constrains nothing.
    """
    b = (g * r).sum()
    return g - b.clamp(max=0.0) / (r * r).sum().clamp_min(torch.finfo(g.dtype).tiny) * r


def combine(g_local: Tensor, g_in: Tensor, align: Align, weight: float) -> Tensor:
    """One step from the gradients of a client's own loss and of the IN loss, for one tensor.

    ``none``: their weighted sum. ``local_primary``: the local one, made not to oppose the other. ``in_primary_sum``:
    the local one plus the other made not to oppose it, so that the step never opposes the local one. ``always``: the
    local one less its component along the other, whatever its sign (the sibling paper says it does this in practice).
    """
    if align == "none":
        return g_local + weight * g_in
    if align == "local_primary":
        return nearest_unopposed(g_local, g_in)
    if align == "in_primary_sum":
        return g_local + weight * nearest_unopposed(g_in, g_local)
    return g_local - (g_local * g_in).sum() / (g_in * g_in).sum().clamp_min(torch.finfo(g_in.dtype).tiny) * g_in
