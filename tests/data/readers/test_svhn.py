"""SVHN: the arrays of its MATLAB files, what belongs to which part, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from polyfed.base.errors import ConfigError, DataError
from polyfed.data import sources
from polyfed.data.images import pixel_stats
from polyfed.data.readers.download import RemoteFile
from polyfed.data.sources import file_digests, load_dataset

LABELS = {"train": [10, 1, 9, 3], "test": [2, 10], "extra": [7, 8, 10]}


def write(folder: Path, **changes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The three files with random pixels, those of ``changes`` with other arrays; returns the pixels."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for part, labels in LABELS.items():
        pixels[part] = rng.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        arrays = {"X": pixels[part], "y": np.array(labels, np.uint8)[:, None]} | changes.get(part, {})
        savemat(folder / f"{part}_32x32.mat", arrays, do_compression=True)
    return pixels


@pytest.mark.parametrize("extra", [False, True])
def test_images_labels_and_parts(tmp_path: Path, extra: bool) -> None:
    """Catches sides that change places, a ten that is a class of its own, and extra images that are tested."""
    pixels = write(tmp_path)
    dataset = load_dataset("svhn", path=tmp_path, **({"extra": True} if extra else {}))
    parts = ("train", "extra", "test") if extra else ("train", "test")
    assert dataset.y.tolist() == [label % 10 for part in parts for label in LABELS[part]]
    assert dataset.classes[0] == "0"
    rows = [(part, row) for part in parts for row in range(len(LABELS[part]))]
    for n, (part, row) in enumerate(rows):
        image = pixels[part][:, :, :, row]  # (H, W, C)
        assert (dataset.x[n, 2].numpy() == image[:, :, 2]).all()
    assert dataset.test_rows is not None
    assert [rows[n][0] for n in dataset.test_rows] == ["test", "test"]
    assert (dataset.mean, dataset.std) == pixel_stats(dataset.x[: -len(LABELS["test"])])
    assert not dataset.flip
    assert dataset.x.dtype == torch.uint8
    assert set(dataset.files) == {f"{part}_32x32.mat" for part in parts}
    assert load_dataset("svhn", path=tmp_path, image_size=16).input_shape == (3, 16, 16)


def test_it_is_found_or_fetched_without_the_extra_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gigabyte that nobody asked for, and a file that is not fetched because others are there."""
    write(tmp_path / "data" / "svhn")
    monkeypatch.setenv("POLYFED_DATA", str(tmp_path / "data"))
    assert len(load_dataset("svhn")) == 6
    monkeypatch.delenv("POLYFED_DATA")
    fetched: list[str] = []

    def fetch(file: RemoteFile, folder: Path) -> None:
        fetched.append(file.name)
        if not (folder / file.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "svhn" / file.name).rename(folder / file.name)

    monkeypatch.setattr(sources, "fetch", fetch)
    assert len(load_dataset("svhn")) == 6
    assert fetched == ["train_32x32.mat", "test_32x32.mat"]
    assert len(load_dataset("svhn", extra=True)) == 9
    assert fetched[2:] == ["train_32x32.mat", "extra_32x32.mat", "test_32x32.mat"]
    assert len(file_digests("svhn", options={"extra": True})) == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((4, 32, 32, 3), np.uint8)}, r"X has shape \(4, 32, 32, 3\) and type uint8; expected .*N\)"),
        ({"X": np.zeros((32, 32, 3, 4))}, "X has .*type float64; expected uint8"),
        ({"X": {"a": 1}}, "X has shape"),
        ({"y": np.ones((3, 1))}, r"y has shape \(3, 1\) .*; expected \(4, 1\)"),
        ({"y": np.array([[1], [2], [0], [3]])}, "label 2 of y is 0; expected 1 to 10, which stands for digit 0"),
        ({"y": np.array([[1], [2], [3], [11]])}, "label 3 of y is 11"),
        ({"y": np.array([[1.5], [2], [3], [4]])}, r"label 0 of y is 1\.5"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    write(tmp_path, train=arrays)
    with pytest.raises(DataError, match=f"train_32x32.mat: {message}"):
        load_dataset("svhn", path=tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "test_32x32.mat"
    whole = path.read_bytes()
    for content in (b"", b"no matrix", whole[:100], whole[: len(whole) // 2], whole[:3000], whole[:128] + b"\1" * 500):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"test_32x32\.mat: (cannot be read as|lacks the)"):
            load_dataset("svhn", path=tmp_path)
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + whole[128:])
    with pytest.raises(DataError, match=r"cannot be read as a file of MATLAB 5"):
        load_dataset("svhn", path=tmp_path)
    savemat(path, {"images": np.zeros(3)})
    with pytest.raises(DataError, match="its arrays are not compressed"):
        load_dataset("svhn", path=tmp_path)
    savemat(path, {"images": np.zeros(3)}, do_compression=True)
    with pytest.raises(DataError, match="lacks the arrays X and y"):
        load_dataset("svhn", path=tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"test_32x32.mat not found; expected a folder of train_32x32.mat, test"):
        load_dataset("svhn", path=tmp_path)
    with pytest.raises(ConfigError, match="extra: got 1; expected true or false"):
        load_dataset("svhn", path=tmp_path, extra=1)
