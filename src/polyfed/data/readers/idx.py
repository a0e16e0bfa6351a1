"""The IDX format of MNIST and its relatives, plain or gzipped.

An IDX file is: two zero bytes, a type byte (8 = uint8), the number of dimensions, each dimension as a
big-endian uint32, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import DataError

#: Files of the MNIST layout, without ".gz": images and labels of the training part, then of the test part.
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array of a uint8 IDX file with ``ndim`` dimensions.

    Raises:
        DataError: the file is missing, not IDX, of another number of dimensions, truncated or too long.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); the file is damaged or missing, fetch it again") from error
    expected = bytes((0, 0, 8, ndim))
    if raw[:4] != expected:
        raise DataError(
            f"{path}: begins with bytes {raw[:4].hex() or 'none'}; expected {expected.hex()} (IDX, uint8, "
            f"{ndim} dimensions); is it another file under this name?"
        )
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise DataError(f"{path}: ends inside its header, after {len(raw)} of {start} bytes; fetch it again")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    if len(raw) - start != math.prod(shape) or 0 in shape:
        raise DataError(
            f"{path}: holds {len(raw) - start} bytes of values; expected {math.prod(shape)} (more than 0) "
            f"for shape {shape}; the file is truncated or damaged, fetch it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def find_idx(folder: Path, name: str) -> Path | None:
    """Return ``folder/name`` if it exists, else ``folder/name.gz``, else None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_mnist_layout(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """The four files of the MNIST layout: images ``(N, 1, H, W)``, labels ``(N,)``, number of training rows.

    Raises:
        DataError: a file is missing or damaged, or images and labels disagree.
    """
    found = {name: path for name in IDX_NAMES if (path := find_idx(folder, name)) is not None}
    missing = [f"{name}[.gz]" for name in IDX_NAMES if name not in found]
    if missing:
        raise DataError(
            f"{folder}: {', '.join(missing)} not found; expected the four IDX files of the MNIST layout; add "
            "them or correct the path"
        )
    paths = list(found.values())
    arrays = [read_idx(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True)]
    for at in (0, 2):
        if len(arrays[at]) != len(arrays[at + 1]):
            raise DataError(
                f"{paths[at]} has {len(arrays[at])} images but {paths[at + 1].name} has {len(arrays[at + 1])} labels; "
                "the files do not belong together, fetch both again"
            )
    images, labels = arrays[::2], arrays[1::2]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise DataError(
            f"{folder}: training images are {images[0].shape[1:]} pixels but test images "
            f"{images[1].shape[1:]}; the files do not belong together"
        )
    return np.concatenate(images)[:, None], np.concatenate(labels).astype(np.int64), len(images[0])
