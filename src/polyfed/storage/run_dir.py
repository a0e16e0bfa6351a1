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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from polyfed.base import files
from polyfed.base.errors import CheckpointError, RunDirError, StorageError
from polyfed.base.types import ClientId
from polyfed.core.message import State
from polyfed.storage import state_files
from polyfed.storage.state_store import Store

LOGS = ("rounds.jsonl", "clients.jsonl")

#: Each client's scores on test rows at the end of a run whose validation rows chose a round.
TESTS = "tests.jsonl"

#: To be raised by 1 when run directories of the version before cannot be resumed any more.
LAYOUT = 3


class Edit(Protocol):
    """Turns a line of a log into the line that a longer run would have written."""

    def __call__(self, log: str, row: dict[str, Any], before: int) -> dict[str, Any] | None:
        """Return the line; None if a longer run would have none.

        Args:
            log: the name of the log.
            row: the line.
            before: the number of rounds that the run had.
        """
        ...


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Args:
        round: the last complete round.
        server: the server's state.
        progress: the ledger and whatever else the loop remembered.
        rounds: the number of rounds that the run had at that time.
    """

    round: int
    server: State
    progress: Any
    rounds: int


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
        self._pinned: dict[str, Any] | None = None  # the pinned checkpoint: its round, and the entries of its states
        self._kept: dict[str, list[str]] = {}  # the server's states of `keep`: round -> name and SHA-256 of the file

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

    def save(
        self,
        round_: int,
        server: State,
        store: Store,
        progress: Mapping[str, Any],
        identity: str,
        rounds: int,
        pinned: int | None = None,
    ) -> None:
        """Write a checkpoint of the end of ``round_``; the one before it stays until this one is complete.

        Args:
            round_: the last complete round.
            server: the server's state.
            store: the private states.
            progress: the ledger and whatever else the loop must remember.
            identity: the hashes of configuration, partition and frozen weights, which a later resume compares.
            rounds: the number of rounds in that configuration.
            pinned: the round whose checkpoint stays beside the last: this one, or the one that was pinned before.
        """
        folder = self.path / "checkpoint"
        manifest: dict[str, Any] = {
            "layout": LAYOUT,
            "round": round_,
            "rounds": rounds,
            "identity": identity,
            "server": self._kept.get(str(round_)) or self._write(round_, server),
            "states": store.save(),
            "logs": {name: self._sync(name) for name in LOGS},
            "progress": files.nulled(progress),
        }
        if pinned == round_:
            self._pinned = {key: manifest[key] for key in ("round", "server", "states")}
        if pinned is not None:
            manifest["best"] = self._pinned
        if self._kept:
            manifest["kept"] = self._kept
        files.write_json(folder / "manifest.json", {"sha256": _digest(manifest), "manifest": manifest})
        current = {one["server"][0] for one in (manifest, manifest.get("best", manifest))}
        current |= {name for name, _ in self._kept.values()}
        for path in folder.glob("server-round-*.safetensors"):
            if path.name not in current:
                path.unlink(missing_ok=True)
        store.prune(round_, pinned)

    def keep(self, round_: int, server: State) -> None:
        """Keep the server's state of the end of a round beside all checkpoints; the next one names it.

        Raises:
            StorageError: the disk is full.
        """
        self._kept[str(round_)] = self._write(round_, server)

    def _write(self, round_: int, server: State) -> list[str]:
        name = f"server-round-{round_}.safetensors"
        return [name, files.write(self.path / "checkpoint" / name, state_files.dump(server))]

    def best(self, states: tuple[type[State], ...]) -> tuple[int, State]:
        """Return the pinned round and the server's state at its end.

        Raises:
            CheckpointError: the file of the state is damaged.
        """
        assert self._pinned is not None, "a round is pinned"
        return self._pinned["round"], _server(self.path, self._pinned, states)

    def _sync(self, name: str) -> int:
        os.fsync(self._logs[name].fileno())
        return os.path.getsize(self.path / name)

    def restore(
        self, store: Store, states: tuple[type[State], ...], identity: Callable[[int], str], rounds: int, edit: Edit
    ) -> Restored | None:
        """Go back to the checkpoint; None without a checkpoint.

        A run that goes on after its end has more rounds than its checkpoint says. Its logs then become those of the
        longer run, and the caller saves a checkpoint at once; until that is complete this may be repeated.

        Args:
            store: the private states.
            states: the state classes of the algorithm.
            identity: the hashes of this run, if its configuration had so many rounds.
            rounds: the number of rounds of this run.
            edit: see `Edit`.

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
        before = manifest.get("rounds", rounds)
        if manifest["identity"] != identity(before):
            raise CheckpointError(
                f"{path} belongs to another configuration, partition or frozen weights of a network (it has "
                f"{manifest['identity']}, expected {identity(before)}); resume with the config.toml of this run "
                "directory, and with the same files of weights"
            )
        server = _server(self.path, manifest, states)
        self._pinned, self._kept = manifest.get("best"), manifest.get("kept", {})
        for log in LOGS:
            if before == rounds:
                self._cut(log, manifest["logs"][log])
            else:
                self._rewrite(log, manifest["round"], lambda row, log=log: edit(log, row, before))
        pinned = None if self._pinned is None else (self._pinned["round"], self._pinned["states"])
        store.restore(manifest["round"], manifest["states"], pinned)
        return Restored(manifest["round"], server, manifest["progress"], before)

    def _rewrite(self, name: str, round_: int, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Replace a log by its lines up to ``round_``, edited; again gives the same.

        Raises:
            CheckpointError: the log has no line of that round.
        """
        path, last = self.path / name, 0
        with open(path, "rb") as old, files.replacing(path) as new:
            for line in old:
                try:
                    row = json.loads(line)
                except ValueError:  # a line that a killed run began; it is the last
                    break
                if row["round"] > round_:
                    break
                last = row["round"]
                if (changed := edit(row)) is not None:
                    new.write((json.dumps(changed) + "\n").encode())
            if name == "rounds.jsonl" and last != round_:
                raise CheckpointError(
                    f"{path} ends with round {last}, but the checkpoint is of round {round_}; restore it, or start a "
                    "new run"
                )
        self._logs[name].close()
        self._logs[name] = open(path, "ab")  # noqa: SIM115 - held until close()

    def _cut(self, name: str, length: int) -> None:
        """Remove the lines after ``length`` bytes: they belong to rounds that will be played again."""
        if os.path.getsize(self.path / name) < length:
            raise CheckpointError(
                f"{self.path / name} is shorter than the {length:,} bytes that the checkpoint expects; restore it, or "
                "start a new run"
            )
        self._logs[name].truncate(length)


def _manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        CheckpointError: it is damaged, or of another layout.
    """
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
    """The last checkpoint of a run directory that no process writes to, its best round or a kept one, for reading.

    It takes a shared lock until `close`, writes nothing, and reads a private state when it is asked for.

    Args:
        path: the run directory.
        states: the state classes of the algorithm.
        which: "last" is the last checkpoint; "best" is the round that ``run.keep = "best"`` kept beside it; "kept" is
            the best if there is one, else the last; a number is a round of ``run.keep_rounds``, which has no private
            states.

    Raises:
        RunDirInUseError: a run is in progress there.
        CheckpointError: there is no checkpoint, it is damaged, or the run does not keep that round.
    """

    def __init__(
        self, path: Path, states: tuple[type[State], ...], which: Literal["last", "best", "kept"] | int = "last"
    ) -> None:
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
            last = _manifest(manifest)
            best = last.get("best")
            if isinstance(which, int):
                best = _kept(path, last.get("kept", {}), which)
            found = last if which == "last" or (which == "kept" and best is None) else best
            if found is None:
                raise CheckpointError(f'{path} keeps no best round; expected a run with run.keep = "best"')
            self.round: int = found["round"]
            self.identity: str = last["identity"]
            self.progress: Mapping[str, Any] = last["progress"]
            self.server: State = _server(path, found, states)
            store = Store(path / "states", states, resident=False, read_only=True)
            self._states = None if isinstance(which, int) else store.at(self.round)
        except BlockingIOError as error:
            self.close()
            raise RunDirInUseError(f"{path} is in use: a run is in progress; wait for its end, or stop it") from error
        except BaseException:
            self.close()
            raise

    def private(self, client: ClientId) -> Any:
        """Return a client's private state of that round; None if it had not trained by then.

        Raises:
            CheckpointError: of this round the server's state alone is kept.
        """
        if self._states is None:
            raise CheckpointError(f"{self.path} keeps the server's state of round {self.round}, no private states")
        return self._states.get(client)

    def close(self) -> None:
        """Release the directory."""
        if self._lock is not None:
            self._lock.close()


def _kept(folder: Path, kept: Mapping[str, list[str]], round_: int) -> dict[str, Any]:
    """Return what a manifest says of a kept round."""
    if str(round_) not in kept:
        known = f"it keeps the rounds {', '.join(kept)}" if kept else "it keeps none"
        raise CheckpointError(
            f"{folder} does not keep the server's state of round {round_} ({known}); expected a run whose "
            "run.keep_rounds has that round, and that got so far"
        )
    return {"round": round_, "server": kept[str(round_)]}


def _server(folder: Path, checkpoint: Mapping[str, Any], states: tuple[type[State], ...]) -> State:
    """Read the server's state of a checkpoint."""
    name, sha256 = checkpoint["server"]
    return state_files.load(folder / "checkpoint" / name, sha256, *states)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
