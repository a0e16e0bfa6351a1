"""A study that is run: what is not run again, tuning, and the page with its tables and pictures."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from studies import TINY, TUNE, study
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError, RunDirError
from polyfed.cli import app
from polyfed.comparison import execution
from polyfed.experiments import views
from polyfed.experiments.reproduce import NOTES, Job, reproduce
from polyfed.report.results import summary_of
from polyfed.rounds.federation import prepare
from polyfed.storage.run_dir import RunDir


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small study that was run, with all views: its file and its --out."""
    folder = tmp_path_factory.mktemp("study")
    path = study(
        folder / "mine.toml",
        algorithms=["fedmrl:rep_dim=4:auxiliary=mlp(hidden=(4,))", "standalone"],
        show=["accuracy", "curves", "clients", "targets", "grid", "predictors", "gradient", "networks", "protocol"],
        entries={"longer": {"name": "standalone", "train": {"epochs": 3}}},
        pair=["fedmrl:rep_dim=4:auxiliary=mlp(hidden=(4,))", "standalone"],
        grid={"train.lr": [0.01, 0.1]},
    )
    reproduce(path, out=folder)
    return path, folder


def test_the_page_has_its_tables_pictures_and_notes(done: tuple[Path, Path]) -> None:
    _, out = done
    page = out / "mine"
    text = (page / "page.md").read_text()
    for name in views.VIEWS:
        rows = list(csv.DictReader((page / f"{name}.csv").read_text().splitlines()))
        assert rows, name
        assert (page / f"{name}.png").exists() == (name not in ("networks", "protocol"))
        assert f"[{name}.csv]({name}.csv)" in text
    rows = list(csv.DictReader((page / "table.csv").read_text().splitlines()))
    assert [row["algorithm"] == "majority class" for row in rows] == [False, False, True] * 2
    index = list(csv.DictReader((page / "cells.csv").read_text().splitlines()))
    assert {row["state"] for row in index} == {"done"}
    assert all((out / row["folder"] / "summary.json").exists() for row in index)
    assert "## Below two standard errors\n\n* lr = 0.01: " in text
    assert "lr = 0.1, " not in text.split("## In three sentences")[1]
    (protocol,) = csv.DictReader((page / "protocol.csv").read_text().splitlines())
    assert (protocol["algorithm"], protocol["local work"], protocol["rate"]) == ("longer", "3 epochs", "0.05")
    gradient = list(csv.DictReader((page / "gradient.csv").read_text().splitlines()))
    assert [row["round"] for row in gradient[:3]] == ["0", "1", "2"]
    assert float(gradient[1]["mean_so_far"]) == pytest.approx(
        (float(gradient[0]["gradient_squared"]) + float(gradient[1]["gradient_squared"])) / 2
    )


def test_nothing_is_run_again_and_notes_are_kept(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = done
    (out / "mine" / "notes.md").write_text("- It agrees.\n")
    monkeypatch.setattr(execution, "run_or_go_on", None)
    reproduce(path, out=out)
    assert (out / "mine" / "page.md").read_text().endswith("## In three sentences\n\n- It agrees.\n")
    (out / "mine" / "notes.md").write_text(NOTES)


def test_views_are_arithmetic_on_what_the_runs_wrote(done: tuple[Path, Path]) -> None:
    """Catches numbers of another client, round or seed."""
    path, out = done
    job = Job.load(path, out=out)
    cells = job.study.cells()
    results = views.Results(job.study, cells, out)
    one = cells[0]
    summary = summary_of(one.run_dir(out))
    assert summary is not None
    assert sum(results.clients(one).values()) / 3 == pytest.approx(summary["accuracy"]["mean"])
    target = next(row for row in views.targets(results).rows)
    rows = [summary_of(cell.run_dir(out)) for cell in cells if cell.label == one.label and cell.setting == one.setting]
    at = [row["targets"][0]["round"] for row in rows]
    assert target[5] == sum(at) / 2
    values = [row["bytes"]["up_values"] + row["bytes"]["down_values"] for row in rows]
    assert target[6] == pytest.approx(sum(v / 4 / 6 * r for v, r in zip(values, at, strict=True)) / 2)
    assert target[8] == pytest.approx(sum(row["flops"] / 6 * r for row, r in zip(rows, at, strict=True)) / 2)
    cell = replace(one, config=one.config.replace("run", precision="fp64"))
    double = views.Results(job.study, [cell], out)
    double.__dict__["done"] = {cell: summary}
    assert views.targets(double).rows[0][6] == pytest.approx(values[0] / 8 / 6 * at[0])
    unfinished = [replace(one, seed=9, config=one.config.replace("run", seed=9))]
    short = views.targets(views.Results(job.study, [*cells, *unfinished], out))
    assert short.rows[0][3:6] == (3, 2, None)
    assert short.cells is not None
    assert short.cells[1][0][3] == "2 of 3 seeds"
    differences = [row for row in views.clients(results).rows if row[0] == one.setting.title and row[1] == 0]
    assert len(differences) == 3
    assert all(a - b == difference for *_, a, b, difference in differences)
    assert [row[2:4] for row in views.grid(results).rows][::2] == [("lr", 0.01), ("lr", 0.1)]


def test_the_better_of_two_errors_is_the_lower(tmp_path: Path) -> None:
    """Catches clients for whom the larger error counts as better."""
    config = {**TINY, "run": {**TINY["run"], "metrics": ["brier"], "targets": []}}
    path = study(tmp_path / "s.toml", config=config, seeds=[0], pair=["fedavg", "standalone"], show=["clients"])
    job = Job.load(path, out=tmp_path)
    errors = {"fedavg": (0.1, 0.2, 0.5), "standalone": (0.3, 0.3, 0.1)}
    cells = job.study.cells()
    for cell in cells:
        cell.run_dir(tmp_path).mkdir(parents=True)
        (cell.run_dir(tmp_path) / "summary.json").write_text(
            json.dumps({"rounds": 2, "metrics": {"brier": {"mean": 0.2}}})
        )
        rows = [
            {"round": 2, "client": k, "examples": 4, "metrics": {"brier": e}} for k, e in enumerate(errors[cell.label])
        ]
        (cell.run_dir(tmp_path) / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = views.clients(views.Results(job.study, cells, tmp_path))
    assert view.cells is not None
    assert view.cells[0][2:4] == ("better with fedavg", "better with standalone")
    assert view.cells[1][0][1:4] == ("3", "67 %", "33 %")


def test_only_runs_a_part_and_the_page_is_of_what_is_there(tmp_path: Path) -> None:
    path = study(tmp_path / "s.toml")
    reproduce(path, out=tmp_path, only=["fed*", "seed 1"])
    assert [row[1] for row in Job.load(path, out=tmp_path).plan()] == ["to do", "to do", "done", "to do"]
    assert "**3 of 4 cells are not done yet.**" in (tmp_path / "s" / "page.md").read_text()
    with pytest.raises(ConfigError, match="--only seed 9: fits no cell; there are fedavg, seed 0, standalone, seed 1"):
        reproduce(path, out=tmp_path, only=["seed 9"])


def test_an_algorithm_is_shown_once_it_is_tuned(tmp_path: Path) -> None:
    """Catches results of another study, with the values of the file, beside tuned ones; and a plan that differs."""
    few = {"algorithms": ["fedavg", "standalone"], "seeds": [0]}
    reproduce(study(tmp_path / "s.toml", **few), out=tmp_path)
    path = study(tmp_path / "s.toml", **few, tune=TUNE)
    reproduce(path, out=tmp_path, only=["fedavg"])
    text = (tmp_path / "s" / "page.md").read_text()
    assert "**1 of 2 cells are not done yet.**" in text
    assert "| standalone" not in text
    assert "* standalone: not tuned yet, and not shown" in text
    shown = list(csv.DictReader((tmp_path / "s" / "table.csv").read_text().splitlines()))
    assert [row["algorithm"] for row in shown] == ["fedavg", "majority class"]
    job = Job.load(path, out=tmp_path)
    assert job.tuned()[1] == {"standalone"}
    states = [(cell.label, state) for cell, state, _ in job.plan() if cell.setting.name != "tuning"]
    assert ("fedavg", "done") in states
    reproduce(path, out=tmp_path)
    assert "| standalone" in (tmp_path / "s" / "page.md").read_text()


def test_a_tuning_cell_that_another_process_is_at_holds_up_its_algorithm_only(tmp_path: Path) -> None:
    """Catches a second terminal that gives up while there is work, or says that everything else is done."""
    path = study(tmp_path / "s.toml", algorithms=["fedavg", "standalone"], seeds=[0], tune=TUNE)
    job = Job.load(path, out=tmp_path)
    held = RunDir(job.tuning()[0].run_dir(tmp_path))
    with pytest.raises(
        RunDirError, match=r"running 1 of the cells \(tuning, epochs = 1, fedavg, seed 0\); 1 more cells wait"
    ):
        reproduce(path, out=tmp_path)
    assert "| standalone" in (tmp_path / "s" / "page.md").read_text()
    held.close()
    reproduce(path, out=tmp_path)
    assert "not done yet" not in (tmp_path / "s" / "page.md").read_text()


def test_a_study_of_the_same_name_elsewhere_gets_a_page_of_its_own(tmp_path: Path) -> None:
    """Catches a page that is written over with another study's numbers, above the first one's sentences."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        study(tmp_path / folder / "s.toml", algorithms=["fedavg"], seeds=[0])
    reproduce(tmp_path / "a" / "s.toml", out=tmp_path)
    with pytest.raises(RunDirError, match=r"has the page of .*a/s\.toml; choose another --out"):
        reproduce(tmp_path / "b" / "s.toml", out=tmp_path)
    assert f"Made by `polyfed reproduce {tmp_path / 'a' / 's.toml'}`" in (tmp_path / "s" / "page.md").read_text()


def test_targets_are_arithmetic_on_summaries(done: tuple[Path, Path]) -> None:
    """Catches a column that is the round alone, another column's factor, or the other precision's bytes."""
    path, out = done
    job = Job.load(path, out=out)
    single, double = (
        replace(cell, config=cell.config.replace("run", targets=(0.5,), precision=precision))
        for cell, precision in zip(job.study.cells()[:2], ("fp32", "fp64"), strict=True)
    )
    summary = {
        "clients": {"participations": 4},
        "bytes": {"up_values": 300, "down_values": 500},
        "flops": 6000,
        "flops_per_example": 7.0,
        "targets": [{"round": 3, "bytes_up": 10, "bytes_down": 20, "flops": 50}],
    }
    results = views.Results(job.study, [single, double], out)
    results.__dict__["done"] = {single: summary, double: summary}
    rows = [row[5:] for row in views.targets(results).rows]
    # rounds; values of both ways / bytes each / participations x rounds; FLOPs of an example; of a client; totals
    assert rows == [(3, 800 / 4 / 4 * 3, 21.0, 6000 / 4 * 3, 30, 50), (3, 800 / 8 / 4 * 3, 21.0, 6000 / 4 * 3, 30, 50)]


#: Runs a study and kills its process in round 3 of Standalone.
KILLED = """
import os, signal, sys
from pathlib import Path
from polyfed.experiments.reproduce import reproduce
from polyfed.rounds.callbacks import Quiet

class Killer(Quiet):
    def __init__(self, label):
        self.label = label
    def round_ended(self, row):
        if "standalone" in self.label and row["round"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

reproduce(Path(sys.argv[1]), out=Path(sys.argv[2]), reporter=Killer)
"""


def test_a_killed_study_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Catches half a cell taken for a whole one, and work done twice."""
    run = {**TINY["run"], "rounds": 4, "checkpoint_every": 2}
    path = study(tmp_path / "s.toml", config={**TINY, "run": run}, seeds=[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(execution.__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    states = [row[1] for row in Job.load(path, out=tmp_path / "killed").plan()]
    assert states == ["done", "begun"]
    (first,) = tmp_path.glob("killed/cells/fedavg-seed-0-*/summary.json")
    before = first.stat().st_mtime_ns
    reproduce(path, out=tmp_path / "killed")
    assert first.stat().st_mtime_ns == before
    reproduce(path, out=tmp_path / "whole")
    means = [
        {
            p.parent.name: json.loads(p.read_text())["accuracy"]
            for p in (tmp_path / name / "cells").glob("*/summary.json")
        }
        for name in ("killed", "whole")
    ]
    assert len(means[0]) == 2
    assert means[0] == means[1]


def test_hyper_parameters_are_chosen_on_validation_rows_only(tmp_path: Path) -> None:
    path = study(
        tmp_path / "s.toml",
        algorithms=["fedavg", "fedmrl:auxiliary=mlp(hidden=(4,))"],
        seeds=[0],
        config={**TINY, "data": {"image_size": 16, "test_fraction": 0.1}, "train": {"epochs": 8, "batch_size": 8}},
        tune={
            "grid": {"train.lr": [1e-7, 0.1], "algorithm.rep_dim": [2, 4]},
            "widen": 0,
            "config": {"data": {"validation_fraction": 0.5, "test_fraction": 0.1}, "run": {"rounds": 4}},
        },
    )
    job = Job.load(path, out=tmp_path)
    assert job.tuned() == ({}, {"fedavg", "fedmrl:auxiliary=mlp(hidden=(4,))"})
    first = job.tuning()
    assert len({cell.folder for cell in first}) == 2 + 4  # fedavg knows no rep_dim
    final = prepare(job.study.cells()[0].config).partition
    tested = set(final.test_rows)
    for cell in first:
        held = prepare(cell.config).partition
        assert set(held.test_rows) <= set(final.train_rows)
        assert not tested & (set(held.test_rows) | set(held.train_rows))
    reproduce(path, out=tmp_path)
    tuned, waiting = job.tuned()
    assert not waiting
    assert tuned["fedavg"] == {"train.lr": 0.1}
    fedmrl = tuned["fedmrl:auxiliary=mlp(hidden=(4,))"]
    assert fedmrl["train.lr"] == 0.1
    assert fedmrl["algorithm.rep_dim"] in (2, 4)
    config = job.study.cells(tuned)[1].config
    assert (config.train.lr, config.algorithm.keys["rep_dim"]) == (0.1, fedmrl["algorithm.rep_dim"])
    assert (config.run.rounds, config.data.validation_fraction) == (2, 0.0)
    assert "* fedavg: train.lr = 0.1" in (tmp_path / "s" / "page.md").read_text()


def test_the_smallest_item_runs_from_the_command_line(tmp_path: Path) -> None:
    """One smoke item of the family, of which one cell is enough here."""

    def polyfed(*words: object) -> str:
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, found.output
        return found.output

    words = ("reproduce", "fedmrl/fig7", "--scale", "smoke", "--only", "fedmrl", "--only", "seed 0", "--out", tmp_path)
    assert "about" in polyfed(*words, "--list")
    told = polyfed(*words)
    page = tmp_path / "fedmrl" / "fig7.smoke" / "page.md"
    assert f"The page is {page}" in told
    assert "mix-small" in page.read_text()
    assert "fedmrl/table1" in polyfed("list", "items")
    bad = CliRunner().invoke(app, ["reproduce", "fedmrl/table11"])
    assert bad.exit_code == 2
    assert "did you mean 'fedmrl/table1'" in bad.output
