"""Studies: the format, what is run and what is not run again, tuning, and the page with its tables and pictures."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError, RunDirError
from polyfed.base.rng import Rng
from polyfed.cli import app
from polyfed.compare import specs as cells_
from polyfed.compare.runs import summary_of
from polyfed.compare.specs import chosen
from polyfed.config import Config
from polyfed.config.toml import to_toml
from polyfed.core.algorithm import Task
from polyfed.core.net import Net
from polyfed.data.catalogue import SHAPES
from polyfed.experiments import tuning, views
from polyfed.experiments.catalogue import SCALES, find, items
from polyfed.experiments.figures import draw
from polyfed.experiments.known import Known
from polyfed.experiments.plan import RATE, work
from polyfed.experiments.reproduce import NOTES, Job, reproduce, undecided
from polyfed.experiments.study import Study
from polyfed.models.catalogue import ModelSpec
from polyfed.rounds.federation import prepare
from polyfed.storage.run_dir import RunDir

TINY = {
    "run": {
        "rounds": 2,
        "eval_every": 1,
        "checkpoint_every": 100,
        "threads": 1,
        "targets": [0.001],
        "gradient_clients": 1,
    },
    "data": {"image_size": 16, "test_fraction": 0.5},
    "partition": {"classes_per_client": 10, "samples_per_client": 40},
    "clients": {"count": 3, "models": ["mlp(hidden=(8,))"]},
    "train": {"batch_size": 8, "lr": 0.05},
}


TUNE = {"grid": {"train.epochs": [1, 2]}, "widen": 0, "config": {"data": {"validation_fraction": 0.5}}}


def study(path: Path, **tables: object) -> Path:
    """A small study of your own."""
    base = {"title": "Tiny", "config": TINY, "algorithms": ["fedavg", "standalone"], "seeds": [0, 1]}
    whole = {**base, **tables}
    plain = {key: value for key, value in whole.items() if not isinstance(value, dict)}
    tables_ = {key: value for key, value in whole.items() if isinstance(value, dict)}
    top = to_toml({"x": plain}).split("\n", 1)[1]
    path.write_text(top + to_toml(tables_))
    return path


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("item", items())
def test_every_committed_study_is_valid_at_every_scale(item: str, scale: str) -> None:
    """Catches a key or an algorithm that is no longer there, and an item without the controls or the paper's words."""
    job = Job.load(find(item), scale)
    cells = job.study.cells()
    for setting in {cell.setting.title for cell in cells}:
        here = {cell.label for cell in cells if cell.setting.title == setting}
        assert {"fedmrl", "local-only", "standalone", "standalone, equal FLOPs"} <= here
    assert job.known.claims or job.known.values
    assert job.study.source
    if scale == "smoke":
        assert {cell.config.data.dataset for cell in cells} <= {"digits"}


@pytest.mark.parametrize("item", ["fedmrl/table1", "fedmrl/table3", "fedmrl/fig6"])
def test_equal_flops_are_equal(item: str) -> None:
    """Catches epochs of the control that do not fit the networks any more."""

    known: dict[object, int] = {}

    def forward(task: Task, spec: ModelSpec) -> int:
        if (task, spec) not in known:
            model = task.build(spec)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                Net(model, model.init(Rng((0,))))(torch.zeros((2, *task.input_shape)))
            known[task, spec] = counter.get_total_flops() // 2
        return known[task, spec]

    for scale, least, most in (("smoke", 0.7, 1.35), ("cpu", 0.92, 1.1), ("paper", 0.92, 1.1)):
        cells = [cell for cell in Job.load(find(item), scale).study.cells() if cell.seed == 0]
        equal = {cell.setting.title: cell.config for cell in cells if cell.label == "standalone, equal FLOPs"}
        for cell in (cell for cell in cells if cell.label == "fedmrl"):
            config = cell.config
            channels, classes = SHAPES[config.data.dataset]
            side = config.data.image_size or 32
            task = Task(input_shape=(channels, side, side), num_classes=classes)
            d1, auxiliary = config.algorithm.keys["rep_dim"], config.algorithm.keys.get("auxiliary", "cnn5")
            more = forward(task, ModelSpec.parse(auxiliary).having(rep_dim=d1)) + 2 * (d1 + 500) * 500  # G and P
            large = [forward(task, spec) for spec in config.clients.models]
            spent = sum(large) * equal[cell.setting.title].train.epochs
            ratio = spent / (sum(large) + more * len(large)) / config.train.epochs
            assert least <= ratio <= most, (scale, cell.setting.title, ratio)


def test_settings_grids_and_seeds_expand_to_cells(tmp_path: Path) -> None:
    path = study(
        tmp_path / "s.toml",
        settings={
            "few": {"partition": {"classes_per_client": 2}, "seeds": [3], "algorithms": ["standalone", "longer"]},
            "even": {"partition": {"kind": "iid"}},
        },
        entries={"longer": {"name": "standalone", "train": {"epochs": 4}}},
        grid={"train.lr": [0.1, 0.2]},
    )
    found = Study.load(path).cells()
    assert [(c.setting.title, c.label, c.seed) for c in found[:4]] == [
        ("few, lr = 0.1", "standalone", 3),
        ("few, lr = 0.1", "longer", 3),
        ("few, lr = 0.2", "standalone", 3),
        ("few, lr = 0.2", "longer", 3),
    ]
    assert len(found) == 4 + 2 * 2 * 2
    longer = found[3].config
    assert (longer.train.epochs, longer.train.lr, longer.partition.classes_per_client) == (4, 0.2, 2)
    assert found[-1].config.partition.kind == "iid"
    assert len({cell.folder for cell in found}) == len(found)


def test_scales_and_bases_are_laid_over_each_other(tmp_path: Path) -> None:
    study(tmp_path / "base.toml", scales={"big": {"config": {"run": {"rounds": 9}}, "seeds": [5]}, "small": {}})
    (tmp_path / "s.toml").write_text('base = "base.toml"\ntitle = "Mine"\n[scales.small]\nseeds = [7]\n')
    big, small = (Study.load(tmp_path / "s.toml", scale) for scale in ("big", "small"))
    assert (big.title, big.configuration.run.rounds, big.seeds) == ("Mine", 9, (5,))
    assert (small.configuration.run.rounds, small.seeds) == (2, (7,))
    with pytest.raises(ConfigError, match="--scale: got None; expected one of big, small"):
        Study.load(tmp_path / "s.toml")


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"algorithms": ["fedavgg"]}, "did you mean 'fedavg'?"),
        ({"algorithms": []}, "algorithms: got none"),
        ({"settings": {"a": {"trian": {"lr": 1.0}}}}, "settings.a.trian: unknown; did you mean 'train'?"),
        ({"grid": {"train.lr": [0.0]}}, "train.lr: got 0.0"),
        ({"grid": {"algorithm.rep_dim": [3]}}, "algorithm.rep_dim: none of fedavg, standalone has this key"),
        ({"show": ["clients"]}, "pair: expected two algorithms"),
        ({"show": ["clients"], "pair": ["fedavg", "x"]}, "pair: 'x' is not among the algorithms"),
        ({"show": ["curve"]}, "show"),
        ({"tune": {"grid": {"train.lr": [0.1]}}}, "without it test data would choose"),
        ({"entries": {"fedavg": {"nme": {"a": 1}}}}, "got nme.*; expected keys of the algorithm"),
        (
            {"entries": {"fedavg": {"partition": {"seed": 1}}}},
            "got partition.seed; algorithms are compared on the same",
        ),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is named twice"),
        ({"algorithms": ["fedavg", "fedavg"]}, "algorithms: 'fedavg' is named twice"),
        ({"grid": {"train.lr": [0.1, 0.10]}}, "grid.train.lr: 0.1 is named twice"),
        ({"settings": {"a": {"seeds": [1, 1]}}}, "settings.a.seeds: 1 is named twice"),
        ({"settings": {"a": {"seeds": ["x"]}}}, "settings.a.seeds[0]: got 'x'"),
        ({"settings": {"a": {"seeds": [-1]}}}, "settings.a.seeds[0]: got -1"),
        ({"settings": {"a": {"algorithms": "fd"}}}, "settings.a.algorithms: got 'fd'"),
        ({"settings": {"a": {"grid": {"train.lr": 0.1}}}}, "settings.a.grid"),
        ({"settings": {"a": {"grid": {"train.lr": []}}}}, "settings.a.grid"),
        (
            {"tune": {**TUNE, "grid": {"train.lr": [0.1]}}, "entries": {"fedavg": {"train": {"lr": 0.5}}}},
            "tune.grid.train.lr: fedavg has a lr of its own",
        ),
        (
            {"tune": TUNE, "entries": {"fedavg": {"run": {"eval_every": 1}, "train": {"epochs": 2}}}},
            "tune.grid.train.epochs: fedavg has a epochs of its own",
        ),
    ],
)
def test_faults_of_a_study_are_told_before_anything_runs(tables: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Study.load(study(tmp_path / "s.toml", **tables))
    assert told in str(caught.value)


def test_a_scale_is_for_files_that_have_scales(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scale: got 'paper'; the file has no scales"):
        Study.load(study(tmp_path / "s.toml"), "paper")


def test_paths_are_relative_to_the_file_that_has_them(tmp_path: Path) -> None:
    """Catches a base in another folder, or a setting, whose data are looked for elsewhere."""
    (tmp_path / "sub").mkdir()
    base = {"config": {"data": {"dataset": "npz", "path": "one.npz"}}}
    (tmp_path / "sub" / "base.toml").write_text('title = "t"\nalgorithms = ["fedavg"]\n' + to_toml(base))
    own = {"settings": {"a": {}, "b": {"data": {"path": "two.npz"}}}, "entries": {"data": {"name": "fedavg"}}}
    (tmp_path / "s.toml").write_text('base = "sub/base.toml"\n[settings.a]\n' + to_toml(own))
    found = [cell.config.data.path for cell in Study.load(tmp_path / "s.toml").cells()]
    assert found == [str(tmp_path / "sub" / "one.npz"), str(tmp_path / "two.npz")]


def test_tuning_looks_at_no_test_rows_whatever_a_setting_says(tmp_path: Path) -> None:
    """Catches a setting or an algorithm that lays a validation part of 0 over the tuning's."""
    setting = {"a": {"data": {"validation_fraction": 0.0}, "run": {"rounds": 7}}}
    tune = {**TUNE, "config": {"data": {"validation_fraction": 0.5}, "run": {"rounds": 1}}}
    found = Study.load(study(tmp_path / "s.toml", settings=setting, tune=tune)).tuning()
    assert {(cell.config.data.validation_fraction, cell.config.run.rounds) for cell in found} == {(0.5, 1)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small study that was run, with all views: its file and its --out."""
    folder = tmp_path_factory.mktemp("study")
    path = study(
        folder / "mine.toml",
        algorithms=["fedmrl:rep_dim=4:auxiliary=mlp(hidden=(4,))", "standalone"],
        show=["accuracy", "curves", "clients", "targets", "grid", "predictors", "gradient", "networks"],
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
        assert (page / f"{name}.png").exists() == (name != "networks")
        assert f"[{name}.csv]({name}.csv)" in text
    assert len(list(csv.DictReader((page / "table.csv").read_text().splitlines()))) == 4
    index = list(csv.DictReader((page / "cells.csv").read_text().splitlines()))
    assert {row["state"] for row in index} == {"done"}
    assert all((out / row["folder"] / "summary.json").exists() for row in index)
    assert "## Below two standard errors\n\n* lr = 0.01: " in text
    assert "lr = 0.1, " not in text.split("## In three sentences")[1]
    gradient = list(csv.DictReader((page / "gradient.csv").read_text().splitlines()))
    assert [row["round"] for row in gradient[:3]] == ["0", "1", "2"]
    assert float(gradient[1]["mean_so_far"]) == pytest.approx(
        (float(gradient[0]["gradient_squared"]) + float(gradient[1]["gradient_squared"])) / 2
    )


def test_nothing_is_run_again_and_notes_are_kept(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = done
    (out / "mine" / "notes.md").write_text("- It agrees.\n")
    monkeypatch.setattr(cells_, "run_or_go_on", None)
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
    assert [row["algorithm"] for row in shown] == ["fedavg"]
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
        RunDirError, match=r"at 1 of the cells \(tuning, epochs = 1, fedavg, seed 0\); 1 more cells wait"
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


def test_only_takes_names_with_commas_whole() -> None:
    cells = Job.load(find("fedmrl/table1"), "cpu").study.cells()
    assert {cell.label for cell in chosen(cells, ["standalone, equal FLOPs"])} == {"standalone, equal FLOPs"}
    assert {cell.label for cell in chosen(cells, ["fedmrl, fd"])} == {"fedmrl", "fd"}
    assert {cell.setting.title for cell in chosen(cells, ["N = 10, *", "fedmrl"])} == {"N = 10, C = 100 %"}


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

reproduce(Path(sys.argv[1]), out=Path(sys.argv[2]), callbacks=Killer)
"""


def test_a_killed_study_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Catches half a cell taken for a whole one, and work done twice."""
    run = {**TINY["run"], "rounds": 4, "checkpoint_every": 2}
    path = study(tmp_path / "s.toml", config={**TINY, "run": run}, seeds=[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cells_.__file__).parents[2])}
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


def searched(job: Job, score: Any) -> dict[str, dict[str, Any]]:
    """Play a search whose cells have made-up accuracies, by label and point; None diverged. Returns what is chosen."""
    for _ in range(30):
        left = [cell for cell in job.tuning() if cell.state(job.out) == "to do"]
        if not left:
            chosen, waiting = job.tuned()
            assert not waiting
            return chosen
        for cell in left:
            run_dir = cell.run_dir(job.out)
            if run_dir.exists():  # of keys that the algorithm does not have
                continue
            run_dir.mkdir(parents=True)
            found = score(cell.label, cell.setting.point)
            name, told = (cells_.DIVERGED, {}) if found is None else ("summary.json", {"accuracy": {"mean": found}})
            (run_dir / name).write_text(json.dumps({**told, "run_dir": str(run_dir), "partition_hash": ""}))
    raise AssertionError("the search does not end")


def peak(**best: float) -> Any:
    """An accuracy that falls with the distance from the best values, on a scale of ratios."""

    def score(label: str, point: Mapping[str, Any]) -> float:
        named = {key.rpartition(".")[2]: value for key, value in point.items()}
        if label == "standalone":  # runs that are the same have one accuracy
            named.pop("weight", None)
        return -sum(abs(math.log(named[key] / value)) for key, value in best.items() if key in named)

    return score


def tuned_study(folder: Path, grid: dict[str, Any], **tune: Any) -> Job:
    config = {"data": {"validation_fraction": 0.5}}
    folder.mkdir(exist_ok=True)
    path = study(folder / "s.toml", algorithms=["fedtgp", "standalone"], tune={"grid": grid, "config": config, **tune})
    return Job.load(path, out=folder)


def values(job: Job, label: str, key: str) -> list[Any]:
    points = [cell.setting.point for cell in job.tuning() if cell.label == label]
    return sorted({point[key] for point in points if key in point})


def test_a_search_goes_on_until_the_best_value_is_inside(tmp_path: Path) -> None:
    """Catches a best value at the edge of a grid: FedTGP's own weight of 10 is beyond 0.1 and 1."""
    job = tuned_study(tmp_path, {"train.lr": [0.01, 0.03], "algorithm.weight": [0.1, 1.0]})
    chosen = searched(job, peak(weight=10, lr=0.01))
    assert chosen == {"fedtgp": {"train.lr": 0.01, "algorithm.weight": 10.0}, "standalone": {"train.lr": 0.01}}
    assert values(job, "fedtgp", "algorithm.weight") == [0.1, 1.0, 10.0, 100.0]
    assert values(job, "fedtgp", "train.lr") == [0.003333, 0.01, 0.03]
    assert values(job, "standalone", "algorithm.weight") == [0.1, 1.0]  # it has none: one run for both
    assert job.edges() == {"fedtgp": {}, "standalone": {}}
    assert tuning.told(chosen, job.edges())[0] == "fedtgp: train.lr = 0.01, algorithm.weight = 10.0"


def test_a_search_that_ends_at_the_edge_says_so(tmp_path: Path) -> None:
    """Catches a search without an end, and one that ends in silence."""
    job = tuned_study(tmp_path, {"algorithm.weight": [0.1, 1.0]}, widen=2)
    chosen = searched(job, lambda _, point: point["algorithm.weight"])
    assert chosen["fedtgp"] == {"algorithm.weight": 100.0}
    (line, _) = tuning.told(chosen, job.edges())
    assert line == (
        "fedtgp: algorithm.weight = 100.0 (**at the edge**: no value above 100.0 was tried, as the search "
        "widens 2 times at most)"
    )
    narrow = tuned_study(tmp_path / "narrow", {"algorithm.weight": [0.1, 1.0]}, widen=0)
    assert searched(narrow, peak(weight=1))["fedtgp"] == {"algorithm.weight": 1.0}
    assert "widens 0 times" in narrow.edges()["fedtgp"]["algorithm.weight"]


def test_a_search_ends_where_there_is_no_further_value(tmp_path: Path) -> None:
    """Catches half an epoch, a search below 0, and networks that do not fit, which would end the study."""
    job = tuned_study(
        tmp_path, {"train.epochs": [1, 2], "train.momentum": [0.0, 0.5], "run.driver": ["auto", "batched"]}
    )
    searched(job, lambda _, point: -point["train.epochs"] - point["train.momentum"])
    assert set(job.edges()["standalone"]) == {"train.epochs", "train.momentum"}
    assert job.edges()["standalone"]["train.momentum"] == "there is no value below 0.0"
    assert job.edges()["standalone"]["train.epochs"].startswith("no value below 1 can be run: ")
    wide = study(
        tmp_path / "w.toml",
        algorithms=["fedmrl:auxiliary=mlp(hidden=(4,))"],
        tune={"grid": {"algorithm.rep_dim": [4, 8]}, "config": {"data": {"validation_fraction": 0.5}}},
    )
    job = Job.load(wide, out=tmp_path)
    (label,) = searched(job, lambda _, point: point["algorithm.rep_dim"])
    assert job.edges()[label]["algorithm.rep_dim"].startswith("no value above 8 can be run: ")


def test_the_best_point_has_the_best_mean_over_seeds(tmp_path: Path) -> None:
    """Catches a point that is chosen for one lucky seed, or for its last."""
    job = tuned_study(tmp_path, {"train.momentum": [0.2, 0.4, 0.6]}, seeds=[0, 1], widen=0)
    accuracy = {(0.2, 0): 0.9, (0.2, 1): 0.1, (0.4, 0): 0.6, (0.4, 1): 0.6, (0.6, 0): 0.1, (0.6, 1): 0.8}
    for cell in job.tuning():
        run_dir = cell.run_dir(tmp_path)
        run_dir.mkdir(parents=True)
        mean = accuracy[cell.setting.point["train.momentum"], cell.seed]
        (run_dir / "summary.json").write_text(json.dumps({"accuracy": {"mean": mean}}))
    assert job.tuned() == ({label: {"train.momentum": 0.4} for label in ("fedtgp", "standalone")}, set())


def test_a_point_that_diverged_is_a_neighbour(tmp_path: Path) -> None:
    """Catches a search that climbs on from a rate beyond which training diverges."""
    job = tuned_study(tmp_path, {"train.lr": [0.1, 1.0]})
    searched(job, lambda _, point: None if point["train.lr"] > 5 else point["train.lr"])
    assert values(job, "standalone", "train.lr") == [0.1, 1.0, 10.0]
    assert job.edges()["standalone"] == {}


@pytest.mark.parametrize("item", [name for name in items() if Study.load(find(name), "cpu").tune is not None])
def test_every_study_can_reach_ten_times_its_largest_weight(
    item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a study in which FedTGP's own weight of 10 is out of reach."""
    monkeypatch.setattr(tuning, "misfits", lambda _: [])  # without the data
    job = Job.load(find(item), "cpu", tmp_path)
    chosen = searched(job, lambda label, point: peak(weight=10)(label, point) if "algorithm.weight" in point else 0.5)
    for label, best in chosen.items():
        if "algorithm.weight" in best:
            assert best["algorithm.weight"] == 10.0, label
            assert "algorithm.weight" not in job.edges()[label], label


def test_a_study_widens_as_it_runs_and_its_page_says_what_stayed_at_the_edge(tmp_path: Path) -> None:
    """Catches a search whose further cells are never run, and a page that is silent on them."""
    config = {"data": {"validation_fraction": 0.5}}
    tune = {"grid": {"train.lr": [1e-8, 1e-7], "train.epochs": [1, 2]}, "config": config}  # all points are equal
    path = study(tmp_path / "s.toml", algorithms=["standalone"], seeds=[0], tune=tune)
    reproduce(path, out=tmp_path)
    job = Job.load(path, out=tmp_path)
    assert len(job.tuning()) == 2 * 2 + 1
    assert job.tuned() == ({"standalone": {"train.lr": 1e-8, "train.epochs": 1}}, set())
    assert all(cell.state(tmp_path) == "done" for cell in job.tuning())
    (line,) = (line for line in (tmp_path / "s" / "page.md").read_text().splitlines() if "epochs = 1" in line)
    assert line.startswith("* standalone: train.lr = 1e-08, train.epochs = 1 (**at the edge**: no value below 1 can be")


def test_what_the_paper_says_needs_a_source(tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text('[s]\n[[s.values]]\nalgorithm = "fedavg"\naccuracy = 0.5\ntag = "P"\n')
    path = study(tmp_path / "s.toml", source="A paper", seeds=[0])
    reproduce(path, out=tmp_path)
    beside = (tmp_path / "s" / "page.md").read_text().split("## Beside the paper")[1]
    assert "| 50.00 % | the paper's text |" in beside
    (tmp_path / "known.toml").write_text('[s]\n[[s.claims]]\ntext = "better"\ntag = "REC"\n')
    with pytest.raises(ConfigError, match="tag 'REC'; expected one of P, ABS"):
        Known.load(tmp_path / "known.toml", "s")
    assert Known.load(tmp_path / "known.toml", "other") == Known()


def test_what_is_below_two_standard_errors() -> None:
    from polyfed.compare.statistics import Line

    def line(label: str, *means: float) -> Line:
        return Line("", label, dict(enumerate(means)), {}, 0, None)

    main = line("a", 0.50, 0.60, 0.70)
    near, far = line("near", 0.40, 0.65, 0.72), line("far", 0.30, 0.41, 0.49)
    (told,) = undecided([main, near, far])
    assert told.startswith("a minus near (+1.0 ± 4.6)")  # differences .10, -.05, -.02: deviation 0.0794 / sqrt(3)
    assert "far" not in told
    between = line("between", 0.40, 0.60, 0.68)  # differences .10, 0, .02: 1.3 standard errors
    assert undecided([main, between])[0].startswith("a minus between (+4.0 ± 3.1)")
    assert undecided([line("a", 0.5), line("b", 0.4)]) == ["one seed, so no standard error: a minus b (+10.0)"]
    assert undecided([main, far]) == ["none"]
    assert undecided([main, line("twin", *main.means.values())]) == [
        "a minus twin (+0.0 ± 0.0); points ± standard error of the paired mean"
    ]
    assert undecided([main, line("open")]) == undecided([main]) == ["nothing to compare yet"]


def test_pictures_are_drawn_from_made_up_results(tmp_path: Path) -> None:
    """Catches a picture that stumbles over what was not reached, one seed, or more algorithms than colours."""
    labels = [f"algorithm {i}" for i in range(12)]
    rows = {
        "accuracy": [("s", label, 0.5, None, 1, 0.5) for label in labels],
        "curves": [("s", label, n, 0.1 * n, None) for label in labels for n in range(3)],
        "targets": [("s", label, 0.9, 1, 0, *[None] * 6) for label in labels],
        "grid": [("", label, "kind", value, 0.5, None) for label in labels for value in ("iid", [{"name": "mlp"}])],
    }
    for name, content in rows.items():
        view = views.View(name, "", (), content)
        assert draw(view, tmp_path / f"{name}.png", "Title")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not draw(replace(view, rows=[]), tmp_path / "none.png", "Title")
    assert not (tmp_path / "none.png").exists()


def test_the_estimate_counts_examples() -> None:
    base = Config.parse(
        {
            "run": {"rounds": 10, "eval_every": 10},
            "data": {"dataset": "cifar10"},
            "clients": {"count": 100, "participation": 0.1},
        }
    )
    assert work(base) == pytest.approx(10 * 10 * 480 + 2 * 0.3 * 120 * 110)
    assert work(base.replace("data", dataset="npz", path="x.npz")) is None
    n100 = [c for c in Job.load(find("fedmrl/table1"), "cpu").study.cells() if "N = 100" in c.setting.title]
    assert sum(work(c.config) or 0 for c in n100) / RATE < 3.3 * 3600


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
