"""Comparisons: the bookkeeping on a stand-in runtime, and one real tiny run."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from summaries import CONFIG, ROUNDS, summary
from torch import nn

import polyfed
from polyfed.base.errors import ConfigError, DataError, DivergedError, ModelError, RunDirError
from polyfed.comparison import compare, meanings, resume_with_controls, run_with_controls, runs
from polyfed.comparison.compare import planned
from polyfed.config import Config
from polyfed.report.results import RunResult
from polyfed.rounds import identity
from polyfed.rounds.callbacks import Interrupted
from polyfed.rounds.identity import Content
from polyfed.storage.run_dir import RunDirInUseError


class Runtime:
    """Stands in for simulate and resume: writes what they write, and counts."""

    def __init__(self):
        self.played, self.resumed, self.interrupt, self.hashes = [], [], None, {}

    def simulate(self, config, *, out=None, **asked):
        out = out or Path("runs") / "made-up"
        out.mkdir(parents=True)
        Content.of(config).write(out)
        (out / "config.toml").write_text(config.resolved().to_toml())
        self.played.append(out)
        if self.interrupt is not None and len(self.played) == self.interrupt:
            raise Interrupted(out)
        return self.finish(config, out)

    def resume(self, out, **asked):
        self.resumed.append(out)
        return self.finish(Config.load(out / "config.toml"), out)

    def finish(self, config, out):
        key = (config.algorithm.name, config.run.seed)
        found = summary(
            {"fedavg": 0.6, "standalone": 0.7}[config.algorithm.name] + math.sin(key[1]) / 100,
            run_dir=str(out),
            config_hash=config.hash(),
            partition_hash=self.hashes.get(key, f"seed {config.run.seed}"),
        )
        (out / "summary.json").write_text(json.dumps(found))
        return RunResult(out, found)


@pytest.fixture
def runtime(monkeypatch):
    found = Runtime()
    monkeypatch.setattr(runs, "simulate", found.simulate)
    monkeypatch.setattr(runs, "resume", found.resume)
    return found


def test_every_seed_and_algorithm_is_run_once_and_complete_runs_are_not_run_again(runtime, tmp_path):
    first = compare(CONFIG, ["fedavg", "standalone"], [0, 1, 2], tmp_path)
    places = sorted(str(path.relative_to(tmp_path))[:-13] for path in runtime.played)
    assert places == [f"cells/{name}-seed-{seed}" for name in ("fedavg", "standalone") for seed in (0, 1, 2)]
    again = compare(CONFIG, ["fedavg", "standalone"], [0, 1, 2, 3], tmp_path)
    assert len(runtime.played) == 8
    assert runtime.resumed == []
    assert first.lines[0].means.items() <= again.lines[0].means.items()


def test_an_interrupted_run_goes_on(runtime, tmp_path):
    runtime.interrupt = 2
    with pytest.raises(Interrupted):
        compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)
    compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)
    (resumed,) = runtime.resumed
    assert resumed.name.startswith("standalone-seed-0-")
    assert len(runtime.played) == 4


def test_runs_of_another_configuration_are_not_taken_for_these(runtime, tmp_path, monkeypatch):
    compare(CONFIG, ["fedavg"], [0], tmp_path)
    compare(CONFIG.replace("train", lr=0.5), ["fedavg"], [0], tmp_path)
    assert len(runtime.played) == 2
    compare(CONFIG.replace("run", name="other", threads=3), ["fedavg"], [0], tmp_path)
    assert len(runtime.played) == 2
    monkeypatch.setattr(identity, "RESULTS", identity.RESULTS + 1)  # the code gives other numbers now
    compare(CONFIG, ["fedavg"], [0], tmp_path)
    assert len(runtime.played) == 3


def test_a_run_that_diverges_is_told_and_not_tried_again(runtime, tmp_path, monkeypatch):
    def diverge(config, *, out=None, **asked):
        if config.algorithm.name == "standalone":
            out.mkdir(parents=True)
            raise DivergedError("a loss is not finite")
        return runtime.simulate(config, out=out, **asked)

    monkeypatch.setattr(runs, "simulate", diverge)
    found = compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)
    assert [line.accuracy_text for line in found.lines][1] == "2 diverged"
    monkeypatch.setattr(runs, "simulate", None)
    assert compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path).lines == found.lines


def test_what_another_process_is_at_is_left_to_it(runtime, tmp_path, monkeypatch):
    held = []

    def simulate(config, *, out=None, **asked):
        if not held:
            held.append(out)
            raise RunDirInUseError("in use")
        return runtime.simulate(config, out=out, **asked)

    monkeypatch.setattr(runs, "simulate", simulate)
    with pytest.raises(RunDirError, match=r"other processes are running 1 of the cells \(fedavg, seed 0\)"):
        compare(CONFIG, ["fedavg", "standalone"], [0], tmp_path)
    assert len(runtime.played) == 1


def test_what_another_process_has_finished_meanwhile_is_taken(runtime, tmp_path, monkeypatch):
    """Catches a command that waits for cells which were in use when it passed them, and are long done."""
    held = []

    def simulate(config, *, out=None, **asked):
        found = runtime.simulate(config, out=out, **asked)
        if not held:
            held.append(out)
            raise RunDirInUseError("in use")
        return found

    monkeypatch.setattr(runs, "simulate", simulate)
    found = compare(CONFIG, ["fedavg", "standalone"], [0], tmp_path)
    assert [len(line.means) for line in found.lines] == [1, 1]


def test_different_splits_are_not_compared(runtime, tmp_path):
    runtime.hashes["standalone", 1] = "others"
    with pytest.raises(DataError, match="other splits"):
        compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)


def test_the_tables_are_written(runtime, tmp_path):
    found = compare(CONFIG, ["fedavg", "standalone"], [0, 1, 2], tmp_path)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["algorithm"] for row in rows] == ["fedavg", "standalone"]
    assert float(rows[0]["mean"]) == pytest.approx(found.lines[0].mean)
    assert [float(rows[1][f"mean_seed_{seed}"]) for seed in (0, 1, 2)] == list(found.lines[1].means.values())
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.count("\n| fedavg | ") == markdown.count("\n| standalone | ") == 2
    assert all(note in markdown for note in found.notes)


def test_all_that_cannot_be_compared_is_told_before_the_first_run(runtime, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compare(CONFIG, ["fedavg", "fedavgg", "fedavg", "fedmrl:shar=false"], [0, 0], tmp_path)
    text = str(caught.value)
    for part in ("'fedavg'?", "'fedavg' is named twice", "did you mean 'share'?", "--seeds: got [0, 0]"):
        assert part in text
    assert runtime.played == []


def test_what_does_not_fit_is_told_before_the_first_run(runtime, tmp_path):
    """Catches hours of the first algorithm before the second one is refused."""
    unlike = CONFIG.replace("clients", models=("mlp(hidden=(8,))", "mlp(hidden=(9,))"))
    with pytest.raises(ModelError, match="fedavg needs one architecture for all clients"):
        compare(unlike, ["standalone", "fedavg"], [0], tmp_path)
    assert not runtime.played


def test_keys_of_one_algorithm_apply(runtime, tmp_path):
    config = Config.parse({**ROUNDS, "algorithms": {"mine": {"name": "standalone"}}})
    compare(config, ["mine"], [0], tmp_path)
    (path,) = tmp_path.glob("cells/standalone-seed-0-*/config.toml")
    assert Config.load(path).algorithm.name == "standalone"


CONTROLLED = Config.parse(
    {
        "run": {**ROUNDS["run"], "controls": True},
        "algorithm": {"name": "fedavg"},
        "controls": {"alone": {"name": "standalone"}, "again": {"name": "fedavg"}},
    }
)


def test_controls_run_below_the_main_run_and_only_when_asked_for(runtime, tmp_path):
    found = run_with_controls(CONTROLLED, out=tmp_path / "r")
    assert list(found) == ["fedavg", "alone", "again"]
    assert runtime.played[1:] == [tmp_path / "r" / "controls" / name for name in ("alone", "again")]
    assert list(run_with_controls(CONTROLLED.replace("run", controls=False), out=tmp_path / "s")) == ["fedavg"]


def test_an_interrupted_control_is_resumed_through_the_main_run(runtime, tmp_path):
    runtime.interrupt = 2
    with pytest.raises(Interrupted) as caught:
        run_with_controls(CONTROLLED, out=tmp_path / "r")
    assert caught.value.run_dir == tmp_path / "r"
    found = resume_with_controls(tmp_path / "r")
    assert list(found) == ["fedavg", "alone", "again"]
    assert runtime.resumed == [tmp_path / "r" / "controls" / "alone"]
    assert len(runtime.played) == 3


MAIN_JOB = Config.parse(
    {
        "run": {**ROUNDS["run"], "controls": True},
        "algorithm": {"name": "fedmrl", "rep_dim": 50, "lr_private": 0.1},
        "controls": {
            "fedmrl": {"name": "fedmrl", "rep_dim": 50, "share": False, "lr_private": 0.2},
            "standalone": {"name": "standalone"},
        },
        "clients": {"models": ["mlp(rep_dim=100)"]},
    }
)


def test_labels_are_short_and_the_same_for_run_and_resume_and_what_differs_is_told_once(monkeypatch, tmp_path):
    seen = []

    def simulate(config, *, out=None, **asked):
        out.mkdir(parents=True)
        Content.of(config).write(out)
        (out / "config.toml").write_text(config.resolved().to_toml())
        (out / "summary.json").write_text(json.dumps(summary(0.5, run_dir=str(out))))
        return RunResult(out, json.loads((out / "summary.json").read_text()))

    def reporter(label):
        seen.append(label)
        return runs.quiet(label)

    monkeypatch.setattr(runs, "simulate", simulate)
    labels = ["fedmrl", "fedmrl (control)", "standalone"]
    assert list(run_with_controls(MAIN_JOB, out=tmp_path / "r", reporter=reporter)) == labels
    assert list(resume_with_controls(tmp_path / "r", reporter=reporter)) == labels
    assert seen == labels * 2
    told = ["fedmrl (control) is fedmrl share=false lr_private=0.2."]
    assert meanings(MAIN_JOB) == meanings(Config.load(tmp_path / "r" / "config.toml")) == told
    assert meanings(MAIN_JOB.replace("run", controls=False)) == []


def test_there_must_be_a_run_to_go_on_with(tmp_path):
    with pytest.raises(RunDirError, match=r"no config\.toml"):
        resume_with_controls(tmp_path)


def test_a_real_comparison_on_the_same_splits(tmp_path):
    config = Config.parse(
        {
            **ROUNDS,
            "partition": {"classes_per_client": 5, "samples_per_client": 20},
            "clients": {"count": 3, "models": ["mlp(hidden=(8,))"]},
            "train": {"batch_size": 8, "lr": 0.05},
            "algorithm": {"name": "fedavg"},
        }
    )
    found = compare(config, ["fedavg", "standalone"], [0, 1], tmp_path)
    summaries = {path.parent: json.loads(path.read_text()) for path in tmp_path.glob("cells/*/summary.json")}
    assert len(summaries) == 4
    assert len({one["partition_hash"] for one in summaries.values()}) == 2  # one per seed
    fedavg, standalone = found.lines
    assert fedavg.costs.up > 0 == standalone.costs.up
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/summary.json")}
    assert compare(config, ["fedavg", "standalone"], [0, 1], tmp_path).lines == found.lines
    assert before == {path: path.stat().st_mtime_ns for path in before}


# -------------------------------------------------------------------------------------------------------- from Python


def test_objects_are_compared_as_their_names_are(runtime, tmp_path):
    """Catches an object that is another run than its name, and its cells that are computed twice."""
    named = compare(CONFIG, ["fedavg", "standalone"], [0], tmp_path)
    given = compare(CONFIG, [polyfed.FedAvg(), polyfed.Standalone], [0], tmp_path)
    assert len(runtime.played) == 2
    assert [line.label for line in given.lines] == [line.label for line in named.lines] == ["fedavg", "standalone"]
    assert [line.means for line in given.lines] == [line.means for line in named.lines]


def test_an_instance_is_compared_with_its_own_values():
    """Catches keys of the configuration, or of [algorithms.NAME], that leak into an instance."""
    config = MAIN_JOB.replace("run", controls=False)
    one, other = planned(config, [polyfed.FedMRL(rep_dim=40), "fedmrl"], [0])
    assert one.label == "fedmrl:rep_dim=40"
    assert one.config.algorithm.keys == {"rep_dim": 40}
    assert other.config.algorithm.keys == {"rep_dim": 50, "lr_private": 0.1}
    along = planned(config, [polyfed.FedMRL(share=False)], [0], {"algorithm.rep_dim": [20, 30]})
    assert [cell.config.algorithm.keys["rep_dim"] for cell in along] == [20, 30]
    with pytest.raises(ConfigError, match="'fedmrl:share=false' is named twice"):
        planned(config, [polyfed.FedMRL(share=False), "fedmrl:share=false"], [0])
    with pytest.raises(ConfigError, match="algorithm: got int"):
        planned(config, [3], [0])


def test_a_comparison_of_objects_on_data_of_a_program(tmp_path):
    """Catches cells that are taken for those of other data or of another network of the same name."""
    draw = np.random.default_rng(0)
    parts = {name: (draw.normal(size=(24, 4)), np.arange(24) % 2) for name in "ab"}
    one, other = polyfed.federated_data(parts), polyfed.federated_data({**parts, "b": parts["a"]})

    def table(dataset, *models):
        config = {"run": {"rounds": 1, "threads": 1}}
        return compare(
            config, ["fedavg", "standalone"], [0, 1], tmp_path, dataset=dataset, models=models, progress=False
        )

    def net(width):
        return lambda: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    small, large = net(3), net(30)
    tables = [table(one, small), table(one, small), table(other, small), table(one, large)]
    dirs = [{row["run_dir"] for row in found.records()} for found in tables]
    assert dirs[0] == dirs[1]
    assert len(dirs[0] | dirs[2] | dirs[3]) == 12
    assert tables[0].records()[0]["bytes_up"] < tables[3].records()[0]["bytes_up"]


def test_it_prints_its_tables_and_has_records_and_a_picture(tmp_path, capsys):
    """Catches a curve of one algorithm under another's name, and means over other seeds."""
    config = Config.parse({"run": {"rounds": 2, "eval_every": 1, "threads": 1}, "clients": {"models": ["mlp"]}})
    config = config.replace("partition", samples_per_client=10)
    found = compare(config, ["standalone", "fedavg"], [0, 1], tmp_path)
    assert "standalone, seed 0 (1 of 4): 2 rounds" in capsys.readouterr().out
    records = found.records()
    assert [(row["algorithm"], row["seed"]) for row in records] == [
        *(("standalone", 0), ("fedavg", 0), ("standalone", 1), ("fedavg", 1)),
    ]
    for row in records:
        result = polyfed.load_run(row["run_dir"])
        assert (row["accuracy"], row["bytes_up"]) == (result.accuracy, result.costs["bytes_up"])
        assert result.config.run.seed == row["seed"]
    text = str(found)
    assert text.startswith("algorithm")
    assert text.splitlines()[1].startswith("standalone  ")
    assert f"The tables lie in {tmp_path}" in text
    assert found._repr_html_().startswith("<pre>algorithm")
    assert repr(found) == f"Comparison(standalone, fedavg; seeds 0, 1; in {str(tmp_path)!r})"
    rounds = found.plot().axes[0]
    for line, label in zip(rounds.lines, ("standalone", "fedavg"), strict=True):
        assert line.get_label() == label
        ends = [row["accuracy"] for row in records if row["algorithm"] == label]
        assert line.get_ydata()[-1] == pytest.approx(100 * sum(ends) / 2)
