"""A run of workers is the run of one process bit by bit, however it ends."""

from __future__ import annotations

import os
import signal
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import killing
import pytest
import running
from runs_of_workers import MODELS, Stop, config

from polyfed.base.errors import ConfigError, DivergedError, StorageError
from polyfed.core.clients import Cohort
from polyfed.core.message import State, assemble
from polyfed.core.requests import Exchange
from polyfed.execute.placement import Placement
from polyfed.parallel import clients, setup, transfer
from polyfed.parallel.clients import WorkerClients
from polyfed.parallel.pool import Pool, WorkerError
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.rounds.evaluation import Evaluator
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.scoring import Scorer
from polyfed.rounds.selection import draw_cohort
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage.state_store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    simulate(config(), out=folder)
    return folder


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_workers_end_where_one_process_does(straight: Path, tmp_path: Path, store: str, count: int) -> None:
    """Catches states that are lost on the way to a worker and back."""
    simulate(config(workers=count, store=store), out=tmp_path / "run")
    running.same(tmp_path / "run", straight)


def test_a_state_goes_on_in_the_file_in_which_it_came(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a state that is written again for its next worker, and one that is not the client's last."""
    monkeypatch.setattr(transfer, "LARGE", 1)
    monkeypatch.setattr(clients, "most_files", lambda: 8)
    sent: list[tuple[int, bool]] = []
    pack = WorkerClients._packed

    def seen(self: WorkerClients, client: int, state: State) -> Any:
        packed = pack(self, client, state)
        sent.append((client, isinstance(packed, transfer.Parcel)))
        return packed

    monkeypatch.setattr(WorkerClients, "_packed", seen)
    simulate(config(workers=2), out=tmp_path / "run")
    running.same(tmp_path / "run", straight)
    written = {client for client, parcel in sent if not parcel}
    assert len({client for client, parcel in sent if parcel} - written) == 2, "two may stay in their files"
    assert written


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_discarded_state_goes_on_in_no_file(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a parcel of a reply that did not count: it would take its state to the next round, or stay in memory."""
    monkeypatch.setattr(transfer, "LARGE", 1)
    federation = prepare(config(workers=2))
    placement = Placement.of("cpu", "fp32")
    store = Store(tmp_path, federation.algorithm.states, resident=True)
    with setup.Execution(federation, store, placement) as made:
        served = cast(WorkerClients, made)
        server = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
        play_round(federation, server, draw_cohort(federation, 1), served, setup.driver_for(federation, placement))
        states = {client: state for client, (state, _) in served._parcels.items()}
        assert len(states) > 1
        kept, *_, lost = states
        other = federation.algorithm.init_client(federation.local(lost, 1))
        assert isinstance(served._packed(lost, states[lost]), transfer.Parcel)
        assert not isinstance(served._packed(lost, other), transfer.Parcel), "another state is written anew"
        served.discard([lost]) if which == "one" else served.discard_round()
        assert lost not in served._parcels
        assert (kept in served._parcels) == (which == "one")


@pytest.mark.parametrize("driver", ["batched", "auto"])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_stacks_are_the_same_in_any_number_of_processes(tmp_path: Path, driver: str, store: str) -> None:
    """Catches stacks that are cut by who is free: in company of other size the last bit of a step is another."""
    told = {"rounds": 3, "eval_every": 3, "checkpoint_every": 3, "store": store, "driver": driver}
    many = {"count": 40, "models": MODELS[:1], "participation": 0.9, "capacities": [1.0, 0.5]}
    train = {"epochs": None, "steps": 3, "batch_size": 4, "momentum": 0.0}
    for count in (1, 2, 4):
        made = running.config(run={**told, "workers": count}, clients=many, train=train, algorithm={"name": "fiarse"})
        simulate(made, out=tmp_path / str(count))
    trained = [row["execution"] for row in running.lines(tmp_path / "1" / "clients.jsonl") if "execution" in row]
    assert trained.count("stacked") > 90
    for count in (2, 4):
        running.same(tmp_path / str(count), tmp_path / "1")


@pytest.mark.parametrize(("store", "large"), [("memory", 1), ("memory", transfer.LARGE), ("disk", 1)])
def test_replies_that_are_lost_are_lost_with_workers_too(
    tmp_path: Path, store: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a private state that moves although nobody had the reply, and rounds that are void."""
    monkeypatch.setattr(transfer, "LARGE", large)
    devices = {"profiles": "cross-device", "dropout": 0.3, "deadline": 3600.0, "min_replies": 2}
    for name, workers_ in (("one", 1), ("two", 2), ("four", 4)):
        told = {"rounds": 8, "eval_every": 4, "checkpoint_every": 4, "store": store, "workers": workers_}
        clients = {"count": 6, "models": MODELS, "participation": 0.67}
        simulate(running.config(run=told, clients=clients, devices=devices), out=tmp_path / name)
    failed = [row["failed"] for row in running.lines(tmp_path / "one" / "clients.jsonl") if "failed" in row]
    assert {"dropped", "void"} <= set(failed), f"the test shows nothing: {failed}"
    running.same(tmp_path / "two", tmp_path / "one")
    running.same(tmp_path / "four", tmp_path / "one")


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_run_of_workers_resumes_identically(straight: Path, tmp_path: Path, store: str) -> None:
    """Catches states that a resumed run does not hand to its clients."""

    with pytest.raises(Interrupted):
        simulate(config(workers=2, store=store), out=tmp_path / "run", callbacks=[Stop(3)])
    resume(tmp_path / "run")
    running.same(tmp_path / "run", straight)


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("algorithm", ["fedmrl", "fedkd", "fedgen"])
def test_gradients_are_measured_of_what_this_round_made(tmp_path: Path, store: str, algorithm: str) -> None:
    """Catches states of the round before, which are those in the store until the round is complete."""
    keys = {"fedmrl": {"auxiliary": "cnn5", "rep_dim": 4}, "fedkd": {"auxiliary": "mlp(hidden=(8,))"}, "fedgen": {}}
    for workers_ in (1, 2):
        told = {"rounds": 2, "eval_every": 1, "gradient_clients": 6, "store": store, "workers": workers_}
        clients = {"count": 6, "models": MODELS, "participation": 0.67}
        made = running.config(run=told, clients=clients, algorithm={"name": algorithm, **keys[algorithm]})
        simulate(made, out=tmp_path / str(workers_))
    one, two = (running.lines(tmp_path / name / "rounds.jsonl") for name in ("1", "2"))
    assert [row["gradient_squared"] for row in one] == [row["gradient_squared"] for row in two]


@pytest.mark.parametrize(("workers", "expected"), [(1, 6.0), (2, 3.0)])
def test_clients_that_test_beside_each_other_take_the_time_of_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, expected: float
) -> None:
    """Catches seconds of a round below 0: its wall clock less the seconds of tests that ran at the same time."""
    score = Scorer.score

    def long(self: Scorer, *given: Any) -> Any:
        return replace(score(self, *given), seconds=1.0)

    monkeypatch.setattr(Scorer, "score", long)
    seen: list[float] = []
    evaluate = Evaluator.evaluate

    def looked(self: Evaluator, *given: Any, **more: Any) -> Any:
        seen.append(sum(report.score.seconds for report in (given[4] or {}).values()))
        return evaluate(self, *given, **more)

    monkeypatch.setattr(Evaluator, "evaluate", looked)
    simulate(config(1.0, workers=workers, rounds=1, eval_every=1, driver="sequential"), out=tmp_path / "run")
    assert seen == [0, expected]


def test_ctrl_c_in_the_middle_of_an_exchange_leaves_nothing_of_it(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches states of half a round in the checkpoint, and workers that go on with what nobody wants."""
    made = WorkerClients._job  # pyright: ignore[reportPrivateUsage]
    trained: list[int] = []

    def pressed(self: WorkerClients, name: str, round_: int, *given: Any) -> Any:
        job = made(self, name, round_, *given)

        def interrupt(worker: int) -> Any:
            if name == "train" and round_ == 3:
                trained.append(worker)
                if len(trained) == 4:  # the last client; another has ended by then
                    raise KeyboardInterrupt
            return job(worker)

        return interrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkerClients, "_job", pressed)
        with pytest.raises(Interrupted):
            simulate(config(workers=2, checkpoint_every=4), out=tmp_path / "run")
    assert len(trained) == 4
    assert {round_ for _, round_, *_ in running.rows(tmp_path / "run" / "states")} <= {1, 2}
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
    """Catches a checkpoint with half of a round, and a run that waits for a worker that is gone."""
    made: list[Pool] = []
    monkeypatch.setattr(setup, "Pool", lambda *given, **keys: made.append(Pool(*given, **keys)) or made[-1])

    class Kill(Quiet):
        def round_ended(self, row: Any) -> None:
            if row["round"] == 3:
                os.kill(made[0].pids[1], signal.SIGKILL)

    with pytest.raises(WorkerError):
        simulate(config(workers=2), out=tmp_path / "run", callbacks=[Kill()])
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
    monkeypatch.setattr(setup, "cores", lambda: 2)
    monkeypatch.setattr(setup, "WORTH_WORKERS", 0.0)
    monkeypatch.setattr(setup, "Pool", lambda *_, **__: pytest.fail("workers were started"))
    with pytest.raises(ConfigError, match=r"run\.workers: got 2 in a daemonic process"):
        simulate(config(workers=2), out=tmp_path / "asked")
    simulate(config(driver="auto", rounds=1), out=tmp_path / "auto")


@pytest.mark.parametrize(
    ("worth", "cores", "threads", "expected"),
    [(float("inf"), 2, 1, []), (0.0, 2, 1, [2]), (0.0, 8, 1, [4]), (0.0, 3, 1, [3]), (0.0, 8, 3, [2]), (0.0, 2, 4, [])],
)
def test_auto_starts_workers_where_there_is_work_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: float, cores: int, threads: int, expected: list[int]
) -> None:
    """Catches processes for a round of milliseconds, more than there are cores or clients, and none at all."""
    started: list[int] = []

    class Started(Exception):  # noqa: N818 - ends the run before anything starts
        pass

    def pool(makers: Any, close: Any, *, threads: int) -> Any:
        started.append(len(makers))
        raise Started

    monkeypatch.setattr(setup, "cores", lambda: cores)
    monkeypatch.setattr(setup, "WORTH_WORKERS", worth)
    monkeypatch.setattr(setup, "Pool", pool)
    try:
        simulate(config(driver="auto", rounds=1, threads=threads), out=tmp_path / "run")
    except Started:
        assert expected
    assert started == expected


def test_clients_that_take_long_are_sent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a long unit that begins when all others have ended; examples times weights stand for its time."""
    federation = prepare(config(participation=1.0))
    sizes = [1.0, 7.0, 3.0, 5.0, 2.0, 9.0]
    monkeypatch.setattr(WorkerClients, "_length", lambda self, client: sizes[client])
    sent: list[int] = []

    class Idle:
        """A pool that answers nothing."""

        def each(self, jobs: Any) -> Any:
            for job in jobs:
                name, _, (_, _, which, _), *_ = job(0)
                assert name == "train"
                sent.extend(which)
                yield 0, ({}, 0.0)

    placement = setup.Placement.of("cpu", "fp32")
    with placement.defaults():
        workers = WorkerClients(
            federation,
            setup.driver_for(federation, placement),
            Store(Path("-"), federation.algorithm.states, resident=True),
            cast(Any, Idle()),
        )
        server = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
        cohort = Cohort(tuple(map(federation.info, range(6))), 1, 4, federation.rng.at("round", 1, "server"))
        down = {info.id: federation.algorithm.message_for(server, info) for info in cohort}
        assert list(workers.work(Exchange(cohort, down, {}), score=False)) == []
    assert sent == [5, 1, 3, 2, 4, 0]


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_the_parent_holds_what_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    """Catches a parent that keeps replies, or with `store = "disk"` states, until the cohort is through."""
    federation = prepare(running.config(run={"store": store}, clients={"count": 16, "participation": 1.0}))
    alive: dict[str, list[Any]] = {"Upload": [], "ClientState": []}
    peaks = dict.fromkeys(alive, 0)

    def watched(pieces: Any, *known: Any) -> Any:
        made = assemble(pieces, *known)
        alive["ClientState" if isinstance(made, State) else "Upload"].append(weakref.ref(made))
        for name, refs in alive.items():
            peaks[name] = max(peaks[name], sum(ref() is not None for ref in refs))
        return made

    placement = setup.Placement.of("cpu", "fp32")
    kept = Store(tmp_path / "states", federation.algorithm.states, resident=store == "memory")
    with placement.defaults():
        pool = Pool([partial(setup._worker, federation, placement)] * 2)  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(clients, "assemble", watched)
        workers = WorkerClients(federation, setup.driver_for(federation, placement), kept, pool, tmp_path)
        server = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
        cohort = Cohort(tuple(map(federation.info, range(16))), 1, 4, federation.rng.at("round", 1, "server"))
        down = {info.id: federation.algorithm.message_for(server, info) for info in cohort}
        gathered, _ = workers.exchange(Exchange(cohort, down, {}))
    assert len(gathered) == len(alive["Upload"]) == len(alive["ClientState"]) == 16
    assert peaks["Upload"] <= 2
    assert peaks["ClientState"] == 16 if store == "memory" else peaks["ClientState"] <= 2
    workers.discard_round()
    pool.close()


def test_a_message_for_several_goes_to_each_worker_once() -> None:
    """Catches an upload of ten megabytes that is sent again for each client, and a worker that lacks it."""
    federation = prepare(config())
    with setup.Placement.of("cpu", "fp32").defaults():
        server = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
        shared, own = (federation.algorithm.message_for(server, federation.info(0)) for _ in range(2))
    assert shared is not own
    units = [{0: shared, 1: shared}, {2: shared}, {3: own}, {4: None}, {5: shared}]
    mail = clients._Mail(7, units)  # pyright: ignore[reportPrivateUsage]
    sent = [mail.to(worker, unit) for worker, unit in zip([0, 0, 0, 0, 1], units, strict=True)]
    assert [len(messages) for _, messages, *_ in sent] == [1, 0, 1, 0, 1]
    assert [len(keep) for *_, keep in sent] == [1, 0, 0, 0, 1], "what one client receives is not kept"
    assert {number for number, *_ in sent} == {7}
    assert sent[3][2] == {4: None}


@pytest.mark.parametrize("fault", [StorageError("full"), KeyboardInterrupt()])
def test_a_commit_that_was_interrupted_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path, fault: BaseException
) -> None:
    """Catches a checkpoint of a round of which half of the states are stored: they would be trained twice."""
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
    """Beside a GPU, and with several threads, clients are no forks: they make their federation anew."""
    placement = setup.Placement.of("cpu", "fp32")
    with placement.defaults():
        site = clients.Worker(config(), lambda federation: setup.driver_for(federation, placement))
    assert site.runner.federation.partition.num_clients == 6
    assert set(site.methods()) == {"train", "test"}


def test_workers_with_several_threads_end_where_one_process_with_as_many_does(tmp_path: Path) -> None:
    """Catches clients on one thread in a worker that have two in the parent: sums on two add in another order."""
    for count in (1, 2):
        made = running.config(
            run={"threads": 2, "workers": count, "rounds": 1, "eval_every": 1},
            train={"epochs": None, "steps": 1},
            algorithm={"name": "standalone"},
            clients={"models": ["mlp(hidden=(200,))"]},
            partition={"samples_per_client": 40},
        )
        simulate(made, out=tmp_path / str(count))
    running.same(tmp_path / "2", tmp_path / "1")
