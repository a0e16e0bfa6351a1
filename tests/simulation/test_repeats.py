"""A run that is repeated: the same bits whatever the clock says, and the threads of its start on another machine."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import running

from polyfed.config import Config, config
from polyfed.execute import drivers
from polyfed.execute.replay import Replays
from polyfed.execute.stacked import run_stacked
from polyfed.parallel import setup
from polyfed.rounds import clients
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation import simulate as simulating
from polyfed.simulation.simulate import resume, simulate


def nothing_set() -> Config:
    """The default run, made short: nothing that says how it is executed."""
    return Config.parse(
        {
            "run": {"rounds": 3, "eval_every": 1},
            "partition": {"kind": "classes", "classes_per_client": 3, "samples_per_client": 16},
            "clients": {"count": 8, "participation": 0.5, "models": ["mlp(hidden=(12, 8))", "resnet8(width=2)"]},
            "data": {"dataset": "digits", "image_size": 16},
            "algorithm": {"name": "fedmrl", "auxiliary": "mlp(hidden=(8,))", "rep_dim": 4},
        }
    )


def test_the_default_run_repeats_bit_by_bit_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stopwatch that decides how clients are executed."""
    assert nothing_set().run.driver == "auto"
    simulate(nothing_set(), out=tmp_path / "first")
    simulate(nothing_set(), out=tmp_path / "second")
    running.same(tmp_path / "second", tmp_path / "first")
    ticks = itertools.accumulate(random.Random(1).expovariate(10.0) for _ in itertools.count())
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))  # a busy machine
    simulate(nothing_set(), out=tmp_path / "third")
    running.same(tmp_path / "third", tmp_path / "first")
    rows = running.lines(tmp_path / "first" / "clients.jsonl")
    assert "stacked" in {row.get("execution") for row in rows}, "the test shows nothing"


class Stop(Quiet):
    """Ctrl-C after so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def round_ended(self, row: Any) -> None:
        self.left -= row["round"] > 0
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The threads that clients and the server are given; they compute on one."""
    found: dict[str, list[int]] = {"clients": [], "server": []}

    def noted(who: str) -> Any:
        @contextmanager
        def threads(count: int) -> Iterator[None]:
            found[who].append(count)
            yield

        return threads

    monkeypatch.setattr(clients, "threads", noted("clients"))
    monkeypatch.setattr(simulating, "threads", noted("server"))
    return found


def cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(config, "cores", lambda: count)
    monkeypatch.setattr(setup, "cores", lambda: count)


@pytest.mark.parametrize(("machine", "expected"), [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)])
def test_cores_are_divided_among_the_cohort_and_written_down(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: dict[str, list[int]],
    machine: int,
    expected: int,
) -> None:
    """Catches threads that depend on the machine that resumes: with others, sums come in another order."""
    asked = running.config(run={"threads": None, "rounds": 3, "workers": 1})
    assert asked.clients.wanted == 2
    cores(monkeypatch, machine)
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "run", callbacks=[Stop(1)])
    written = Config.load(tmp_path / "run" / "config.toml").run
    assert (written.threads, written.server_threads, written.workers) == (expected, 1, 1)
    assert set(counts["clients"]) == {expected}
    assert set(counts["server"]) == {1}
    counts["clients"].clear()
    cores(monkeypatch, 1)
    with pytest.raises(Interrupted):
        resume(tmp_path / "run", callbacks=[Stop(1)])
    cores(monkeypatch, 64)
    resume(tmp_path / "run")
    assert set(counts["clients"]) == {expected}, "threads of the run, not of the machine"


def test_what_is_set_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, list[int]]
) -> None:
    """Catches a number of the user's that the cores correct, and one number for clients and server."""
    cores(monkeypatch, 64)
    simulate(running.config(run={"threads": 3, "server_threads": 2, "workers": 1, "rounds": 1}), out=tmp_path / "run")
    assert set(counts["clients"]) == {3}
    assert set(counts["server"]) == {2}
    written = Config.load(tmp_path / "run" / "config.toml").run
    assert (written.threads, written.server_threads) == (3, 2)


def test_a_run_of_a_larger_machine_is_resumed_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, list[int]]
) -> None:
    """Catches no process at all where a client has more threads than there are cores."""
    monkeypatch.setattr(setup, "WORTH_WORKERS", 0.0)
    asked = running.config(run={"threads": 4, "rounds": 2, "driver": "auto"})
    cores(monkeypatch, 4)
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "run", callbacks=[Stop(1)])
    cores(monkeypatch, 2)
    assert resume(tmp_path / "run").summary["rounds"] == 2


def test_stacks_are_cut_by_the_memory_that_the_configuration_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches sizes of stacks that follow what is free: another size of a stack is another last bit."""
    sizes: list[int] = []
    monkeypatch.setattr(
        drivers, "run_stacked", lambda fits, *given: sizes.append(len(fits)) or run_stacked(fits, *given)
    )
    told = {"rounds": 1, "eval_every": 1, "driver": "batched"}
    many = {"count": 9, "models": ["mlp(hidden=(12,))"], "participation": 1.0}
    assert Config.parse({}).run.memory == 2.0
    for memory, expected in ((2.0, [8, 1]), (0.0002, [3, 3, 3])):
        sizes.clear()
        made = running.config(run={**told, "memory": memory}, clients=many, algorithm={"name": "fedavg"})
        simulate(made, out=tmp_path / str(memory))
        assert sizes == expected


def test_stacks_of_the_usual_size_resume_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches steps whose last bit depends on how many came before in the same process."""
    monkeypatch.setattr(drivers, "Replays", lambda _: Replays(5))  # traced in round 2, or sooner after a resume
    told = {"rounds": 4, "eval_every": 2, "checkpoint_every": 2, "driver": "batched"}
    many = {"count": 9, "models": ["mlp(hidden=(12,))"], "participation": 1.0}
    train = {"batch_size": 4, "momentum": 0.0}
    asked = running.config(run=told, clients=many, train=train, algorithm={"name": "fedavg"})
    simulate(asked, out=tmp_path / "straight")
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "run", callbacks=[Stop(3)])
    resume(tmp_path / "run")
    running.same(tmp_path / "run", tmp_path / "straight")
