"""A pool of worker processes, and the pipe to each process.

Workers with one thread are forks if torch sees no GPU: they share the data set and the networks with their parent, page
by page, and start in a hundredth of a second. With a GPU, autograd refuses to work in a fork, and a fork with several
threads may hang; so such workers are new processes that read their data again, and a script must guard its entry point
by ``if __name__ == "__main__":``.

Each request has one answer. Processes with more threads in total than there are cores are slower by an order of
magnitude than one process (their threads spin), so threads times workers is at most the number of cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from polyfed.base.memory import keep_freed_blocks
from polyfed.parallel import transfer

#: Makes a request ``(name, *arguments)`` for the worker that is free to do it.
Job: TypeAlias = Callable[[int], tuple[Any, ...]]
#: Makes, in the worker, the functions that answer requests: ``make() -> {name: function}``.
Make = Callable[[], Mapping[str, Callable[..., Any]]]


class WorkerError(PolyfedError):
    """A worker process ended, or failed for a reason other than the user's input."""


class Abandoned(BaseException):
    """Raised inside a worker whose parent no longer waits for the answer."""


class Pool:
    """Worker processes.

    Args:
        makers: a maker for each worker; with forks any callable, otherwise a callable that can be pickled.
        close: file descriptors of the parent that a fork must not keep open, such as that of a lock.
        threads: threads of each worker.
    """

    def __init__(self, makers: Sequence[Make], close: Sequence[int] = (), *, threads: int = 1) -> None:
        # A child of a process that has used several threads must not use several itself: GNU's OpenMP hangs.
        forks = can_fork() and threads == 1
        # Any: the types of contexts and pipes depend on the system.
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._asked = 0
        self._owing: set[int] = set()  # workers that have a request and have not answered
        #: The number of the last abandoned request: a signal alone could arrive before its request.
        self._abandoned: Any = context.RawValue("q", 0)
        for make in makers:
            ours, theirs = context.Pipe()
            inherited = (*close, *(pipe.fileno() for pipe in (*self._pipes, ours))) if forks else ()
            process = context.Process(
                target=_serve, args=(theirs, make, inherited, self._abandoned, threads), daemon=True
            )
            # A worker that is abandoned before it has its handler would end; it inherits the mask and opens it itself.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """The process ids."""
        return [process.pid for process in self._processes]

    def peaks(self) -> list[int]:
        """Return the largest resident memory of each worker so far, in bytes, if the system reports it."""
        found: list[int] = []
        for pid in self.pids:
            with contextlib.suppress(OSError, ValueError):
                found.append(int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
        return found

    def each(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Any]]:
        """Give each job to the next free worker; yield ``(worker, answer)`` as the answers come, in any order.

        Raises:
            WorkerError: a worker ended without an answer.
            BaseException: the exception of a worker; the first, if several workers raise. All workers then stop, as
                they do if the caller stops.
        """
        self._abandon()  # stops jobs that an earlier caller left when it stopped
        self._asked += 1
        asked, left, busy = self._asked, iter(jobs), set[int]()
        try:
            for worker in range(len(self)):
                self._next(worker, left, busy)
            while busy:
                # In the order of arrival: a failure must not wait for a slow worker.
                for pipe in wait([self._pipes[worker] for worker in busy]):
                    worker = self._pipes.index(pipe)
                    done, answer = self._receive(worker)
                    busy.discard(worker)
                    if not done:
                        raise answer
                    self._next(worker, left, busy)  # first, so that the worker computes while the answer is used
                    yield worker, answer
                    del answer  # the next answer may take long
        except BaseException:  # such as Ctrl-C, or a caller that stops
            if asked == self._asked:
                self._abandon()
            raise

    def _next(self, worker: int, jobs: Iterator[Job], busy: set[int]) -> None:
        job = next(jobs, None)
        if job is None:
            return
        request = (self._asked, *job(worker))
        while worker in self._owing:
            self._receive(worker)  # the abandoned answer: two large messages in opposite directions would block
        busy.add(worker)
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
            process.kill()  # a part of its message is lost, so the rest of the pipe cannot be read
            process.join()
            return WorkerError(
                f"a message of worker process {worker} could not be read ({error}); memory or open files "
                "(`ulimit -n`) may be short. Resume with run.workers = 1, or with fewer workers"
            )
        return WorkerError(
            f"worker process {worker} ended (exit code {process.exitcode}); out of memory (-9), or a script without "
            '`if __name__ == "__main__":` on a machine with a GPU? Resume with run.workers = 1, or with fewer workers'
        )

    def _abandon(self) -> None:
        self._abandoned.value = self._asked
        for worker in self._owing:
            if self._processes[worker].is_alive():
                os.kill(self._processes[worker].pid, signal.SIGUSR1)

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()  # ends a worker that waits for a request
        for process in self._processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _whole() -> Generator[None]:
    """Delay Ctrl-C until the block is done: the rest of half a message would be read as the next message."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C reaches the main thread only
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)  # now as outside the block


def most_files() -> int:
    """Return how many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def process_peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def can_fork() -> bool:
    """Return whether workers may be forks: on Linux, and if torch has no GPU, for which autograd keeps threads."""
    return sys.platform == "linux" and torch.cuda.device_count() == 0


def _serve(pipe: Any, make: Make, inherited: Sequence[int], abandoned: Any, threads: int) -> None:
    """Run the loop of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    busy = 0  # the number of the current request

    def abandon(*_: Any) -> None:
        if 0 < busy <= abandoned.value:
            raise Abandoned

    signal.signal(signal.SIGUSR1, abandon)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    for descriptor in inherited:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed run leaves no process at work
    keep_freed_blocks()
    gc.freeze()  # what was inherited stays, so collections need not walk through it
    torch.set_num_threads(threads)
    methods: Mapping[str, Callable[..., Any]] | None = None
    while True:
        try:
            number, name, *arguments = transfer.receive(pipe)
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone or done; inherited files must not be flushed or closed twice
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
            busy = 0  # first: a signal from here on must not interrupt anything
            answer = (False, error)
        _answer(pipe, *answer)


def _answer(pipe: Any, done: bool, value: Any) -> None:
    try:
        if not done and not isinstance(value, PolyfedError):
            # The user's own exception, whose class the parent may be unable to rebuild.
            text = "".join(traceback.format_exception(value))
            value = RuntimeError(f"in a worker process: {value}\n{text}")
        transfer.send(pipe, (done, value))
    except (EOFError, OSError):
        os._exit(0)
