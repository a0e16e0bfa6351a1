"""The way that "auto" takes: the fastest, written down, and the same after a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import running
from runs_of_workers import Stop, config

from polyfed.base.errors import CheckpointError
from polyfed.execute import choice, drivers
from polyfed.execute.choice import ExecutionChoice
from polyfed.execute.replay import Replays
from polyfed.parallel import auto, setup
from polyfed.parallel.pool import Pool
from polyfed.rounds.callbacks import Interrupted
from polyfed.simulation.simulate import resume, simulate

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Says what each way takes, instead of the clock."""
    takes = {"sequential": 3.0, "channels-last": 3.0, "stacked": 1.0}

    def trials(self: Any, fit: Any) -> Any:
        return ((way, count, lambda way=way: way) for way, count in zip(takes, (1, 1, 2), strict=True))

    monkeypatch.setattr(choice.Calibration, "_trials", trials)
    monkeypatch.setattr(choice, "seconds", lambda work, **_: takes.get(str(work()), 1.0))
    return takes


def test_stacks_of_the_usual_size_resume_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches steps whose last bit depends on how many came before in the same process."""

    monkeypatch.setattr(
        drivers, "Replays", lambda _: Replays(5)
    )  # traced in the second round, or not so soon after a resume
    told = {"rounds": 4, "eval_every": 2, "checkpoint_every": 2, "driver": "batched"}
    clients = {"count": 9, "models": ["mlp(hidden=(12,))"], "participation": 1.0}
    train = {"batch_size": 4, "momentum": 0.0}
    asked = running.config(run=told, clients=clients, train=train, algorithm={"name": "fedavg"})
    simulate(asked, out=tmp_path / "straight")
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "run", callback=Stop(3))
    resume(tmp_path / "run")
    running.same(tmp_path / "run", tmp_path / "straight")


def test_stacks_are_cut_by_the_memory_that_was_free_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches other sizes of stacks, and so another last bit, where more or less memory is free at a resume."""
    free = [10**9]
    monkeypatch.setattr(setup, "_memory", lambda asked, placement: free[0])
    told = {"rounds": 2, "eval_every": 2, "checkpoint_every": 1, "driver": "batched"}
    clients = {"count": 9, "models": ["mlp(hidden=(12,))"], "participation": 1.0}
    train = {"batch_size": 4, "momentum": 0.0}

    asked = running.config(run=told, clients=clients, train=train, algorithm={"name": "fedavg"})
    simulate(asked, out=tmp_path / "straight")
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "run", callback=Stop(1))
    free[0] = 10**5
    resume(tmp_path / "run")
    running.same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("fastest", ["stacked", "channels-last", "sequential"])
def test_auto_takes_the_fastest_way_and_says_which(tmp_path: Path, clock: dict[str, float], fastest: str) -> None:
    """Catches a choice that is not followed, not written down, or that the clients' log does not tell."""
    clock.update(dict.fromkeys(clock, 3.0) | {fastest: 1.0})
    simulate(config(1.0, driver="auto", workers=1), out=tmp_path / "run")
    chosen = json.loads((tmp_path / "run" / "choices.json").read_text())
    assert set(chosen["by_kind"].values()) == {fastest, "sequential"}  # so are dense networks tested
    assert set(chosen["stack"].values()) == ({2} if fastest == "stacked" else set())
    trained = [row for row in running.lines(tmp_path / "run" / "clients.jsonl") if "execution" in row]
    assert {row["execution"] for row in trained} == {fastest}


def test_a_method_that_warms_up_is_timed_when_it_trains(tmp_path: Path) -> None:
    """Catches a kind that counts as known although nothing of it was timed, and clients decided by nothing."""
    learner = {"name": "fedl2g", "warmup": 2, "holdout": 0.3}
    told = {"rounds": 3, "eval_every": 1, "checkpoint_every": 1, "driver": "auto", "threads": 2}
    simulate(running.config(run=told, clients={"participation": 1.0}, algorithm=learner), out=tmp_path / "run")
    chosen = json.loads((tmp_path / "run" / "choices.json").read_text())
    assert chosen["since"] == 3
    assert all(seconds > 0 for seconds in chosen["seconds"].values())
    assert [kind.rpartition(": ")[2] for kind in chosen["by_kind"]] == ["predict", "loss"]


def test_workers_that_start_late_take_over_the_states_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint with the states that this process held before the clients trained them."""

    monkeypatch.setattr(auto.AutoClients, "_decide", lambda self, timed, down: 2)
    learner = {"name": "fedl2g", "warmup": 2, "holdout": 0.3}
    told = {"rounds": 6, "eval_every": 6, "checkpoint_every": 6, "driver": "auto", "threads": 2}
    asked = running.config(run=told, clients={"participation": 1.0}, algorithm=learner)
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "run", callback=Stop(4))
    assert {round_ for _, round_, *_ in running.rows(tmp_path / "run" / "states")} == {4}
    resume(tmp_path / "run")
    simulate(asked, out=tmp_path / "straight")
    running.same(tmp_path / "run", tmp_path / "straight")


def test_a_way_within_the_clocks_error_is_not_taken(tmp_path: Path, clock: dict[str, float]) -> None:
    """Catches choices by noise."""
    clock.update({"sequential": 1.0, "channels-last": 0.97, "stacked": 0.96})
    simulate(config(driver="auto", workers=1, rounds=1), out=tmp_path / "run")
    assert set(json.loads((tmp_path / "run" / "choices.json").read_text())["by_kind"].values()) == {"sequential"}


@pytest.mark.parametrize(("alone", "expected"), [(1e-6, 1), (10.0, 2)])
def test_auto_starts_workers_where_they_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: float, expected: int
) -> None:
    """Clients whose training takes no longer than the way to a worker stay here."""
    monkeypatch.setattr(choice, "seconds", lambda work, **_: alone)
    monkeypatch.setattr(setup, "cores", lambda: 2)
    started: list[int] = []
    monkeypatch.setattr(setup, "Pool", lambda makers, close: started.append(len(makers)) or Pool(makers, close))
    simulate(config(driver="auto", rounds=2, threads=2), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "choices.json").read_text())["workers"] == expected
    assert started == ([2] if expected == 2 else [])


def test_a_resumed_run_does_not_ask_the_clock_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches results that depend on a stopwatch: the same choices, and the same numbers."""
    simulate(config(driver="auto", workers=2), out=tmp_path / "straight")

    run = tmp_path / "run"
    run.mkdir()
    (run / "choices.json").write_bytes((tmp_path / "straight" / "choices.json").read_bytes())
    monkeypatch.setattr(choice, "seconds", lambda *_, **__: pytest.fail("the clock was asked"))
    with pytest.raises(Interrupted):
        simulate(config(driver="auto", workers=2), out=run, callback=Stop(2))
    resume(run)
    running.same(run, tmp_path / "straight")


def test_finding_out_moves_no_random_stream(tmp_path: Path) -> None:
    """Catches a trial that draws from what training draws from: with nothing chosen, bitwise the sequential run."""
    simulate(config(), out=tmp_path / "sequential")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "MARGIN", 0.0)  # nothing is fast enough: everything is timed, and sequential it stays
        patch.setattr(auto, "MARGIN", 0.0)
        simulate(config(driver="auto"), out=tmp_path / "auto")
    one, other = (running.outcome(tmp_path / driver) for driver in ("auto", "sequential"))
    assert {key: one[key] for key in ("states", "rounds", "files")} == {
        k: other[k] for k in ("states", "rounds", "files")
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"by_kind": {"a": "sideways"}, "seconds": {}}'])
def test_choices_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    """Catches a traceback, and a way that nobody knows."""
    (tmp_path / "choices.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"choices\.json"):
        simulate(config(driver="auto"), out=tmp_path)


def test_choices_survive_their_file() -> None:
    """Catches a field that is written and not read."""
    made = ExecutionChoice({"a: loss": "stacked"}, {"a: loss": 8}, {"a": 0.5}, 2, 7, 10**9)
    assert ExecutionChoice.from_json(json.loads(json.dumps(made.to_json())), "-") == made
