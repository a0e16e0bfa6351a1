"""A user's own arrays in one .npz file.

Arrays: ``x`` and ``y``, whole numbers or names of classes; optionally ``test`` (N,) bool, ``groups`` and ``units`` (N,)
whole numbers or strings, ``times`` (N,) numbers or dates, ``classes`` names. Where a row may have no label, -1 or "" in
``y`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.data.arrays import coded, numbered, ranked, read_rows
from polyfed.data.dataset import Dataset, Kind
from polyfed.data.readers.cache import read_npz
from polyfed.metrics.catalogue import TaskKind

_KNOWN = ("x", "y", "test", "groups", "units", "times", "classes")


def load_npz(
    path: Path,
    *,
    image_size: int | None = None,
    flip: bool = False,
    kind: Kind | None = None,
    layout: str | None = None,
    task: TaskKind = "classification",
    known: Sequence[str] = (),
    unlabelled: bool = False,
) -> Dataset:
    """The data set of an .npz file.

    ``x`` is uint8 ``(N, H, W)`` or ``(N, C, H, W)`` pixels, or any numbers ``(N, F)`` as features (NaN =
    missing); for other arrays ``kind`` or ``layout`` says what they are. Pixel mean and deviation are taken over the
    rows that are not flagged as test.

    Args:
        path: the file.
        image_size: side in pixels that images are resized to; None keeps them.
        flip: whether a horizontally flipped image keeps its class.
        task: with "regression" ``y`` is any numbers, and there are no ``classes``.
        kind: what ``x`` holds, as in `read_rows`.
        layout: the order of the axes of ``x``, as in `read_rows`.
        known: classes that other sites have; of labels that are numbers without names, the highest of all sites counts.
        unlabelled: whether a row may have no label: -1, or an empty text.

    Raises:
        DataError: the file is damaged, or an array is missing or of a wrong shape or type.
        ConfigError: ``image_size`` for features, or ``kind`` and ``layout`` that contradict each other.
    """
    arrays = read_npz(path)
    if not {"x", "y"} <= arrays.keys() <= set(_KNOWN):
        raise DataError(
            f"{path}: holds the arrays {', '.join(sorted(arrays)) or 'none'}; expected x and y, and no others "
            f"but {', '.join(_KNOWN[2:])}; rename or remove the others"
        )
    rows = read_rows(arrays["x"], path, kind=kind, layout=layout)
    classes = tuple(str(name) for name in arrays["classes"].ravel()) if "classes" in arrays else None
    if task == "regression":
        if classes is not None:
            raise DataError(f"{path}: holds classes; a regression has none: remove the array, or correct data.task")
        classes = ()
    y, classes = _read_y(arrays["y"], path, task, classes, known, unlabelled=unlabelled)
    groups, group_names = numbered(arrays["groups"], len(y), f"{path}: groups") if "groups" in arrays else (None, ())
    return rows.dataset(
        path.stem,
        path,
        image_size=image_size,
        y=torch.from_numpy(y),
        classes=classes,
        test_rows=_read_test(arrays["test"], len(y), path) if "test" in arrays else None,
        groups=groups,
        group_names=group_names,
        flip=flip,
        units=numbered(arrays["units"], len(y), f"{path}: units")[0] if "units" in arrays else None,
        times=ranked(arrays["times"], len(y), f"{path}: times") if "times" in arrays else None,
        unlabelled=unlabelled,
    )


def _read_y(
    y: NDArray[Any],
    path: Path,
    task: TaskKind,
    classes: tuple[str, ...] | None,
    known: Sequence[str],
    *,
    unlabelled: bool,
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return the numbers of the labels, and the names of the classes: the given, those in y, or the numbers."""
    if task == "regression":
        if y.ndim != 1 or y.dtype.kind not in "fiu" or len(y) == 0:
            raise DataError(f"{path}: y has shape {y.shape} and type {y.dtype}; expected (N,) numbers, N above 0")
        return y.astype(np.float64), ()
    if y.ndim == 1 and y.dtype.kind == "f":
        raise DataError(
            f"{path}: y has type {y.dtype}; expected whole numbers or texts, the classes; for numbers to predict set "
            'data.task = "regression"'
        )
    if y.ndim != 1 or y.dtype.kind not in "iuU" or len(y) == 0:
        raise DataError(
            f"{path}: y has shape {y.shape} and type {y.dtype}; expected (N,) whole numbers or texts, N above 0"
        )
    if y.dtype.kind == "U":
        there = (y != "") | (not unlabelled)
        code, names = np.full(len(y), -1, dtype=np.int64), ()
        code[there], names = coded(y[there].tolist())
        if classes is None:
            return code, names
        if unknown := sorted(set(names) - set(classes)):
            raise DataError(f"{path}: y holds {unknown[0]!r}; expected one of its classes {', '.join(classes)}")
        return np.array([*map(classes.index, names), -1])[code].astype(np.int64), classes  # the last is that of -1
    numbers = [int(name) for name in known if name.isascii() and name.isdigit()]
    highest = max([int(y.max()), *numbers])
    return y.astype(np.int64), tuple(map(str, range(highest + 1))) if classes is None else classes


def _read_test(test: NDArray[Any], rows: int, path: Path) -> NDArray[np.int64]:
    if test.shape != (rows,) or test.dtype != np.bool_:
        raise DataError(
            f"{path}: test has shape {test.shape} and type {test.dtype}; expected ({rows},) bool, true for test rows"
        )
    return np.flatnonzero(test).astype(np.int64)
