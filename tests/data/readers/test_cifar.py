"""The binary format of CIFAR: what is read, and what damage is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import real_data

from polyfed.base.errors import DataError
from polyfed.data.readers import cifar, parquet
from polyfed.data.sources import load_dataset


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


def test_real_cifar_test_file() -> None:
    pytest.importorskip("pyarrow")
    path = real_data("cifar10") / "test-00000-of-00001.parquet"
    x, y = parquet.read_images(path, "label", (32, 32))
    assert x.shape == (10000, 3, 32, 32)
    assert set(np.bincount(y)) == {1000}
    assert x.mean(axis=(0, 2, 3)) / 255 == pytest.approx([0.494, 0.485, 0.450], abs=0.002)
