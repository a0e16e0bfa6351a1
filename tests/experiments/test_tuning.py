"""Hyper-parameters chosen by a search that goes on until the best value is inside."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from studies import TINY, TUNE, study

from polyfed.comparison import specs
from polyfed.experiments import tuning
from polyfed.experiments.catalogue import find, items
from polyfed.experiments.reproduce import Job, reproduce
from polyfed.experiments.study import Study


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
            name, told = (specs.DIVERGED, {}) if found is None else ("summary.json", {"accuracy": {"mean": found}})
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


def test_the_best_point_of_an_error_has_the_lowest_mean(tmp_path: Path) -> None:
    """Catches the largest error called the best."""
    path = study(
        tmp_path / "s.toml",
        algorithms=["standalone"],
        seeds=[0],
        config={**TINY, "run": {**TINY["run"], "metrics": ["brier"], "targets": []}},
        tune={"grid": {"train.momentum": [0.2, 0.4, 0.6]}, "widen": 0, "config": TUNE["config"]},
    )
    job = Job.load(path, out=tmp_path)
    for cell in job.tuning():
        error = {0.2: 0.3, 0.4: 0.1, 0.6: 0.2}[cell.setting.point["train.momentum"]]
        cell.run_dir(tmp_path).mkdir(parents=True)
        text = json.dumps({"accuracy": {"mean": error}, "metrics": {"brier": {"mean": error}}})
        (cell.run_dir(tmp_path) / "summary.json").write_text(text)
    assert job.tuned() == ({"standalone": {"train.momentum": 0.4}}, set())


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
