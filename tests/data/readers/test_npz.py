"""NumPy archives: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.schema import Schema
from polyfed.data.sources import load_dataset


def test_npz_images(tmp_path: Path) -> None:
    x = np.random.default_rng(5).integers(0, 256, (6, 9, 9), dtype=np.uint8)
    flags = np.array([0, 0, 0, 0, 1, 1], dtype=bool)
    groups = np.array(["b", "a", "b", "a", "c", "c"])
    path = tmp_path / "mine.npz"
    np.savez(path, x=x, y=np.array([0, 1, 0, 1, 0, 1]), test=flags, groups=groups, classes=np.array(["no", "yes"]))
    dataset = load_dataset("npz", path=path, flip=True)
    assert (dataset.name, dataset.input_shape, dataset.classes) == ("mine", (1, 9, 9), ("no", "yes"))
    assert dataset.flip
    assert dataset.groups is not None
    assert dataset.groups.tolist() == [1, 0, 1, 0, 2, 2]
    assert dataset.group_names == ("a", "b", "c")
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [4, 5]
    assert dataset.mean == pytest.approx((x[:4].mean() / 255,))  # not of the test rows
    assert load_dataset("npz", path=path, image_size=12).input_shape == (1, 12, 12)


def test_npz_features(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, x=np.array([[1, 2], [3, 4]]), y=np.array([0, 2], dtype=np.uint8))
    dataset = load_dataset("npz", path=path)
    assert dataset.x.tolist() == [[1, 2], [3, 4]]
    assert (dataset.num_classes, dataset.test_rows, dataset.groups, dataset.mean) == (3, None, None, ())
    with pytest.raises(ConfigError, match="image_size"):
        load_dataset("npz", path=path, image_size=32)


def test_npz_labels_may_be_texts(tmp_path: Path) -> None:
    """Catches classes in another order than that of `federated_data`, and labels that classes of the file misname."""
    path, x = tmp_path / "t.npz", np.zeros((4, 3))
    y = np.array(["ill", "well", "ill", "cured"])
    np.savez(path, x=x, y=y)
    dataset = load_dataset("npz", path=path)
    assert (dataset.classes, dataset.y.tolist()) == (("cured", "ill", "well"), [1, 2, 1, 0])
    np.savez(path, x=x, y=np.array(["10", "9", "10", "1"]))
    assert load_dataset("npz", path=path).classes == ("1", "9", "10")
    np.savez(path, x=x, y=y, classes=np.array(["well", "cured", "ill", "dead"]))
    dataset = load_dataset("npz", path=path)
    assert (dataset.classes, dataset.y.tolist()) == (("well", "cured", "ill", "dead"), [2, 0, 2, 1])
    np.savez(path, x=x, y=y)
    agreed = Schema(classes=("well", "ill", "cured", "dead"))
    assert load_dataset("npz", path=path, agreed=agreed).y.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((2, 3))}, "expected x and y"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 1]), "z": np.zeros(1)}, "expected x and y, and no others but test"),
        ({"x": np.zeros((2, 3, 3)), "y": np.array([0, 1])}, "expected uint8 images"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.array([0, 1])}, "channels first"),
        ({"x": np.zeros((2, 3)), "y": np.array([0.0, 1.0])}, "whole numbers"),
        ({"x": np.zeros((2, 3)), "y": np.array(["a", "c"]), "classes": np.array(["a", "b"])}, "y holds 'c'"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 1, 1])}, "one label for each row"),
        ({"x": np.zeros((2, 3)), "y": np.array([-1, 1])}, "labels run from -1"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 1]), "test": np.array([0, 1])}, "bool"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 1]), "test": np.array([True, True])}, "not all rows"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 1]), "groups": np.array([0.5, 1])}, "groups has"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 3]), "classes": np.array(["a", "b"])}, "0 to 1"),
        ({"x": np.array([{}, {}], dtype=object), "y": np.array([0, 1])}, "pickled"),
    ],
)
def test_npz_faults(tmp_path: Path, arrays: dict, says: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=says):
        load_dataset("npz", path=path)


def test_npz_damaged_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_dataset("npz", path=tmp_path / "none.npz")
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((2, 3)), y=np.array([0, 1]))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a.npz: cannot be read"):
        load_dataset("npz", path=path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load_dataset("npz", path=tmp_path / "b.npy")


def test_npz_of_other_kinds(tmp_path: Path) -> None:
    """Catches an option that is not passed on, and an array that is ignored."""
    path = tmp_path / "a.npz"
    y, more = np.array([0, 1, 0, 1]), {"units": np.array(["p", "q", "p", "r"]), "times": np.array([4, 3, 2, 1])}
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (4, 16, 16, 13), dtype=np.uint8)
    np.savez(path, x=x, y=y, **more)
    with pytest.raises(DataError, match='"NCHW" for channels first, 16 channels of 16x13 pixels, or "NHWC"'):
        load_dataset("npz", path=path)
    found = load_dataset("npz", path=path, layout="NHWC")
    assert np.array_equal(found.x.numpy(), x.transpose(0, 3, 1, 2))
    assert (found.units.tolist(), found.times.tolist()) == ([0, 1, 0, 2], [3, 2, 1, 0])
    np.savez(path, x=rng.random((4, 6, 5, 3)), y=y)
    scans = load_dataset("npz", path=path, layout="NHWC", image_size=4)
    assert (scans.kind, scans.input_shape, scans.x.dtype.is_floating_point) == ("image", (3, 4, 4), True)
    np.savez(path, x=rng.random((4, 6, 5)), y=y)
    assert load_dataset("npz", path=path, layout="NCT").channels_first
    np.savez(path, x=rng.integers(0, 99, (4, 6)), y=y)
    assert load_dataset("npz", path=path).kind == "features"
    assert load_dataset("npz", path=path, kind="tokens").x.dtype.is_floating_point is False
    for option in ({"kind": "words"}, {"layout": "CHW"}):
        with pytest.raises(ConfigError, match="expected one of"):
            load_dataset("npz", path=path, **option)


def test_a_row_may_have_no_label_by_option(tmp_path: Path) -> None:
    """Catches a class of its own for rows without a label, and class numbers that they shift."""
    path, x = tmp_path / "t.npz", np.zeros((5, 3))
    for y in (np.array([-1, 2, -1, 0, 1]), np.array(["", "c", "", "a", "b"])):
        np.savez(path, x=x, y=y)
        found = load_dataset("npz", path=path, unlabelled=True)
        assert (found.y.tolist(), found.num_classes, found.num_unlabelled) == ([-1, 2, -1, 0, 1], 3, 2)
    np.savez(path, x=x, y=y, classes=np.array(["c", "b", "a"]))
    assert load_dataset("npz", path=path, unlabelled=True).y.tolist() == [-1, 0, -1, 2, 1]
    np.savez(path, x=x, y=np.full(5, -1))
    with pytest.raises(DataError, match="t: none of its 5 rows has a label"):
        load_dataset("npz", path=path, unlabelled=True)
    with pytest.raises(ConfigError, match="unlabelled: not an option of dataset 'digits'"):
        load_dataset("digits", unlabelled=True)
