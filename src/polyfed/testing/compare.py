"""Records compared leaf by leaf: bitwise, by distance, and by a hash that shows whether a value was written to.

`differences` and `digest` look at the fields, so they serve where one processor computes the same twice. `furthest`
looks at what records stand for, as what rounds otherwise may choose another of several equal forms.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from polyfed.core.message import Record


def leaves(value: Any, *, per_client: bool = True, meant: bool = False, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, number and string of a record with its path, such as ``("model.fc1.weight", tensor)``.

    Args:
        value: a record, or a mapping or tuple of what a record may hold.
        per_client: descend into mappings by integer too, which hold one entry per client.
        meant: of what records stand for (`Record.stands_for`), not of their fields.
        path: of ``value`` itself.
    """
    if isinstance(value, Record) and meant:
        value = value.stands_for()
    if isinstance(value, Record):
        inside = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]  # pyright: ignore[reportArgumentType]
    elif isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        # By name, not in the order of making: a mapping means the same in any order.
        inside = [(key, entries[key]) for key in sorted(entries, key=str) if per_client or isinstance(key, str)]
    elif isinstance(value, tuple):
        inside = list(enumerate(cast(tuple[Any, ...], value)))
    else:
        yield path, value
        return
    for name, inner in inside:
        yield from leaves(inner, per_client=per_client, meant=meant, path=f"{path}.{name}" if path else str(name))


def tensors(value: Any) -> dict[str, Tensor]:
    """The floating-point tensors of a record by path."""
    return {path: leaf for path, leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def bits(leaf: Any) -> bytes:
    """A leaf's type and value as bytes; for tensors shape and content, so that NaN equals NaN and 0.0 is not -0.0."""
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {leaf!r}".encode()
    raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + raw


def digest(value: Any) -> str:
    """A hash of every leaf with its path."""
    whole = hashlib.sha256()
    for path, leaf in leaves(value):
        whole.update(path.encode() + b"\0" + bits(leaf) + b"\0")
    return whole.hexdigest()


def differences(a: Any, b: Any) -> list[str]:
    """The paths at which two records are not bitwise the same, with how far tensors are apart; empty if none."""
    left, right = dict(leaves(a)), dict(leaves(b))
    out = [f"{path} is in one of them only" for path in sorted(left.keys() ^ right.keys())]
    out += [
        f"{path}: {_shown(left[path])} and {_shown(right[path])}, {apart(left[path], right[path]):.1e} apart"
        for path in left.keys() & right.keys()
        if bits(left[path]) != bits(right[path])
    ]
    return sorted(out)


def _shown(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def apart(a: Any, b: Any) -> float:
    """The distance of two leaves over the norm of the second; infinite where they cannot be compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not a.is_floating_point():
            return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else math.inf
        gap, norm = float((a.double() - b.double()).norm()), float(b.double().norm())
    elif isinstance(a, float) and isinstance(b, float):
        gap, norm = abs(a - b), abs(b)
    else:
        return 0.0 if type(a) is type(b) and a == b else math.inf
    if gap == 0.0:
        return 0.0
    return gap / norm if norm and math.isfinite(gap) else math.inf


def furthest(a: Any, b: Any, *, per_client: bool = True) -> tuple[float, str]:
    """The largest distance of what two records stand for, and at which leaf; infinite where the paths differ."""
    left, right = (dict(leaves(record, per_client=per_client, meant=True)) for record in (a, b))
    if left.keys() != right.keys():
        return math.inf, f"{min(left.keys() ^ right.keys())}, which is in one of them only"
    return max(((apart(left[path], right[path]), path) for path in left), default=(0.0, "nowhere"))
