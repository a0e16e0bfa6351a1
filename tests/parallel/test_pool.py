"""Worker processes: what they answer, what they raise, and that none outlives its pool."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from polyfed.base.errors import DivergedError
from polyfed.parallel import transfer
from polyfed.parallel.pool import Pool, WorkerError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


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
