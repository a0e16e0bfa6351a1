"""Processes that work at the same time, and the pipe to each of them.

Workers of one thread where torch sees no GPU are forks: they share the data set and the networks with their parent,
page by page, and start in a hundredth of a second. Beside a GPU a fork's autograd refuses to work, and a fork with
several threads may hang, so there they start afresh and read their data again; then a script must guard its entry by
``if __name__ == "__main__":``.

One request, one answer. Processes with more threads together than there are cores are slower than one by an order of
magnitude (their threads spin), so threads times workers is at most the number of cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeAlias

import torch

from polyfed.base.errors import PolyfedError
from polyfed.parallel import transfer

#: A request ``(name, *arguments)``, made for the worker that is free to do it.
Job: TypeAlias = Callable[[int], tuple[Any, ...]]
#: Makes what answers requests, in the worker: ``make() -> {name: function}``.
Make = Callable[[], Mapping[str, Callable[..., Any]]]


class WorkerError(PolyfedError):
    """A worker process ended, or failed in a way that is not the user's input."""


class Abandoned(BaseException):
    """Raised inside a worker whose parent no longer wants the answer."""


class Pool:
    """Worker processes.

    Args:
        makers: one for each worker; with forks any callable, otherwise one that can be pickled.
        close: file descriptors of the parent that a fork must not keep open, such as that of a lock.
        threads: of each.
    """

    def __init__(self, makers: Sequence[Make], close: Sequence[int] = (), *, threads: int = 1) -> None:
        # The child of a process that has computed on several threads may not do so itself: GNU's OpenMP hangs.
        forks = can_fork() and threads == 1
        # Any: the types of contexts and pipes differ from system to system.
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._asked = 0
        self._owing: set[int] = set()  # workers that were sent a request and have not answered
        #: The last request whose answer nobody wants any more: a signal alone could come before its request.
        self._abandoned: Any = context.RawValue("q", 0)
        for make in makers:
            ours, theirs = context.Pipe()
            inherited = (*close, *(pipe.fileno() for pipe in (*self._pipes, ours))) if forks else ()
            process = context.Process(
                target=_serve, args=(theirs, make, inherited, self._abandoned, threads), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """The process numbers."""
        return [process.pid for process in self._processes]

    def peaks(self) -> list[int]:
        """The largest resident memory of each worker so far, in bytes, where the system tells."""
        found: list[int] = []
        for pid in self.pids:
            with contextlib.suppress(OSError, ValueError):
                status = Path(f"/proc/{pid}/status").read_text()
                found.append(int(status.split("VmHWM:")[1].split()[0]) * 1024)
        return found

    def each(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Any]]:
        """Have whoever is free do the next job; ``(worker, answer)`` as they come, in any order.

        Raises:
            WorkerError: a worker ended without an answer.
            BaseException: what a worker raised; the first, if several did. No worker goes on with its job then, nor if
                the caller stops.
        """
        self._abandon()  # what a caller before this one, who stopped, has left at work
        self._asked += 1
        asked, left, busy = self._asked, iter(jobs), set[int]()
        try:
            for worker in range(len(self)):
                self._next(worker, left, busy)
            while busy:
                # In whatever order they come: who fails must not wait for who is slow.
                for pipe in wait([self._pipes[worker] for worker in busy]):
                    worker = self._pipes.index(pipe)
                    done, answer = self._receive(worker)
                    busy.discard(worker)
                    if not done:
                        raise answer
                    self._next(worker, left, busy)  # first, so that it has work while the answer is looked at
                    yield worker, answer
                    del answer  # the next may be long in coming
        except BaseException:  # Ctrl-C, most of all; or nobody wants the rest
            if asked == self._asked:
                self._abandon()
            raise

    def _next(self, worker: int, jobs: Iterator[Job], busy: set[int]) -> None:
        job = next(jobs, None)
        if job is None:
            return
        request = (self._asked, *job(worker))
        while worker in self._owing:
            self._receive(worker)  # of what was abandoned: two large messages that pass each other would block both
        busy.add(worker)
        self._send(worker, request)

    def _send(self, worker: int, request: tuple[Any, ...]) -> None:
        try:
            with _whole():
                transfer.send(self._pipes[worker], request)
                self._owing.add(worker)
        except OSError as error:
            raise self._lost(worker, error) from error

    def _receive(self, worker: int) -> tuple[bool, Any]:
        try:
            with _whole():
                answer = transfer.receive(self._pipes[worker])
                self._owing.discard(worker)
                return answer
        except (EOFError, OSError, RuntimeError) as error:  # RuntimeError: torch could not map a file
            raise self._lost(worker, error) from error

    def _lost(self, worker: int, error: Exception) -> WorkerError:
        process = self._processes[worker]
        process.join(timeout=5)
        if process.is_alive():
            process.kill()  # what it said is lost, so nothing else that it says can be believed
            process.join()
            return WorkerError(
                f"a message of worker process {worker} could not be read ({error}); memory or open files "
                "(`ulimit -n`) may be short. Resume with run.workers = 1, or with fewer"
            )
        code = process.exitcode
        return WorkerError(
            f"worker process {worker} ended (exit code {code}); out of memory (-9), or a script without "
            '`if __name__ == "__main__":` beside a GPU? Resume with run.workers = 1, or with fewer'
        )

    def _abandon(self) -> None:
        self._abandoned.value = self._asked
        for worker in self._owing:
            if self._processes[worker].is_alive():
                os.kill(self._processes[worker].pid, signal.SIGUSR1)

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()  # a worker that waits ends now
        for process in self._processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _whole() -> Generator[None]:
    """Ctrl-C waits until the block is done: half a message would leave the other half to be read as the next."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C comes to the main thread only
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)  # whatever it does outside the block


def process_peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def can_fork() -> bool:
    """Whether workers may be forks: on Linux, and where torch has no GPU for which autograd keeps threads."""
    return sys.platform == "linux" and torch.cuda.device_count() == 0


def _serve(pipe: Any, make: Make, inherited: Sequence[int], abandoned: Any, threads: int) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    busy = 0  # the number of the request that is being answered

    def abandon(*_: Any) -> None:
        if 0 < busy <= abandoned.value:
            raise Abandoned

    signal.signal(signal.SIGUSR1, abandon)
    for descriptor in inherited:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _die_with_parent()
    torch.set_num_threads(threads)
    methods: Mapping[str, Callable[..., Any]] | None = None
    while True:
        try:
            number, name, *arguments = transfer.receive(pipe)
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone or done; of what was inherited nothing must be flushed or closed twice
        try:
            busy = number
            abandon()
            methods = make() if methods is None else methods
            answer = (True, methods[name](*arguments))
            busy = 0
        except Abandoned:
            busy = 0
            answer = (False, WorkerError("abandoned"))
        except BaseException as error:
            busy = 0  # first of all: a signal from here on must find nobody at work
            answer = (False, error)
        _answer(pipe, answer)


def _answer(pipe: Any, answer: tuple[bool, Any]) -> None:
    done, value = answer
    try:
        if not done and not isinstance(value, PolyfedError):
            # The user's own exception, whose class the parent may not be able to build again.
            text = "".join(traceback.format_exception(value))
            value = RuntimeError(f"in a worker process: {value}\n{text}")
        transfer.send(pipe, (done, value))
    except (EOFError, OSError):
        os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed run leaves nobody computing
