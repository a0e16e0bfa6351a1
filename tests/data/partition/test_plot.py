"""The picture of a partition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import some_labels

from polyfed.base.errors import StorageError
from polyfed.base.rng import Rng
from polyfed.data.partition.make import make_partition
from polyfed.data.partition.plot import picture


@pytest.mark.parametrize("classes", [6, 30])
def test_picture(tmp_path: Path, classes: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    dataset = some_labels(4000, classes)
    partition = make_partition(dataset, kind="iid", num_clients=100, rng=Rng((0,)))
    picture(partition, dataset.y, classes, tmp_path / "p.png")
    pixels = image.imread(tmp_path / "p.png")
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
    names = [f"class {k}" for k in range(classes)]
    picture(partition, dataset.y, classes, tmp_path / "q.png", class_names=names)
    assert (tmp_path / "p.png").read_bytes() != (tmp_path / "q.png").read_bytes() or classes > 20
    few = make_partition(dataset, kind="iid", num_clients=3, rng=Rng((0,)))
    for place, clients in enumerate([(), ("Ulm", "Bonn", "Kiel")]):
        picture(few, dataset.y, classes, tmp_path / f"{place}.png", client_names=clients)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
    with pytest.raises(StorageError):
        picture(partition, dataset.y, classes, tmp_path / "p.png" / "q.png")


def test_rows_without_a_label_are_shown(tmp_path: Path) -> None:
    """Catches a bar that is too short, and rows of one client drawn as a class of another."""
    pytest.importorskip("matplotlib")
    dataset = some_labels(120, 3)
    partition = make_partition(dataset, kind="iid", num_clients=2, rng=Rng((0,)))
    seen: list[bytes] = []
    for labels in (dataset.y, dataset.y.where(dataset.y > 0, -1)):
        picture(partition, labels, 3, tmp_path / "p.png")
        seen.append((tmp_path / "p.png").read_bytes())
        (tmp_path / "p.png").unlink()
    assert seen[0] != seen[1]
