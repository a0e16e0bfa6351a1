"""`RunResult` and `load_run`, held to the files of the run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import running
from deploy_toy import Run
from deploy_toy import config as toy

import polyfed
from polyfed import RunResult, load_run, simulate
from polyfed.base.errors import RunDirError
from polyfed.report.curves import Curve, mean_curve

NAMES = ["Ulm", "Bonn", "Kiel", "Jena"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = running.config(
        run={"metrics": ["auroc", "accuracy"], "eval_every": 2}, clients={"names": NAMES, "participation": 0.5}
    )
    return simulate(config, out=tmp_path_factory.mktemp("runs") / "run")


def test_its_numbers_are_those_of_the_summary(run: RunResult) -> None:
    told = json.loads((run.run_dir / "summary.json").read_text())
    assert run.summary == told
    assert run.accuracy == told["accuracy"]["mean"]
    assert run.metrics == {name: told["metrics"][name]["mean"] for name in ("auroc", "accuracy")}
    assert run.costs["bytes_up"] == told["bytes"]["up"] > 0
    assert run.costs["bytes_down"] == told["bytes"]["down"] != told["bytes"]["up"]
    for key in ("flops", "flops_evaluation", "seconds", "seconds_evaluation"):
        assert run.costs[key] == told[key]
    assert run.costs["process_peak"] == told["memory"]["process_peak"]
    assert run.config.to_toml() == (run.run_dir / "config.toml").read_text()


def test_rounds_are_columns_with_a_value_or_none_for_every_round(run: RunResult) -> None:
    """Catches columns that slip: a value of round 2 beside round 1."""
    lines = running.lines(run.run_dir / "rounds.jsonl")
    assert run.rounds["round"] == [0, 1, 2, 3, 4]
    assert {len(column) for column in run.rounds.values()} == {5}
    assert run.rounds["accuracy.mean"] == [line.get("accuracy", {}).get("mean") for line in lines]
    assert [value is None for value in run.rounds["accuracy.mean"]] == [False, True, False, True, False]
    assert run.rounds["totals.bytes_up"] == [line["totals"]["bytes_up"] for line in lines]
    assert run.rounds["cohort"][0] is None


def test_clients_are_those_of_the_last_evaluation_and_records_are_all(run: RunResult) -> None:
    lines = running.lines(run.run_dir / "clients.jsonl")
    last = [line for line in lines if line["round"] == 4 and "examples" in line]
    assert run.clients["name"] == NAMES
    assert run.clients["accuracy"] == [line["accuracy"] for line in last]
    assert run.clients["metrics.auroc"] == [line["metrics"]["auroc"] for line in last]
    records = run.records()
    assert len(records) == len(lines)
    assert [row["metrics.auroc"] for row in records if row["round"] == 4 and "examples" in row] == run.clients[
        "metrics.auroc"
    ]


def test_it_prints_the_closing_table_and_the_clients(run: RunResult) -> None:
    text = str(run)
    assert f"{100 * run.accuracy:.1f} %" in text  # type: ignore[operator]
    assert all(re.search(rf"^{name} +mlp", text, re.MULTILINE) for name in NAMES)
    assert text.splitlines()[-1] == f"The run lies in {run.run_dir}"
    assert repr(run) == f"RunResult({str(run.run_dir)!r}: fedmrl, auroc {run.metrics['auroc']:.3f})"
    assert run._repr_html_() == f"<pre>{text}</pre>"


def test_the_picture_has_the_curve_of_the_headline_metric(run: RunResult) -> None:
    """Catches the accuracy drawn under another metric's name, and axes that are exchanged."""
    figure = run.plot()
    rounds, sent = figure.axes
    found = [rounds.lines[0].get_xdata(), rounds.lines[0].get_ydata(), sent.lines[0].get_xdata()]
    values = [value for value in run.rounds["metrics.auroc.mean"] if value is not None]
    both = zip(run.rounds["totals.bytes_up"], run.rounds["totals.bytes_down"], strict=True)
    megabytes = [(up + down) / 1e6 for up, down in both][::2]
    assert [list(axis) for axis in found] == [[0, 2, 4], values, megabytes]
    assert (rounds.get_xlabel(), rounds.get_ylabel()) == ("round", "auroc")
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []  # a notebook would show it twice


def test_percent_are_drawn_as_percent(tmp_path: Path) -> None:
    result = simulate(running.config(run={"rounds": 1, "eval_every": 1}), out=tmp_path / "run")
    axis = result.plot().axes[0]
    assert axis.lines[0].get_ydata()[-1] == pytest.approx(100 * result.accuracy)  # type: ignore[operator]
    assert axis.get_ylabel() == "accuracy, %"


def test_a_mean_curve_is_over_the_rounds_of_all() -> None:
    one, other = Curve([0, 2, 4], [0, 20, 40], [0.1, 0.2, 0.3]), Curve([0, 1, 4], [0, 30, 80], [0.3, 0.9, 0.5])
    assert mean_curve([one, other]) == Curve([0, 4], [0, 60], [pytest.approx(0.2), pytest.approx(0.4)])


def test_it_is_loaded_again_from_where_the_directory_is_now(run: RunResult, tmp_path: Path) -> None:
    """Catches a table that reads the logs of the directory in which the run was."""
    moved = tmp_path / "moved"
    shutil.copytree(run.run_dir, moved)
    with (moved / "clients.jsonl").open() as log:
        text = log.read().replace("Ulm", "Graz")
    (moved / "clients.jsonl").write_text(text)
    again = load_run(str(moved))
    assert (again.summary, again.metrics, again.rounds) == (run.summary, run.metrics, run.rounds)
    assert "Graz" in str(again)
    assert str(again).endswith(str(moved))


def test_a_run_of_code_that_is_gone_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_once.py").write_text(
        "from torch import nn\n\ndef net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = running.config(clients={"models": ["mine_once:net"]}, algorithm={"name": "fedavg"}, run={"rounds": 1})
    run = simulate(config, out=tmp_path / "run")
    (tmp_path / "mine_once.py").unlink()
    code = f"import polyfed; r = polyfed.load_run({str(run.run_dir)!r}); print(r.accuracy, r.config.clients.models[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{run.accuracy} mine_once:net\n"


def test_a_deployed_run_is_loaded(tmp_path: Path) -> None:
    there = Run(tmp_path, toy("fedavg")).serve()
    result = load_run(there["run_dir"])
    assert result.accuracy == there["accuracy"]["mean"]
    assert result.clients["client"] == list(range(there["clients"]["count"]))
    assert result.rounds["round"] == list(range(there["rounds"] + 1))
    assert result.config.algorithm.name == "fedavg"
    assert "fedavg" in str(result)
    assert len(result.plot().axes) == 2


def test_what_is_no_complete_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"holds no run: it has no config\.toml"):
        load_run(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(RunDirError, match=r"is not complete; continue it with `polyfed resume"):
        load_run(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunDirError, match=r"summary\.json cannot be read"):
        load_run(tmp_path)
    with pytest.raises(RunDirError, match=r"rounds\.jsonl cannot be read"):
        _ = polyfed.RunResult(tmp_path, {}).rounds
