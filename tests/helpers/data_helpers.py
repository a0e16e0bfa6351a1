"""Small data sets and files for the data tests."""

from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from polyfed.data.dataset import Dataset


def image_dataset(rows: int = 40, classes: int = 4, *, official: int = 0, flip: bool = False, **fields) -> Dataset:
    """Random 8x8 colour images with labels 0, 1, 2, ... in turn; the last ``official`` rows are the test split."""
    x = np.random.default_rng(0).integers(0, 256, (rows, 3, 8, 8), dtype=np.uint8)
    return Dataset(
        **{
            "name": "tiny",
            "x": torch.from_numpy(x),
            "y": torch.arange(rows) % classes,
            "classes": tuple(map(str, range(classes))),
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
            "test_rows": np.arange(rows - official, rows) if official else None,
            "flip": flip,
            **fields,
        }
    )


def feature_dataset(x: list[list[float]] | np.ndarray, y: list[int], **fields) -> Dataset:
    """A data set of features."""
    values = torch.as_tensor(np.asarray(x), dtype=torch.float32)
    names = tuple(map(str, range(max(y) + 1)))
    return Dataset(
        **{"name": "table", "x": values, "y": torch.tensor(y), "classes": names, "mean": (), "std": (), **fields}
    )


def labelled(y: np.ndarray, classes: int, **fields) -> Dataset:
    """A data set where only the labels matter."""
    names = tuple(map(str, range(classes)))
    return Dataset(
        **{
            "name": "labels",
            "x": torch.zeros(len(y), 1),
            "y": torch.from_numpy(np.asarray(y, dtype=np.int64)),
            "classes": names,
            "mean": (),
            "std": (),
            **fields,
        }
    )


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array in the IDX format."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, train: int = 12, test: int = 5, *, zipped: bool = True, side: int = 28) -> dict:
    """The four files of the MNIST layout with random pixels; returns the arrays by file name."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for stem, count in (("train", train), ("t10k", test)):
        arrays[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        content = idx_bytes(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return arrays


def image_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An ``(H, W, 3)`` uint8 image (or ``(H, W)``) as the bytes of a file."""
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def real_data(folder: str) -> Path:
    """A folder of real data, or the test is skipped."""
    root = Path(os.environ.get("POLYFED_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (root / folder).is_dir():
        pytest.skip(f"no {folder} in {root}; set POLYFED_DATA")
    return root / folder


def some_labels(rows: int = 1200, classes: int = 6, *, official: int = 0, clients: int = 8) -> Dataset:
    """Random labels and groups; the last ``official`` rows are the test split."""
    rng = np.random.default_rng(7)
    return labelled(
        rng.integers(0, classes, rows),
        classes,
        test_rows=np.arange(rows - official, rows) if official else None,
        groups=rng.integers(0, clients, rows),
    )


def write_parquet(path: Path, images: list, labels: list, label: str = "label") -> None:
    """Images, as the bytes of files, and their labels: one shard."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [None if i is None else {"bytes": i, "path": "a.png"} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": pa.array(cells, kind), label: pa.array(labels)}), path)


def parquet_cifar(folder: Path) -> np.ndarray:
    """CIFAR of three and two rows in three shards; its pixels."""
    pixels = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    files = [image_file(p) for p in pixels]
    write_parquet(folder / "train-00000-of-00002.parquet", files[:2], [3, 4])
    write_parquet(folder / "train-00001-of-00002.parquet", files[2:3], [9])
    write_parquet(folder / "test-00000-of-00001.parquet", files[3:], [0, 1])
    return pixels.transpose(0, 3, 1, 2)
