"""Arithmetic on Params: plain functions that return new mappings and write nothing in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from polyfed.base.types import Params, Parts


def map_leaves(fn: Callable[[Tensor], Tensor], params: Params) -> dict[str, Tensor]:
    """``fn`` of every tensor, under the same names."""
    return {name: fn(value) for name, value in params.items()}


def map_parts(fn: Callable[[Tensor], Tensor], parts: Parts) -> dict[str, dict[str, Tensor]]:
    """``fn`` of every tensor of every part."""
    return {part: map_leaves(fn, params) for part, params in parts.items()}


def sub(a: Params, b: Params) -> dict[str, Tensor]:
    """``a - b`` for the names of ``a``; of truth values, which of them differ."""
    return {n: value ^ b[n] if value.dtype == torch.bool else value - b[n] for n, value in a.items()}


def add(a: Params, b: Params, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Return ``a + scale * b``; for a name that ``b`` lacks the result has the tensor of ``a`` itself.

    Integer tensors (BatchNorm's counter) are added in float64 and rounded back to their type. A truth value is turned
    where ``scale * b`` is above a half: where most clients have turned it, if ``b`` is the mean of their differences.
    """
    out: dict[str, Tensor] = {}
    for name, value in a.items():
        if name not in b:
            out[name] = value
        elif value.is_floating_point():
            out[name] = value + scale * b[name]
        elif value.dtype == torch.bool:
            out[name] = value ^ (scale * b[name].double() > 0.5)
        else:
            out[name] = (value.double() + scale * b[name].double()).round().to(value.dtype)
    return out


def pick(params: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the entries of ``params`` whose names are in ``names``, in the order of ``params``."""
    wanted = frozenset(names)
    return {name: value for name, value in params.items() if name in wanted}


def drop(params: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the entries of ``params`` whose names are not in ``names``."""
    unwanted = frozenset(names)
    return {name: value for name, value in params.items() if name not in unwanted}


def under(params: Params, prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names begin with ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(value.shape) for name, value in params.items()}


def numel(params: Params) -> int:
    """Return how many numbers ``params`` holds."""
    return sum(value.numel() for value in params.values())


def same(a: Params, b: Params) -> bool:
    """Return whether both hold the same names and bitwise the same values."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def first_not_finite(parts: Mapping[str, Params]) -> str | None:
    """``"part.name"`` of the first tensor that holds NaN or infinity, or None."""
    for part, params in parts.items():
        for name, value in params.items():
            # A finite sum shows that all terms are finite, in a fifth of the time; as a sum may overflow, check again.
            suspect = value.is_floating_point() and not math.isfinite(float(value.sum()))
            if suspect and not bool(torch.isfinite(value).all()):
                return f"{part}.{name}"
    return None
