"""Folders of image files: what is read, in which order, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import image_file

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.readers import pictures
from polyfed.data.schema import Schema
from polyfed.data.sources import load_dataset

RNG = np.random.default_rng(0)


def put(path: Path, shape: tuple[int, ...] = (6, 6, 3)) -> np.ndarray:
    """Write an image of random pixels; returns them."""
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_file(pixels))
    return pixels


def put_all(folder: Path, *names: str) -> dict[str, np.ndarray]:
    return {name: put(folder / name) for name in names}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))


def test_folders_are_classes(tmp_path: Path) -> None:
    """Catches classes in the order of the disk, 10 before 9, an empty class that is forgotten, and swapped axes."""
    root = tmp_path / "own"
    made = put_all(root, "10/a.png", "9/b.PNG", "9/a.png")
    (root / "11").mkdir()
    (root / "README.txt").write_text("hello")
    (root / "9" / ".DS_Store").write_text("junk")
    found = load_dataset("images", path=root, flip=True)
    assert (found.classes, found.y.tolist(), found.flip) == (("9", "10", "11"), [1, 0, 0], True)
    assert (found.groups, found.test_rows, found.kind) == (None, None, "image")
    expected = np.stack([made[name] for name in ("10/a.png", "9/a.png", "9/b.PNG")]).transpose(0, 3, 1, 2)
    assert np.array_equal(found.x.numpy(), expected)
    assert found.mean == pytest.approx(expected.mean(axis=(0, 2, 3)) / 255)


def test_clients_and_an_official_split(tmp_path: Path) -> None:
    put_all(tmp_path / "c", "b/cat/0.png", "b/dog/0.png", "a/dog/0.png")
    found = load_dataset("images", path=tmp_path / "c")
    assert (found.group_names, found.groups.tolist()) == (("a", "b"), [0, 1, 1])
    assert found.y.tolist() == [1, 0, 1]
    put_all(tmp_path / "s", "train/cat/0.png", "test/cat/0.png", "train/dog/0.png")
    found = load_dataset("images", path=tmp_path / "s")
    assert (found.classes, found.groups, found.test_rows.tolist()) == (("cat", "dog"), None, [0])
    put_all(tmp_path / "both", "train/a/cat/0.png", "test/a/dog/0.png", "train/b/dog/0.png")
    found = load_dataset("images", path=tmp_path / "both")
    assert (found.group_names, found.groups.tolist(), found.test_rows.tolist()) == (("a", "b"), [0, 0, 1], [0])


def test_a_table_says_class_client_unit_and_time(tmp_path: Path) -> None:
    """Catches classes that are merged as numbers, another order than the table's, and a name that is guessed."""
    made = put_all(tmp_path / "i", "x/1.png", "x/2.png", "y/1.png")
    table = tmp_path / "i" / "who.csv"
    table.write_text(
        "\ufeffpicture,dx,site,patient,day\n2,01,s,p,2024-02-01\ny/1.png,1,s,q,2024-01-01\nx\\1,1,t,p,2024-02-01\n"
    )
    names = {"file": "picture", "label": 1, "group": "site", "unit": "patient", "time": -1}
    found = load_dataset("images", path=tmp_path / "i", table="who.csv", **names)
    assert (found.classes, found.y.tolist()) == (("01", "1"), [0, 1, 1])
    assert (found.group_names, found.groups.tolist()) == (("s", "t"), [0, 0, 1])
    assert (found.units.tolist(), found.times.tolist()) == ([0, 1, 0], [1, 0, 1])
    assert np.array_equal(found.x[0].numpy(), made["x/2.png"].transpose(2, 0, 1))
    table.write_text("file,label,client\nx/1.png,a,s\nx/2.png,b,t\ny/1.png,b,s\n")
    assert load_dataset("images", path=tmp_path / "i", table="who.csv").groups.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("file,dx\nx/1.png,a\n", "no column 'label' for option 'label'; the columns are file, dx"),
        ("file,label\n1.png,a\n", "line 2: '1.png' is the name of x/1.png and y/1.png"),
        ("file,label\nx/3.png,a\n", "line 2: 'x/3.png' is no image"),
        ("file,label\nx/1.png,\n", "line 2: 'label' is empty"),
        ("file,label\nx/1.png\n", "line 2: 1 cells; expected 2"),
        ("file,label\nx/1.png,a\nx/1,b\n", "line 3: x/1.png is in line 2 already"),
        ("file,label\nx/1.png,a\n", "no line for x/2.png and 1 more images"),
        ("", "the columns are none"),
    ],
)
def test_faults_of_a_table(tmp_path: Path, rows: str, says: str) -> None:
    put_all(tmp_path / "i", "x/1.png", "x/2.png", "y/1.png")
    (tmp_path / "i" / "t.csv").write_text(rows)
    with pytest.raises(DataError, match=re.escape(says)):
        load_dataset("images", path=tmp_path / "i", table="t.csv")


def test_images_become_equal_on_request_only(tmp_path: Path) -> None:
    """Catches a resize or a conversion in silence, and an error that does not name both files."""
    root = tmp_path / "i"
    put(root / "a" / "0.png", (6, 6, 3))
    put(root / "b" / "0.png", (6, 8, 3))
    with pytest.raises(DataError, match=r"b/0.png has 8x6 pixels, and .*a/0.png has 6x6; set data.image_size"):
        load_dataset("images", path=root)
    assert load_dataset("images", path=root, image_size=5).input_shape == (3, 5, 5)
    put(root / "b" / "0.png", (6, 6))
    with pytest.raises(DataError, match=r"b/0.png is grey, and .*a/0.png is in colour; set the option channels"):
        load_dataset("images", path=root)
    assert load_dataset("images", path=root, channels=1).input_shape == (1, 6, 6)
    assert load_dataset("images", path=root, channels=3).input_shape == (3, 6, 6)


def _faulty(root: Path, how: str) -> None:
    image = pytest.importorskip("PIL.Image")
    path = root / "b" / "0.png"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "text":
        path.write_text("no image")
    elif how == "deep":
        image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(path)
    elif how == "clear":
        image.fromarray(np.full((6, 6, 4), 100, np.uint8)).save(path)
    elif how == "frames":
        frames = [image.fromarray(np.full((6, 6), k, np.uint8)) for k in (0, 200)]
        frames[0].save(root / "b" / "1.gif", save_all=True, append_images=frames[1:])
    elif how == "other":
        (root / "b" / "notes.txt").write_text("x")
    elif how == "loose":
        put(root / "c.png")
    elif how == "parts":
        for name in ("train", "val"):
            put(root / name / "x" / "0.png")
        (root / "a" / "0.png").unlink(), path.unlink()
    elif how == "unsorted":
        put(root / "train" / "0.png"), put(root / "test" / "0.png")
        (root / "a" / "0.png").unlink(), path.unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", r"b/0.png does not decode"),
        ("text", r"b/0.png does not decode"),
        ("deep", r"b/0.png has mode I;16; expected 8 bits"),
        ("clear", r"b/0.png has transparent pixels"),
        ("frames", r"b/1.gif holds 2 pictures"),
        ("other", r"b/notes.txt is no image"),
        ("loose", r"got c.png and a/0.png; expected all images as <class>/FILE"),
        ("parts", r"has the parts train, val; expected train and test"),
        ("unsorted", r"got test/0.png; expected all images as <class>/FILE"),
    ],
)
def test_what_is_no_image_or_in_no_class_is_refused_by_name(tmp_path: Path, how: str, says: str) -> None:
    put_all(tmp_path / "i", "a/0.png", "b/0.png")
    _faulty(tmp_path / "i", how)
    with pytest.raises(DataError, match=says):
        load_dataset("images", path=tmp_path / "i")
    assert not (tmp_path / "cache" / "decoded").exists()


def test_options_of_a_table_need_the_table(tmp_path: Path) -> None:
    put_all(tmp_path / "i", "a/0.png", "b/0.png")
    with pytest.raises(ConfigError) as caught:
        load_dataset("images", path=tmp_path / "i", label="x", unit="y")
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="below"):
        load_dataset("images", path=tmp_path / "i", table="../t.csv")
    with pytest.raises(ConfigError, match=r"channels: got 2; expected 1 \(grey\) or 3"):
        load_dataset("images", path=tmp_path / "i", channels=2)
    with pytest.raises(DataError, match="no such folder"):
        load_dataset("images", path=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image below"):
        load_dataset("images", path=tmp_path / "empty")


def test_pixels_are_decoded_once_and_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pixels of before, and a digest of names alone."""
    root = tmp_path / "i"
    put_all(root, "a/0.png", "b/0.png")
    first = load_dataset("images", path=root)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decoded", None)
        again = load_dataset("images", path=root)
    assert again.files == first.files
    assert again.x.equal(first.x)
    changed = put(root / "b" / "0.png")
    third = load_dataset("images", path=root)
    assert third.files != first.files
    assert np.array_equal(third.x[1].numpy(), changed.transpose(2, 0, 1))
    (root / "b" / "0.png").rename(root / "a" / "1.png")
    put(root / "b" / "0.png")
    assert load_dataset("images", path=root).y.tolist() == [0, 0, 1]


@pytest.mark.parametrize(("mode", "channels"), [("P", 3), ("1", 1), ("CMYK", 3), ("LA", 1), ("RGBA", 3)])
def test_modes_of_pillow(tmp_path: Path, mode: str, channels: int) -> None:
    """Catches a palette's numbers for colours, and an opaque image that is refused."""
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / "i" / name).mkdir(parents=True)
        colour = image.new("RGB", (6, 6), (255, 255, 255) if name == "a" else (0, 0, 0))
        ending = "jpg" if mode == "CMYK" else "png"
        colour.convert(mode).save(tmp_path / "i" / name / f"0.{ending}")
    found = load_dataset("images", path=tmp_path / "i")
    assert found.input_shape == (channels, 6, 6)
    assert found.x[0].min() > 250
    assert found.x[1].max() < 5


@pytest.mark.parametrize("parts", [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_parts_are_known_by_their_usual_names(parts: tuple[str, str], tmp_path: Path) -> None:
    """Catches an official split that is lost, so that test images are trained on."""
    train, test = parts
    put_all(tmp_path / "own", f"{train}/cat/a.png", f"{train}/dog/b.png", f"{test}/cat/c.png", f"{test}/dog/d.png")
    found = load_dataset("images", path=tmp_path / "own")
    assert (found.classes, found.groups) == (("cat", "dog"), None)
    names = sorted((train, test))
    assert found.test_rows is not None
    assert found.test_rows.tolist() == ([0, 1] if names[0] == test else [2, 3])


@pytest.mark.parametrize("third", ["extra", "val", "Train"])
def test_a_part_beside_other_folders_is_refused(third: str, tmp_path: Path) -> None:
    put_all(tmp_path / "own", "train/cat/a.png", "test/cat/b.png", f"{third}/cat/c.png")
    with pytest.raises(DataError, match=r"has the parts .*expected train and test beside no other"):
        load_dataset("images", path=tmp_path / "own")


def test_a_site_of_one_class_is_read_with_the_classes_of_the_others(tmp_path: Path) -> None:
    """Catches a site that can never join as it has seen one class alone."""
    put_all(tmp_path / "own", "ill/a.png", "ill/b.png")
    with pytest.raises(DataError, match="expected at least 2"):
        load_dataset("images", path=tmp_path / "own")
    found = load_dataset("images", path=tmp_path / "own", agreed=Schema(classes=("well", "ill")))
    assert (found.classes, found.y.tolist()) == (("well", "ill"), [1, 1])
    np.savez(tmp_path / "one.npz", x=np.zeros((3, 2)), y=np.zeros(3, dtype=np.int64))
    found = load_dataset("npz", path=tmp_path / "one.npz", agreed=Schema(classes=("0", "1")))
    assert (found.classes, found.y.tolist()) == (("0", "1"), [0, 0, 0])
