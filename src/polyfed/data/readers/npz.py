"""A user's own arrays in one .npz file.

Arrays: ``x`` and ``y``; optionally ``test`` (N,) bool, ``groups`` (N,) whole numbers or strings, ``classes``
names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.dataset import Dataset, check_digits
from polyfed.data.images import check_image_size, pixel_stats, resize
from polyfed.data.readers.cache import read_npz
from polyfed.metrics.catalogue import TaskKind

_KNOWN = ("x", "y", "test", "groups", "classes")


def load_npz(
    path: Path, *, image_size: int | None = None, flip: bool = False, task: TaskKind = "classification"
) -> Dataset:
    """The data set of an .npz file.

    ``x`` is uint8 ``(N, H, W)`` or ``(N, C, H, W)`` pixels, or any numbers ``(N, F)`` as features (NaN =
    missing). Pixel mean and deviation are taken over the rows that are not flagged as test.

    Args:
        path: the file.
        image_size: side in pixels that images are resized to; None keeps them.
        flip: whether a horizontally flipped image keeps its class.
        task: with "regression" ``y`` is any numbers, and there are no ``classes``.

    Raises:
        DataError: the file is damaged, or an array is missing or of a wrong shape or type.
        ConfigError: ``image_size`` for features.
    """
    arrays = read_npz(path)
    if not {"x", "y"} <= arrays.keys() <= set(_KNOWN):
        raise DataError(
            f"{path}: holds the arrays {', '.join(sorted(arrays)) or 'none'}; expected x and y, and no others "
            f"but {', '.join(_KNOWN[2:])}; rename or remove the others"
        )
    x, y = _read_x(arrays["x"], path), _read_y(arrays["y"], path, task)
    test_rows = _read_test(arrays["test"], len(y), path) if "test" in arrays else None
    groups, group_names = _read_groups(arrays["groups"], len(y), path) if "groups" in arrays else (None, ())
    classes = tuple(str(name) for name in arrays["classes"].ravel()) if "classes" in arrays else None
    if task == "regression":
        if classes is not None:
            raise DataError(f"{path}: holds classes; a regression has none: remove the array, or correct data.task")
        classes = ()
    mean, std = (), ()
    if x.dim() == 4:
        if image_size is not None:
            x = resize(x, check_image_size(image_size, image_size))
        mean, std = pixel_stats(x, None if test_rows is None else np.setdiff1d(np.arange(len(x)), test_rows))
    elif image_size is not None:
        raise ConfigError(f"image_size: got {image_size}, but {path} holds features, not images; leave it out")
    return Dataset(
        name=path.stem,
        x=x,
        y=torch.from_numpy(y),
        classes=tuple(str(c) for c in range(int(y.max(initial=-1)) + 1)) if classes is None else classes,
        mean=mean,
        std=std,
        test_rows=test_rows,
        groups=groups,
        group_names=group_names,
        flip=flip,
    )


def _read_x(x: NDArray[Any], path: Path) -> torch.Tensor:
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[:, None]
    if x.dtype == np.uint8 and x.ndim == 4:
        if x.shape[1] > 4 and x.shape[3] <= 4:
            raise DataError(
                f"{path}: x has shape {x.shape}; expected channels first, (N, C, H, W); save x.transpose(0, 3, 1, 2)"
            )
        return torch.from_numpy(np.ascontiguousarray(x))
    if x.ndim == 2 and x.dtype.kind in "fiub":
        if np.can_cast(x.dtype, np.float32):
            return torch.from_numpy(x.astype(np.float32))
        for at, column in enumerate(x.T):
            check_digits(column, f"{path}: column {at} of x")
        return torch.from_numpy(x.astype(np.float64))
    raise DataError(
        f"{path}: x has shape {x.shape} and type {x.dtype}; expected uint8 images (N, H, W) or (N, C, H, W), "
        "or numbers (N, F)"
    )


def _read_y(y: NDArray[Any], path: Path, task: TaskKind) -> NDArray[Any]:
    if task == "regression":
        if y.ndim != 1 or y.dtype.kind not in "fiu" or len(y) == 0:
            raise DataError(f"{path}: y has shape {y.shape} and type {y.dtype}; expected (N,) numbers, N above 0")
        return y.astype(np.float64)
    if y.ndim == 1 and y.dtype.kind == "f":
        raise DataError(
            f"{path}: y has type {y.dtype}; expected whole numbers, the classes; for numbers to predict set "
            'data.task = "regression"'
        )
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) == 0:
        raise DataError(f"{path}: y has shape {y.shape} and type {y.dtype}; expected (N,) whole numbers, N above 0")
    return y.astype(np.int64)


def _read_test(test: NDArray[Any], rows: int, path: Path) -> NDArray[np.int64]:
    if test.shape != (rows,) or test.dtype != np.bool_:
        raise DataError(
            f"{path}: test has shape {test.shape} and type {test.dtype}; expected ({rows},) bool, true for test rows"
        )
    return np.flatnonzero(test).astype(np.int64)


def _read_groups(groups: NDArray[Any], rows: int, path: Path) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    if groups.shape != (rows,) or groups.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: groups has shape {groups.shape} and type {groups.dtype}; expected ({rows},) whole "
            "numbers or strings"
        )
    names, numbers = np.unique(groups, return_inverse=True)
    return numbers.astype(np.int64), tuple(str(name) for name in names)
