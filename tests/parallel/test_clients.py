"""A run of workers is the run of one process bit by bit, however it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import killing
import pytest
import running
from runs_of_workers import MODELS, Stop, config

from polyfed.base.errors import ConfigError, DivergedError, StorageError
from polyfed.parallel import clients, setup
from polyfed.parallel.clients import WorkerClients
from polyfed.parallel.pool import Pool, WorkerError
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage.state_store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    simulate(config(), out=folder)
    return folder


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_two_workers_end_where_one_process_does(straight: Path, tmp_path: Path, store: str) -> None:
    """Catches states that are lost on the way between clients, or not brought home for a checkpoint."""
    simulate(config(workers=2, store=store), out=tmp_path / "run")
    running.same(tmp_path / "run", straight)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_replies_that_are_lost_are_lost_with_workers_too(tmp_path: Path, store: str) -> None:
    """Catches a private state that moves although nobody had the reply, and rounds that are void."""
    devices = {"profiles": "cross-device", "dropout": 0.3, "deadline": 3600.0, "min_replies": 2}
    for name, workers_ in (("one", 1), ("two", 2)):
        told = {"rounds": 8, "eval_every": 4, "checkpoint_every": 4, "store": store, "workers": workers_}
        clients = {"count": 6, "models": MODELS, "participation": 0.67}
        simulate(running.config(run=told, clients=clients, devices=devices), out=tmp_path / name)
    failed = [row["failed"] for row in running.lines(tmp_path / "one" / "clients.jsonl") if "failed" in row]
    assert {"dropped", "void"} <= set(failed), f"the test shows nothing: {failed}"
    running.same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_run_of_workers_resumes_identically(straight: Path, tmp_path: Path, store: str) -> None:
    """Catches states that a resumed run does not hand to its clients."""

    with pytest.raises(Interrupted):
        simulate(config(workers=2, store=store), out=tmp_path / "run", callback=Stop(3))
    resume(tmp_path / "run")
    running.same(tmp_path / "run", straight)


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("algorithm", ["fedmrl", "fedkd", "fedgen"])
def test_gradients_are_measured_of_what_this_round_made(tmp_path: Path, store: str, algorithm: str) -> None:
    """Catches states of the round before, which is what a worker has until the round is complete."""
    keys = {"fedmrl": {"auxiliary": "cnn5", "rep_dim": 4}, "fedkd": {"auxiliary": "mlp(hidden=(8,))"}, "fedgen": {}}
    for workers_ in (1, 2):
        told = {"rounds": 2, "eval_every": 1, "gradient_clients": 6, "store": store, "workers": workers_}
        clients = {"count": 6, "models": MODELS, "participation": 0.67}
        made = running.config(run=told, clients=clients, algorithm={"name": algorithm, **keys[algorithm]})
        simulate(made, out=tmp_path / str(workers_))
    one, two = (running.lines(tmp_path / name / "rounds.jsonl") for name in ("1", "2"))
    assert [row["gradient_squared"] for row in one] == [row["gradient_squared"] for row in two]


def test_a_state_on_its_way_to_another_worker_is_not_lost(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint without the states that were between two clients when the run was interrupted."""
    moved: list[object] = []
    packed = clients._packed

    def interrupt(down: Any) -> Any:
        if moved:
            raise KeyboardInterrupt
        return packed(down)

    move = WorkerClients._move

    def watched(self: WorkerClients, shares: Any) -> Any:
        states = move(self, shares)
        moved.extend(client for mine in states.values() for client in mine)
        return states

    with monkeypatch.context() as patch:
        patch.setattr(clients, "_packed", interrupt)
        patch.setattr(WorkerClients, "_move", watched)
        # The larger network goes to whoever is behind: states move between clients.
        patch.setattr(WorkerClients, "_cost", lambda self, client, training: 1.0 + client)
        with pytest.raises(Interrupted):
            simulate(config(workers=2, checkpoint_every=4), out=tmp_path / "run")
    assert moved, "no state moved: the test shows nothing"
    resume(tmp_path / "run")
    running.same(tmp_path / "run", straight)


def test_killed_with_its_run_no_worker_computes_on(tmp_path: Path, straight: Path) -> None:
    """Catches orphans that hold the run directory and the cores after a kill -9."""
    job = killing.start(config(workers=2, rounds=400), tmp_path / "run", daemon=False)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    deadline = time.monotonic() + 60
    while len(pids := children.read_text().split()) < 2:
        assert time.monotonic() < deadline, "no clients were started"
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGKILL)
    assert killing.ended(job) == -signal.SIGKILL
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_worker_ends_the_run_at_its_last_checkpoint(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint that is written without the states that died with a worker."""
    made: list[Pool] = []
    monkeypatch.setattr(setup, "Pool", lambda *given: made.append(Pool(*given)) or made[-1])

    class Kill(Quiet):
        def round_ended(self, row: Any) -> None:
            if row["round"] == 3:
                os.kill(made[0].pids[1], signal.SIGKILL)

    with pytest.raises(WorkerError):
        simulate(config(workers=2), out=tmp_path / "run", callback=Kill())
    resume(tmp_path / "run")
    running.same(tmp_path / "run", straight)


def test_a_client_that_diverges_is_named(tmp_path: Path) -> None:
    """Catches an error that says no more than that a worker failed."""
    wild = running.config(run={"workers": 2}, train={"lr": 1e30, "momentum": 0.0})
    with pytest.raises(DivergedError, match=r"client \d, round 1: tensor"):
        simulate(wild, out=tmp_path / "run")


def test_a_process_that_may_have_no_children_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's daemonic processes may not start others: asked for clients there, say so; "auto" does without."""
    monkeypatch.setattr(setup, "current_process", lambda: type("Process", (), {"daemon": True}))
    with pytest.raises(ConfigError, match=r"run\.workers is 2, but .* daemonic"):
        simulate(config(workers=2), out=tmp_path / "asked")
    simulate(config(driver="auto", rounds=1), out=tmp_path / "auto")
    assert json.loads((tmp_path / "auto" / "choices.json").read_text())["workers"] == 1


def test_clients_are_dealt_by_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest first, each to the worker it knows, or to the one that is far behind; always the same way."""
    costs = {0: 8.0, 1: 1.0, 2: 8.0, 3: 1.0, 4: 8.0, 5: 1.0}
    dealer = WorkerClients.__new__(WorkerClients)
    dealer.pool, dealer._dealt = [None, None], {}  # type: ignore[assignment]
    monkeypatch.setattr(WorkerClients, "_cost", lambda self, client, training: costs[client])
    shares = dealer.deal(dict.fromkeys(costs))
    assert shares == {0: dict.fromkeys([0, 4]), 1: dict.fromkeys([1, 2, 3, 5])}
    dealer._dealt = {0: 1}
    assert dealer.deal({0: None}) == {1: {0: None}}, "a client at work stays where it is"


@pytest.mark.parametrize("fault", [StorageError("full"), KeyboardInterrupt()])
def test_settling_that_was_interrupted_settles_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path, fault: BaseException
) -> None:
    """Catches a state that is forgotten before it is stored: the checkpoint would hold the one of before."""
    put, puts = Store.put, [0]

    def failing(self: Store, *given: Any) -> None:
        puts[0] += 1
        if puts[0] == 2:
            raise fault
        put(self, *given)

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises((StorageError, Interrupted)):
        simulate(config(workers=2, checkpoint_every=4), out=tmp_path / "run")
    resume(tmp_path / "run")
    running.same(tmp_path / "run", straight)


def test_a_worker_that_starts_afresh_reads_its_configuration() -> None:
    """Beside a GPU clients are no forks: they make their federation anew."""
    placement = setup.Placement.of("cpu", "fp32")
    site = clients.Worker(config(), placement, "sequential", None)
    assert site.federation.partition.num_clients == 6
    assert "exchange" in site.methods()
