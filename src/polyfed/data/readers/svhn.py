"""SVHN, house numbers on photographs, cropped digits: MATLAB 5 files with pixels ``X`` and labels ``y``.

scipy reads them as arrays; unlike a pickle, such a file holds no instructions, so that no code of it runs.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.data.dataset import Dataset
from polyfed.data.images import pixel_stats, resize

_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"

# What scipy raises on a damaged or foreign file, or one of MATLAB 7.3.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    NotImplementedError,
    zlib.error,
)


def svhn_names(*, extra: bool) -> tuple[str, ...]:
    """Names of the files, the test part last.

    Args:
        extra: whether the 531,131 easier images are training rows, too.
    """
    return (_TRAIN, _EXTRA, _TEST) if extra else (_TRAIN, _TEST)


def load_svhn(place: Path, side: int, *, extra: bool = False) -> Dataset:
    """The data set of the folder ``place``: colour images, digit 0 as class 0, the official test rows.

    Args:
        place: the folder.
        side: side of the images in pixels.
        extra: whether the images of extra_32x32.mat are training rows, behind those of train_32x32.mat.

    Raises:
        DataError: a file is missing, damaged or another one.
    """
    files = [place / name for name in svhn_names(extra=extra)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise DataError(
            f"{place}: {', '.join(missing)} not found; expected a folder of {', '.join(path.name for path in files)}: "
            "the cropped digits (format 2) of SVHN; add them or correct the path"
        )
    parts = [read_svhn(path) for path in files]
    n_train = sum(len(y) for _, y in parts[:-1])
    pixels = resize(torch.from_numpy(np.concatenate([x for x, _ in parts])), side)
    y = np.concatenate([y for _, y in parts])
    return Dataset(
        "svhn",
        pixels,
        torch.from_numpy(y),
        tuple("0123456789"),
        *pixel_stats(pixels[:n_train]),
        test_rows=np.arange(n_train, len(y), dtype=np.int64),
    )


def read_svhn(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels ``(N, 3, 32, 32)`` and labels ``(N,)`` from 0 to 9 of one file, in which 10 stands for 0.

    Raises:
        DataError: the file is damaged, or holds other arrays.
    """
    from scipy.io import loadmat  # takes a tenth of a second
    from scipy.io.matlab import MatReadError

    _check_compressed(path)
    try:
        arrays: dict[str, Any] = loadmat(path, variable_names=("X", "y"))
    except (*_DAMAGED, MatReadError) as error:
        raise DataError(
            f"{path}: cannot be read as a file of MATLAB 5 ({error}); it is damaged or another file; fetch it again"
        ) from error
    x, y = arrays.get("X"), arrays.get("y")
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
        raise DataError(f"{path}: lacks the arrays X and y; expected pixels and labels of SVHN's cropped digits")
    if x.ndim != 4 or x.dtype != np.uint8 or x.shape[:3] != (32, 32, 3) or not x.size:
        raise DataError(f"{path}: X has shape {x.shape} and type {x.dtype}; expected uint8 (32, 32, 3, N), N above 0")
    labels = _labels(y, x.shape[3], path)
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), labels


def _check_compressed(path: Path) -> None:
    """Raise DataError unless the file's first array is compressed, as in SVHN's: then damage fails zlib's checksum.

    A damaged file that is not compressed can make scipy's reader read beyond its buffers.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER + 4)
    if len(start) < _HEADER + 4 or start[_HEADER - 2 : _HEADER] not in (b"IM", b"MI"):
        raise DataError(f"{path}: cannot be read as a file of MATLAB 5; it is damaged or another file; fetch it again")
    order = "little" if start[_HEADER - 2 : _HEADER] == b"IM" else "big"
    if int.from_bytes(start[_HEADER:], order) != _COMPRESSED:
        raise DataError(
            f"{path}: cannot be read as a file of SVHN: its arrays are not compressed, as those of the published files "
            "are, so damage would go unnoticed; fetch it again, or save it with compression"
        )


#: Bytes before a MATLAB 5 file's first array, and the type of a compressed array.
_HEADER, _COMPRESSED = 128, 15


def _labels(y: NDArray[Any], rows: int, path: Path) -> NDArray[np.int64]:
    if y.shape not in ((rows, 1), (1, rows)) or y.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: y has shape {y.shape} and type {y.dtype}; expected ({rows}, 1) numbers, as X has images"
        )
    labels = y.ravel().astype(np.float64)
    wrong = np.flatnonzero(~np.isin(labels, np.arange(1, 11)))
    if len(wrong):
        raise DataError(
            f"{path}: label {wrong[0]} of y is {labels[wrong[0]]:g}; expected 1 to 10, which stands for digit 0"
        )
    return (labels % 10).astype(np.int64)
