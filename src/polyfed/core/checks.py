"""Checks of a client's upload before it is aggregated; a fault raises MessageError with the reason.

`check_numbers` applies to every upload. `check_counterparts` is the default of `Algorithm.check_upload`; `check_like`
and `check_tensor` are for algorithms with checks of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.core.message import Message, Record


def check_numbers(up: Message) -> None:
    """Check that every number is finite, and every ``num_examples`` is positive.

    Raises:
        MessageError: a number is not; the text names it.
    """
    for where, value in _leaves(up, type(up).__name__):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise MessageError(f"{where} holds a number that is not finite; expected finite numbers")
        if isinstance(value, float) and not math.isfinite(value):
            raise MessageError(f"{where} is {value}; expected a finite number")
        if where.endswith(".num_examples") and not (isinstance(value, int) and 0 < value < 2**53):
            raise MessageError(f"{where} is {value}, expected a positive number")


def check_counterparts(down: Message | None, up: Message) -> None:
    """Check that each mapping of tensors has the names, shapes and types of a mapping that the client received.

    Raises:
        MessageError: a mapping has not, or no received mapping can be compared with a tensor.
    """
    received = [tensors for _, tensors in _tensors(down, "") if not isinstance(tensors, Tensor)]
    for where, tensors in _tensors(up, type(up).__name__):
        names = set[str]() if isinstance(tensors, Tensor) else tensors.keys()
        like = max(received, key=lambda other: (other.keys() == names, len(other.keys() & names)), default=None)
        if isinstance(tensors, Tensor) or like is None or not (names & like.keys() or names == like.keys()):
            raise MessageError(
                f"{where} has no counterpart in the message to the client, by which its shapes could be checked; if it "
                "belongs to the algorithm, define the expected shapes in the algorithm's check_upload"
            )
        check_like(where, tensors, like)


def check_like(where: str, params: Params, like: Params) -> None:
    """Check that ``params`` has the names, shapes and types of ``like``.

    Raises:
        MessageError: it has not; ``where`` names it in the text.
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
    """Check that a tensor has this shape and type.

    Args:
        where: the name of the tensor in the text.
        value: the received tensor.
        shape: the length of each dimension; a range allows any length in it.
        dtype: the type; None is the type of the run's weights, to which results of a bf16 run's autocast are converted.

    Raises:
        MessageError: the shape or the type differs.

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
    """Check that ``counts`` (num_classes,), in the type of the weights, are numbers of examples by class, not all 0.

    Raises:
        MessageError: the shape or the type differs, or the numbers are no such counts.
    """
    check_tensor(where, counts, num_classes)
    if not (bool((counts >= 0).all()) and bool(counts.any())):
        raise MessageError(f"{where} are {counts.tolist()}; expected numbers of examples, at least one above 0")


def check_classes(where: str, classes: Tensor, num_classes: int) -> None:
    """Check that ``classes`` (num_classes,), bool, says which classes a client has, at least one.

    Raises:
        MessageError: the shape or the type differs, or there is none.
    """
    check_tensor(where, classes, num_classes, dtype=torch.bool)
    if not bool(classes.any()):
        raise MessageError(f"{where} names no class; expected at least one")


def check_features(
    s_in_shape: Sequence[int],
    s_out_shape: Sequence[int],
    pairs: Iterable[tuple[Tensor, Tensor]],
    most: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Check that each pair is a batch of an extractor's outputs and a classifier's inputs.

    Args:
        s_in_shape: the shape of one output of the extractor, as it is sent.
        s_out_shape: the shape of one input of the classifier.
        pairs: s_in (B, *s_in_shape) and s_out (B, *s_out_shape).
        most: the largest B.
        dtype: as of `check_tensor`.

    Raises:
        MessageError: a tensor has another shape or type, or has no or too many examples.
    """
    for s_in, s_out in pairs:
        check_tensor("s_in", s_in, range(1, most + 1), *s_in_shape, dtype=dtype)
        check_tensor("s_out", s_out, len(s_in), *s_out_shape, dtype=dtype)


def _inside(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the values in a record, mapping or tuple, one level down."""
    if isinstance(value, Record):
        fields = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
        yield from ((f"{where}.{field.name}", getattr(value, field.name)) for field in fields)
    elif isinstance(value, Mapping):
        yield from ((f"{where}[{name!r}]", inner) for name, inner in cast(Mapping[Any, Any], value).items())
    elif isinstance(value, tuple):
        yield from ((f"{where}[{place}]", inner) for place, inner in enumerate(cast(tuple[Any, ...], value)))


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Record | Mapping | tuple):
        yield where, value
    for place, inner in _inside(value, where):
        yield from _leaves(inner, place)


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Params | Tensor]]:
    """Yield all mappings of tensors in a record, at any depth, and the tensors outside such mappings."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping) and all(isinstance(inner, Tensor) for inner in value.values()):
        yield where, cast(Params, value)
    else:
        for place, inner in _inside(value, where):
            yield from _tensors(inner, place)
