"""MedMNIST's layout: what is read, and what is refused. No real file is at hand; these are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.dataset import Dataset
from polyfed.data.sources import load_dataset

SIZES = {"train": 6, "val": 2, "test": 3}


def arrays(*colour: int, labels: int = 1) -> dict[str, Any]:
    """The arrays of a small file."""
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for part, n in SIZES.items():
        out[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28, *colour), dtype=np.uint8)
        out[f"{part}_labels"] = rng.integers(0, 2, (n, labels)).astype(np.uint8)
    out["train_labels"][0] = 1
    return out


def read(folder: Path, found: dict[str, Any], **options: Any) -> Dataset:
    np.savez(folder / "mine.npz", **found)
    return load_dataset("medmnist", path=folder / "mine.npz", **options)


@pytest.mark.parametrize("colour", [(), (3,)])
def test_images_and_classes_are_those_of_the_file(tmp_path: Path, colour: tuple[int, ...]) -> None:
    """Catches axes exchanged, parts in another order, statistics that see test images, and a flip by default."""
    found = arrays(*colour)
    found["test_labels"][0] = 4
    dataset = read(tmp_path, found)
    assert (dataset.name, dataset.input_shape) == ("mine", (len(colour) * 2 + 1, 28, 28))
    assert (dataset.classes, dataset.flip) == (tuple("01234"), False)
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [8, 9, 10]
    images = np.concatenate([found[f"{part}_images"] for part in SIZES])
    expected = torch.from_numpy(images[:, None] if not colour else images.transpose(0, 3, 1, 2).copy())
    assert torch.equal(dataset.x, expected)
    assert dataset.y.tolist() == np.concatenate([found[f"{part}_labels"][:, 0] for part in SIZES]).tolist()
    assert dataset.mean == pytest.approx(tuple((expected[:8].double().mean(dim=(0, 2, 3)) / 255).tolist()))
    assert read(tmp_path, found, image_size=14, flip=True).input_shape[1:] == (14, 14)


def test_validation_images_are_training_rows_or_left_out(tmp_path: Path) -> None:
    found = arrays()
    dataset = read(tmp_path, found, validation=False)
    assert len(dataset) == 9
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [6, 7, 8]
    assert dataset.x[6, 0].tolist() == found["test_images"][0].tolist()


def test_one_of_several_labels_is_a_set_of_two_classes(tmp_path: Path) -> None:
    """Catches another column, and a file of several labels that is read as if it had one."""
    found = arrays(labels=3)
    with pytest.raises(DataError, match=r"train_labels has 3 columns: several labels .* label = 0 }, up to 2"):
        read(tmp_path, found)
    dataset = read(tmp_path, found, label=2)
    assert dataset.classes == ("0", "1")
    assert dataset.y[:6].tolist() == found["train_labels"][:, 2].tolist()
    for wrong in (3, "effusion"):
        with pytest.raises(ConfigError, match="3 columns, expected a number from 0 to 2"):
            read(tmp_path, found, label=wrong)
    found["val_labels"][1, 2] = 3
    with pytest.raises(DataError, match="val_labels has values up to 3 in column 2; label takes a column of 0 and 1"):
        read(tmp_path, found, label=2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"val_labels": None},
            r"val_labels not found; it holds test_images, .*; for your own arrays use dataset = \"npz\"",
        ),
        ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, r"\(6, 28, 28, 28\) .*3-D images, .* cannot be read"),
        ({"train_images": np.zeros((6, 28, 28, 1), np.uint8)}, r"for colour, N above 0; drop the last axis"),
        ({"train_images": np.zeros((6, 28, 28, 4), np.uint8)}, r"for colour, N above 0$"),
        (
            {"train_images": np.zeros((6, 28, 28))},
            r"train_images has shape \(6, 28, 28\) and type float64; expected uint8",
        ),
        ({"test_images": np.zeros((3, 64, 64), np.uint8)}, r"unlike shapes: train \(28, 28\), .* test \(64, 64\)"),
        (
            {"test_labels": np.zeros((4, 1), np.uint8)},
            r"test_labels has shape \(4, 1\) .*expected \(3, 1\) whole numbers",
        ),
        ({"test_labels": np.zeros((3, 1))}, r"test_labels .*float64; expected \(3, 1\) whole numbers from 0"),
        ({"train_labels": -np.ones((6, 1), np.int64)}, "train_labels .*whole numbers from 0"),
        ({"train_labels": np.array([None] * 6)}, "without pickled objects"),
    ],
)
def test_what_is_not_the_layout_is_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    found = {name: value for name, value in {**arrays(), **change}.items() if value is not None}
    with pytest.raises(DataError, match=match):
        read(tmp_path, found)
