"""What a federation is refused for before it runs, where rows have no label; and a run of such rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyfed import simulate
from polyfed.base.errors import ConfigError, DataError
from polyfed.config import Config
from polyfed.rounds.federation import misfits, prepare
from polyfed.rounds.scoring import majority


def config(path: Path, known: int = 6, **more: Any) -> Config:
    """Three hospitals with ``known`` labelled and 20 other rows each: signals of two channels."""
    draws = np.random.default_rng(0)
    y = np.concatenate([np.r_[np.arange(known) % 2, np.full(20, -1)] for _ in range(3)])
    x = draws.standard_normal((len(y), 2, 12)).astype(np.float32)
    np.savez(path / "some.npz", x=x, y=y, groups=np.repeat(["a", "b", "c"], known + 20), classes=["no", "yes"])
    options = {"layout": "NCT", "unlabelled": True}
    tables: dict[str, Any] = {
        "run": {"rounds": 1, "threads": 1, "metrics": ["accuracy", "balanced_accuracy"]},
        "data": {"dataset": "npz", "path": str(path / "some.npz"), "options": options},
        "partition": {"kind": "natural"},
        "clients": {"count": 3, "models": ["mlp(hidden=(9,))"]},
        "train": {"epochs": 1, "batch_size": 8},
        "algorithm": {"name": "fedmrl-ssl", "auxiliary": "mlp(hidden=(8,))", "rep_dim": 4, "head_dim": 4},
    }
    for section, keys in more.items():
        tables[section] = keys if section == "algorithm" else {**tables[section], **keys}
    return Config.parse(tables)


def test_what_reads_labels_in_training_is_refused_with_all_other_faults(tmp_path: Path) -> None:
    """Catches a run that learns -1, and faults that are told one after another."""
    train = {"class_weights": "balanced", "clients": {"1": {"class_weights": [1.0, 2.0]}}}
    refused = config(
        tmp_path, partition={"kind": "dirichlet"}, train=train, algorithm={"name": "fedavg"}, clients={"count": 2}
    )
    with pytest.raises(ConfigError) as found:
        prepare(refused)
    count = "60 of 78 rows have no label"
    assert found.value.faults == (
        f"algorithm.name: got 'fedavg', which learns from labels, but {count} (unlabelled = true); choose fedmrl-ssl, "
        "or remove those rows",
        f"train.class_weights: weighs rows by their labels, but {count} (unlabelled = true); remove the key",
        f"train.clients.1.class_weights: weighs rows by their labels, but {count} (unlabelled = true); remove the key",
        f"kind: got 'dirichlet', which deals classes, and {count}: choose 'iid' or 'natural'",
    )
    assert misfits([refused]) == list(found.value.faults[:3])  # before the first cell of a comparison
    assert misfits([config(tmp_path)]) == []


def test_a_client_without_a_labelled_training_row_is_named(tmp_path: Path) -> None:
    """Catches a probe of nothing, and a validation that takes the last labelled row."""
    with pytest.raises(DataError, match=r"client a: none of its 20 training rows has a label .*3 of 3 clients"):
        prepare(config(tmp_path, known=1))
    prepare(config(tmp_path, known=2))
    with pytest.raises(DataError, match=r"lower data\.test_fraction or data\.validation_fraction"):
        prepare(config(tmp_path, known=2, data={"validation_fraction": 0.3}))
    with pytest.raises(ConfigError, match="fedavg"):  # the first cause
        prepare(config(tmp_path, known=1, algorithm={"name": "fedavg"}))


def test_a_run_of_rows_without_labels_is_tested_and_controlled_by_those_with(tmp_path: Path) -> None:
    """Catches a most frequent class of -1, and a test of rows without a label."""
    settings = config(tmp_path)
    federation = prepare(settings)
    y = federation.dataset.strata
    assert [int((y[federation.partition.train(k)] < 0).sum()) for k in range(3)] == [20, 20, 20]
    assert (y[federation.partition.test_rows] >= 0).all()
    simulate(settings, out=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["majority"]["accuracy"]["mean"]
    shares: list[float] = []
    for client in range(3):
        train, test = (y[rows] for rows in (federation.partition.train(client), federation.partition.test(client)))
        shares.append(float((test == np.bincount(train[train >= 0]).argmax()).mean()))
    assert found == pytest.approx(np.mean(shares))


def test_the_most_frequent_class_is_one_of_labelled_rows() -> None:
    labels = torch.tensor([-1, -1, -1, 1, 1, 0])
    assert majority(labels, torch.tensor([1, 1, 0, 1]), 2, ["accuracy"]) == {"accuracy": 0.75}
