"""Comparisons: the arithmetic on made-up summaries, the bookkeeping on a stand-in runtime, and one real tiny run."""

import csv
import json
import math
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from polyfed.compare import compare, meanings, paired_p, resume_with_controls, run_with_controls, runs, tabulate
from polyfed.compare.grid import Entry
from polyfed.config import Config
from polyfed.errors import ConfigError, DataError, RunDirError
from polyfed.report import TRAINING_TIME
from polyfed.runtime.watch import Interrupted

ROUNDS = {"run": {"name": "t", "rounds": 2, "eval_every": 2, "threads": 1}}


def summary(mean, worst=0.5, **changes):
    return {
        "accuracy": {"mean": mean, "worst_decile": worst},
        "bytes": {"up": 10, "down": 20},
        "flops": 1000,
        "seconds": 2.0,
        "memory": {"process_peak": 1},
        "partition_hash": "h",
        **changes,
    }


def table(**means):
    seeds = range(len(next(iter(means.values()))))
    return tabulate({label: [summary(mean) for mean in of] for label, of in means.items()}, list(seeds), Path("x"))


def test_mean_deviation_difference_and_paired_test_against_the_best_of_the_others():
    a, b, c = [0.80, 0.83, 0.79], [0.70, 0.75, 0.71], [0.60, 0.61, 0.66]
    found = table(a=a, b=b, c=c)
    lines = {line.label: line for line in found.lines}
    assert [lines[name].against for name in "abc"] == ["b", "a", "a"]
    assert lines["a"].difference == pytest.approx(sum(a) / 3 - sum(b) / 3)
    assert lines["c"].difference == pytest.approx(sum(c) / 3 - sum(a) / 3)
    assert lines["a"].p == pytest.approx(ttest_rel(a, b).pvalue)
    assert lines["c"].p == pytest.approx(ttest_rel(c, a).pvalue)
    cells = dict(zip(found.headings, found.cells()[0], strict=True))
    assert cells["mean"] == "80.7 ± 2.1 %"  # deviation with n - 1: 2.08; with n it would be 1.7
    assert cells["difference"] == "+8.7"


def test_fewer_than_three_seeds_make_no_test_and_say_so():
    found = table(a=[0.8, 0.9], b=[0.7, 0.75])
    assert [line.p for line in found.lines] == [None, None]
    assert any("needs at least 3 seeds, and there are 2" in note for note in found.notes)
    assert found.cells()[0][1] == "85.0 ± 7.1 %"
    assert table(a=[0.8], b=[0.7]).cells()[0][1] == "80.0 %"


def test_differences_without_spread_make_no_test_and_say_so():
    equal = table(a=[0.8, 0.9, 0.7], b=[0.8, 0.9, 0.7])
    assert [line.p for line in equal.lines] == [None, None]
    assert any("a and b are equal for every seed" in note for note in equal.notes)
    apart = table(a=[0.5, 0.75, 1.0], b=[0.25, 0.5, 0.75])
    assert any("apart by the same amount" in note for note in apart.notes)
    assert paired_p([0.1, 0.2, 0.3]) is not None


def test_one_algorithm_alone_is_compared_with_nobody():
    found = table(a=[0.5, 0.6, 0.7])
    assert (found.lines[0].against, found.lines[0].difference) == ("", None)
    assert found.notes[1:] == (TRAINING_TIME,)


@pytest.mark.parametrize(
    ("text", "name", "keys", "folder"),
    [
        ("fedmrl", "fedmrl", {}, "fedmrl"),
        ("fedmrl:share=false:rep_dim=50", "fedmrl", {"share": False, "rep_dim": 50}, "fedmrl-share=false-rep_dim=50"),
        ("my.file:Mine", "my.file:Mine", {}, "my.file-Mine"),
        ("my.file:Mine:a=x", "my.file:Mine", {"a": "x"}, "my.file-Mine-a=x"),
    ],
)
def test_entries(text, name, keys, folder):
    entry = Entry.parse(text)
    assert (entry.name, dict(entry.keys), entry.folder, entry.label) == (name, keys, folder, text)


class Runtime:
    """Stands in for simulate and resume: writes what they write, and counts."""

    def __init__(self):
        self.played, self.resumed, self.interrupt, self.hashes = [], [], None, {}

    def simulate(self, config, *, out=None, watch=None):
        out = out or Path("runs") / "made-up"
        out.mkdir(parents=True)
        (out / "config.toml").write_text(config.resolved().to_toml())
        self.played.append(out)
        if self.interrupt is not None and len(self.played) == self.interrupt:
            raise Interrupted(out)
        return self.finish(config, out)

    def resume(self, out, *, watch=None):
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
        return found


@pytest.fixture
def runtime(monkeypatch):
    found = Runtime()
    monkeypatch.setattr(runs, "simulate", found.simulate)
    monkeypatch.setattr(runs, "resume", found.resume)
    return found


CONFIG = Config.parse({**ROUNDS, "algorithm": {"name": "fedavg"}})


def test_every_seed_and_algorithm_is_run_once_and_complete_runs_are_not_run_again(runtime, tmp_path):
    first = compare(CONFIG, ["fedavg", "standalone"], [0, 1, 2], tmp_path)
    places = sorted(str(path.relative_to(tmp_path)) for path in runtime.played)
    assert places == [f"{name}/seed-{seed}" for name in ("fedavg", "standalone") for seed in (0, 1, 2)]
    again = compare(CONFIG, ["fedavg", "standalone"], [0, 1, 2, 3], tmp_path)
    assert len(runtime.played) == 8
    assert runtime.resumed == []
    assert again.lines[0].means[:3] == first.lines[0].means


def test_an_interrupted_run_goes_on(runtime, tmp_path):
    runtime.interrupt = 2
    with pytest.raises(Interrupted):
        compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)
    compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)
    assert runtime.resumed == [tmp_path / "standalone" / "seed-0"]
    assert len(runtime.played) == 4


def test_runs_of_another_configuration_are_not_taken_for_these(runtime, tmp_path):
    compare(CONFIG, ["fedavg"], [0], tmp_path)
    with pytest.raises(RunDirError, match="another configuration"):
        compare(CONFIG.replace("train", lr=0.5), ["fedavg"], [0], tmp_path)
    assert len(runtime.played) == 1


def test_different_splits_are_not_compared(runtime, tmp_path):
    runtime.hashes["standalone", 1] = "others"
    with pytest.raises(DataError, match="other splits"):
        compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)


def test_the_tables_are_written(runtime, tmp_path):
    found = compare(CONFIG, ["fedavg", "standalone"], [0, 1, 2], tmp_path)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["algorithm"] for row in rows] == ["fedavg", "standalone"]
    assert float(rows[0]["mean"]) == pytest.approx(found.lines[0].mean)
    assert [float(rows[1][f"mean_seed_{seed}"]) for seed in (0, 1, 2)] == list(found.lines[1].means)
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.count("\n| ") == 3
    assert "| fedavg | " in markdown
    assert all(note in markdown for note in found.notes)


def test_all_that_cannot_be_compared_is_told_before_the_first_run(runtime, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compare(CONFIG, ["fedavg", "fedavgg", "fedavg", "fedmrl:shar=false"], [0, 0], tmp_path)
    text = str(caught.value)
    for part in ("'fedavg'?", "'fedavg' is named twice", "did you mean 'share'?", "--seeds: got [0, 0]"):
        assert part in text
    assert runtime.played == []


def test_keys_of_one_algorithm_apply(runtime, tmp_path):
    config = Config.parse({**ROUNDS, "algorithms": {"mine": {"name": "standalone"}}})
    compare(config, ["mine"], [0], tmp_path)
    assert Config.load(tmp_path / "mine" / "seed-0" / "config.toml").algorithm.name == "standalone"


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

    def simulate(config, *, out=None, watch=None):
        out.mkdir(parents=True)
        (out / "config.toml").write_text(config.resolved().to_toml())
        (out / "summary.json").write_text(json.dumps(summary(0.5, run_dir=str(out))))
        return json.loads((out / "summary.json").read_text())

    def watches(label):
        seen.append(label)
        return runs.quiet(label)

    monkeypatch.setattr(runs, "simulate", simulate)
    labels = ["fedmrl", "fedmrl (control)", "standalone"]
    assert list(run_with_controls(MAIN_JOB, out=tmp_path / "r", watches=watches)) == labels
    assert list(resume_with_controls(tmp_path / "r", watches=watches)) == labels
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
    summaries = {path.parent: json.loads(path.read_text()) for path in tmp_path.glob("*/seed-*/summary.json")}
    assert len(summaries) == 4
    assert len({one["partition_hash"] for one in summaries.values()}) == 2  # one per seed
    fedavg, standalone = found.lines
    assert fedavg.bytes_up > 0 == standalone.bytes_up
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-*/summary.json")}
    assert compare(config, ["fedavg", "standalone"], [0, 1], tmp_path).lines == found.lines
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_simulated_times_are_means_over_seeds_that_all_reached_the_target(tmp_path):
    """Catches a mean over the lucky seeds only."""

    def run(seconds, *targets):
        reached = [{"accuracy": a, "simulated_seconds": s} if s else None for a, s in targets]
        return {**summary(0.5), "simulated": {"seconds": seconds}, "targets": reached}

    runs_ = {
        "fedavg": [run(60.0, (0.5, 10.0), (0.6, 30.0)), run(70.0, (0.5, 20.0), (0.6, None))],
        "standalone": [run(8.0, (0.5, None), (0.6, None))] * 2,
    }
    table = tabulate(runs_, [0, 1], tmp_path)
    assert [line.times for line in table.lines] == [(65.0, 15.0, None), (8.0, None, None)]
    assert table.headings[7:10] == ("simulated time", "to 50.0 %", "to 60.0 %")
    assert table.cells()[0][7:10] == ("1 min 05 s", "15.0 s", "-")
    head, first, *_ = table.to_csv().splitlines()
    row = dict(zip(head.split(","), first.split(","), strict=True))
    times = [row[key] for key in ("simulated_seconds", "simulated_seconds_to_0.5", "simulated_seconds_to_0.6")]
    assert times == ["65.0", "15.0", ""]
    lines = table.to_markdown().splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "simulated" not in tabulate({"fedavg": [summary(0.5)]}, [0], tmp_path).to_csv()
