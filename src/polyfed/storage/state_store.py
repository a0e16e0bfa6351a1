"""Where private states live: an SQLite file of the small ones, one safetensors file for each large one.

A row is a client, a round and a SHA-256: the state that the client kept at the end of that round. Rows and files are
never changed; the version of the last checkpoint stays until the next one is complete. All that is written between
two checkpoints is one transaction, so a run that is killed finds the index as the checkpoint left it, or as one left
it whose manifest was not written any more; the rows of its later rounds are dropped. No step of a round looks at
more than the cohort's rows: the cost does not grow with the number of clients, nor of those that have trained.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyfed.base import files
from polyfed.base.errors import CheckpointError, StorageError
from polyfed.base.types import ClientId
from polyfed.core.message import Nothing, State
from polyfed.storage import state_files

#: Bytes up to which a state is a row of the index; measured on ext4: below, writing a file costs more, above, a blob.
INLINE = 256 * 1024

_INDEX = "index.sqlite"
_SCHEMA = """
CREATE TABLE states (client INTEGER NOT NULL, round INTEGER NOT NULL, sha256 TEXT NOT NULL, data BLOB);
CREATE UNIQUE INDEX by_client ON states (client, round, sha256);
"""
_LATEST = "SELECT round, sha256 FROM states WHERE client = ? AND round <= ? ORDER BY round DESC LIMIT 1"
_NAME = re.compile(r"client-(\d+)-round-(\d+)\.safetensors")


@dataclass(frozen=True)
class Seal:
    """What a manifest remembers of all states together, at a cost that does not depend on how many there are.

    Args:
        count: clients that have a state.
        digest: XOR over them of SHA-256(client, round, SHA-256 of the state), as an integer.
    """

    count: int = 0
    digest: int = 0

    def plus(self, client: ClientId, round_: int, sha256: str) -> Seal:
        """With one more state."""
        return Seal(self.count + 1, self.digest ^ _digest(client, round_, sha256))

    def minus(self, client: ClientId, round_: int, sha256: str) -> Seal:
        """Without a state that is in it."""
        return Seal(self.count - 1, self.digest ^ _digest(client, round_, sha256))

    def entry(self) -> dict[str, Any]:
        """As JSON."""
        return {"count": self.count, "digest": f"{self.digest:064x}"}


def _digest(client: ClientId, round_: int, sha256: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{client} {round_} {sha256}".encode()).digest())


class Store:
    """The private states of the clients that have trained.

    One process writes: whoever makes a store holds the run directory.

    Args:
        folder: where the index and the files go; made when there is something to write.
        kinds: the state classes of the algorithm.
        resident: keep states in memory, writing them at checkpoints only; else write each at once and keep none.
    """

    def __init__(self, folder: Path, kinds: tuple[type[State], ...], *, resident: bool) -> None:
        self.folder, self.kinds, self.resident = folder, kinds, resident
        self._held: dict[ClientId, State] = {}
        self._dirty: dict[ClientId, int] = {}  # held, and not written since this round
        self._settled = (0, Seal())  # the last checkpoint: its round, and what was there
        self._written: dict[ClientId, tuple[int, str]] = {}  # since then: round and SHA-256
        self._db: sqlite3.Connection | None = None

    def get(self, client: ClientId) -> Any:
        """The client's state, or None if it has none.

        Raises:
            CheckpointError: what was written is damaged or gone.
        """
        if client in self._held:
            return self._held[client]
        row = self._one("SELECT round, sha256, data FROM states WHERE client = ? ORDER BY round DESC LIMIT 1", client)
        if row is None:
            return None
        round_, sha256, data = row
        if data is None:
            state = state_files.load(self._path(client, round_), sha256, *self.kinds)
        else:
            state = state_files.parse(data, sha256, f"{self.folder / _INDEX}, client {client}", *self.kinds)
        if self.resident:
            self._held[client] = state
        return state

    def put(self, client: ClientId, state: State, round_: int) -> None:
        """Keep a client's state as of the end of ``round_``, which comes after the last checkpoint.

        Raises:
            StorageError: the disk is full.
        """
        if isinstance(state, Nothing):
            return
        if self.resident:
            self._held[client] = state
            self._dirty[client] = round_
        else:
            self._write(client, state, round_)

    def _write(self, client: ClientId, state: State, round_: int) -> None:
        data = state_files.dump(state)
        inline = len(data) <= INLINE
        path = self._path(client, round_)
        sha256 = hashlib.sha256(data).hexdigest() if inline else files.write(path, data)
        # Of an earlier round of this checkpoint, or of an attempt at it: never to be read.
        self._drop(client, "round > ?", self._settled[0], keep=None if inline else path)
        self._do("INSERT INTO states VALUES (?, ?, ?, ?)", client, round_, sha256, data if inline else None)
        self._written[client] = (round_, sha256)

    def save(self) -> dict[str, Any]:
        """Write what is not on disk yet; returns what a manifest needs to know the states again.

        Until `prune` is called the states of the checkpoint before can be restored, too.
        """
        for client in sorted(self._dirty):
            self._write(client, self._held[client], self._dirty[client])
            del self._dirty[client]
        if self._db is not None:
            with self._guarded():
                self._db.commit()
        return self._sealed().entry()

    def _sealed(self) -> Seal:
        settled, seal = self._settled
        for client, (round_, sha256) in self._written.items():
            before = self._one(_LATEST, client, settled)
            seal = (seal if before is None else seal.minus(client, *before)).plus(client, round_, sha256)
        return seal

    def prune(self, round_: int) -> None:
        """The manifest of ``round_`` is written: what its states supersede goes."""
        written = dict(self._written)
        self._settled = (round_, self._sealed())  # first: Ctrl-C below must leave what a further save builds upon
        self._written.clear()
        for client, (latest, _) in written.items():
            self._drop(client, "round < ?", latest)
        if self._db is not None:
            with self._guarded():
                self._db.commit()

    def _drop(self, client: ClientId, which: str, round_: int, keep: Path | None = None) -> None:
        rows = f"SELECT round, data NOTNULL FROM states WHERE client = ? AND {which}"
        for found, inline in self._all(rows, client, round_):
            self._do("DELETE FROM states WHERE client = ? AND round = ?", client, found)
            path = self._path(client, found)
            if not inline and path != keep:
                path.unlink(missing_ok=True)

    def restore(self, round_: int = 0, entry: Any = None) -> None:
        """Go back to the states of a manifest; all that is of later rounds, or superseded, goes.

        Looks once at every row of the index; not at the states, which are checked when they are read.

        Args:
            round_: of the checkpoint.
            entry: what `save` returned then; None if there is no checkpoint.

        Raises:
            CheckpointError: these are not the states that the manifest knows.
        """
        self._held.clear()
        self._dirty.clear()
        self._written.clear()
        self._close()
        if entry is None:
            entry = Seal().entry()
            for name in (_INDEX, f"{_INDEX}-journal"):
                (self.folder / name).unlink(missing_ok=True)
        latest = "SELECT client, max(round), sha256 FROM states WHERE round <= ? GROUP BY client"
        seal = Seal()
        for client, found, sha256 in self._each(latest, round_):
            seal = seal.plus(client, found, sha256)
        if seal.entry() != entry:
            raise CheckpointError(
                f"{self.folder / _INDEX} is not what the checkpoint of round {round_} left: it holds the states of "
                f"{seal.count} clients of these rounds, expected {entry['count']}, or others; restore the folder "
                "from where it was copied, or start a new run"
            )
        self._settled = (round_, seal)
        later = "SELECT client, round FROM states WHERE round > ?"
        older = (
            "SELECT client, round FROM states AS old WHERE round < ? AND EXISTS "
            "(SELECT 1 FROM states AS new WHERE new.client = old.client AND new.round > old.round)"
        )
        for query in (later, older):
            for client, found in self._all(query, round_):
                self._do("DELETE FROM states WHERE client = ? AND round = ?", client, found)
        if self._db is not None:
            with self._guarded():
                self._db.commit()
        self._sweep()

    def _sweep(self) -> None:
        """Remove the files that no row refers to: those of a round that was killed."""
        for path in self.folder.glob("??/client-*.safetensors"):
            name = _NAME.fullmatch(path.name)
            known = "SELECT 1 FROM states WHERE client = ? AND round = ? AND data ISNULL"
            if name and self._one(known, int(name[1]), int(name[2])) is None:
                path.unlink(missing_ok=True)

    def _path(self, client: ClientId, round_: int) -> Path:
        return self.folder / f"{client % 256:02x}" / f"client-{client}-round-{round_}.safetensors"

    # ------------------------------------------------------------------------------------------------------- SQLite

    def _open(self, *, write: bool) -> sqlite3.Connection | None:
        """The index; None where there is none and none is to be made."""
        path = self.folder / _INDEX
        if self._db is None and (write or path.exists()):
            with self._guarded():
                self.folder.mkdir(parents=True, exist_ok=True)
                # The run directory is locked as a whole; SQLite's own locks fail on some network file systems.
                self._db = sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True)
                self._finalizer = weakref.finalize(self, self._db.close)
                if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        return self._db

    def _close(self) -> None:
        if self._db is not None:
            self._finalizer()  # what was not committed is rolled back
            self._db = None

    def _do(self, statement: str, *values: object) -> None:
        db = self._open(write=True)
        with self._guarded():
            assert db is not None
            db.execute(statement, values)

    def _each(self, query: str, *values: object) -> Iterator[Any]:
        db = self._open(write=False)
        if db is not None:
            with self._guarded():
                yield from db.execute(query, values)

    def _all(self, query: str, *values: object) -> list[Any]:
        return list(self._each(query, *values))

    def _one(self, query: str, *values: object) -> Any:
        return next(iter(self._all(query, *values)), None)

    @contextmanager
    def _guarded(self) -> Generator[None]:
        """Errors of SQLite under their names here."""
        path = self.folder / _INDEX
        try:
            yield
        except sqlite3.DatabaseError as error:
            code: int | None = getattr(error, "sqlite_errorcode", None)
            if code is None:  # not of the file
                raise
            if code & 0xFF in (
                sqlite3.SQLITE_FULL,
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            ):
                raise StorageError(
                    f"could not write {path}: {error}; what the last checkpoint left is intact. Make room or choose "
                    "another --out, then resume"
                ) from error
            raise CheckpointError(f"checkpoint file {path} is damaged: {error}") from error
        except OSError as error:
            raise StorageError(f"cannot use {self.folder}: {error.strerror or error}") from error
