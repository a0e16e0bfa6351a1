"""What a client sent, before it is aggregated: what must not be used raises MessageError, and says why.

`check_numbers` holds for every upload. `check_counterparts` is what `Algorithm.check_upload` does where an algorithm
does not say better what it expects; `check_like` and `check_tensor` are for those that do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.core.message import Message, Record
from polyfed.models.split import SplitModel


def check_numbers(up: Message) -> None:
    """Every number is finite, and every ``num_examples`` is positive.

    Raises:
        MessageError: one is not; says which.
    """
    for where, value in _leaves(up, type(up).__name__):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise MessageError(f"{where} holds a number that is not finite")
        if isinstance(value, float) and not math.isfinite(value):
            raise MessageError(f"{where} is {value}")
        if where.endswith(".num_examples") and not (isinstance(value, int) and 0 < value < 2**53):
            raise MessageError(f"{where} is {value}, expected a positive number")


def check_counterparts(down: Message | None, up: Message) -> None:
    """Each mapping of tensors has the names, shapes and types of one that the client received.

    Raises:
        MessageError: it has not, or a tensor was sent that nothing received can be compared with.
    """
    received = [tensors for _, tensors in _tensors(down, "") if not isinstance(tensors, Tensor)]
    for where, tensors in _tensors(up, type(up).__name__):
        names = set[str]() if isinstance(tensors, Tensor) else tensors.keys()
        like = max(received, key=lambda other: (other.keys() == names, len(other.keys() & names)), default=None)
        if isinstance(tensors, Tensor) or like is None or not (names & like.keys() or names == like.keys()):
            raise MessageError(
                f"{where} has no counterpart in what was sent, by which its shapes could be checked; if it belongs to "
                "the algorithm, the algorithm's check_upload is to say what is expected"
            )
        check_like(where, tensors, like)


def check_like(where: str, params: Params, like: Params) -> None:
    """``params`` has the names, shapes and types of ``like``.

    Raises:
        MessageError: it has not; ``where`` says what it is.
    """
    if params.keys() != like.keys():
        odd = sorted(map(repr, params.keys() ^ like.keys()))
        raise MessageError(f"{where} has other names than what was sent: {', '.join(odd[:3])}")
    for name, value in params.items():
        if value.shape != like[name].shape or value.dtype != like[name].dtype:
            raise MessageError(
                f"{where}[{name!r}] has shape {tuple(value.shape)} and type {value.dtype}; what was sent has "
                f"{tuple(like[name].shape)} and {like[name].dtype}"
            )


def check_tensor(where: str, value: Tensor, *shape: int | range, dtype: torch.dtype | None = None) -> None:
    """A tensor has this shape and type.

    Args:
        where: what it is.
        value: what came.
        shape: the length of each dimension; a range allows any of it.
        dtype: None is the type of the run's weights; what a bf16 run's autocast made is to be sent as that, too.

    Raises:
        MessageError: it has not.

    Example:
        >>> check_tensor("prototypes", torch.zeros(3, 8), range(11), 8, dtype=torch.float32)
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    fits = len(value.shape) == len(shape) and all(
        got in want if isinstance(want, range) else got == want for got, want in zip(value.shape, shape, strict=True)
    )
    if not fits or value.dtype != dtype:
        told = ", ".join(f"{n.start} to {n.stop - 1}" if isinstance(n, range) else str(n) for n in shape)
        raise MessageError(
            f"{where} has shape {tuple(value.shape)} and type {value.dtype}; expected ({told}) and {dtype}"
        )


def check_counts(where: str, counts: Tensor, num_classes: int) -> None:
    """``counts`` is (num_classes,), of the type of the run's weights: numbers of examples by class, some above 0.

    Raises:
        MessageError: it is not.
    """
    check_tensor(where, counts, num_classes)
    if not (bool((counts >= 0).all()) and bool(counts.any())):
        raise MessageError(f"{where} are {counts.tolist()}; expected numbers of examples, some above 0")


def check_features(model: SplitModel, pairs: Iterable[tuple[Tensor, Tensor]], most: int) -> None:
    """Each pair is a batch of the extractor's outputs and the classifier's inputs as ``model`` has them.

    Args:
        model: a network cut in three.
        pairs: s_in (B, *s_in_shape) and s_out (B, rep_dim).
        most: the largest B.

    Raises:
        MessageError: one is of another shape or type, or of none or too many examples.
    """
    for s_in, s_out in pairs:
        check_tensor("s_in", s_in, range(1, most + 1), *model.s_in_shape)
        check_tensor("s_out", s_out, len(s_in), *model.s_out_shape)


def _fields(record: Record) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(record):  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
        yield field.name, getattr(record, field.name)


def _inside(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """What a record, mapping or tuple holds, one level down."""
    if isinstance(value, Record):
        yield from ((f"{where}.{name}", inner) for name, inner in _fields(value))
    elif isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        yield from ((f"{where}[{name!r}]", inner) for name, inner in entries.items())
    elif isinstance(value, tuple):
        items = cast(tuple[Any, ...], value)
        yield from ((f"{where}[{place}]", inner) for place, inner in enumerate(items))


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Record | Mapping | tuple):
        yield where, value
    for place, inner in _inside(value, where):
        yield from _leaves(inner, place)


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Params | Tensor]]:
    """All mappings of tensors in a record, however deep, and the tensors that are in none."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping) and all(isinstance(inner, Tensor) for inner in value.values()):
        yield where, cast(Params, value)
    else:
        for place, inner in _inside(value, where):
            yield from _tensors(inner, place)
