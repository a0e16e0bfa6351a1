"""The format of MNIST: what is read, and what damage is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from data_helpers import idx_bytes, real_data, write_mnist

from polyfed.base.errors import DataError
from polyfed.data.readers import idx
from polyfed.data.sources import load_dataset


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_layout(tmp_path: Path, zipped: bool) -> None:
    arrays = write_mnist(tmp_path / "m", zipped=zipped)
    raw = load_dataset("mnist", path=tmp_path / "m", image_size=28)
    assert np.array_equal(raw.x[:12, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(raw.x[12:, 0], arrays["t10k-images-idx3-ubyte"])
    assert raw.y.tolist() == [*range(10), 0, 1, 0, 1, 2, 3, 4]
    assert raw.test_rows is not None
    assert raw.test_rows.tolist() == [12, 13, 14, 15, 16]
    assert raw.mean == pytest.approx((arrays["train-images-idx3-ubyte"].mean() / 255,))
    assert load_dataset("fashion-mnist", path=tmp_path / "m").input_shape == (1, 32, 32)
    assert load_dataset("fashion-mnist", path=tmp_path / "m").flip
    assert not raw.flip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (idx_bytes(np.zeros((3, 4), np.uint8))[:-1], r"holds 11 bytes .* expected 12"),
        (idx_bytes(np.zeros((3, 4), np.uint8)) + b"x", "holds 13 bytes"),
        (b"\0\0\x08\x02\0\0", "inside its header"),
        (b"\0\0\x0d\x02" + bytes(20), "begins with bytes 00000d02; expected 00000802"),
        (idx_bytes(np.zeros(3, np.uint8)), "00000801"),
        (b"", "begins with bytes none"),
        (gzip.compress(idx_bytes(np.zeros((3, 4), np.uint8)), mtime=0)[:-6], "cannot be read"),
        (b"\x1f\x8b" + bytes(30), "cannot be read"),
        (idx_bytes(np.zeros((0, 4), np.uint8)), "more than 0"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        idx.read_idx(path, 2)
    assert str(path) in str(caught.value)


def test_mnist_files_must_be_complete_and_agree(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(4, np.uint8))))
    with pytest.raises(DataError, match=r"5 images but .* 4 labels"):
        load_dataset("mnist", path=tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\[.gz\] not found"):
        load_dataset("mnist", path=tmp_path)


def test_mnist_labels_out_of_range(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    labels = idx_bytes(np.arange(12, dtype=np.uint8))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    with pytest.raises(DataError, match="labels run from 0 to 11"):
        load_dataset("mnist", path=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_idx_labels(name: str) -> None:
    folder = real_data(name)
    for stem, count in (("train", 6000), ("t10k", 1000)):
        path = idx.find_idx(folder, f"{stem}-labels-idx1-ubyte")
        assert path is not None
        per_class = np.bincount(idx.read_idx(path, 1))
        assert per_class.sum() == 10 * count
        assert name == "mnist" or set(per_class) == {count}


def test_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFED_DATA", str(real_data("fashion-mnist").parent))
    dataset = load_dataset("fashion-mnist", image_size=28)
    assert dataset.x.shape == (70000, 1, 28, 28)
    assert dataset.mean == pytest.approx((0.2860,), abs=1e-4)  # as published
    assert dataset.std == pytest.approx((0.3530,), abs=1e-4)
