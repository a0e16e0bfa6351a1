"""Worker processes: what they answer, what they raise, and that none outlives its pool."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
from echoing import echo

from polyfed.base.errors import DivergedError
from polyfed.parallel import pool as pool_module
from polyfed.parallel import transfer
from polyfed.parallel.pool import Job, Pool, WorkerError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool([echo, echo])
    yield made
    made.close()


def jobs(*requests: tuple[Any, ...]) -> Iterator[Job]:
    """Requests that every worker may do."""
    return (lambda worker, request=request: request for request in requests)


def ask(pool: Pool, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
    """One request of each worker, by number."""
    order = sorted(requests)  # the first job goes to worker 0, the second to worker 1
    assert order == list(range(len(order)))
    return dict(pool.each(jobs(*(requests[k] for k in order))))


def test_workers_have_one_thread_and_answer_for_themselves(pool: Pool) -> None:
    """Catches clients whose threads fight for the cores, and answers that are mixed up."""
    assert ask(pool, {0: ("threads",), 1: ("threads",)}) == {0: 1, 1: 1}
    assert ask(pool, {0: ("pid",), 1: ("pid",)}) == dict(enumerate(pool.pids))
    assert ask(pool, {1: ("echo", 1), 0: ("echo", 2, 3)}) == {1: (1,), 0: (2, 3)}


def test_workers_have_the_threads_that_they_are_given() -> None:
    """Catches clients that compute on other threads than in one process: with those the last bit moves."""
    pool = Pool([echo], threads=3)
    try:
        assert ask(pool, {0: ("threads",)}) == {0: 3}
    finally:
        pool.close()


def test_whoever_is_free_does_the_next_job(pool: Pool) -> None:
    """Catches jobs that are dealt beforehand, that come in another order, twice or never."""
    made: list[tuple[int, int]] = []

    def job(number: int, request: tuple[Any, ...]) -> Job:
        return lambda worker: made.append((number, worker)) or request

    slow = job(0, ("sleep", 1.0))
    answers = list(pool.each([slow, *(job(k, ("echo", k)) for k in range(1, 9))]))
    assert [number for number, _ in made] == list(range(9)), "jobs are made in their order"
    assert made[0] == (0, 0)
    assert {worker for _, worker in made[1:]} == {1}, "worker 0 sleeps"
    assert answers == [*((1, (k,)) for k in range(1, 9)), (0, None)], "answers come as they are there"


def test_a_job_is_made_when_a_worker_is_free_for_it(pool: Pool) -> None:
    """Catches the states of a whole cohort in memory before the first of its clients trains."""
    made: list[int] = []
    answers = pool.each((lambda worker, k=k: made.append(k) or ("echo", k)) for k in range(20))
    assert made == []
    for seen, _ in enumerate(answers, 1):
        assert len(made) <= seen + len(pool)
    assert made == list(range(20))


def test_no_jobs_are_done_at_once(pool: Pool) -> None:
    """Catches a wait for ever."""
    assert list(pool.each([])) == []


def test_a_caller_that_stops_early_leaves_nobody_at_work(pool: Pool) -> None:
    """Catches an old answer that is taken for a new one, and a wait for a job that nobody wants any more."""
    started = time.monotonic()
    answers = pool.each(jobs(("echo", 1), ("sleep", 60), ("sleep", 60)))
    assert next(answers) == (0, (1,))
    answers.close()  # type: ignore[attr-defined]
    assert ask(pool, {0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}
    kept = pool.each(jobs(("echo", 1), ("sleep", 60)))
    assert next(kept) == (0, (1,))
    answers = pool.each(jobs(("sleep", 0.2), ("echo", 2)))  # while the other still waits for its end
    assert next(answers) == (1, (2,))
    kept.close()  # type: ignore[attr-defined]
    assert next(answers) == (0, None), "an old iterator ends the jobs of a new one"
    assert time.monotonic() - started < 30


def test_a_worker_that_is_abandoned_while_it_starts_answers_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a signal that ends a process which is too young to have a handler for it."""
    serve = pool_module._serve

    def late(pipe: Connection, make: Any, inherited: Sequence[int], *rest: Any) -> None:
        time.sleep(0.5 * (len(inherited) - 1))  # the second worker, as on a busy machine
        serve(pipe, make, inherited, *rest)

    monkeypatch.setattr(pool_module, "_serve", late)
    pool = Pool([echo, echo])
    try:
        with pytest.raises(DivergedError):
            list(pool.each(jobs(("fail", "ours"), ("sleep", 60))))
        assert ask(pool, {0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}
    finally:
        pool.close()


def test_a_large_answer_that_nobody_wants_blocks_no_large_request(pool: Pool) -> None:
    """Catches a parent that waits for its worker to read, while that waits for the parent to read."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("both wait"))
    try:
        signal.alarm(30)
        large = b"x" * 5_000_000
        with pytest.raises(DivergedError):
            list(pool.each(jobs(("fail", "ours"), ("echo", large))))
        time.sleep(0.5)  # the answer is on its way
        assert ask(pool, {0: ("echo", 1), 1: ("echo", large)}) == {0: (1,), 1: (large,)}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_job_that_cannot_be_made_ends_the_others(pool: Pool) -> None:
    """Catches a worker that is waited for although nothing was sent to it, such as with a state that is damaged."""

    def damaged(worker: int) -> tuple[Any, ...]:
        raise DivergedError("not made")

    started = time.monotonic()
    with pytest.raises(DivergedError, match="not made"):
        list(pool.each([*jobs(("sleep", 60)), damaged]))
    assert ask(pool, {0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("failing", [0, 1])
def test_what_a_worker_raises_arrives_and_the_others_stop(pool: Pool, failing: int) -> None:
    """Catches an error that is swallowed, one that waits for the others' work, and answers left in the pipe."""
    started = time.monotonic()
    with pytest.raises(DivergedError, match="ours"):
        ask(pool, {failing: ("fail", "ours"), 1 - failing: ("sleep", 60)})
    assert time.monotonic() - started < 30
    with pytest.raises(RuntimeError, match="in a worker process: 'theirs'"):
        ask(pool, {0: ("fail", "theirs")})
    assert ask(pool, {0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}


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
                ask(pool, {0: ("echo", b"x" * 5_000_000)})
        assert ask(pool, {0: ("echo", 1), 1: ("echo", 2)}) == {0: (1,), 1: (2,)}
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_that_ends_is_reported(pool: Pool) -> None:
    """Catches a run that waits for ever for a worker that was killed for its memory."""
    with pytest.raises(WorkerError, match=r"exit code 7\).*run\.workers = 1"):
        ask(pool, {0: ("die",)})


def test_a_worker_whose_answer_is_lost_is_ended(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that hangs, or believes an old answer, after a message for which memory or files were short."""

    def refuse(pipe: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "receive", refuse)
        with pytest.raises(WorkerError, match=r"worker process 0 could not be read .*Too many open files.*ulimit"):
            ask(pool, {0: ("echo", 1)})
    with pytest.raises(WorkerError, match="worker process 0 ended"):
        ask(pool, {0: ("echo", 2)})


def test_no_worker_outlives_its_pool(pool: Pool) -> None:
    """Catches processes left behind."""
    pids = pool.pids
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
