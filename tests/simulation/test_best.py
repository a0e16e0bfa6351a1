"""The best round by validation rows: chosen without test rows, kept with the private states of that round."""

from __future__ import annotations

import json
import random
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import killing
import numpy as np
import pytest
import running
import torch

from polyfed.base.errors import CheckpointError
from polyfed.config import Config, load_algorithm
from polyfed.report.results import load_run
from polyfed.rounds.callbacks import Quiet
from polyfed.rounds.federation import deal, prepare
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import state_files
from polyfed.storage import state_store as store_module
from polyfed.storage.run_dir import SavedRun

ROUNDS = 10


def config(rounds: int = ROUNDS, store: str = "memory", **more: Any) -> Config:
    """A run whose best round, by the Brier score, is neither the first nor the last."""
    sections: dict[str, dict[str, Any]] = {
        "run": {
            "rounds": rounds,
            "eval_every": 1,
            "checkpoint_every": 3,
            "keep": "best",
            "monitor": "brier",
            "metrics": ["accuracy", "brier"],
            "store": store,
        },
        "data": {"validation_fraction": 0.3},
        "partition": {"samples_per_client": 30},
        "train": {"lr": 0.2, "epochs": 2},
        "clients": {"models": ["mlp(hidden=(12, 8))", "mlp(hidden=(32, 8))"]},
    }
    return running.config(**{name: {**sections.get(name, {}), **more.get(name, {})} for name in {*sections, *more}})


def states(folder: Path, settings: Config, which: Any) -> tuple[int, dict[Any, bytes | None]]:
    """The round of what a run keeps, and the bytes of the server's state and of each client's."""
    classes = load_algorithm(settings.algorithm.name, settings.algorithm.keys).states
    with closing(SavedRun(folder, classes, which)) as found:
        clients = {k: found.private(k) for k in range(settings.clients.count)}
        dumped = {k: None if state is None else state_files.dump(state) for k, state in clients.items()}
        return found.round, {"server": state_files.dump(found.server), **dumped}


@pytest.fixture(scope="module", params=["memory", "disk"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A complete run, some of whose states are files, and its summary."""
    folder = tmp_path_factory.mktemp("best") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "INLINE", killing.INLINE)
        return folder, simulate(config(store=request.param), out=folder).summary


def test_the_best_round_is_kept_as_a_run_that_ends_there_leaves_it(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Catches private states of another round, and a server's state that is the last one."""
    folder, summary = finished
    values = [row["metrics"]["brier"]["mean"] for row in running.lines(folder / "rounds.jsonl")]
    best = int(np.argmin(values))
    assert 0 < best < ROUNDS, "the test needs another best round"
    chosen = summary["selection"]
    assert (chosen["metric"], chosen["kept"], chosen["stopped"]) == ("brier", "best", None)
    assert (chosen["best"]["round"], chosen["last"]["round"]) == (best, ROUNDS)
    assert chosen["best"]["validation"]["brier"] == values[best]
    there = simulate(config(best), out=tmp_path / "there").summary
    assert states(folder, config(), "best") == states(tmp_path / "there", config(), "last")
    assert states(folder, config(), "best")[1] != states(folder, config(), "last")[1]
    assert chosen["best"] == there["selection"]["last"] == there["selection"]["best"]
    assert summary["metrics"]["brier"]["mean"] == chosen["best"]["test"]["brier"]
    assert summary["accuracy"]["mean"] == chosen["best"]["test"]["accuracy"] != chosen["last"]["test"]["accuracy"]


def test_no_more_is_kept_than_two_rounds(finished: tuple[Path, dict[str, Any]]) -> None:
    """Catches states of every round that was once the best."""
    folder, summary = finished
    best = summary["selection"]["best"]["round"]
    trained: dict[int, list[int]] = {}
    for row in running.lines(folder / "rounds.jsonl")[1:]:
        for client in row["cohort"]:
            trained.setdefault(client, []).append(row["round"])
    expected = {
        (client, round_)
        for client, rounds in trained.items()
        for round_ in (max(rounds), max((r for r in rounds if r <= best), default=None))
        if round_ is not None
    }
    assert {row[:2] for row in running.rows(folder / "states")} == expected
    servers = {path.name for path in (folder / "checkpoint").glob("server-*")}
    assert servers == {f"server-round-{r}.safetensors" for r in (best, ROUNDS)}


def test_test_rows_choose_nothing() -> None:
    """Catches a choice by test rows, test rows that train, and other test rows than a run has that chooses nothing."""
    for partition in ({}, {"kind": "resampled", "classes_per_client": None, "alpha": 1.0}):
        kinds = {key: value for key, value in {**running.config().to_dict()["partition"], **partition}.items() if value}
        tables = config().to_dict() | {"partition": {**kinds, "samples_per_client": 30}}
        plain = {**tables, "run": {**tables["run"], "keep": "last"}}
        del plain["run"]["monitor"]
        chosen, validated = (deal(Config.parse(t))[1] for t in (tables, plain))
        usual = deal(Config.parse({**plain, "data": {**plain["data"], "validation_fraction": 0.0}}))[1]
        for k in range(4):
            assert np.array_equal(chosen.train(k), validated.train(k))
            assert np.array_equal(chosen.evaluated(k, final=False), validated.test(k))
            assert not {*chosen.train(k), *validated.test(k)} & set(chosen.test(k))
            assert len(chosen.test(k)) > 0
            if not partition:
                assert np.array_equal(chosen.evaluated(k, final=True), usual.test(k))
            assert set(chosen.test_rows) == set(usual.test_rows)
        assert chosen.hash != validated.hash


def test_the_partition_is_stored_with_its_three_parts(finished: tuple[Path, dict[str, Any]]) -> None:
    """Catches a file from which nobody can tell the test rows."""
    folder, summary = finished
    loaded = type(prepare(config()).partition).load(folder / "partition.npz")
    assert loaded.hash == summary["partition_hash"]
    assert loaded.validation_rows is not None
    assert len(loaded.evaluated(0, final=False)) + len(loaded.train(0)) == 24
    assert len(loaded.test(0)) == 6
    assert loaded.counts(torch.zeros(2000).int(), 1, "validation")[0] == len(loaded.evaluated(0, final=False))


def test_each_clients_tests_are_in_a_log(finished: tuple[Path, dict[str, Any]]) -> None:
    """Catches tests of validation rows, and clients that are left out."""
    folder, summary = finished
    rows = running.lines(folder / "tests.jsonl")
    partition = prepare(config()).partition
    for kept in ("best", "last"):
        own = [row for row in rows if row["kept"] == kept]
        assert [row["examples"] for row in own] == [len(partition.test(k)) for k in range(4)]
        assert {row["round"] for row in own} == {summary["selection"][kept]["round"]}
        mean = np.mean([row["accuracy"] for row in own])
        assert mean == pytest.approx(summary["selection"][kept]["test"]["accuracy"], abs=1e-12)
        assert all("majority" in row for row in own)


def test_predictions_are_those_of_the_kept_model(tmp_path: Path) -> None:
    """Catches predictions of validation rows, and of the last round."""
    import pyarrow.parquet as pq

    summary = simulate(config(run={"predictions": True}), out=tmp_path).summary
    partition = prepare(config()).partition
    rows = [r for r in pq.read_table(tmp_path / "predictions.parquet").to_pylist() if r["predictor"] == "mix-large"]
    right: list[float] = []
    for k in range(4):
        own = [row for row in rows if row["client"] == k]
        assert [row["row"] for row in own] == partition.test(k).tolist()
        scores = [{name: row[name] for name in row if name.startswith("score")} for row in own]
        guesses = [max(row, key=lambda name, row=row: row[name]).removeprefix("score ") for row in scores]
        right.append(float(np.mean([guess == row["label"] for guess, row in zip(guesses, own, strict=True)])))
    assert np.mean(right) == pytest.approx(summary["selection"]["best"]["test"]["accuracy"], abs=1e-12)


def test_workers_and_other_stores_choose_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Catches workers that test with the latest states."""
    folder, summary = finished
    two = simulate(config(run={"workers": 2}), out=tmp_path / "two").summary
    assert running.essence(two["selection"]) == running.essence(summary["selection"])
    assert states(tmp_path / "two", config(), "best") == states(folder, config(), "best")


def test_a_run_killed_anywhere_keeps_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Catches a best round whose states a killed checkpoint lost, and states of it that stay for ever."""
    folder, _ = finished
    settings = Config.load(folder / "config.toml")
    counting = tmp_path / "counts.json"
    assert killing.ended(killing.start(settings, tmp_path / "straight", counts=counting)) == 0
    running.same(tmp_path / "straight", folder)
    counts, draws = json.loads(counting.read_text()), random.Random(5)
    for number, phase in enumerate(["rounds", "saving", "saving", "saving"]):
        out, moment = tmp_path / str(number), draws.randrange(1, counts[phase])
        job = killing.start(settings, out, phase=phase, moment=moment)  # pyright: ignore[reportArgumentType]
        assert killing.ended(job) == -signal.SIGKILL
        assert killing.ended(killing.start(settings, out)) == 0
        running.same(out, folder)
        assert (out / "tests.jsonl").exists()


def test_a_damaged_best_round_is_refused(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """Catches a best round that is not checked when a run is resumed, and a run without one that is opened."""
    classes = load_algorithm("fedmrl").states
    simulate(running.config(run={"rounds": 2}), out=tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r'keeps no best round; expected a run with run\.keep = "best"'):
        SavedRun(tmp_path / "plain", classes, "best")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        SavedRun(tmp_path / "none", classes)
    assert not (tmp_path / "none").exists()


class Rounds(Quiet):
    """Notes which rounds are played."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.notes: list[str] = []

    def round_ended(self, row: Any) -> None:
        self.seen.append(row["round"])

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_ends_when_its_patience_does(tmp_path: Path, keep: str) -> None:
    """Catches a count of rounds or of all bad evaluations, a run that goes on, and one that a resume plays further."""
    settings = config(20, run={"patience": 2, "keep": keep, "checkpoint_every": 50})
    seen = Rounds()
    summary = simulate(settings, out=tmp_path, callbacks=[seen]).summary
    values = [row["metrics"]["brier"]["mean"] for row in running.lines(tmp_path / "rounds.jsonl")]
    end = next(r for r in range(2, 21) if min(values[r - 1 : r + 1]) >= min(values[: r - 1]))
    assert 2 < end < 20, "the test needs another run"
    assert seen.seen == list(range(end + 1))
    stopped = summary["selection"]["stopped"]
    assert stopped["round"] == end
    assert "brier on validation rows did not improve in 2 evaluations (run.patience = 2)" in stopped["reason"]
    assert any(f"ended at round {end}" in note for note in seen.notes)
    assert summary["selection"]["last"]["round"] == end
    assert ("best" in summary["selection"]) is (keep == "best")
    again = Rounds()
    assert running.essence(resume(tmp_path, callbacks=[again]).summary) == running.essence(summary)
    assert again.seen == []


def test_an_improvement_below_min_delta_does_not_count(tmp_path: Path) -> None:
    """Catches a threshold that is passed over, and one that also decides which round is the best."""
    settings = config(20, run={"patience": 2, "min_delta": 10.0, "checkpoint_every": 50})
    summary = simulate(settings, out=tmp_path).summary
    assert summary["selection"]["stopped"]["round"] == 2
    assert "by more than 10" in summary["selection"]["stopped"]["reason"]
    values = [row["metrics"]["brier"]["mean"] for row in running.lines(tmp_path / "rounds.jsonl")]
    assert summary["selection"]["best"]["round"] == int(np.argmin(values)) > 0


@pytest.mark.parametrize("monitor", ["accuracy", "brier"])
def test_higher_or_lower_is_better_by_the_catalogue(tmp_path: Path, monitor: str) -> None:
    """Catches an error that is maximised; the first of equal rounds is kept."""
    summary = simulate(config(run={"monitor": monitor}), out=tmp_path).summary
    rows = running.lines(tmp_path / "rounds.jsonl")
    values = [row["metrics"][monitor]["mean"] for row in rows]
    assert summary["selection"]["best"]["round"] == int((np.argmax if monitor == "accuracy" else np.argmin)(values))


def test_the_result_in_python_is_of_the_kept_model(finished: tuple[Path, dict[str, Any]]) -> None:
    """Catches validation rows of the last round under the headline of the best, and a table without the choice."""
    folder, summary = finished
    result = load_run(folder)
    tests = [row for row in running.lines(folder / "tests.jsonl") if row["kept"] == "best"]
    assert result.clients["accuracy"] == [row["accuracy"] for row in tests]
    assert result.clients["examples"] == [row["examples"] for row in tests]
    assert np.mean(result.clients["accuracy"]) == pytest.approx(result.accuracy)
    assert "test rows chose nothing" in str(result)
    assert result.model(client=0).about["round"] == summary["selection"]["best"]["round"]


def test_a_metric_that_no_evaluation_defines_chooses_nothing(tmp_path: Path) -> None:
    """Catches a run that ends in a traceback, or without a model, as no round was the best."""
    settings = config(
        2,
        run={"monitor": "auroc", "metrics": ["auroc", "accuracy"]},
        partition={"kind": "classes", "classes_per_client": 1},
    )
    result = simulate(settings, out=tmp_path)
    assert result.summary["selection"]["kept"] == "last"
    assert result.model(client=0).about["round"] == 2
    assert "auroc was not defined in any evaluation, so the last round is kept" in str(result)
