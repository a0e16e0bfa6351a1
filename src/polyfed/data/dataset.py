"""A data set in memory, checked when it is made; all of its rows, or some, have labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyfed.base.errors import DataError
from polyfed.data.columns import Column
from polyfed.metrics.catalogue import TaskKind

#: What the rows of a data set are. "image": pixels; "features": a number per column of a table; "series": numbers per
#: channel over time; "tokens": whole numbers that stand for words or codes, and are not standardised.
Kind: TypeAlias = Literal["image", "features", "series", "tokens"]

_FLOATS = (torch.float32, torch.float64)
#: Kind -> dimensions of x, its types, and both in words.
_FORMS: Mapping[str, tuple[int, tuple[torch.dtype, ...], str]] = {
    "image": (4, (torch.uint8, *_FLOATS), "(N, C, H, W) torch.uint8, torch.float32 or torch.float64 pixels"),
    "features": (2, _FLOATS, "(N, F) torch.float32 or torch.float64 features"),
    "series": (3, _FLOATS, "(N, T, C), or with channels_first (N, C, T), torch.float32 or torch.float64 numbers"),
    "tokens": (2, (torch.int64,), "(N, T) torch.int64 tokens"),
}

_LOOK = 65_536  # rows of a column of fractions that are checked: sorting a million rows takes a tenth of a second


def check_digits(values: NDArray[Any], what: str) -> None:
    """Refuse a column whose distinct values become equal when it is centred and rounded to float32, as batches are.

    All whole numbers must stay distinct: they are counts, times or codes. A tenth of the distinct fractions may become
    equal to others, as their last digits are noise.

    Args:
        values: ``(N,)`` numbers of any type; NaN = missing.
        what: the name of the column in the message.

    Raises:
        DataError: values would become equal; the text names two of them.
    """
    there = values[np.isfinite(values)]
    whole = bool((there == np.floor(there)).all())
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 0.0)
    if not len(there) or (whole and high - low < 2**23 and max(-low, high) < 2**53):
        return  # float32 tells halves apart up to 2**23, and float64 all whole numbers up to 2**53
    distinct = np.unique(there if whole else there[:_LOOK])
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = (distinct.astype(np.float64) - there.mean(dtype=np.float64)).astype(np.float32)
    same = rounded[1:] == rounded[:-1]
    if same.sum() > (0 if whole else 0.1 * len(distinct)):
        first = int(np.argmax(same))
        raise DataError(
            f"{what}: {distinct[first]} and {distinct[first + 1]} would become equal, as would {same.sum()} of "
            f"{len(distinct)} distinct values: networks compute in float32, which keeps 24 bits of the distance from "
            "the mean; split the column in two, take its logarithm, correct an outlier, or leave the column out"
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, features, series or tokens with labels; official test rows and natural groups where the source has them.

    Args:
        name: the name of the data set in configurations and reports.
        x: one row for each example, as read, neither normalised nor standardised: ``(N, C, H, W)`` pixels, uint8, or
            float32 or float64 of any range; ``(N, F)`` float32 or float64 features, NaN = missing; ``(N, T, C)`` or
            ``(N, C, T)`` float32 or float64 series, likewise; ``(N, T)`` int64 tokens.
        y: ``(N,)`` int64 class numbers in ``[0, num_classes)``, or float64 targets of a regression. With
            ``unlabelled``, -1 marks a row without a label.
        classes: the name of each class; empty for a regression.
        mean: per channel, of uint8 pixels / 255 or of floating-point pixels as they are; empty for other kinds.
        std: likewise.
        test_rows: int64 rows of the official test split; None if the source has none.
        groups: ``(N,)`` int64 group number of each row for the natural partition; None if there is none.
        group_names: the name of each group number; may be empty.
        flip: whether a horizontally flipped image keeps its class.
        columns: what each column of a table was taken for, in the order of the file; empty if it is no table.
        target_offset: for a regression: networks learn (y - offset) / scale.
        target_scale: likewise; above 0.
        files: SHA-256 of each file that the data set was read from, by name; empty if it comes from no file.
        declared: what the rows are; None takes "image" for ``(N, C, H, W)`` uint8 and "features" for ``(N, F)`` floats.
        channels_first: whether series are ``(N, C, T)``.
        units: ``(N,)`` int64 number of the patient or device that a row belongs to, for ``split = "groups"``; None if
            the source has none.
        times: ``(N,)`` int64 place of each row in time, equal for rows of one moment, for ``split = "time"``; None if
            rows are in order of time.
        bucket: of tokens that end in padding, 0: batches are as long as their longest row, up to a multiple of
            ``bucket``; 0 gives all batches the full length.
        tokenizer: of tokens of texts: the JSON text of the tokenizer that made them; empty if there is none. Tokens
            of two data sets mean alike only where it is equal.
        unlabelled: whether -1 in ``y`` marks a row without a label, which is trained on and never tested on; without
            it -1 is refused, as it may be a class. Not for a regression.

    Raises:
        DataError: a field of the wrong type or length, or a value out of range.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_rows: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    flip: bool = False
    columns: tuple[Column, ...] = ()
    target_offset: float = 0.0
    target_scale: float = 1.0
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    declared: Kind | None = None
    channels_first: bool = False
    units: NDArray[np.int64] | None = None
    times: NDArray[np.int64] | None = None
    bucket: int = 0
    tokenizer: str = field(default="", repr=False)
    unlabelled: bool = False

    def __post_init__(self) -> None:
        """Refuse fields on which a later step would fail."""
        self._check_x()
        self._check_y()
        if self.test_rows is not None:
            self._check_test_rows(self.test_rows)
        if self.groups is not None:
            self._check_groups(self.groups)
        for name in ("units", "times"):
            self._check_column(name)

    def __len__(self) -> int:
        """Number of rows, N."""
        return self.y.shape[0]  # len() of a tensor takes ten times as long

    @property
    def task(self) -> TaskKind:
        """Whether the labels are classes or numbers to predict."""
        return "regression" if self.y.is_floating_point() else "classification"

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not all of them occur; 1 for a regression, the one output of a network."""
        return len(self.classes) or 1

    @property
    def strata(self) -> NDArray[np.int64]:
        """``(N,)`` class numbers, by which rows are dealt and split, -1 for a row without a label.

        All are 0 for a regression, which splits at random.
        """
        return self.y.cpu().numpy() if self.task == "classification" else np.zeros(len(self), dtype=np.int64)

    @cached_property
    def num_unlabelled(self) -> int:
        """Number of rows without a label."""
        return int((self.y < 0).sum()) if self.unlabelled else 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row: ``(C, H, W)``, ``(F,)``, ``(T, C)`` or ``(T,)``."""
        return tuple(self.x.shape[1:])

    @property
    def kind(self) -> Kind:
        """What the rows are."""
        return self.declared or ("image" if self.x.dtype == torch.uint8 else "features")

    @property
    def feature_columns(self) -> tuple[tuple[str, int], ...]:
        """Name and number of features of each column of a table, in the order of ``x``; empty if it is no table."""
        return tuple((column.name, column.width) for column in self.columns if column.kind in ("number", "category"))

    @property
    def is_image(self) -> bool:
        """Whether rows are images."""
        return self.kind == "image"

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Type of a network's input: int64 for tokens; None for numbers, whose type the run chooses."""
        return torch.int64 if self.kind == "tokens" else None

    @property
    def is_standardised(self) -> bool:
        """Whether each client standardises the rows by its own training rows: features and series."""
        return self.kind in ("features", "series")

    @cached_property
    def channels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels of pixels, ``(C, 1, 1)`` each, where ``x`` is."""
        kind = self.x.dtype if self.x.is_floating_point() else None
        mean, std = (
            torch.tensor(values, device=self.x.device, dtype=kind)[:, None, None] for values in (self.mean, self.std)
        )
        return mean, std

    @cached_property
    def lengths(self) -> Tensor:
        """``(N,)`` columns of each row up to the last token that is no padding; on the CPU, wherever ``x`` is."""
        places = torch.arange(1, self.x.shape[1] + 1, device=self.x.device)
        return torch.cat([((piece != 0) * places).amax(dim=1) for piece in self.x.split(_LOOK)]).cpu()

    @cached_property
    def extremes(self) -> Tensor:
        """The first row, of ``(2, *input_shape)``, that holds the smallest value of all, and that with the largest."""
        size = math.prod(self.input_shape)
        return self.x[[int(self.x.argmin()) // size, int(self.x.argmax()) // size]].cpu()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that a run computes with: rows, labels, parts, groups and settings."""
        found = hashlib.sha256(
            repr((self.classes, self.mean, self.std, self.flip, self.kind, self.channels_first)).encode()
        )
        arrays = [self.x.cpu().numpy(), self.y.cpu().numpy(), self.test_rows, self.groups, self.units, self.times]
        for array in arrays:
            if array is not None:
                found.update(f"{array.dtype.str}{array.shape}".encode())
                found.update(np.ascontiguousarray(array).reshape(-1).data)
            found.update(b";")
        if self.bucket:
            found.update(f"bucket {self.bucket}".encode())
        return found.hexdigest()

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with ``x`` and ``y`` on a device, so that batches need no transfer."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def _check_x(self) -> None:
        shape = tuple(self.x.shape)
        usual = {(4, torch.uint8): "image", (2, torch.float32): "features", (2, torch.float64): "features"}
        kind = self.declared or usual.get((self.x.dim(), self.x.dtype), "")
        form = _FORMS.get(kind)
        if form is None or self.x.dim() != form[0] or self.x.dtype not in form[1] or 0 in shape:
            if kind in _FORMS:
                expected = f"{_FORMS[kind][2]} for kind {kind!r}, none of them empty; convert x"
            else:
                expected = (
                    "(N, C, H, W) torch.uint8 pixels or (N, F) torch.float32 or torch.float64 features, none of them "
                    f"empty; convert x, or declare its kind, one of {', '.join(get_args(Kind))},"
                )
            raise DataError(
                f"{self.name}: x has shape {shape} and type {self.x.dtype}; expected {expected} before making the "
                "Dataset"
            )
        channels = shape[1] if self.is_image else 0
        if len(self.mean) != channels or len(self.std) != channels:
            raise DataError(
                f"{self.name}: got {len(self.mean)} means and {len(self.std)} standard deviations for x of "
                f"shape {shape}; expected {channels} of each (one per channel of an image, none for other kinds)"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or any(s <= 0 for s in self.std):
            raise DataError(
                f"{self.name}: got mean {self.mean} and std {self.std}; expected finite numbers, with std above 0"
            )
        if not self.x.is_floating_point():
            return
        for start in range(0, len(self.x), _LOOK):  # a million rows at once would need their memory again
            piece = self.x[start : start + _LOOK]
            wrong = (~piece.isfinite() if self.is_image else torch.isinf(piece)).flatten(1).any(dim=1)
            if bool(wrong.any()):
                what = f"an infinite {'feature' if kind == 'features' else 'value'}; mark missing values as NaN instead"
                if self.is_image:
                    what = "a pixel that is not a finite number; correct or remove the image"
                raise DataError(f"{self.name}: row {start + int(wrong.nonzero()[0])} has {what}")

    def _check_y(self) -> None:
        if self.y.dtype == torch.float64 and tuple(self.y.shape) == (len(self.x),):
            self._check_targets()
            return
        if self.y.dtype != torch.int64 or tuple(self.y.shape) != (len(self.x),):
            raise DataError(
                f"{self.name}: y has shape {tuple(self.y.shape)} and type {self.y.dtype}; expected "
                f"({len(self.x)},) torch.int64, one label for each row of x, or torch.float64 for a regression"
            )
        low, high = int(self.y.min()), int(self.y.max())
        if self.unlabelled and low == high == -1:
            raise DataError(
                f"{self.name}: none of its {len(self)} rows has a label; expected some, as each client predicts and is "
                "tested by labelled rows; label a few rows of every client"
            )
        if self.num_classes < 2:
            raise DataError(f"{self.name}: got {self.num_classes} classes {self.classes}; expected at least 2")
        if low < (-1 if self.unlabelled else 0) or high >= self.num_classes:
            marks = "; if -1 marks rows without a label, say so by unlabelled = true" * (low == -1)
            raise DataError(
                f"{self.name}: labels run from {low} to {high}; expected 0 to {self.num_classes - 1} for "
                f"{self.num_classes} classes; renumber the labels or name more classes{marks}"
            )

    def _check_targets(self) -> None:
        if self.classes:
            raise DataError(f"{self.name}: got {len(self.classes)} classes for targets of a regression; expected none")
        if self.unlabelled:
            raise DataError(f"{self.name}: unlabelled is for classes; a regression needs the target of every row")
        if not bool(self.y.isfinite().all()):
            row = int((~self.y.isfinite()).nonzero()[0])
            raise DataError(f"{self.name}: the target of row {row} is {float(self.y[row])}; expected finite numbers")
        if not (math.isfinite(self.target_offset) and 0 < self.target_scale < math.inf):
            raise DataError(
                f"{self.name}: got target_offset {self.target_offset} and target_scale {self.target_scale}; expected "
                "finite numbers, the scale above 0"
            )

    def _check_test_rows(self, rows: NDArray[np.int64]) -> None:
        if (
            rows.dtype != np.int64
            or rows.ndim != 1
            or not 0 < len(rows) < len(self)
            or rows.min() < 0
            or rows.max() >= len(self)
            or len(np.unique(rows)) != len(rows)
        ):
            raise DataError(
                f"{self.name}: test_rows has shape {rows.shape} and type {rows.dtype}; expected different "
                f"int64 row numbers from 0 to {len(self) - 1}, at least one and not all rows"
            )
        if self.num_unlabelled and (gone := rows[self.strata[rows] < 0]).size:
            raise DataError(
                f"{self.name}: {gone.size} of the {len(rows)} official test rows have no label, such as row {gone[0]}; "
                "a test needs labels: remove these rows, or flag them as training rows"
            )

    def _check_groups(self, groups: NDArray[np.int64]) -> None:
        if groups.dtype != np.int64 or groups.shape != (len(self),):
            raise DataError(
                f"{self.name}: groups has shape {groups.shape} and type {groups.dtype}; expected "
                f"({len(self)},) int64, one group for each row"
            )
        low, high = int(groups.min()), int(groups.max())
        if low < 0 or (self.group_names and high >= len(self.group_names)):
            raise DataError(
                f"{self.name}: group numbers run from {low} to {high}; expected 0 to "
                f"{len(self.group_names) - 1 if self.group_names else 'any'}; renumber or name more groups"
            )

    def _check_column(self, name: str) -> None:
        values = getattr(self, name)
        if values is not None and (values.dtype != np.int64 or values.shape != (len(self),)):
            raise DataError(
                f"{self.name}: {name} has shape {values.shape} and type {values.dtype}; expected ({len(self)},) int64, "
                "a number for each row"
            )
