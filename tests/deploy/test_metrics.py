"""Metrics of a deployed run: each client's value is exact, sums are pooled, and scores stay at home."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from deploy_toy import Run, config, with_tables

from polyfed.deploy.wire.frames import Frame
from polyfed.deploy.wire.headers import Counts
from polyfed.metrics.metrics import read_sums
from polyfed.metrics.tallies import Tally
from polyfed.simulation.simulate import simulate

METRICS = 'run.metrics=["auroc", "accuracy", "sensitivity", "brier"]'


def both(tmp_path: Path, *keys: str) -> tuple[dict[str, Any], dict[str, Any], Run]:
    settings = config("fedavg", "run.predictions=true", *keys)
    here = simulate(settings, out=tmp_path / "here").summary
    run = Run(tmp_path, settings)
    return here, run.serve(), run


def test_means_are_exact_and_pooled_scores_are_counted_by_bins(tmp_path: Path) -> None:
    """Catches values computed from bins, sums of other clients, and rows that travel."""
    here, there, run = both(tmp_path, METRICS, 'clients.names=["Ulm", "Bonn", "Kiel"]')
    for name in here["metrics"]:
        one, other = here["metrics"][name], there["metrics"][name]
        for key in ("mean", "worst_decile", "undefined", "predictors", "before_aggregation", "best"):
            assert one[key] == other[key], (name, key)
        assert other["pooled"] == pytest.approx(one["pooled"], abs=0.05 if name == "auroc" else 1e-12)
    assert there["majority"] == here["majority"]
    for site, name in enumerate(("Ulm", "Bonn", "Kiel")):
        folder = tmp_path / f"site-{site}" / run.experiment / f"client-{site}"
        path = folder / "predictions.parquet"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        rows = pq.read_table(path).to_pylist()
        every = pq.read_table(tmp_path / "here" / "predictions.parquet").to_pylist()
        assert rows == [row for row in every if row["client"] == site]
        assert {row["name"] for row in rows} == {name}
        for row in rows:
            score = str(row["score 0"])
            assert not any(score in header for header, _ in run.memory.replies)
    assert not (run.folder / "predictions.parquet").exists()
    told = [json.loads(line) for line in (run.folder / "clients.jsonl").read_text().splitlines()]
    assert {row["name"] for row in told} == {"Ulm", "Bonn", "Kiel"}


def test_a_reported_score_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sums that are checked, thrown away and read again."""
    read = list[str]()

    def counted(kind: str, *rest: Any) -> Tally:
        read.append(kind)
        return read_sums(kind, *rest)

    monkeypatch.setattr("polyfed.deploy.server.clients.read_sums", counted)
    run = Run(tmp_path, config("fedavg", 'run.metrics=["brier"]'))
    run.serve()
    assert len(read) == sum("SquaredScores" in str(header) for header, _ in run.memory.replies) > 0


def test_a_regression_is_deployed_as_it_is_simulated(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts: list[str] = []
    for site in range(3):
        x = generator.normal(size=(40 + site, 2))
        texts.append("a,b,y\n" + "".join(f"{a:.4f},{b:.4f},{100 + 10 * a - 5 * b:.3f}\n" for a, b in x))
    regression = ("data.task=regression", "data.target_offset=100.0", "data.target_scale=10.0")
    settings, run = with_tables(tmp_path, texts, *regression)
    here, there = simulate(settings, out=tmp_path / "here").summary, run.serve()
    for name in ("rmse", "mae", "r2"):
        assert there["metrics"][name]["mean"] == here["metrics"][name]["mean"]
        assert there["metrics"][name]["pooled"] == pytest.approx(here["metrics"][name]["pooled"], rel=1e-12)
    assert "accuracy" not in there


@pytest.mark.parametrize(
    "change",
    [
        {"sums": {}},
        {"sums": {"Confusion": [1.0]}},
        {"sums": {"Scores": [1.0]}},
        {"sums": {"Confusion": [-1.0] * 100}},
        {"sums": {"Confusion": ["x"] * 100}},
        {"values": {}},
        {"values": {"global": {"auroc": 0.5}}},
        {"values": {"global": {"balanced_accuracy": float("nan")}}},
        {"correct": {}},
        {"majority": {"auroc": 0.5}},
    ],
)
def test_metrics_that_cannot_be_are_not_counted(change: dict[str, Any], tmp_path: Path) -> None:
    """Catches a client that ends the run, or poisons a mean, with sums of another shape or metrics of another name."""
    run = Run(tmp_path, config("fedavg", 'run.metrics=["balanced_accuracy"]'))

    def instead(message: Any, go: Any) -> Frame:
        header, body = go()
        if message.kind != "evaluate" or message.node != 100:
            return header, body
        told = json.loads(header)
        told["score"] |= change
        return json.dumps(told), body

    run.memory.instead = instead
    found = run.serve()["metrics"]["balanced_accuracy"]
    assert found["clients"] == 2
    assert 0 <= found["mean"] <= 1
    assert {row["client"] for row in run.events if row["event"] == "failed"} == {0}


def test_a_client_that_tells_no_scores_tells_no_metrics(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg", METRICS), tell=("costs",))
    summary = run.serve()
    assert "metrics" not in summary
    assert not any('"sums":{"' in header or '"values":{"' in header for header, _ in run.memory.replies)


def test_a_test_has_a_predictor() -> None:
    with pytest.raises(ValueError, match="no predictor"):
        Counts(examples=3)
