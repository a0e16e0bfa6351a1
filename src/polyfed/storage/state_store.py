"""The store of private states: an SQLite file for small states, one safetensors file for each large state.

A row is a client, a round and a SHA-256: the state that the client kept at the end of that round. Rows and files never
change, and the version of the last checkpoint stays until the next checkpoint is complete. All writes between two
checkpoints are one transaction. So a killed run finds the index as its checkpoint left it, or as a later checkpoint
left it whose manifest was not written; the rows of later rounds are then dropped. A step of a round reads only the
cohort's rows: its cost grows neither with the number of clients nor with the number that have trained.

A checkpoint may be pinned: of each client the latest row up to its round then stays beside the latest of all, until
another checkpoint is pinned. Table ``pinned`` lists the rows that only this keeps.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyfed.base import files
from polyfed.base.errors import CheckpointError, StorageError
from polyfed.base.types import ClientId
from polyfed.core.message import Nothing, State
from polyfed.storage import state_files

#: Bytes up to which a state is a row of the index. Measured on ext4: below this size a file costs more than a blob.
INLINE = 256 * 1024

#: Files that a checkpoint writes at the same time.
WRITERS = 2
#: States that the writers may be ahead of the index: so many are in memory, or written after Ctrl-C, at most.
AHEAD = 16


@dataclass(frozen=True)
class Seal:
    """A summary of all states together for the manifest, whose size does not depend on their number.

    Args:
        count: clients that have a state.
        digest: XOR over these states of SHA-256(client, round, SHA-256 of the state), as an integer.
    """

    count: int = 0
    digest: int = 0

    def plus(self, client: ClientId, round_: int, sha256: str) -> Seal:
        """Return the seal with a state added."""
        digest = hashlib.sha256(f"{client} {round_} {sha256}".encode()).digest()
        return Seal(self.count + 1, self.digest ^ int.from_bytes(digest))

    def minus(self, client: ClientId, round_: int, sha256: str) -> Seal:
        """Return the seal with a state of it removed."""
        return Seal(self.count - 1, self.plus(client, round_, sha256).digest)  # XOR removes what it adds

    def entry(self) -> dict[str, Any]:
        """Return the seal as JSON values."""
        return {"count": self.count, "digest": f"{self.digest:064x}"}


class StatesOf(Protocol):
    """The private states of clients."""

    def get(self, client: ClientId) -> Any:
        """Return the client's state, or None if it has none."""
        ...


class Store:
    """The private states of the clients that have trained.

    Only one process writes: the process that makes a store holds the lock of the run directory.

    Args:
        folder: the folder of the index and the files; made with the first write.
        kinds: the state classes of the algorithm.
        resident: whether states stay in memory and are written at checkpoints only; else each is written at once.
        read_only: whether the store only reads, so that it needs no lock.
    """

    def __init__(
        self, folder: Path, kinds: tuple[type[State], ...], *, resident: bool, read_only: bool = False
    ) -> None:
        self.folder, self.kinds, self.resident, self.read_only = folder, kinds, resident, read_only
        self._index = folder / "index.sqlite"
        self._held: dict[ClientId, State] = {}
        self._dirty: dict[ClientId, int] = {}  # states in memory that are not written: client -> their round
        self._settled = (0, Seal())  # the last checkpoint: its round and its seal
        self._written: dict[ClientId, tuple[int, str]] = {}  # states written since then: round and SHA-256
        self._db: sqlite3.Connection | None = None

    def get(self, client: ClientId) -> Any:
        """Return the client's state, or None if it has none.

        Raises:
            CheckpointError: the stored state is damaged or gone.
        """
        if client in self._held:
            return self._held[client]
        state = self._load(client)
        if self.resident and state is not None:
            self._held[client] = state
        return state

    def _load(self, client: ClientId, latest: int = 2**62) -> Any:
        """Read the last state up to a round; None if there is none."""
        row = self._one(
            "SELECT round, sha256, data FROM states WHERE client = ? AND round <= ? ORDER BY round DESC LIMIT 1",
            client,
            latest,
        )
        if row is None:
            return None
        round_, sha256, data = row
        if data is None:
            return state_files.load(self._path(client, round_), sha256, *self.kinds)
        return state_files.parse(data, sha256, f"{self._index}, client {client}", *self.kinds)

    def at(self, round_: int) -> StatesOf:
        """Return the states as they were at the end of ``round_``, which is pinned or the last checkpoint; read-only.

        Nothing that is read stays in memory.
        """
        return _Earlier(self, round_)

    def put(self, client: ClientId, state: State, round_: int) -> None:
        """Store a client's state at the end of ``round_``, which comes after the last checkpoint.

        Raises:
            StorageError: the disk is full.
        """
        if isinstance(state, Nothing):
            return
        if self.resident:
            self._held[client] = state
            self._dirty[client] = round_
        else:
            self._enter(client, round_, *self._file(client, state, round_))

    def _file(self, client: ClientId, state: State, round_: int) -> tuple[str, bytes | None]:
        """Write the file of a large state; return the SHA-256, and the bytes of a small state."""
        data = state_files.dump(state)
        if len(data) <= INLINE:
            return hashlib.sha256(data).hexdigest(), data
        return files.write(self._path(client, round_), data), None

    def _enter(self, client: ClientId, round_: int, sha256: str, data: bytes | None) -> None:
        # The rows of earlier rounds since the checkpoint, or of an earlier attempt at this round, are not needed.
        self._drop(client, "round > ?", self._settled[0], keep=self._path(client, round_) if data is None else None)
        self._do("INSERT INTO states VALUES (?, ?, ?, ?)", client, round_, sha256, data)
        self._written[client] = (round_, sha256)

    def save(self) -> dict[str, Any]:
        """Write the states that are not on disk yet; return the entry by which a manifest identifies all states.

        Until `prune` is called, the states of the checkpoint before can be restored, too.
        """
        clients = sorted(self._dirty)
        with ThreadPoolExecutor(WRITERS) as pool:
            for start in range(0, len(clients), AHEAD):
                some = clients[start : start + AHEAD]
                written = pool.map(self._file, some, map(self._held.get, some), map(self._dirty.get, some))
                for client, (sha256, data) in zip(some, written, strict=True):
                    self._enter(client, self._dirty[client], sha256, data)
                    del self._dirty[client]
        self._commit()
        return self._sealed().entry()

    def _sealed(self) -> Seal:
        settled, seal = self._settled
        for client, (round_, sha256) in self._written.items():
            before = self._one(
                "SELECT round, sha256 FROM states WHERE client = ? AND round <= ? ORDER BY round DESC LIMIT 1",
                client,
                settled,
            )
            seal = (seal if before is None else seal.minus(client, *before)).plus(client, round_, sha256)
        return seal

    def prune(self, round_: int, pinned: int | None = None) -> None:
        """Delete the states that those of ``round_`` supersede; to be called when its manifest is written.

        Args:
            round_: the round of the checkpoint.
            pinned: the round of the pinned checkpoint: this one, or the one that was pinned before; None pins none.
        """
        self._settled = (round_, self._sealed())  # first: Ctrl-C below must leave what a further save builds upon
        written, self._written = self._written, {}
        if pinned == round_:  # the checkpoint that was pinned before is not any more
            while row := self._one("SELECT client, round FROM pinned LIMIT 1"):
                self._drop(row[0], "round = ?", row[1])
                self._do("DELETE FROM pinned WHERE client = ?", row[0])
        for client, (latest, _) in written.items():
            kept = None if pinned is None or pinned == round_ else self._pin(client, pinned)
            if kept is None:
                self._drop(client, "round < ?", latest)
            else:
                self._drop(client, f"round <> {int(kept)} AND round < ?", latest)
        self._commit()

    def _pin(self, client: ClientId, pinned: int) -> int | None:
        """Note the row of a client that a pinned checkpoint keeps; return its round, None if it keeps none."""
        row = self._one("SELECT max(round) FROM states WHERE client = ? AND round <= ?", client, pinned)
        if row[0] is not None:
            self._do("INSERT OR REPLACE INTO pinned VALUES (?, ?)", client, row[0])
        return row[0]

    def _drop(self, client: ClientId, which: str, round_: int, keep: Path | None = None) -> None:
        for found, inline in list(
            self._each(f"SELECT round, data NOTNULL FROM states WHERE client = ? AND {which}", client, round_)
        ):
            self._do("DELETE FROM states WHERE client = ? AND round = ?", client, found)
            path = self._path(client, found)
            if not inline and path != keep:
                path.unlink(missing_ok=True)

    def restore(self, round_: int = 0, entry: Any = None, pinned: tuple[int, Any] | None = None) -> None:
        """Go back to the states of a manifest; delete later and superseded states.

        It reads every row of the index once, but no state: a state is checked when it is read.

        Args:
            round_: the round of the checkpoint.
            entry: the result of `save` for that checkpoint; None if there is no checkpoint.
            pinned: the round of the pinned checkpoint, and the result of `save` for it; None if none is pinned.

        Raises:
            CheckpointError: the states differ from those that the manifest identifies.
        """
        self._held.clear()
        self._dirty.clear()
        self._written.clear()
        if self._db is not None:
            self._finalizer()  # rolls back whatever was not committed
            self._db = None
        if entry is None:
            entry = Seal().entry()
            for path in (self._index, self.folder / f"{self._index.name}-journal"):
                path.unlink(missing_ok=True)
        seal = self._check(round_, entry)
        if pinned is not None:
            self._check(*pinned)
        self._settled = (round_, seal)
        if self._db is not None:  # else there is no index, and none is made
            self._do("DELETE FROM states WHERE round > ?", round_)
            # What is superseded is deleted, unless nothing superseded it up to the pinned round.
            last = round_ if pinned is None else pinned[0]
            newer = "SELECT 1 FROM states AS new WHERE new.client = states.client AND new.round > states.round"
            self._do(f"DELETE FROM states WHERE round <= ? AND EXISTS ({newer} AND new.round <= ?)", last, last)
            self._do(f"DELETE FROM states WHERE round > ? AND EXISTS ({newer})", last)
            self._do("DELETE FROM pinned")
            if pinned is not None:
                self._do(
                    f"INSERT INTO pinned SELECT client, round FROM states WHERE round <= ? AND EXISTS ({newer})",
                    last,
                )
        self._commit()
        self._sweep()

    def _check(self, round_: int, entry: Any) -> Seal:
        """Return the seal of a checkpoint, which must be that of its entry in the manifest.

        Raises:
            CheckpointError: the states differ.
        """
        seal = Seal()
        for row in self._each("SELECT client, max(round), sha256 FROM states WHERE round <= ? GROUP BY client", round_):
            seal = seal.plus(*row)
        if seal.entry() != entry:
            raise CheckpointError(
                f"{self._index} is not what the checkpoint of round {round_} left: it holds states of "
                f"{seal.count} clients up to that round, expected {entry['count']} clients, or other states; restore "
                "the folder from a copy, or start a new run"
            )
        return seal

    def _sweep(self) -> None:
        """Remove the files that no row refers to, which a killed round left."""
        for path in self.folder.glob("??/client-*.safetensors"):
            name = re.fullmatch(r"client-(\d+)-round-(\d+)\.safetensors", path.name)
            if name and not self._one(
                "SELECT 1 FROM states WHERE client = ? AND round = ? AND data ISNULL", int(name[1]), int(name[2])
            ):
                path.unlink(missing_ok=True)

    def _path(self, client: ClientId, round_: int) -> Path:
        return self.folder / f"{client % 256:02x}" / f"client-{client}-round-{round_}.safetensors"

    # ------------------------------------------------------------------------------------------------------- SQLite

    def _execute(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        """Execute a statement; the index is opened first, and made if it is absent."""
        if self._db is None:
            # The run directory is locked as a whole; SQLite's own locks fail on some network file systems.
            mode = "&mode=ro" if self.read_only else ""
            if not mode:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(f"{self._index.absolute().as_uri()}?nolock=1{mode}", uri=True)
            self._finalizer = weakref.finalize(self, self._db.close)
            if not mode and not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'pinned'").fetchone():
                self._db.executescript(
                    "BEGIN; CREATE TABLE IF NOT EXISTS states "
                    "(client INTEGER NOT NULL, round INTEGER NOT NULL, sha256 TEXT NOT NULL, data BLOB);"
                    "CREATE UNIQUE INDEX IF NOT EXISTS by_client ON states (client, round, sha256);"
                    "CREATE TABLE pinned (client INTEGER PRIMARY KEY, round INTEGER NOT NULL); COMMIT;"
                )
        return self._db.execute(statement, values)

    def _do(self, statement: str, *values: object) -> None:
        with self._guarded():
            self._execute(statement, values)

    def _each(self, query: str, *values: object) -> Iterator[Any]:
        if self._db is not None or self._index.exists():
            with self._guarded():
                yield from self._execute(query, values)

    def _one(self, query: str, *values: object) -> Any:
        return next(self._each(query, *values), None)

    def _commit(self) -> None:
        if self._db is not None:
            with self._guarded():
                self._db.commit()

    @contextmanager
    def _guarded(self) -> Generator[None]:
        """Turn errors of SQLite into StorageError or CheckpointError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code: int | None = getattr(error, "sqlite_errorcode", None)
            if code is None:  # the error does not concern the file
                raise
            if code & 0xFF in (
                sqlite3.SQLITE_FULL,
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            ):
                raise StorageError(
                    f"could not write {self._index}: {error}; the states of the last checkpoint are intact. Make room "
                    "or choose another --out, then resume"
                ) from error
            raise CheckpointError(
                f"checkpoint file {self._index} is damaged: {error}; restore it, or start a new run"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot use {self.folder}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Earlier:
    """The states of a store at the end of an earlier round."""

    store: Store
    round: int

    def get(self, client: ClientId) -> Any:
        """Return the client's state at that time, or None if it had none.

        Raises:
            CheckpointError: the stored state is damaged or gone.
        """
        return self.store._load(client, self.round)  # pyright: ignore[reportPrivateUsage]
