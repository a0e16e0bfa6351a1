"""The run directory: its lock, its files, and the checkpoint that a killed run resumes from.

    config.toml         the resolved configuration           rounds.jsonl    one line per round
    environment.json    versions and hardware                clients.jsonl   one line per client and round
    partition.npz       the rows of each client, and a hash  summary.json    the results, once the run is complete
    checkpoint/         manifest.json and the server's state
    preprocessing.json  what was fitted to the data (see polyfed.trained), and .safetensors with its tensors
    states/             private states: index.sqlite, and a file for each large one

The manifest names immutable files by checksum and is replaced last, in one rename: whenever a run is killed, the
directory holds a complete checkpoint (or none, and the run starts again). docs/run-directory.md documents every key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyfed.base import files
from polyfed.base.errors import CheckpointError, RunDirError, StorageError
from polyfed.base.types import ClientId
from polyfed.core.message import State
from polyfed.storage import state_files
from polyfed.storage.state_store import Store

LOGS = ("rounds.jsonl", "clients.jsonl")

#: To be raised by 1 when run directories of the version before cannot be resumed any more.
LAYOUT = 3


class RunDirInUseError(RunDirError):
    """Another process holds the run directory."""


class RunDir:
    """A run directory, which this process locks until `close`.

    Raises:
        RunDirInUseError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until close()
        except OSError as error:
            raise StorageError(
                f"cannot use {self.path} as run directory: {error.strerror or error}; choose another --out"
            ) from error
        try:
            # The kernel drops the lock with its process, however that ends: a dead run never blocks.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            owner = (self.path / "lock").read_text("utf-8").strip() or "unknown"
            raise RunDirInUseError(
                f"{self.path} is in use by process {owner}; wait for it, stop it, or choose another --out"
            ) from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._logs = {name: open(self.path / name, "ab") for name in LOGS}  # noqa: SIM115 - held until close()

    def close(self) -> None:
        """Release the directory."""
        for log in self._logs.values():
            with contextlib.suppress(OSError):  # a full disk, of which `append` has told
                log.close()
        self._lock.close()

    @property
    def lock(self) -> int:
        """The descriptor of the lock; a fork that kept it open would lock the directory, too."""
        return self._lock.fileno()

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to a log.

        Raises:
            StorageError: the disk is full.
        """
        log = self._logs[name]
        try:
            log.write("".join(json.dumps(files.nulled(row)) + "\n" for row in rows).encode())
            log.flush()
        except OSError as error:
            raise StorageError(
                f"could not write to {self.path / name}: {error.strerror or error}; make room, then resume"
            ) from error

    def trained(self) -> int:
        """Return how many clients have trained in a round that counted, by rounds.jsonl."""
        rows = map(json.loads, (self.path / "rounds.jsonl").read_bytes().splitlines())
        return len(
            {
                client
                for row in rows
                for client in row.get("cohort", ())
                if str(client) not in row.get("simulated", {}).get("failed", {})
            }
        )

    def save(self, round_: int, server: State, store: Store, progress: Mapping[str, Any], identity: str) -> None:
        """Write a checkpoint of the end of ``round_``; the one before it stays until this one is complete.

        Args:
            round_: the last complete round.
            server: the server's state.
            store: the private states.
            progress: the ledger and whatever else the loop must remember.
            identity: the hashes of configuration, partition and frozen weights, which a later resume compares.
        """
        name = f"server-round-{round_}.safetensors"
        folder = self.path / "checkpoint"
        manifest: dict[str, Any] = {
            "layout": LAYOUT,
            "round": round_,
            "identity": identity,
            "server": [name, files.write(folder / name, state_files.dump(server))],
            "states": store.save(),
            "logs": {name: self._sync(name) for name in LOGS},
            "progress": files.nulled(progress),
        }
        files.write_json(folder / "manifest.json", {"sha256": _digest(manifest), "manifest": manifest})
        for path in folder.glob("server-round-*.safetensors"):
            if path.name != name:
                path.unlink(missing_ok=True)
        store.prune(round_)

    def _sync(self, name: str) -> int:
        os.fsync(self._logs[name].fileno())
        return os.path.getsize(self.path / name)

    def restore(self, store: Store, states: tuple[type[State], ...], identity: str) -> tuple[int, State, Any] | None:
        """Go back to the checkpoint; return its round, the server's state and ``progress``, None without a checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another configuration.
        """
        for leftover in self.path.rglob(".*.tmp"):  # left by a write that was killed
            leftover.unlink(missing_ok=True)
        path = self.path / "checkpoint" / "manifest.json"
        if not path.exists():
            for name in LOGS:
                self._cut(name, 0)
            store.restore()
            return None
        manifest = _manifest(path)
        if manifest["identity"] != identity:
            raise CheckpointError(
                f"{path} belongs to another configuration, partition or frozen weights of a network (it has "
                f"{manifest['identity']}, expected {identity}); resume with the config.toml of this run directory, and "
                "with the same files of weights"
            )
        name, sha256 = manifest["server"]
        server = state_files.load(path.parent / name, sha256, *states)
        for log in LOGS:
            self._cut(log, manifest["logs"][log])
        store.restore(manifest["round"], manifest["states"])
        return manifest["round"], server, manifest["progress"]

    def _cut(self, name: str, length: int) -> None:
        """Remove the lines after ``length`` bytes: they belong to rounds that will be played again."""
        if os.path.getsize(self.path / name) < length:
            raise CheckpointError(
                f"{self.path / name} is shorter than the {length:,} bytes that the checkpoint expects; restore it, or "
                "start a new run"
            )
        self._logs[name].truncate(length)


def _manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest."""
    try:
        whole = json.loads(path.read_bytes())
        manifest = whole["manifest"]
        intact = whole["sha256"] == _digest(manifest)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it, or start a new run"
        ) from error
    if not intact:
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match its content; restore it, or start a new run"
        )
    if manifest.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{path} was written by another version of polyfed (layout {manifest.get('layout', 1)}, expected "
            f"{LAYOUT}); resume it with that version, or start a new run"
        )
    return manifest


class SavedRun:
    """The last checkpoint of a run directory that no process writes to, for reading.

    It takes a shared lock until `close`, writes nothing, and reads a private state when it is asked for.

    Args:
        path: the run directory.
        states: the state classes of the algorithm.

    Raises:
        RunDirInUseError: a run is in progress there.
        CheckpointError: there is no checkpoint, or it is damaged.
    """

    def __init__(self, path: Path, states: tuple[type[State], ...]) -> None:
        self.path = path
        self._lock = None
        with contextlib.suppress(FileNotFoundError):  # a copy of the directory may lack it
            self._lock = open(path / "lock", encoding="utf-8")  # noqa: SIM115 - held until close()
        try:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            manifest = path / "checkpoint" / "manifest.json"
            if not manifest.exists():
                raise CheckpointError(f"{path} has no checkpoint yet; let the run go on with `polyfed resume {path}`")
            found = _manifest(manifest)
            name, sha256 = found["server"]
            self.round: int = found["round"]
            self.identity: str = found["identity"]
            self.server: State = state_files.load(manifest.parent / name, sha256, *states)
            self._store = Store(path / "states", states, resident=False)
        except BlockingIOError as error:
            self.close()
            raise RunDirInUseError(f"{path} is in use: a run is in progress; wait for its end, or stop it") from error
        except BaseException:
            self.close()
            raise

    def private(self, client: ClientId) -> Any:
        """Return a client's private state of the checkpoint; None if it has none."""
        return self._store.get(client, self.round)

    def close(self) -> None:
        """Release the directory."""
        if self._lock is not None:
            self._lock.close()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
