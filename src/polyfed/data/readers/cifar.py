"""The binary version of CIFAR-10 and CIFAR-100: a folder of .bin files, or the official tar.gz.

A record is one label byte (CIFAR-100: coarse label, then fine label) and 3,072 pixel bytes, channels first.
The "python version" holds pickled objects and is refused: unpickling runs code from the file.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import DataError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarLayout:
    """Which files make up a CIFAR data set.

    Args:
        train: names of the training files, in order.
        test: name of the test file.
        label_bytes: label bytes per record; the last one is the class.
        num_classes: number of classes.
        archive: name of the official archive.
    """

    train: tuple[str, ...]
    test: str
    label_bytes: int
    num_classes: int
    archive: str


CIFAR10 = CifarLayout(
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, 10, "cifar-10-binary.tar.gz"
)
CIFAR100 = CifarLayout(("train.bin",), "test.bin", 2, 100, "cifar-100-binary.tar.gz")


def decode_records(raw: bytes, where: str, layout: CifarLayout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels ``(N, 3, 32, 32)`` and labels ``(N,)`` of the bytes of one .bin file.

    Raises:
        DataError: not a whole number of records, none, or a label out of range.
    """
    record = layout.label_bytes + _PIXELS
    if not raw or len(raw) % record:
        raise DataError(
            f"{where}: {len(raw)} bytes; expected a multiple of {record} (one record), more than 0; the file "
            "is truncated or damaged, fetch it again"
        )
    table = np.frombuffer(raw, dtype=np.uint8).reshape(-1, record)
    y = table[:, layout.label_bytes - 1].astype(np.int64)
    if y.max() >= layout.num_classes:
        bad = int(np.argmax(y >= layout.num_classes))
        raise DataError(
            f"{where}: record {bad} has label {y[bad]}; expected 0 to {layout.num_classes - 1}; the file is "
            "damaged or belongs to another data set"
        )
    return table[:, layout.label_bytes :].reshape(-1, 3, 32, 32), y


def read_cifar_folder(folder: Path, layout: CifarLayout) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Pixels, labels and number of training rows of a folder of .bin files.

    Raises:
        DataError: a file is missing, truncated or damaged.
    """
    files: dict[str, bytes] = {}
    for name in (*layout.train, layout.test):
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{folder / name}: cannot be read ({error}); expected {', '.join((*layout.train, layout.test))} in "
                "this folder"
            ) from error
    return _decoded(files, str(folder), layout)


def read_cifar_archive(archive: Path, layout: CifarLayout) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Pixels, labels and number of training rows of the official tar.gz; nothing is unpacked to disk.

    Raises:
        DataError: the archive is damaged, lacks a file, or is the pickled "python version".
    """
    wanted = {*layout.train, layout.test}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = Path(member.name).name
                handle = tar.extractfile(member) if name in wanted and member.isfile() else None
                if handle is not None:
                    files[name] = handle.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{archive}: cannot be read as a tar archive ({error}); fetch it again") from error
    missing = sorted(wanted - files.keys())
    if missing:
        raise DataError(
            f"{archive}: {', '.join(missing)} not found inside; expected the binary version, "
            f"{layout.archive} (the python version holds pickled objects and is not read)"
        )
    return _decoded(files, str(archive), layout)


def _decoded(
    files: dict[str, bytes], where: str, layout: CifarLayout
) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    return joined(
        [decode_records(files[name], f"{where}/{name}", layout) for name in (*layout.train, layout.test)],
        len(layout.train),
    )


def joined(
    parts: Sequence[tuple[NDArray[np.uint8], NDArray[np.int64]]], train: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Pixels, labels and number of training rows of files of which the first ``train`` are for training."""
    return (
        np.concatenate([x for x, _ in parts]),
        np.concatenate([y for _, y in parts]),
        sum(len(y) for _, y in parts[:train]),
    )
