"""A partition as a value: saved, loaded, counted, and never changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import some_labels

from polyfed.base.errors import ConfigError, DataError, StorageError
from polyfed.base.rng import Rng
from polyfed.data.partition.make import make_partition
from polyfed.data.partition.partition import Partition


def test_save_and_load(tmp_path: Path) -> None:
    dataset = some_labels()
    partition = make_partition(dataset, kind="dirichlet", num_clients=8, rng=Rng((0, "partition")), alpha=0.5)
    path = tmp_path / "below" / "partition.npz"
    partition.save(path)
    loaded = Partition.load(path)
    assert loaded.hash == partition.hash
    assert dict(loaded.about) == dict(partition.about)
    assert loaded.about["seed"] == [0, "partition"]
    assert np.array_equal(loaded.test(3), partition.test(3))
    assert [p.name for p in path.parent.iterdir()] == ["partition.npz"]


def test_tampering_and_damage(tmp_path: Path) -> None:
    partition = make_partition(some_labels(), kind="iid", num_clients=4, rng=Rng((0,)))
    path = tmp_path / "p.npz"
    partition.save(path)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)

    def refused(says: str, **changed: np.ndarray) -> None:
        np.savez(path, **{**arrays, **changed})
        with pytest.raises(DataError, match=says):
            Partition.load(path)

    swapped = arrays["train_rows"].copy()
    swapped[[0, -1]] = swapped[[-1, 0]]
    refused("was changed or damaged", train_rows=swapped)
    refused("was changed or damaged", about=np.array('{"kind":"iid"}'))
    refused("not JSON", about=np.array("{"))
    refused("JSON object", about=np.array("[]"))
    refused("held twice", train_rows=np.zeros_like(swapped))
    refused("do not rise", train_offsets=arrays["train_offsets"][::-1])
    refused("do not rise", test_rows=arrays["test_rows"][:-1])
    refused("flat int64", train_rows=swapped.astype(np.int32))
    refused("expected a partition", extra=np.zeros(1))
    for damaged in (whole[:-40], b"", whole[:200] + bytes(100) + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=str(path)):
            Partition.load(path)
    with pytest.raises(DataError, match="no such file"):
        Partition.load(tmp_path / "none.npz")


def test_save_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    partition = make_partition(some_labels(), kind="iid", num_clients=4, rng=Rng((0,)))
    with pytest.raises(StorageError, match="could not be written"):
        partition.save(tmp_path / "file" / "p.npz")


def test_a_partition_cannot_be_changed() -> None:
    rows = np.arange(4)
    partition = Partition(rows, np.array([0, 4]), np.array([4]), np.array([0, 1]), {"kind": "x"})
    rows[0] = 9
    assert partition.train(0).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        partition.train(0)[0] = 5
    with pytest.raises(TypeError):
        partition.about["kind"] = "y"  # type: ignore[index]


def test_counts() -> None:
    partition = Partition(np.array([0, 2, 1]), np.array([0, 2, 3]), np.array([3, 4]), np.array([0, 1, 2]), {})
    y = [0, 1, 0, 2, 1]
    assert partition.counts(y, 3).tolist() == [[2, 0, 0], [0, 1, 0]]
    assert partition.counts(y, 3, "test").tolist() == [[0, 0, 1], [0, 1, 0]]
    assert partition.counts([0, -1, -1, 2, 1], 3).tolist() == [[1, 0, 0], [0, 0, 0]]  # rows without a label
    assert partition.unlabelled([0, 1, -1, 2, 1]).tolist() == [1, 0]
    assert partition.unlabelled([0, 1, -1, 2, 1], first=1).tolist() == [1]
    assert partition.tested([0, -1, -1, 0, 1], 3).tolist() == [1, -1, -1]
    with pytest.raises(ConfigError, match="which"):
        partition.counts(y, 3, "all")
