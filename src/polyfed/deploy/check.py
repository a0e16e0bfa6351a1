"""Replies that must not be aggregated: numbers that are not finite, tensors that do not fit what was sent.

What an algorithm sends and receives is known by name only, so the rule is one of names: a mapping of tensors that
shares names with one that the client received must have exactly its names, shapes and types.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from polyfed.message import Message, Record


def fault(down: Message | None, up: Message | None, expected: bool = True) -> str:
    """Why a reply must not be used; "" if nothing is wrong with it.

    Args:
        down: what the client received.
        up: what it sent.
        expected: whether anything was expected of it.
    """
    if up is None:
        return "nothing was sent where others sent something" if expected else ""
    for where, value in _leaves(up, type(up).__name__):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return f"{where} holds a number that is not finite"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{where} is {value}"
        if where.endswith(".num_examples") and not (isinstance(value, int) and 0 < value < 2**53):
            return f"{where} is {value}, expected a positive number"
    received = [tensors for _, tensors in _mappings(down, "")] if down is not None else []
    for where, tensors in _mappings(up, type(up).__name__):
        like = max(received, key=lambda other: len(other.keys() & tensors.keys()), default={})
        if not like.keys() & tensors.keys():
            continue  # names of its own, such as classes: nothing was sent that they could be compared with
        if like.keys() != tensors.keys():
            odd = sorted(like.keys() ^ tensors.keys())
            return f"{where} has other names than what was sent: {', '.join(odd[:3])}"
        for name, value in tensors.items():
            if value.shape != like[name].shape or value.dtype != like[name].dtype:
                return (
                    f"{where}[{name!r}] has shape {tuple(value.shape)} and type {value.dtype}; what was sent has "
                    f"{tuple(like[name].shape)} and {like[name].dtype}"
                )
    return ""


def _fields(record: Record) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(record):  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
        yield field.name, getattr(record, field.name)


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Record):
        for name, inner in _fields(value):
            yield from _leaves(inner, f"{where}.{name}")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{where}[{name!r}]")
    elif isinstance(value, tuple):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{place}]")
    else:
        yield where, value


def _mappings(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """All mappings of tensors in a record, however deep."""
    if isinstance(value, Record):
        for name, inner in _fields(value):
            yield from _mappings(inner, f"{where}.{name}")
    elif isinstance(value, Mapping):
        if value and all(isinstance(inner, Tensor) for inner in value.values()):
            yield where, value
        else:
            for name, inner in value.items():
                yield from _mappings(inner, f"{where}[{name!r}]")
    elif isinstance(value, tuple):
        for place, inner in enumerate(value):
            yield from _mappings(inner, f"{where}[{place}]")
