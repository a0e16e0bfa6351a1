"""Runs that measure more than the accuracy: results against stored predictions, names, and the majority class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import running
import torch
from consoles import pipe, written

from polyfed.base.errors import ConfigError, DataError, DivergedError, StorageError
from polyfed.blocks.losses import probabilities
from polyfed.config import Config
from polyfed.data.sources import load_dataset
from polyfed.metrics.metrics import tallies, value
from polyfed.metrics.tallies import Predictions
from polyfed.report.tables import show
from polyfed.rounds.federation import prepare
from polyfed.simulation.simulate import resume, simulate

NAMES = ["Ulm", "Bonn", "Kiel", "Graz"]
METRICS = ["auroc", "accuracy", "macro_f1", "sensitivity", "brier", "ece"]


def measured(**run: Any) -> Config:
    return running.config(
        run={"metrics": METRICS, "predictions": True, "targets": [0.05, "auroc=0.3", "auroc=1.0", "brier=5"], **run},
        clients={"names": NAMES},
        algorithm={"name": "fedmrl", "auxiliary": "mlp(hidden=(8, 6))", "rep_dim": 4},
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("measured") / "run"
    return folder, simulate(measured(), out=folder).summary


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "predictions.parquet").to_pylist()


def predictions(rows: list[dict[str, Any]], classes: tuple[str, ...]) -> Predictions:
    y = np.array([classes.index(row["label"]) for row in rows])
    return Predictions(y, np.array([[row[f"score {name}"] for name in classes] for row in rows]))


def test_the_results_are_those_of_the_stored_predictions(done: tuple[Path, dict[str, Any]]) -> None:
    """Catches scores of another predictor, round or row, and a pooled value that is a mean of clients' values."""
    folder, summary = done
    data, partition = prepare(measured()).dataset, prepare(measured()).partition
    rows = [row for row in rows_of(folder) if row["predictor"] == "mix-large"]
    last = {row["client"]: row for row in running.lines(folder / "clients.jsonl") if row["round"] == 4}
    assert {row["predictor"] for row in rows_of(folder)} == set(summary["accuracy"]["predictors"])
    found: dict[str, list[float | None]] = {name: [] for name in METRICS}
    for client in range(4):
        own = [row for row in rows if row["client"] == client]
        assert [row["row"] for row in own] == partition.test(client).tolist()
        assert [row["label"] for row in own] == [data.classes[y] for y in data.y.numpy()[partition.test(client)]]
        assert {row["name"] for row in own} == {NAMES[client]} == {last[client]["name"]}
        sums = tallies(METRICS, predictions(own, data.classes))
        for name in METRICS:
            expected = value(name, sums)
            assert last[client]["metrics"][name] == (None if expected is None else pytest.approx(expected, abs=1e-12))
            found[name].append(expected)
        assert last[client]["metrics"]["accuracy"] == last[client]["accuracy"]
    sums = tallies(METRICS, predictions(rows, data.classes))
    for name in METRICS:
        there = [each for each in found[name] if each is not None]
        block = summary["metrics"][name]
        assert block["pooled"] == pytest.approx(value(name, sums), abs=1e-12)
        assert block["mean"] == pytest.approx(np.mean(there), abs=1e-12)
        assert block["worst_decile"] == pytest.approx(max(there) if name in ("brier", "ece") else min(there))
        assert block["undefined"] == 4 - len(there)
        assert block["predictors"]["mix-large"] == block["mean"]
    assert set(summary["metrics"]["auroc"]["pooled_by_class"]) == set(data.classes)
    assert "by_class" in last[0]
    assert "pooled_by_class" not in summary["metrics"]["brier"]


def test_targets_name_their_metric_and_errors_are_reached_from_above(done: tuple[Path, dict[str, Any]]) -> None:
    reached = done[1]["targets"]
    assert reached[0]["accuracy"] == 0.05
    assert (reached[1]["auroc"], reached[1]["round"]) == (0.3, 0)
    assert reached[2] is None
    assert (reached[3]["brier"], reached[3]["round"]) == (5.0, 0)
    values = [row["metrics"]["brier"]["mean"] for row in running.lines(done[0] / "rounds.jsonl") if "metrics" in row]
    assert done[1]["metrics"]["brier"]["best"]["mean"] == min(values)


def test_the_accuracy_is_what_a_run_without_metrics_writes(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Catches metrics that change the training or the numbers that runs have always had, and unasked files."""
    plain = measured().to_dict()
    plain["run"] = {k: v for k, v in plain["run"].items() if k not in ("metrics", "predictions", "targets")}
    del plain["clients"]["names"]
    summary = simulate(Config.parse(plain), out=tmp_path / "plain").summary
    assert summary["accuracy"] == done[1]["accuracy"]
    assert summary["majority"] == {"accuracy": done[1]["majority"]["accuracy"]}
    assert "metrics" not in summary
    assert not (tmp_path / "plain" / "predictions.parquet").exists()
    rows = running.lines(tmp_path / "plain" / "clients.jsonl")
    assert not any({"name", "metrics", "by_class"} & row.keys() for row in rows)
    assert {row["round"] for row in rows if "majority" in row} == {4}


def test_workers_measure_the_same(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    summary = simulate(measured(workers=2), out=tmp_path / "two").summary
    for key in ("accuracy", "metrics", "majority"):
        assert summary[key] == done[1][key]
    assert rows_of(tmp_path / "two") == rows_of(done[0])


def test_the_majority_class_is_counted(done: tuple[Path, dict[str, Any]]) -> None:
    """Catches the majority of test rows, or of all clients, in place of a client's training rows."""
    federation = prepare(measured())
    y = federation.dataset.y.numpy()
    shares: list[float] = []
    for client in range(4):
        train, test = y[federation.partition.train(client)], y[federation.partition.test(client)]
        shares.append(float((test == np.bincount(train).argmax()).mean()))
    last = [row for row in running.lines(done[0] / "clients.jsonl") if row["round"] == 4]
    assert [row["majority"]["accuracy"] for row in last] == shares
    found = done[1]["majority"]
    assert (found["accuracy"]["mean"], found["accuracy"]["worst_decile"]) == (np.mean(shares), min(shares))
    assert found["brier"]["mean"] == pytest.approx(2 * (1 - np.mean(shares)))  # sure, and wrong in the rest
    assert found["auroc"]["mean"] == 0.5


def test_tables_show_metrics_names_and_the_majority_class(done: tuple[Path, dict[str, Any]]) -> None:
    console = pipe()
    show(console, {"fedmrl": done[1]})
    text = written(console)
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("algorithm"))
    assert lines[head].split()[:7] == ["algorithm", "auroc", "tenth", "pooled", "accuracy", "pooled", "f1"]
    assert [line.split("  ")[0] for line in lines[head + 1 : head + 3]] == ["fedmrl", "majority class"]
    for name in NAMES:
        assert sum(line.startswith(name) for line in lines) == 1
    assert "auroc of the" in text
    many = {**done[1], "clients": {**done[1]["clients"], "count": 21}}
    console = pipe()
    show(console, {"fedmrl": many})
    assert NAMES[0] not in written(console)


def test_clients_where_a_metric_is_not_defined_are_left_out_and_told(tmp_path: Path) -> None:
    """Catches clients of one class whose AUROC counts as 0 or as a half."""
    x = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    groups = np.repeat(["a", "b", "c"], 30)
    y = np.where(groups == "b", 0, np.arange(90) % 2)
    np.savez(tmp_path / "x.npz", x=x, y=y, groups=groups)
    config = running.config(
        run={"rounds": 1, "metrics": ["auroc"]},
        data={"dataset": "npz", "path": str(tmp_path / "x.npz"), "image_size": None},
        partition={"kind": "natural", "samples_per_client": None, "classes_per_client": None},
        clients={"count": 3, "participation": 1.0},
        algorithm={"name": "fedavg"},
    )
    summary = simulate(config, out=tmp_path / "run").summary
    last = [row for row in running.lines(tmp_path / "run" / "clients.jsonl") if row["round"] == 1]
    assert [row["name"] for row in last] == ["a", "b", "c"]
    values = [row["metrics"]["auroc"] for row in last]
    assert values[1] is None
    assert summary["metrics"]["auroc"]["mean"] == pytest.approx((values[0] + values[2]) / 2)
    assert summary["metrics"]["auroc"]["undefined"] == 1
    console = pipe()
    show(console, {"fedavg": summary})
    assert "auroc: 1 of 3 clients are left out of the mean; it is not defined there." in written(console)


def test_names_in_another_order_than_the_groups_are_refused(tmp_path: Path) -> None:
    """Catches a hospital under another one's name."""
    config = amounts(tmp_path)
    assert list(prepare(config).client_names) == ["1", "2", "3"]
    assert tuple(prepare(config.replace("clients", names=["Ulm", "Bonn", "Kiel"])).client_names) == (
        "Ulm",
        "Bonn",
        "Kiel",
    )
    with pytest.raises(ConfigError, match="in the order of their clients, are 1, 2, 3"):
        prepare(config.replace("clients", names=["3", "1", "2"]))


# ---------------------------------------------------------------------------------------------------- regression


def amounts(folder: Path, **data: Any) -> Config:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(240, 4)).astype(np.float32)
    y = 1e6 + 500 * (x @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.1 * generator.normal(size=240))
    np.savez(folder / "x.npz", x=x, y=y, groups=np.repeat([3, 1, 2], 80))
    return Config.parse(
        {
            "run": {"rounds": 12, "eval_every": 6, "threads": 1, "predictions": True, "targets": ["rmse=400"]},
            "data": {
                "dataset": "npz",
                "path": str(folder / "x.npz"),
                "task": "regression",
                "target_offset": 1e6,
                "target_scale": 1000.0,
                **data,
            },
            "partition": {"kind": "natural"},
            "clients": {"count": 3, "models": ["mlp(hidden=(16,))"]},
            "train": {"lr": 0.1, "batch_size": 16},
            "algorithm": {"name": "fedavg"},
        }
    )


def test_a_regression_predicts_in_the_unit_of_the_data(tmp_path: Path) -> None:
    """Catches errors of scaled targets, targets rounded to float32 before the offset is taken off, and accuracies."""
    config = amounts(tmp_path)
    summary = simulate(config, out=tmp_path / "run").summary
    assert "accuracy" not in summary
    assert list(summary["metrics"]) == ["rmse", "mae", "r2"]
    assert summary["metrics"]["r2"]["mean"] > 0.9
    rows = rows_of(tmp_path / "run")
    y = np.load(tmp_path / "x.npz")["y"]
    assert [row["label"] for row in rows] == [y[row["row"]] for row in rows]
    for client, row in enumerate(running.lines(tmp_path / "run" / "clients.jsonl")[-3:]):
        error = np.array([one["prediction"] - one["label"] for one in rows if one["client"] == client])
        assert row["metrics"]["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
        assert row["metrics"]["mae"] == pytest.approx(np.abs(error).mean())
        assert row["name"] == str(client + 1)
        assert not {"correct", "accuracy"} & row.keys()
    pooled = np.array([one["prediction"] - one["label"] for one in rows])
    assert summary["metrics"]["rmse"]["pooled"] == pytest.approx(np.sqrt((pooled**2).mean()))
    assert summary["metrics"]["rmse"]["global"]["global"] > 0
    assert summary["targets"][0]["rmse"] == 400
    federation = prepare(config)
    train, test = (y[part(0)] for part in (federation.partition.train, federation.partition.test))
    mean = running.lines(tmp_path / "run" / "clients.jsonl")[-3]["majority"]["rmse"]
    assert mean == pytest.approx(np.sqrt(((test - train.mean()) ** 2).mean()))
    x, scaled = federation.data.train(0).batch(federation.data.train(0).rows.new_tensor([0, 1]))
    assert scaled.dtype == x.dtype
    assert scaled.tolist() == pytest.approx((train[:2] - 1e6) / 1000, abs=1e-6)
    console = pipe()
    show(console, {"fedavg": summary})
    assert "training mean" in written(console)


def test_a_target_that_is_left_as_it_is_diverges_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"lower train\.lr"):
        simulate(amounts(tmp_path, target_offset=0.0, target_scale=1.0), out=tmp_path / "run")


def test_a_table_is_read_as_a_regression(tmp_path: Path) -> None:
    path = tmp_path / "stays.csv"
    path.write_text("age,days\n" + "".join(f"{20 + i},{i / 4}\n" for i in range(20)))
    dataset = load_dataset("csv", path=path, task="regression")
    assert (dataset.task, dataset.num_classes, dataset.classes) == ("regression", 1, ())
    assert dataset.y.tolist() == [i / 4 for i in range(20)]
    for cell in ("?", "long", "inf"):
        path.write_text(f"age,days\n20,1.5\n30,{cell}\n")
        with pytest.raises(DataError, match=r"stays\.csv, line 3: .*'days'"):
            load_dataset("csv", path=path, task="regression")
    with pytest.raises(ConfigError, match="the labels of data set 'digits' are classes"):
        load_dataset("digits", task="regression")


def test_floats_are_not_taken_for_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((4, 2), np.float32), y=np.arange(4) / 2)
    with pytest.raises(DataError, match=r'data\.task = "regression"'):
        load_dataset("npz", path=tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=np.ones((4, 2), np.float32), y=np.array([0.5, np.nan, 1, 2]))
    with pytest.raises(DataError, match="the target of row 1 is nan"):
        load_dataset("npz", path=tmp_path / "x.npz", task="regression")
    np.savez(tmp_path / "x.npz", x=np.ones((4, 2), np.float32), y=np.arange(4.0), classes=["a", "b"])
    with pytest.raises(DataError, match="a regression has none"):
        load_dataset("npz", path=tmp_path / "x.npz", task="regression")


def test_predictions_are_whole_or_absent(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a file after a full disk, and a resumed run that has none."""
    from polyfed.base import files

    def full(path: Path, data: bytes, *, mode: int = 0o666) -> str:
        if path.name == "predictions.parquet":
            raise StorageError("no space left")
        return real(path, data, mode=mode)

    real = files.write
    monkeypatch.setattr(files, "write", full)
    with pytest.raises(StorageError, match="no space"):
        simulate(measured(), out=tmp_path / "run")
    assert not (tmp_path / "run" / "predictions.parquet").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert json.loads((tmp_path / "run" / "checkpoint" / "manifest.json").read_text())["manifest"]["round"] == 3
    monkeypatch.undo()
    summary = resume(tmp_path / "run").summary
    assert {key: summary[key] for key in ("metrics", "majority")} == {k: done[1][k] for k in ("metrics", "majority")}
    assert rows_of(tmp_path / "run") == rows_of(done[0])


@pytest.mark.parametrize("algorithm", ["fedproto", "fedtgp"])
def test_classes_without_a_prototype_have_the_probability_zero(algorithm: str, tmp_path: Path) -> None:
    """Catches a run that stops, or a metric that is NaN, as a client has not seen every class."""
    settings = running.config(
        run={"metrics": ["accuracy", "auroc", "brier", "ece"], "predictions": True, "rounds": 2},
        algorithm={"name": algorithm},
        clients={"count": 4, "models": ["mlp(hidden=(12, 8))"]},
        partition={"kind": "classes", "classes_per_client": 3},
    )
    result = simulate(settings, out=tmp_path)
    rows = rows_of(tmp_path)
    scores = np.array([[row[f"score {c}"] for c in range(10)] for row in rows])
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-9)
    assert bool((scores == 0).any()) is (algorithm == "fedproto")  # FedTGP's server has all by then
    assert result.metrics["brier"] is not None


def test_a_row_without_a_candidate_is_as_likely_of_any_class() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 0.0], [-torch.inf] * 4])
    assert probabilities(logits).tolist() == [[1 / 3, 0, 1 / 3, 1 / 3], [0.25] * 4]
