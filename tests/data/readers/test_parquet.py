"""CIFAR as Parquet: what is read, and what damage is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import image_file, parquet_cifar, write_parquet

from polyfed.base.errors import DataError
from polyfed.data.readers import parquet
from polyfed.data.sources import load_dataset


@pytest.mark.parametrize("below", ["", "plain_text"])
def testparquet_cifar10(tmp_path: Path, below: str) -> None:
    pixels = parquet_cifar(tmp_path / "p" / below)
    dataset = load_dataset("cifar10", path=tmp_path / "p")
    assert np.array_equal(dataset.x, pixels)
    assert dataset.y.tolist() == [3, 4, 9, 0, 1]
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [3, 4]


def testparquet_cifar100_reads_fine_label(tmp_path: Path) -> None:
    black = image_file(np.zeros((32, 32, 3), np.uint8))
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [black], [77], "fine_label")
    assert load_dataset("cifar100", path=tmp_path).y.tolist() == [77, 77]
    with pytest.raises(DataError, match=r"has columns img, fine_label; expected .* 'label'"):
        load_dataset("cifar10", path=tmp_path)


def test_parquet_lacks_a_shard(tmp_path: Path) -> None:
    parquet_cifar(tmp_path)
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 train parquet files .*; expected 2"):
        load_dataset("cifar10", path=tmp_path)


def test_parquet_labels_out_of_range(tmp_path: Path) -> None:
    parquet_cifar(tmp_path)
    black = image_file(np.zeros((32, 32, 3), np.uint8))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [black], [10])
    with pytest.raises(DataError, match="labels run from 3 to 10"):
        load_dataset("cifar10", path=tmp_path)


@pytest.mark.parametrize(
    ("cell", "label", "says"),
    [
        ("cut", 0, "row 1: the image does not decode"),
        ("grey", 0, "mode L; expected 32x32 in mode RGB"),
        ("small", 0, "16x16 pixels"),
        ("gif", 0, "does not decode"),
        (None, 0, "holds no bytes"),
        ("good", None, "label None"),
    ],
)
def test_damaged_images(tmp_path: Path, cell: str | None, label: int | None, says: str) -> None:
    good = np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    files = {
        "good": image_file(good),
        "cut": image_file(good)[:-200],
        "grey": image_file(good[:, :, 0]),
        "small": image_file(good[:16, :16]),
        "gif": image_file(good[:, :, 0], "GIF"),
        None: None,
    }
    write_parquet(tmp_path / "a.parquet", [files["good"], files[cell]], [0, label])
    with pytest.raises(DataError, match=says) as caught:
        parquet.read_images(tmp_path / "a.parquet", "label", (32, 32))
    assert str(tmp_path / "a.parquet") in str(caught.value)


def test_damaged_parquet(tmp_path: Path) -> None:
    parquet_cifar(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet: cannot be read as parquet"):
        load_dataset("cifar10", path=tmp_path)


def test_images_in_parquet_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_cifar(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'polyfed\[images\]'"):
        load_dataset("cifar10", path=tmp_path)
