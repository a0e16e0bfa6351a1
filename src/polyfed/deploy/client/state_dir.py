"""A client's private state on its own disk: one folder that only its owner can enter, and a pointer file.

    STATE_DIR/EXPERIMENT/client-K/content.json     digests of the data and the code, which the server never sees
                                  pointer.json     the files that each exchange left, by SHA-256, and the exchange
                                                   that left the state of the best round
                                  state-R-A-P.safetensors, reply-R-A-P.bin
                                  client.json, config.toml   which client, algorithm and configuration these are of
                                  trained.json and others   from which it predicts (`polyfed.trained.single`)

An exchange writes its state and its reply first and the pointer last, in one rename: whenever the process is killed,
the folder holds either the old state or the new state, whole. The server names the last exchange that counted, so a
round that was void, or that a resumed server plays again, starts from the old state. Older files are deleted then.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyfed.base import files
from polyfed.base.errors import CheckpointError, StorageError
from polyfed.core.message import State
from polyfed.deploy.wire.headers import Key
from polyfed.rounds.identity import NAME, Content
from polyfed.storage import state_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredExchange:
    """An exchange that this client completed.

    Args:
        key: the exchange.
        request: the digest of the request.
        state: file name and SHA-256 of the state that the client kept.
        reply: file name and SHA-256 of the client's reply.
    """

    key: Key
    request: str
    state: tuple[str, str]
    reply: tuple[str, str]


class ClientStateDir:
    """The private states of one client in one experiment; one process at a time holds the folder.

    Args:
        root: the client's state directory.
        experiment: the name of the run.
        client: the number of the client.
        kinds: the state classes of the algorithm.
    """

    def __init__(self, root: Path, experiment: str, client: int, kinds: tuple[type[State], ...]) -> None:
        self.kinds = kinds
        self.folder = private_folder(private_folder(private_folder(root) / experiment) / f"client-{client}")
        #: The exchange that left this client's state of the best round, as the server last named it.
        self.best: Key | None = None
        self.entries: list[StoredExchange] = self._read()

    @contextmanager
    def held(self, seconds: float = 60.0) -> Generator[None]:
        """Hold the folder against another process of this client, such as the orphan of a killed node.

        Raises:
            StorageError: another process holds it for longer than ``seconds``.
        """
        with open(self.folder / "lock", "a+", encoding="utf-8") as lock:
            end, waiting = time.monotonic() + seconds, False
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    lock.seek(0)
                    holder = lock.read().strip() or "unknown"
                    if time.monotonic() > end:
                        raise StorageError(
                            f"{self.folder} is held by another process of this client (number {holder}), after "
                            f"{seconds:g} s of waiting; stop that process"
                        ) from error
                    if not waiting:
                        log.warning("%s is held by process %s; waiting up to %g s for it", self.folder, holder, seconds)
                    waiting = True
                    time.sleep(0.1)
            lock.truncate(0)
            print(os.getpid(), file=lock, flush=True)
            self.entries = self._read()
            yield

    def bind(self, content: Content) -> None:
        """Check that the data and the code are those that the client began the experiment with.

        Raises:
            CheckpointError: they changed; the text names what changed.
        """
        if (self.folder / NAME).exists():
            content.check(self.folder)
        else:
            content.write(self.folder, mode=0o600)

    def _read(self) -> list[StoredExchange]:
        path = self.folder / "pointer.json"
        if not path.exists():
            return []
        try:
            found = json.loads(path.read_bytes())
            self.best = None if found.get("best") is None else _key(found["best"])
            return [
                StoredExchange(_key(e["key"]), str(e["request"]), _file(e["state"]), _file(e["reply"]))
                for e in found["entries"]
            ]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {error}); remove it to start from the first state"
            ) from error

    def state(self, since: Key | None) -> tuple[State | None, bool]:
        """Return the state that the client kept at ``since``, and whether that state was lost.

        Where that state is gone (a disk restored from a backup), the latest older state takes its place; None means
        that the client starts from its first state.
        """
        if since is None:
            return None, False
        entry = self._until(since)
        if entry is None:
            return None, True
        name, sha256 = entry.state
        return state_files.load(self.folder / name, sha256, *self.kinds), entry.key != since

    def answered(self, key: Key, request: str) -> bytes | None:
        """Return the reply to an earlier copy of this request; None if the request is new."""
        for entry in self.entries:
            if entry.key == key and entry.request == request:
                name, sha256 = entry.reply
                data = (self.folder / name).read_bytes()
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
        return None

    def _until(self, key: Key | None) -> StoredExchange | None:
        """Return the last exchange up to ``key``; None if there is none."""
        found = (e for e in self.entries if key is not None and e.key <= key)
        return max(found, key=lambda e: e.key, default=None)

    def mark(self, best: Key | None) -> None:
        """Note which exchange left the state of the best round; to be called while the folder is held."""
        if best != self.best and self.entries:
            self.best = best
            self._point()

    def keep(
        self, key: Key, settled: Key | None, request: str, state: State, reply: bytes, *, best: Key | None = None
    ) -> None:
        """Complete an exchange: write state and reply, then replace the pointer in one rename.

        The states that a round can start from stay: that of ``settled``, the last exchange of an earlier round that
        counted, and those of this round so far. So does that of ``best``, the client's state of the best round.

        Raises:
            StorageError: the disk is full; the old state is intact.
        """
        name = f"{'-'.join(map(str, key))}-{request[:8]}"
        kept = self._write(f"state-{name}.safetensors", state_files.dump(state))
        entry = StoredExchange(key, request, kept, self._write(f"reply-{name}.bin", reply))
        counted = [e.key for e in (self._until(settled), self._until(best)) if e is not None]
        self.entries = [
            *(e for e in self.entries if e.key != key and (e.key in counted or e.key[0] >= key[0])),
            entry,
        ]
        self.best = best
        self._point()
        current = {name for e in self.entries for name, _ in (e.state, e.reply)}
        for pattern in ("state-*", "reply-*", ".*.tmp"):
            for path in self.folder.glob(pattern):
                if path.name not in current:
                    path.unlink(missing_ok=True)

    def _point(self) -> None:
        """Replace the pointer."""
        told = {"entries": [asdict(e) for e in self.entries], **({} if self.best is None else {"best": self.best})}
        self._write("pointer.json", json.dumps(told, indent=1).encode())

    def record(self, config: str, about: Mapping[str, Any]) -> None:
        """Write which run this folder belongs to, for people; a run that goes on after its end has another config.

        Args:
            config: the configuration, as TOML.
            about: what client.json holds: the algorithm, the client, its network and its data.
        """
        path = self.folder / "config.toml"
        if not path.exists() or path.read_text("utf-8") != config:
            self._write("config.toml", config.encode())
        if not (self.folder / "client.json").exists():
            self._write("client.json", (json.dumps(about, indent=2) + "\n").encode())

    def _write(self, name: str, data: bytes) -> tuple[str, str]:
        """Write a file that only its owner can read; return its name and SHA-256."""
        return name, files.write(self.folder / name, data, mode=0o600)


def private_folder(path: Path) -> Path:
    """Return a folder that only its owner can enter; it is made if it does not exist.

    Raises:
        StorageError: the folder cannot be made, or belongs to another user.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.stat().st_uid != os.getuid():
            raise StorageError(f"{path} belongs to another user; set state_dir to a folder of this user")
        path.chmod(0o700)
    except OSError as error:
        raise StorageError(f"{path} cannot hold private state: {error.strerror or error}; correct state_dir") from error
    return path


def _key(value: Any) -> Key:
    round_, attempt, phase = (int(part) for part in value)
    return round_, attempt, phase


def _file(value: Any) -> tuple[str, str]:
    name, sha256 = value
    if "/" in str(name):
        raise ValueError(f"{name!r} is no file name")
    return str(name), str(sha256)
