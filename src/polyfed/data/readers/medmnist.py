"""MedMNIST's layout: an .npz file with images and labels of the parts train, val and test.

``train_images`` (N, H, W) grey or (N, H, W, 3) colour, uint8, and ``train_labels`` (N, 1), whole numbers; likewise
``val_`` and ``test_``. Nothing in the file is run: pickled objects are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.arrays import read_rows
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cache import Arrays, read_npz

_PARTS = ("train", "val", "test")
_NAMES = tuple(f"{part}_{what}" for part in _PARTS for what in ("images", "labels"))


def load_medmnist(
    path: Path,
    *,
    image_size: int | None = None,
    flip: bool = False,
    label: int | str | None = None,
    validation: bool = True,
) -> Dataset:
    """The data set of one file: images as they are stored, classes by their numbers, the part test as test rows.

    Args:
        path: the file.
        image_size: side in pixels that images are resized to; None keeps them.
        flip: whether a horizontally flipped image keeps its class.
        label: number of a column of labels, from 0, where the file has several: a set of two classes, with the label
            and without it, 1 and 0 in the column.
        validation: whether images of the part val are training rows, behind those of train; else they are left out.

    Raises:
        ConfigError: ``label`` is no column of the file.
        DataError: the file is damaged, lacks an array, or holds an array of another shape or type; images are 3-D; or
            there are several labels for each image and ``label`` is None, or values other than 0 and 1 in its column.
    """
    arrays = read_npz(path)
    if missing := [name for name in _NAMES if name not in arrays]:
        raise DataError(
            f"{path}: {', '.join(missing)} not found; it holds {', '.join(sorted(arrays)) or 'nothing'}; expected "
            f'{", ".join(_NAMES)}, the layout of MedMNIST; for your own arrays use dataset = "npz"'
        )
    parts = [part for part in _PARTS if validation or part != "val"]
    images = [_images(arrays[f"{part}_images"], f"{path}: {part}_images") for part in parts]
    if len({found.shape[1:] for found in images}) > 1:
        shapes = ", ".join(f"{part} {found.shape[1:]}" for part, found in zip(parts, images, strict=True))
        raise DataError(f"{path}: the parts have images of unlike shapes: {shapes}; expected one shape")
    y = np.concatenate([_labels(arrays, part, len(x), path, label) for part, x in zip(parts, images, strict=True)])
    rows = read_rows(np.concatenate(images), path, layout="NHW" if images[0].ndim == 3 else "NHWC")
    return rows.dataset(
        path.stem,
        path,
        image_size=image_size,
        test_rows=np.arange(len(y) - len(images[-1]), len(y), dtype=np.int64),
        y=torch.from_numpy(y),
        classes=tuple(map(str, range(max(2, int(y.max()) + 1)))),
        flip=flip,
    )


def _images(x: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Refuse what is no stack of grey or colour images."""
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3) or x.dtype != np.uint8 or 0 in x.shape:
        hint = ""
        if x.ndim == 4 and x.shape[3] == 1:
            hint = "; drop the last axis, of a single channel"
        elif x.ndim == 5 or (x.ndim == 4 and x.shape[3] > 4):
            hint = "; 3-D images, of the files named ...mnist3d, cannot be read"
        raise DataError(
            f"{where} has shape {x.shape} and type {x.dtype}; expected uint8, (N, H, W) for grey images or "
            f"(N, H, W, 3) for colour, N above 0{hint}"
        )
    return x


def _labels(arrays: Arrays, part: str, rows: int, path: Path, column: int | str | None) -> NDArray[np.int64]:
    """The class numbers of a part, (N,)."""
    y, where = arrays[f"{part}_labels"], f"{path}: {part}_labels"
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or y.dtype.kind not in "iu" or len(y) != rows or not y.shape[1] or int(y.min()) < 0:
        raise DataError(
            f"{where} has shape {y.shape} and type {y.dtype}; expected ({rows}, 1) whole numbers from 0, one for "
            "each image"
        )
    columns = y.shape[1]
    if column is None:
        if columns > 1:
            raise DataError(
                f"{where} has {columns} columns: several labels for an image, as ChestMNIST has, and a task of polyfed "
                f"has one; choose one with options = {{ label = 0 }}, up to {columns - 1}, for a set of two classes"
            )
        return y[:, 0].astype(np.int64)
    if not isinstance(column, int) or not 0 <= column < columns:
        raise ConfigError(
            f"label: got {column!r}; {where} has {columns} columns, expected a number from 0 to {columns - 1}"
        )
    if int(y[:, column].max()) > 1:
        raise DataError(
            f"{where} has values up to {y[:, column].max()} in column {column}; label takes a column of 0 and 1, "
            "without and with the label; leave label out where the column says which of several classes it is"
        )
    return y[:, column].astype(np.int64)
