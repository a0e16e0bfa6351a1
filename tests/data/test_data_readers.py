"""Public file formats: what is read, and what damage is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import idx_bytes, image_file, real_data, write_mnist

from polyfed.base.errors import ConfigError, DataError
from polyfed.data import sources
from polyfed.data.readers import cifar, idx, parquet
from polyfed.data.readers.cache import file_digest
from polyfed.data.sources import load_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POLYFED_DATA", raising=False)


# --- IDX -------------------------------------------------------------------------------------------------------


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


# --- CIFAR binary ----------------------------------------------------------------------------------------------


def _cifar10_files(rows: int = 4) -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    names = (*cifar.CIFAR10.train, cifar.CIFAR10.test)
    table = rng.integers(0, 256, (len(names), rows, 3073), dtype=np.uint8)
    table[:, :, 0] %= 10
    return {name: part.tobytes() for name, part in zip(names, table, strict=True)}


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar10_folder_and_archive_are_the_same(tmp_path: Path) -> None:
    files = _cifar10_files()
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(_tar(files))
    plain, packed = load_dataset("cifar10", path=tmp_path / "data"), load_dataset("cifar10", path=archive)
    first = np.frombuffer(files["data_batch_1.bin"], np.uint8).reshape(4, 3073)
    for dataset in (plain, packed, load_dataset("cifar10", path=tmp_path)):
        assert dataset.x.shape == (24, 3, 32, 32)
        assert np.array_equal(dataset.x[:4].flatten(1), first[:, 1:])
        assert dataset.y[:4].tolist() == first[:, 0].tolist()
        assert dataset.test_rows is not None
        assert dataset.test_rows.tolist() == [20, 21, 22, 23]
    assert plain.mean == packed.mean
    assert load_dataset("cifar10", path=archive, image_size=16).input_shape == (3, 16, 16)


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    for name, fine in (("train.bin", 99), ("test.bin", 3)):
        (tmp_path / name).write_bytes(bytes((7, fine)) + bytes(3072))
    dataset = load_dataset("cifar100", path=tmp_path)
    assert dataset.y.tolist() == [99, 3]
    assert (dataset.classes[0], dataset.classes[99], dataset.num_classes) == ("apple", "worm", 100)


def test_damaged_cifar(tmp_path: Path) -> None:
    files = _cifar10_files()
    with pytest.raises(DataError, match=r"a.bin: 3072 bytes; expected a multiple of 3073"):
        cifar.decode_records(bytes(3072), "a.bin", cifar.CIFAR10)
    with pytest.raises(DataError, match=r"record 1 has label 10; expected 0 to 9"):
        cifar.decode_records(bytes(3073) + b"\x0a" + bytes(3072), "a.bin", cifar.CIFAR10)
    with pytest.raises(DataError, match="more than 0"):
        cifar.decode_records(b"", "a.bin", cifar.CIFAR10)
    whole = _tar(files)
    archive = tmp_path / "cifar.tar.gz"
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cifar.tar.gz: cannot be read"):
        load_dataset("cifar10", path=archive)
    archive.write_bytes(_tar({"data_batch_1": b"pickled"}))
    with pytest.raises(DataError, match="pickled objects and is not read"):
        load_dataset("cifar10", path=archive)
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(files["test_batch.bin"])
    with pytest.raises(DataError, match=r"data_batch_1.bin: cannot be read"):
        load_dataset("cifar10", path=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no files of 'cifar10'"):
        load_dataset("cifar10", path=tmp_path / "empty")


# --- parquet ---------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, images: list, labels: list, label: str = "label") -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [None if i is None else {"bytes": i, "path": "a.png"} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": pa.array(cells, kind), label: pa.array(labels)}), path)


def _parquet_cifar(folder: Path) -> np.ndarray:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    files = [image_file(p) for p in pixels]
    _write_parquet(folder / "train-00000-of-00002.parquet", files[:2], [3, 4])
    _write_parquet(folder / "train-00001-of-00002.parquet", files[2:3], [9])
    _write_parquet(folder / "test-00000-of-00001.parquet", files[3:], [0, 1])
    return pixels.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("below", ["", "plain_text"])
def test_parquet_cifar10(tmp_path: Path, below: str) -> None:
    pixels = _parquet_cifar(tmp_path / "p" / below)
    dataset = load_dataset("cifar10", path=tmp_path / "p")
    assert np.array_equal(dataset.x, pixels)
    assert dataset.y.tolist() == [3, 4, 9, 0, 1]
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [3, 4]


def test_parquet_cifar100_reads_fine_label(tmp_path: Path) -> None:
    black = image_file(np.zeros((32, 32, 3), np.uint8))
    for split in ("train", "test"):
        _write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [black], [77], "fine_label")
    assert load_dataset("cifar100", path=tmp_path).y.tolist() == [77, 77]
    with pytest.raises(DataError, match=r"has columns img, fine_label; expected .* 'label'"):
        load_dataset("cifar10", path=tmp_path)


def test_parquet_lacks_a_shard(tmp_path: Path) -> None:
    _parquet_cifar(tmp_path)
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 train parquet files .*; expected 2"):
        load_dataset("cifar10", path=tmp_path)


def test_parquet_labels_out_of_range(tmp_path: Path) -> None:
    _parquet_cifar(tmp_path)
    black = image_file(np.zeros((32, 32, 3), np.uint8))
    _write_parquet(tmp_path / "test-00000-of-00001.parquet", [black], [10])
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
    _write_parquet(tmp_path / "a.parquet", [files["good"], files[cell]], [0, label])
    with pytest.raises(DataError, match=says) as caught:
        parquet.read_images(tmp_path / "a.parquet", "label", (32, 32))
    assert str(tmp_path / "a.parquet") in str(caught.value)


def test_damaged_parquet(tmp_path: Path) -> None:
    _parquet_cifar(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet: cannot be read as parquet"):
        load_dataset("cifar10", path=tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parquet_cifar(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'polyfed\[parquet\]'"):
        load_dataset("cifar10", path=tmp_path)


# --- cache of decoded pixels -----------------------------------------------------------------------------------


def test_decoded_pixels_are_cached_and_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = _parquet_cifar(tmp_path / "p")
    decoded: list[Path] = []
    original = sources.read_images
    monkeypatch.setattr(sources, "read_images", lambda *a: decoded.append(a[0]) or original(*a))

    def load() -> int:
        before = len(decoded)
        dataset = load_dataset("cifar10", path=tmp_path / "p", cache=tmp_path / "c")
        assert np.array_equal(dataset.x, pixels)
        assert dataset.y.tolist() == [3, 4, 9, 0, 1]
        return len(decoded) - before

    assert load() == 3
    assert load() == 0
    (kept,) = (tmp_path / "c" / "decoded").iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[:100], b"", bytes(flipped), whole[:-20]):
        kept.write_bytes(damaged)
        assert load() == 3
        assert load() == 0
    np.savez(kept, x=np.zeros(3), y=np.zeros(3))  # whole, but something else
    assert load() == 3
    # a source file that changes makes another key
    (tmp_path / "p" / "test-00000-of-00001.parquet").touch()
    assert load() == 3
    assert [p for p in kept.parent.iterdir() if p.name.startswith(".")] == []


def test_unwritable_cache_only_means_no_caching(tmp_path: Path) -> None:
    pixels = _parquet_cifar(tmp_path / "p")
    (tmp_path / "file").write_text("in the way")
    dataset = load_dataset("cifar10", path=tmp_path / "p", cache=tmp_path / "file")
    assert np.array_equal(dataset.x, pixels)


# --- npz -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((2, 3))}, "expected x and y"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 1]), "z": np.zeros(1)}, "none besides"),
        ({"x": np.zeros((2, 3, 3)), "y": np.array([0, 1])}, "expected uint8 images"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.array([0, 1])}, "channels first"),
        ({"x": np.zeros((2, 3)), "y": np.array([0.0, 1.0])}, "whole numbers"),
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


# --- real files ------------------------------------------------------------------------------------------------


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


def test_real_cifar_test_file() -> None:
    pytest.importorskip("pyarrow")
    path = real_data("cifar10") / "test-00000-of-00001.parquet"
    x, y = parquet.read_images(path, "label", (32, 32))
    assert x.shape == (10000, 3, 32, 32)
    assert set(np.bincount(y)) == {1000}
    assert x.mean(axis=(0, 2, 3)) / 255 == pytest.approx([0.494, 0.485, 0.450], abs=0.002)


# -------------------------------------------------------------------------------------------------- digests of files


def test_the_files_of_a_data_set_are_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files that are left out, a digest of names or dates, and a download only to look."""
    monkeypatch.setattr(sources, "fetch", None)
    arrays = write_mnist(tmp_path / "mnist")
    found = sources.file_digests("mnist", path=tmp_path / "mnist")
    assert found.keys() == {f"{name}.gz" for name in arrays}
    assert load_dataset("mnist", path=tmp_path / "mnist").files == found
    path = tmp_path / "mnist" / next(iter(found))
    assert found[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sources.file_digests("mnist") == sources.file_digests("cifar10") == {}  # not there yet
    (digest,) = sources.file_digests("digits").values()
    assert load_dataset("digits").files == {"digits.npz": digest}
    (tmp_path / "sites").mkdir()
    for name in ("b", "a"):
        (tmp_path / "sites" / f"{name}.csv").write_text(f"x,y\n{name},0\n2,1\n")
    assert list(load_dataset("csv", path=tmp_path / "sites").files) == ["a.csv", "b.csv"]


def test_a_large_file_is_hashed_once_as_long_as_it_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes that every run hashes again, and a digest of before for a file that changed."""
    path, hashed = tmp_path / "large.npz", []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: (hashed.append(1), real(*arguments))[1])

    def digest(*, times: int) -> str:
        hashed.clear()
        found = file_digest(path, tmp_path / "cache")
        assert len(hashed) == times
        return found

    content = bytearray(2 << 20)
    path.write_bytes(content)
    first = digest(times=1)
    assert digest(times=1) == first  # too young: it may change again within this tick of the clock
    os.utime(path, (1, 1))
    assert digest(times=1) == first
    assert digest(times=0) == first
    os.utime(path, (2, 2))  # touched
    assert digest(times=1) == first
    content[5] = 1
    path.write_bytes(content)
    os.utime(path, (3, 3))
    assert digest(times=1) != first
    path.with_name("other").write_bytes(bytes(2 << 20))  # put in its place, of the same size and time
    os.utime(path.with_name("other"), (3, 3))
    path.with_name("other").replace(path)
    assert digest(times=1) == first
    for kept in (tmp_path / "cache" / "digests").iterdir():
        kept.write_text("[")
    assert digest(times=1) == first


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a digest of other bytes than those that were read."""
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,0\n2,1\n")
    read = sources.load_csv

    def slowly(*arguments, **options):
        found = read(*arguments, **options)
        path.write_text("x,y\n1,0\n3,1\n")
        return found

    monkeypatch.setattr(sources, "load_csv", slowly)
    with pytest.raises(DataError, match="changed while they were read"):
        load_dataset("csv", path=path)
