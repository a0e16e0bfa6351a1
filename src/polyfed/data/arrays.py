"""From arrays to a data set: what x is, by its type and shape, or by an option where these leave it open."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.catalogue import LAYOUTS
from polyfed.data.dataset import Dataset, Kind, check_digits
from polyfed.data.images import check_image_size, pixel_stats, resize

_DIMENSIONS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"image": (3, 4), "features": (2,), "series": (2, 3), "tokens": (2,)}
)
_MOST_CHANNELS = 4  # grey, two, colour, or colour with alpha: an axis of more may as well be a side
_LEAST_SIDE = 5  # pixels


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as a `Dataset` takes them.

    Args:
        x: the rows.
        kind: what they are.
        channels_first: whether series are ``(N, C, T)``.
    """

    x: Tensor
    kind: Kind
    channels_first: bool = False

    def dataset(
        self,
        name: str,
        where: object,
        *,
        image_size: int | None = None,
        test_rows: NDArray[np.int64] | None = None,
        **fields: Any,
    ) -> Dataset:
        """Return the data set of these rows; pixels get the mean and deviation of the rows that are no test rows.

        Args:
            name: name of the data set.
            where: the source, for messages.
            image_size: side in pixels that images are resized to; None keeps them.
            test_rows: the official test rows.
            fields: the other fields of `Dataset`.

        Raises:
            ConfigError: ``image_size`` for rows that are no images.
            DataError: what `Dataset` refuses.
        """
        x, mean, std = self.x, (), ()
        if self.kind == "image":
            if image_size is not None:
                x = resize(x, check_image_size(image_size, image_size))
            mean, std = pixel_stats(x, None if test_rows is None else np.setdiff1d(np.arange(len(x)), test_rows))
        elif image_size is not None:
            raise ConfigError(f"image_size: got {image_size}, but {where} holds {self.kind}, not images; leave it out")
        return Dataset(
            name,
            x,
            mean=mean,
            std=std,
            test_rows=test_rows,
            declared=self.kind,
            channels_first=self.channels_first,
            **fields,
        )


def read_rows(x: NDArray[Any], where: object, *, kind: Kind | None = None, layout: str | None = None) -> Rows:
    """Return the rows of an array; an error asks for ``layout`` or ``kind`` where the array can be read in two ways.

    Args:
        x: the array, one row for each example along its first axis.
        where: its source, for messages.
        kind: what it holds; None takes features for two axes, and images for more where that is certain.
        layout: a name of ``catalogue.LAYOUTS``: the order of the axes of images or series.

    Raises:
        ConfigError: ``kind`` and ``layout`` contradict each other.
        DataError: a shape or type that fits no kind, or several.
    """
    if layout is not None:
        if kind not in (None, LAYOUTS[layout]):
            raise ConfigError(f"layout: got {layout!r}, a layout of kind {LAYOUTS[layout]!r}, for kind {kind!r}")
        kind = LAYOUTS[layout]
    got = f"{where}: x has shape {x.shape} and type {x.dtype}"
    if x.dtype.kind == "U":
        raise DataError(
            f"{got}; expected numbers: make tokens of texts, whole numbers (N, T) with 0 as padding, and give the "
            'option kind = "tokens"; or save the texts as a csv or parquet file, and name their column in `text`'
        )
    if x.dtype.kind not in "fiub" or x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise DataError(
            f"{got}; expected uint8 images (N, H, W) or (N, C, H, W), numbers (N, F), or with an option layout or kind "
            "floating-point images, series or tokens, none of them empty"
        )
    if kind is None:
        kind = "features" if x.ndim == 2 else "image"
        if x.ndim == 3 and (x.dtype != np.uint8 or not _like_grey_images(x)):
            raise DataError(
                f"{got}; expected uint8 images (N, C, H, W), numbers (N, F), or the option layout: {_3d(x)}"
            )
    if layout is None and kind == "series" and x.ndim == 3:
        raise DataError(f"{got}; expected the option layout: {_3d(x)}")
    if layout is None and kind == "image" and x.ndim == 4 and not _channels_first(x):
        raise DataError(f"{got}; expected the option layout: {_4d(x)}")
    axes = (len(layout),) if layout is not None else _DIMENSIONS[kind]
    if x.ndim not in axes:
        raise DataError(
            f"{got}; expected {' or '.join(map(str, axes))} axes for {f'layout {layout!r}' if layout else ''}"
            f"{'' if layout else f'kind {kind!r}'}; correct the option or the array"
        )
    if kind == "tokens":
        if x.dtype.kind not in "iu" or x.max() > np.iinfo(np.int64).max:
            raise DataError(f"{got}; expected whole numbers below 2**63 for kind 'tokens'; save them as int64")
        return Rows(torch.from_numpy(x.astype(np.int64)), kind)
    if kind == "image":
        pixels = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if layout == "NHWC" else x
        return Rows(torch.from_numpy(_pixels(pixels, where)), kind)
    values = x[:, :, None] if kind == "series" and x.ndim == 2 else x
    first = layout == "NCT"
    axis = 1 if first or kind == "features" else 2
    what = "column {} of x" if kind == "features" else "channel {} of x"
    return Rows(torch.from_numpy(_numbers(values, axis, f"{where}: {what}")), kind, first)


def _like_grey_images(x: NDArray[Any]) -> bool:
    """Whether ``(N, A, B)`` bytes can only be grey images: two sides, of which neither is many times the other."""
    short, long = sorted(x.shape[1:])
    return short >= _LEAST_SIDE and long <= 4 * short


def _channels_first(x: NDArray[Any]) -> bool:
    """Whether ``(N, A, B, C)`` can only be images with channels first."""
    return x.shape[1] <= _MOST_CHANNELS and min(x.shape[2:]) >= _LEAST_SIDE


def _3d(x: NDArray[Any]) -> str:
    _, a, b = x.shape
    return (
        f'layout = "NHW" for grey images of {a}x{b} pixels, "NTC" for series of {a} steps of {b} channels, or "NCT" '
        f"for series of {b} steps of {a} channels"
    )


def _4d(x: NDArray[Any]) -> str:
    _, a, b, c = x.shape
    return (
        f'layout = "NCHW" for channels first, {a} channels of {b}x{c} pixels, or "NHWC" for channels last, {c} '
        f"channels of {a}x{b} pixels"
    )


def _pixels(x: NDArray[Any], where: object) -> NDArray[Any]:
    """Bytes, or numbers as float32, or as float64 where the spread of a channel is small beside its values."""
    x = np.ascontiguousarray(x)
    if x.dtype == np.uint8:
        return x
    with np.errstate(over="ignore"):  # what overflows float32 is refused below
        small = x.astype(np.float32, copy=False)
    wrong = np.flatnonzero(~np.isfinite(small).reshape(len(x), -1).all(axis=1))
    if len(wrong):
        raise DataError(f"{where}: row {wrong[0]} of x has a pixel that is no finite number of float32; correct it")
    channels = small.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
    narrow = channels.std(axis=1, dtype=np.float64) < 1e-3 * np.abs(channels).max(axis=1)
    return small if np.can_cast(x.dtype, np.float32) or not narrow.any() else x.astype(np.float64)


def _numbers(x: NDArray[Any], axis: int, what: str) -> NDArray[Any]:
    """Numbers as float32 where that holds every value of their type, else as float64."""
    if np.can_cast(x.dtype, np.float32):
        return x.astype(np.float32)
    for at, column in enumerate(np.moveaxis(x, axis, 0)):
        check_digits(column.ravel(), what.format(at))
    return x.astype(np.float64)


def numbered(values: NDArray[Any], rows: int, what: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number each different value, such as the group of a row, from 0 in their order; and return their names.

    Args:
        values: ``(rows,)`` whole numbers or strings.
        rows: number of rows.
        what: the array in messages.

    Raises:
        DataError: another shape or type.
    """
    if values.shape != (rows,) or values.dtype.kind not in "iuU":
        raise DataError(
            f"{what} has shape {values.shape} and type {values.dtype}; expected ({rows},) whole numbers or strings"
        )
    names, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), tuple(str(name) for name in names)


def in_order(texts: Iterable[str], *, units: bool = False) -> list[str]:
    """Return different texts in order: whole numbers in their own (9 before 10), anything else by alphabet.

    Args:
        texts: the texts; "01" is another than "1".
        units: where there are both, put whole numbers first. Then the order of two units does not depend on the others,
            and a site that knows its own patients alone orders and splits them as a simulation does.
    """
    known = set(texts)
    digits = {text for text in known if text.isascii() and text.isdigit()}
    if len(digits) < len(known) and not units:
        return sorted(known)
    return sorted(known, key=lambda text: (text not in digits, int(text) if text in digits else 0, text))


def coded(
    texts: Sequence[str], more: Sequence[str] = (), *, units: bool = False
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number texts from 0, whole numbers in their own order (9 before 10) and others by alphabet; and return the names.

    Args:
        texts: the texts, compared as they are: "01" is another than "1".
        more: further names that get a number.
        units: as for `in_order`.
    """
    names = in_order({*texts, *more}, units=units)
    code = {name: number for number, name in enumerate(names)}
    return np.fromiter((code[text] for text in texts), np.int64, len(texts)), tuple(names)


def ranked(values: NDArray[Any], rows: int, what: str) -> NDArray[np.int64]:
    """Return the place of each moment in time, equal for equal moments.

    Args:
        values: ``(rows,)`` numbers, datetime64, or strings: all of them numbers, or all dates as in ISO 8601.
        rows: number of rows.
        what: the array in messages.

    Raises:
        DataError: another shape or type, or a value that is missing or no moment.
    """
    if values.dtype.kind == "U":
        for form in (np.int64, np.float64, "datetime64[us]"):
            with warnings.catch_warnings(), suppress(ValueError, Warning):
                warnings.simplefilter("error")  # numpy warns of a time zone and ignores it
                values = values.astype(form)
                break
    kind = values.dtype.kind
    gone = (kind == "f" and not np.isfinite(values).all()) or (kind == "M" and np.isnat(values).any())
    if values.shape != (rows,) or kind not in "iufM" or gone:
        raise DataError(
            f"{what} has shape {values.shape} and type {values.dtype}; expected ({rows},) numbers or dates as in ISO "
            "8601, such as 2024-05-31T12:00, none of them missing"
        )
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
