"""The arithmetic of comparisons, on made-up summaries."""

import csv
import math
from dataclasses import replace

import pytest
from scipy.stats import ttest_rel
from summaries import CONFIG, put, table

from polyfed.comparison import RunSpec, Setting, paired_p, tabulate
from polyfed.config import Config

PLAIN = {"mean": 0.1, "worst_decile": 0.2, "clients": 4, "undefined": 0}


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


def test_a_run_in_which_nobody_trained_has_no_memory_to_compare(tmp_path):
    """Catches a mean over no step: all devices of a run may be absent in all rounds."""
    alone = CONFIG.with_algorithm("standalone")
    cells = [
        put(tmp_path, "a", 0, mean=0.6, memory={"step_peak": {}}),
        put(tmp_path, "s", 0, alone, mean=0.6, memory={"step_peak": {"x": 50}}),
    ]
    found = {line.label: line.costs.memory for line in tabulate(cells, tmp_path, tmp_path).lines}
    assert found == {"a": None, "s": 0}


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


def test_errors_compare_the_other_way_round_and_the_baseline_is_a_row(tmp_path):
    """Catches the largest error called the best, percent signs at errors, and a baseline that competes."""
    tables = {"data": {"dataset": "npz", "path": "x.npz", "task": "regression"}, "partition": {"kind": "iid"}}
    config = Config.parse({**CONFIG.to_dict(), **tables}).replace("run", targets=["rmse=3"])
    baseline = {name: {"mean": 9.0, "worst_decile": 9.5} for name in ("rmse", "mae", "r2")}
    reached = {"rmse": 3.0, "round": 2, "bytes_up": 1000, "bytes_down": 500, "flops": 70, "seconds": 1.0}

    def run(label, seed, rmse):
        metrics = {name: {"mean": rmse / n, "worst_decile": rmse + 1} for n, name in enumerate(config.metrics, 1)}
        return put(
            tmp_path, label, seed, config, mean=0, accuracy=None, metrics=metrics, majority=baseline, targets=[reached]
        )

    cells = [run(label, seed, rmse + seed) for label, rmse in (("a", 4), ("b", 2), ("c", 6)) for seed in range(3)]
    found = tabulate(cells, tmp_path, tmp_path)
    rows = [dict(zip(found.headings, row, strict=True)) for row in found.cells()]
    assert [row["algorithm"] for row in rows] == ["a", "b", "c", "training mean"]
    assert [row["against"] for row in rows] == ["b", "a", "b", "-"]
    assert (rows[0]["mean rmse"], rows[0]["worst tenth"], rows[0]["mae"]) == ("5 ± 1", "6 ± 1", "2.5 ± 0.5")
    assert (rows[0]["difference"], rows[3]["mean rmse"], rows[3]["difference"]) == ("+2", "9 ± 0", "-")
    assert [row["to rmse 3"] for row in (dict(zip(found.cost_headings, r, strict=True)) for r in found.cost_cells())]
    assert "%" not in found.to_markdown().split("Up, down")[0].split("| algorithm | up")[0]
    plain = list(csv.DictReader(found.to_csv().splitlines()))
    assert (plain[0]["round_to_rmse_3"], plain[0]["mae"], plain[3]["mean"]) == ("2.0", "2.5", "9.0")


def test_the_majority_class_of_each_setting_follows_its_lines(tmp_path):
    majority = {"accuracy": {"mean": 0.25, "worst_decile": 0.2}}
    cells = [put(tmp_path, label, 0, mean=0.5, majority=majority) for label in "ab"]
    other = [replace(cell, setting=Setting("two")) for cell in cells]
    for cell in other:
        cell.run_dir(tmp_path).mkdir(parents=True, exist_ok=True)
        (cell.run_dir(tmp_path) / "summary.json").write_text((cells[0].run_dir(tmp_path) / "summary.json").read_text())
    found = tabulate([*cells, *other], tmp_path, tmp_path)
    assert [row[:3] for row in found.cells()] == [
        *[("", label, "50.0 %") for label in "ab"],
        ("", "majority class", "25.0 %"),
        *[("two", label, "50.0 %") for label in "ab"],
        ("two", "majority class", "25.0 %"),
    ]
    assert len(found.cost_cells()) == 4


def test_notes_name_the_class_and_the_clients_that_are_left_out(tmp_path):
    """Catches means over fewer clients, and metrics of a class, without a word."""

    def run(label, seed, undefined, classes=("ill", "well")):
        parts = {"mean": 0.7, "worst_decile": 0.5, "clients": 4, "pooled_by_class": dict.fromkeys(classes, 0.5)}
        return put(tmp_path, label, seed, mean=0.5, metrics={"auprc": {**parts, "undefined": undefined}, "ece": PLAIN})

    cells = [run(label, seed, seed) for label in "ab" for seed in (0, 1, 2)]
    notes = tabulate(cells, tmp_path, tmp_path).notes
    assert "auprc: 6 of 24 clients, counted in each run, are left out of the mean; it is not defined there." in notes
    assert [note for note in notes if "of class" in note] == [
        "auprc: of class 'well', the second of (ill, well); data.options.classes sets the order."
    ]
    assert not any(note.startswith("ece") for note in notes)
    assert not any("left out" in note for note in tabulate(cells[::3], tmp_path, tmp_path).notes)
