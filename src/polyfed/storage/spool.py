"""Bytes that wait on disk: replies of an exchange, and private states of a round that is not complete.

The file has no name, so nothing of it remains, however the process ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from polyfed.base.errors import StorageError
from polyfed.base.types import ClientId
from polyfed.core.message import State
from polyfed.storage import state_files

#: The place of bytes in a spool: offset and length.
Place: TypeAlias = tuple[int, int]


class Spool:
    """Bytes on disk, in a file without a name.

    Args:
        folder: a folder on the disk to use; None takes the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: Any = None
        self._end = 0

    def put(self, pieces: Iterable[bytes | memoryview]) -> Place:
        """Write the pieces one after another and return their place.

        Raises:
            StorageError: the disk is full, or the folder cannot be written to.
        """
        try:
            if self._file is None:
                if self._folder is not None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - held until close()
            self._file.seek(self._end)
            length = sum(self._write(piece) for piece in pieces)
        except OSError as error:
            raise StorageError(
                f"could not write below {self._folder or tempfile.gettempdir()}: "
                f"{error.strerror or error}; make room, then resume"
            ) from error
        self._end += length
        return self._end - length, length

    def get(self, place: Place) -> bytearray:
        """Return the bytes at a place."""
        data = bytearray(place[1])
        self._file.seek(place[0])
        left = memoryview(data)
        while left and (count := self._file.readinto(left)):  # 2 GB at most in one go
            left = left[count:]
        assert not left, "what was put is there"
        return data

    def _write(self, piece: bytes | memoryview) -> int:
        """Write all of it: one call writes 2 GB at most, and on a disk that fills up what fits, without an error."""
        left = memoryview(piece)
        while left:
            left = left[self._file.write(left) :]
        return len(piece)

    def close(self) -> None:
        """Delete everything; the spool can be used again."""
        if self._file is not None:
            self._file.close()
        self._file, self._end = None, 0


class PendingStates:
    """The private states that clients keep from a round that is not complete yet.

    Args:
        kinds: the state classes of the algorithm.
        spool: where the states wait; None keeps them in memory.
    """

    def __init__(self, kinds: tuple[type[State], ...], spool: Spool | None) -> None:
        self._kinds, self._spool = kinds, spool
        self._states: dict[ClientId, Any] = {}  # a state, or its place in the spool
        self._before: dict[ClientId, Any] = {}  # states from before this exchange, of the clients in it

    def __contains__(self, client: ClientId) -> bool:
        return client in self._states

    def __iter__(self) -> Iterator[ClientId]:
        return iter(sorted(self._states))

    def begin(self) -> None:
        """Begin an exchange: `discard` goes back to this point."""
        self._before = {}

    def put(self, client: ClientId, state: State) -> None:
        """Store the state that a client keeps from this exchange."""
        self._before[client] = self._states.get(client)
        self._states[client] = state if self._spool is None else self._spool.put([state_files.dump(state)])

    def get(self, client: ClientId) -> Any:
        """Return the state that a client keeps so far."""
        found = self._states[client]
        return found if self._spool is None else state_files.unpack(bytes(self._spool.get(found)), *self._kinds)

    def discard(self, client: ClientId) -> None:
        """Discard the state that a client kept from this exchange, as its reply does not count."""
        before = self._before.pop(client)
        if before is None:
            del self._states[client]
        else:
            self._states[client] = before

    def clear(self) -> None:
        """Forget all states: they are stored, or the round is void."""
        self._states.clear()
        self._before = {}
        if self._spool is not None:
            self._spool.close()
