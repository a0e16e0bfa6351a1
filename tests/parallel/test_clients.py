"""Worker processes: the run of one process bit by bit, and nothing left behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import killing
import pytest
import running
import torch

from polyfed.base.errors import CheckpointError, ConfigError, DivergedError, StorageError
from polyfed.execute import choice, drivers
from polyfed.execute.choice import ExecutionChoice
from polyfed.execute.replay import Replays
from polyfed.parallel import auto, clients, setup, transfer
from polyfed.parallel.clients import WorkerClients
from polyfed.parallel.pool import Pool, WorkerError
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage.state_store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

MODELS = ["mlp(hidden=(12, 8))", "mlp(hidden=(32, 8))"]


def config(participation: float = 0.67, **run: Any) -> Any:
    told = {"rounds": 4, "eval_every": 2, "checkpoint_every": 2, **run}
    return running.config(run=told, clients={"count": 6, "models": MODELS, "participation": participation})


class Stop(Quiet):
    """Ctrl-C at the end of a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_ended(self, row: Any) -> None:
        if row["round"] == self.number:
            raise KeyboardInterrupt


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


def echo() -> dict[str, Any]:
    def fail(what: str) -> None:
        raise DivergedError(what) if what == "ours" else KeyError(what)

    return {
        "echo": lambda *given: given,
        "pid": os.getpid,
        "threads": torch.get_num_threads,
        "fail": fail,
        "sleep": lambda seconds: time.sleep(seconds),
        "die": lambda: os._exit(7),
    }


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool([echo, echo])
    yield made
    made.close()


def test_workers_have_one_thread_and_answer_for_themselves(pool: Pool) -> None:
    """Catches clients whose threads fight for the cores, and answers that are mixed up."""
    assert pool.ask({0: ("threads",), 1: ("threads",)}) == {0: 1, 1: 1}
    assert [pool.ask({k: ("pid",)})[k] for k in (0, 1)] == pool.pids
    assert pool.ask({1: ("echo", 1), 0: ("echo", 2, 3)}) == {1: (1,), 0: (2, 3)}


@pytest.mark.parametrize("failing", [0, 1])
def test_what_a_worker_raises_arrives_and_the_others_stop(pool: Pool, failing: int) -> None:
    """Catches an error that is swallowed, one that waits for the others' work, and answers left in the pipe."""
    started = time.monotonic()
    with pytest.raises(DivergedError, match="ours"):
        pool.ask({failing: ("fail", "ours"), 1 - failing: ("sleep", 60)})
    assert time.monotonic() - started < 30
    with pytest.raises(RuntimeError, match="in a worker process: 'theirs'"):
        pool.ask({0: ("fail", "theirs")})
    assert pool.ask({0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}


def test_ctrl_c_in_the_middle_of_an_answer_leaves_no_half_of_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the rest of a large answer read as the next one: the checkpoint after Ctrl-C would be lost."""
    read = Connection._recv  # type: ignore[attr-defined]

    def pressed(self: Any, size: int, *more: Any) -> Any:
        if size > 1_000_000:  # the body, of which nothing has been read yet
            signal.raise_signal(signal.SIGINT)
        return read(self, size, *more)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "_recv", pressed)
            with pytest.raises(KeyboardInterrupt):
                pool.ask({0: ("echo", b"x" * 5_000_000)})
        assert pool.ask({0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_that_ends_is_reported(pool: Pool) -> None:
    """Catches a run that waits for ever for a worker that was killed for its memory."""
    with pytest.raises(WorkerError, match=r"exit code 7\).*run\.workers = 1"):
        pool.ask({0: ("die",)})


def test_a_worker_whose_answer_is_lost_is_ended(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that hangs, or believes an old answer, after a message for which memory or files were short."""

    def refuse(pipe: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "receive", refuse)
        with pytest.raises(WorkerError, match=r"worker process 0 could not be read .*Too many open files.*ulimit"):
            pool.ask({0: ("echo", 1)})
    with pytest.raises(WorkerError, match="worker process 0 ended"):
        pool.ask({0: ("echo", 2)})


def test_no_worker_outlives_its_pool(pool: Pool) -> None:
    """Catches processes left behind."""
    pids = pool.pids
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


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


# ---------------------------------------------------------------------------------------------------------- auto


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


def test_a_worker_that_starts_afresh_reads_its_configuration() -> None:
    """Beside a GPU clients are no forks: they make their federation anew."""
    placement = setup.Placement.of("cpu", "fp32")
    site = clients.Worker(config(), placement, "sequential", None)
    assert site.federation.partition.num_clients == 6
    assert "exchange" in site.methods()
