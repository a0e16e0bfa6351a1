"""The lock of a client's state directory: one client process at a time uses it. Loads no torch."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from polyfed.base.errors import StorageError

NAME = "in-use.json"


@dataclass(frozen=True)
class StateLock:
    """A held lock.

    Args:
        descriptor: the open file; a child process that inherits it holds the lock as long as it runs.
        path: the file, which names the processes that use the directory.
    """

    descriptor: int
    path: Path

    def name(self, *processes: int) -> None:
        """Write the numbers of the processes, for the error of another client."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps({"processes": processes}).encode(), 0)


@contextmanager
def in_use(folder: Path) -> Generator[StateLock]:
    """Hold a client's state directory in the ``with`` block.

    Args:
        folder: the directory, which exists.

    Raises:
        StorageError: another client process uses it, or the file cannot be written.
    """
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}; correct the state directory") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(_refusal(folder, path)) from error
        lock = StateLock(descriptor, path)
        lock.name(os.getpid())
        yield lock
    finally:
        os.close(descriptor)


def _refusal(folder: Path, path: Path) -> str:
    numbers: list[int] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        numbers = [int(number) for number in json.loads(path.read_bytes())["processes"]]
    known = f" ({'process' if len(numbers) == 1 else 'processes'} {', '.join(map(str, numbers))})" if numbers else ""
    stop = f"`kill {' '.join(map(str, numbers))}`" if numbers else "ending it"
    return (
        f"{folder} is in use by another client{known}; a state directory belongs to one client at a time. Give this "
        f"client a --state of its own, or stop the other by {stop}. If the other client was killed, this is its "
        "worker, which may still train: stop it the same way"
    )
