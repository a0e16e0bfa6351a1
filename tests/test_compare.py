"""Comparisons: the arithmetic on made-up summaries, the bookkeeping on a stand-in runtime, and one real tiny run."""

import csv
import json
import math
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from polyfed.base.errors import ConfigError, DataError, DivergedError, ModelError, RunDirError
from polyfed.compare import (
    AlgorithmEntry,
    RunSpec,
    Setting,
    compare,
    meanings,
    paired_p,
    resume_with_controls,
    run_with_controls,
    runs,
    tabulate,
)
from polyfed.compare import specs as cells_
from polyfed.compare.compare import parse_grid, planned
from polyfed.config import Config
from polyfed.rounds.callbacks import Interrupted
from polyfed.storage.run_dir import RunDirInUseError

ROUNDS = {"run": {"name": "t", "rounds": 2, "eval_every": 2, "threads": 1}}


def summary(mean, worst=0.5, **changes):
    return {
        "accuracy": {"mean": mean, "worst_decile": worst},
        "bytes": {"up": 400, "down": 800, "up_header": 40, "down_header": 20},
        "flops": 1000,
        "flops_per_example": 7.0,
        "seconds": 2.0,
        "memory": {"process_peak": 1, "step_peak": {"a": 100, "b": 300}},
        "clients": {"count": 2, "trained": 2, "participations": 4},
        "targets": [],
        "partition_hash": "h",
        **changes,
    }


CONFIG = Config.parse({**ROUNDS, "algorithm": {"name": "fedavg"}})


def put(root, label, seed, config=CONFIG, **of):
    """A cell whose run is done with these results."""
    cell = RunSpec(
        Setting(),
        label,
        seed,
        config.replace("run", seed=seed, name=label).replace("train", lr=1.0 + sum(map(ord, label))),
    )
    cell.run_dir(root).mkdir(parents=True)
    (cell.run_dir(root) / "summary.json").write_text(json.dumps(summary(**of)))
    return cell


def table(root, **means):
    cells = [put(root, label, seed, mean=mean) for label, of in means.items() for seed, mean in enumerate(of)]
    return tabulate(cells, root, root)


def test_mean_deviation_difference_and_paired_test_against_the_best_of_the_others(tmp_path):
    a, b, c = [0.80, 0.83, 0.79], [0.70, 0.75, 0.71], [0.60, 0.61, 0.66]
    found = table(tmp_path, a=a, b=b, c=c)
    lines = {line.label: line for line in found.lines}
    assert [lines[name].against for name in "abc"] == ["b", "a", "a"]
    assert lines["a"].difference == pytest.approx(sum(a) / 3 - sum(b) / 3)
    assert lines["c"].difference == pytest.approx(sum(c) / 3 - sum(a) / 3)
    assert lines["a"].p == pytest.approx(ttest_rel(a, b).pvalue)
    assert lines["c"].p == pytest.approx(ttest_rel(c, a).pvalue)
    cells = dict(zip(found.headings, found.cells()[0], strict=True))
    assert cells["mean"] == "80.7 ± 2.1 %"  # deviation with n - 1: 2.08; with n it would be 1.7
    assert lines["a"].worst == {0: 0.5, 1: 0.5, 2: 0.5}
    row = next(csv.DictReader(found.to_csv().splitlines()))
    assert float(row["mean_sd"]) == pytest.approx(math.sqrt(sum((value - sum(a) / 3) ** 2 for value in a) / 2))
    assert cells["difference"] == "+8.7"


def test_fewer_than_three_seeds_make_no_test_and_say_so(tmp_path):
    found = table(tmp_path / "two", a=[0.8, 0.9], b=[0.7, 0.75])
    assert [line.p for line in found.lines] == [None, None]
    assert any("needs at least 3 seeds, and there are 2" in note for note in found.notes)
    assert found.cells()[0][1] == "85.0 ± 7.1 %"
    assert table(tmp_path / "one", a=[0.8], b=[0.7]).cells()[0][1] == "80.0 %"


def test_differences_without_spread_make_no_test_and_say_so(tmp_path):
    equal = table(tmp_path / "equal", a=[0.8, 0.9, 0.7], b=[0.8, 0.9, 0.7])
    assert [line.p for line in equal.lines] == [None, None]
    assert any("a and b are equal for every seed" in note for note in equal.notes)
    apart = table(tmp_path / "apart", a=[0.5, 0.75, 1.0], b=[0.25, 0.5, 0.75])
    assert any("apart by the same amount" in note for note in apart.notes)
    assert paired_p([0.1, 0.2, 0.3]) is not None


def test_one_algorithm_alone_is_compared_with_nobody(tmp_path):
    found = table(tmp_path, a=[0.5, 0.6, 0.7])
    assert (found.lines[0].against, found.lines[0].difference) == ("", None)
    assert not any("Difference" in note for note in found.notes)


def test_seeds_that_are_missing_are_left_out_of_differences_and_diverged_runs_are_told(tmp_path):
    cells = [put(tmp_path, "a", seed, mean=mean) for seed, mean in enumerate([0.5, 0.6, 0.9])]
    cells += [put(tmp_path, "b", seed, mean=mean) for seed, mean in enumerate([0.4, 0.4])]
    lost = RunSpec(Setting(), "b", 2, CONFIG.replace("run", seed=2))
    lost.run_dir(tmp_path).mkdir(parents=True)
    (lost.run_dir(tmp_path) / "diverged.json").write_text("{}")
    a, b = tabulate([*cells, lost], tmp_path, tmp_path).lines
    assert a.difference == pytest.approx(0.15)
    assert b.accuracy_text == "40.0 ± 0.0 %, 1 diverged"


def test_the_best_rival_is_the_best_of_the_seeds_that_are_compared(tmp_path):
    """Catches a rival that is the best thanks to a seed of which there is no difference."""
    cells = [put(tmp_path, "a", seed, mean=0.5) for seed in (0, 1)]
    cells += [put(tmp_path, "b", seed, mean=mean) for seed, mean in enumerate([0.4, 0.4, 0.9])]
    cells += [put(tmp_path, "c", seed, mean=0.45) for seed in (0, 1)]
    a = tabulate(cells, tmp_path, tmp_path).lines[0]
    assert a.against == "c"
    assert a.difference == pytest.approx(0.05)


def test_the_best_rival_is_not_one_that_lacks_a_hard_seed(tmp_path):
    """Catches means over each rival's own seeds."""
    cells = [put(tmp_path, "a", seed, mean=mean) for seed, mean in enumerate([0.9, 0.5])]
    cells += [put(tmp_path, "b", 0, mean=0.95)]
    cells += [put(tmp_path, "c", seed, mean=mean) for seed, mean in enumerate([0.88, 0.48])]
    cells += [put(tmp_path, "d", seed, mean=mean) for seed, mean in enumerate([0.89, 0.40])]
    a = tabulate(cells, tmp_path, tmp_path).lines[0]
    assert a.against == "c"
    assert a.difference == pytest.approx(0.02)


def test_extra_memory_is_beyond_a_standalone_of_the_same_steps(tmp_path):
    """Catches a mean over variants of Standalone: larger batches are not what an algorithm needs beyond."""
    alone = CONFIG.with_algorithm("standalone")
    large = alone.replace("train", batch_size=4 * CONFIG.train.batch_size)
    cells = [
        put(tmp_path, "a", 0, mean=0.6),
        put(tmp_path, "s", 0, alone, mean=0.6, memory={"step_peak": {"x": 50}}),
        put(tmp_path, "long", 0, alone.replace("train", epochs=9), mean=0.6, memory={"step_peak": {"x": 70}}),
        put(tmp_path, "large", 0, large, mean=0.6, memory={"step_peak": {"x": 400}}),
        put(tmp_path, "adam", 0, CONFIG.replace("train", optimizer="adam"), mean=0.6),
    ]
    found = {line.label: line.costs.memory for line in tabulate(cells, tmp_path, tmp_path).lines}
    assert found == {"a": 140, "s": -10, "long": 10, "large": 0, "adam": None}


def test_settings_with_fewer_seeds_are_told_apart(tmp_path):
    """Catches three seeds that are claimed for a setting that has one."""
    cells = [put(tmp_path, "a", seed, mean=0.5) for seed in range(3)]
    few = put(tmp_path / "few", "a", 0, mean=0.5)
    one = RunSpec(Setting("one"), "a", 0, few.config)
    notes = tabulate([*cells, one], tmp_path, tmp_path).notes
    assert "; 1 to 3 seeds, mean ± standard deviation; " in notes[0]


def test_costs_are_per_client_and_round(tmp_path):
    targets = CONFIG.replace("run", targets=[0.5, 0.9])
    alone = targets.with_algorithm("standalone")
    reached = {"accuracy": 0.5, "round": 3, "bytes_up": 1000, "bytes_down": 500, "flops": 70, "seconds": 1.0}
    none = dict.fromkeys(("up", "down", "up_header", "down_header"), 0)
    cells = [
        put(tmp_path, "a", 0, targets, mean=0.6, targets=[reached, None]),
        put(tmp_path, "a", 1, targets, mean=0.6, targets=[reached | {"round": 5}, None]),
        put(tmp_path, "b", 0, targets, mean=0.6, targets=[reached, None]),
        put(tmp_path, "b", 1, targets, mean=0.6, targets=[None, None]),
        put(
            tmp_path, "s", 0, alone, mean=0.4, bytes=none, targets=[None] * 2, memory={"step_peak": {"a": 60, "b": 40}}
        ),
    ]
    found = tabulate(cells, tmp_path, tmp_path)
    a, _, s = (line.costs for line in found.lines)
    assert (a.up, a.down, a.header, a.training, a.inference) == (100, 200, 0.05, 250, 7.0)
    assert (a.memory, s.memory, s.header) == (150, 0, 0.0)
    rows = [dict(zip(found.cost_headings, row, strict=True)) for row in found.cost_cells()]
    assert [row["to 50 %"] for row in rows] == ["round 4, 1.5 kB", "1 of 2 seeds", "not reached"]
    assert [row["to 90 %"] for row in rows] == ["not reached"] * 3
    assert rows[0]["header"] == "5 %"
    diverged = RunSpec(Setting(), "a", 2, targets.replace("run", seed=2))
    diverged.run_dir(tmp_path).mkdir(parents=True)
    (diverged.run_dir(tmp_path) / "diverged.json").write_text("{}")
    open_ = RunSpec(Setting(), "a", 3, targets.replace("run", seed=3))
    for more in (diverged, open_):
        rest = tabulate([*cells, more], tmp_path, tmp_path)
        assert dict(zip(rest.cost_headings, rest.cost_cells()[0], strict=True))["to 50 %"] == "2 of 3 seeds"
    plain = next(csv.DictReader(found.to_csv().splitlines()))
    assert (plain["round_to_0.5"], plain["bytes_to_0.5"], plain["round_to_0.9"]) == ("4.0", "1500.0", "")


@pytest.mark.parametrize(
    ("text", "name", "keys", "sections"),
    [
        ("fedmrl", "fedmrl", {}, {}),
        ("fedmrl:share=false:rep_dim=50", "fedmrl", {"share": False, "rep_dim": 50}, {}),
        ("standalone:train.epochs=2", "standalone", {}, {"train": {"epochs": 2}}),
        ("my.file:Mine", "my.file:Mine", {}, {}),
        ("my.file:Mine:a=x", "my.file:Mine", {"a": "x"}, {}),
    ],
)
def test_entries(text, name, keys, sections):
    entry = AlgorithmEntry.parse(text)
    assert (entry.name, dict(entry.keys), dict(entry.sections), entry.label) == (name, keys, sections, text)


def test_an_entry_of_a_section_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"got trian\.\*; expected keys of the algorithm, or of the sections run"):
        AlgorithmEntry.parse("standalone:trian.epochs=2")


class Runtime:
    """Stands in for simulate and resume: writes what they write, and counts."""

    def __init__(self):
        self.played, self.resumed, self.interrupt, self.hashes = [], [], None, {}

    def simulate(self, config, *, out=None, callback=None):
        out = out or Path("runs") / "made-up"
        out.mkdir(parents=True)
        (out / "config.toml").write_text(config.resolved().to_toml())
        self.played.append(out)
        if self.interrupt is not None and len(self.played) == self.interrupt:
            raise Interrupted(out)
        return self.finish(config, out)

    def resume(self, out, *, callback=None):
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
    monkeypatch.setattr(cells_, "RESULTS", cells_.RESULTS + 1)  # the code gives other numbers now
    compare(CONFIG, ["fedavg"], [0], tmp_path)
    assert len(runtime.played) == 3


def test_a_run_that_diverges_is_told_and_not_tried_again(runtime, tmp_path, monkeypatch):
    def diverge(config, *, out=None, callback=None):
        if config.algorithm.name == "standalone":
            out.mkdir(parents=True)
            raise DivergedError("a loss is not finite")
        return runtime.simulate(config, out=out, callback=callback)

    monkeypatch.setattr(runs, "simulate", diverge)
    found = compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path)
    assert [line.accuracy_text for line in found.lines][1] == "2 diverged"
    monkeypatch.setattr(runs, "simulate", None)
    assert compare(CONFIG, ["fedavg", "standalone"], [0, 1], tmp_path).lines == found.lines


def test_what_another_process_is_at_is_left_to_it(runtime, tmp_path, monkeypatch):
    held = []

    def simulate(config, *, out=None, callback=None):
        if not held:
            held.append(out)
            raise RunDirInUseError("in use")
        return runtime.simulate(config, out=out, callback=callback)

    monkeypatch.setattr(runs, "simulate", simulate)
    with pytest.raises(RunDirError, match=r"other processes are at 1 of the cells \(fedavg, seed 0\)"):
        compare(CONFIG, ["fedavg", "standalone"], [0], tmp_path)
    assert len(runtime.played) == 1


def test_what_another_process_has_finished_meanwhile_is_taken(runtime, tmp_path, monkeypatch):
    """Catches a command that waits for cells which were in use when it passed them, and are long done."""
    held = []

    def simulate(config, *, out=None, callback=None):
        found = runtime.simulate(config, out=out, callback=callback)
        if not held:
            held.append(out)
            raise RunDirInUseError("in use")
        return found

    monkeypatch.setattr(runs, "simulate", simulate)
    found = compare(CONFIG, ["fedavg", "standalone"], [0], tmp_path)
    assert [len(line.means) for line in found.lines] == [1, 1]


def test_a_grid_is_run_at_every_point_and_its_keys_go_to_the_algorithms_that_have_them():
    values = parse_grid(["algorithm.rep_dim=10,20", "train.lr=0.1,0.2"])
    cells = planned(CONFIG, ["fedmrl", "fedmrl:rep_dim=7", "standalone"], [0], values)
    assert len(cells) == 12
    assert [cell.setting.title for cell in cells[::3]] == [
        f"rep_dim = {d}, lr = {lr}" for d in (10, 20) for lr in (0.1, 0.2)
    ]
    dims = {(c.setting.title, c.label): c.config.algorithm.keys.get("rep_dim") for c in cells}
    assert dims["rep_dim = 20, lr = 0.1", "fedmrl"] == 20
    assert {dims[c.setting.title, "fedmrl:rep_dim=7"] for c in cells} == {7}
    alone = {cell.folder for cell in cells if cell.label == "standalone"}
    assert len(alone) == 2  # one for each lr: of d1 it knows nothing, and is not run again
    with pytest.raises(ConfigError, match=r"algorithm\.rep_dim: none of standalone has this key"):
        planned(CONFIG, ["standalone"], [0], {"algorithm.rep_dim": [1]})
    with pytest.raises(ConfigError) as caught:
        planned(CONFIG, ["fedmrl"], [0], {"algorithm.rep_dim": [-1], "algorithm.width": [2]})
    assert [fault for fault in caught.value.faults if "none of" in fault] == [
        "algorithm.width: none of fedmrl has this key"
    ], "a bad value is no missing key"
    for bad in (["train.lr"], ["train.lr="], ["lr=1"], ["train.lr=1", "train.lr=2"]):
        with pytest.raises(ConfigError, match="--grid"):
            parse_grid(bad)


def test_another_kind_of_partition_takes_its_own_keys(tmp_path):
    config = CONFIG.replace("partition", kind="classes", classes_per_client=3)
    (cell,) = planned(config, ["standalone"], [0], {"partition.kind": ["dirichlet"]})
    assert (cell.config.partition.alpha, cell.config.partition.classes_per_client) == (0.5, None)


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

    def simulate(config, *, out=None, callback=None):
        out.mkdir(parents=True)
        (out / "config.toml").write_text(config.resolved().to_toml())
        (out / "summary.json").write_text(json.dumps(summary(0.5, run_dir=str(out))))
        return json.loads((out / "summary.json").read_text())

    def callbacks(label):
        seen.append(label)
        return runs.quiet(label)

    monkeypatch.setattr(runs, "simulate", simulate)
    labels = ["fedmrl", "fedmrl (control)", "standalone"]
    assert list(run_with_controls(MAIN_JOB, out=tmp_path / "r", callbacks=callbacks)) == labels
    assert list(resume_with_controls(tmp_path / "r", callbacks=callbacks)) == labels
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


def test_simulated_times_are_means_over_seeds_that_all_reached_the_target(tmp_path):
    """Catches a mean over the lucky seeds only."""
    config = CONFIG.replace("run", targets=[0.5, 0.6])
    cost = {"round": 1, "bytes_up": 1000, "bytes_down": 0, "flops": 1}

    def run(label, seed, seconds, *times):
        reached = [None if time is None else {**cost, "simulated_seconds": time} for time in times]
        return put(tmp_path, label, seed, config, mean=0.6, simulated={"seconds": seconds}, targets=reached)

    cells = [run("a", 0, 60.0, 10.0, 30.0), run("a", 1, 70.0, 20.0, None)]
    cells += [run("b", seed, 8.0, None, None) for seed in (0, 1)]
    found = tabulate(cells, tmp_path, tmp_path)
    assert [line.costs.simulated for line in found.lines] == [65.0, 8.0]
    first, second = (dict(zip(found.cost_headings, row, strict=True)) for row in found.cost_cells())
    assert [first[key] for key in ("simulated time", "to 50 %", "to 60 %")] == [
        "1 min 05 s",
        "round 1, 1 kB, 15.0 s",
        "1 of 2 seeds",
    ]
    assert second["to 50 %"] == "not reached"
    plain = next(csv.DictReader(found.to_csv().splitlines()))
    assert [plain[key] for key in ("simulated", "simulated_to_0.5", "simulated_to_0.6")] == ["65.0", "15.0", ""]
    assert any("Simulated time" in note for note in found.notes)
    without = tabulate([put(tmp_path / "w", "a", 0, mean=0.5)], tmp_path / "w", tmp_path)
    assert "simulated" not in without.to_csv() + without.to_markdown()
