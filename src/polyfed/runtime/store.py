"""Where private states live: in memory, or one file each on disk. A client that never trained has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyfed.message import Nothing, State
from polyfed.runtime import files
from polyfed.typing import ClientId

#: In a manifest: the file of each client's state and its SHA-256.
Entries = dict[str, tuple[str, str]]


class Store:
    """The private states of the clients that have trained.

    A state's file is named after its client and the round that wrote it, and is never changed: the files of the last
    checkpoint stay until the next one is complete.

    Args:
        folder: where the files go.
        kinds: the state classes of the algorithm.
        resident: keep states in memory, writing them at checkpoints only; else write each at once and keep none.
    """

    def __init__(self, folder: Path, kinds: tuple[type[State], ...], *, resident: bool) -> None:
        self.folder, self.kinds, self.resident = folder, kinds, resident
        self._held: dict[ClientId, tuple[State, int]] = {}  # in memory and not on disk, or resident
        self._files: dict[ClientId, tuple[str, str]] = {}
        self._dirty: set[ClientId] = set()

    def __len__(self) -> int:
        return len(self._held.keys() | self._files.keys())

    def __contains__(self, client: ClientId) -> bool:
        return client in self._held or client in self._files

    def get(self, client: ClientId) -> Any:
        """The client's state, or None if it has none."""
        if client in self._held:
            return self._held[client][0]
        if client not in self._files:
            return None
        state = files.load(self.folder / self._files[client][0], self._files[client][1], *self.kinds)
        if self.resident:
            self._held[client] = (state, 0)
        return state

    def put(self, client: ClientId, state: State, round_: int) -> None:
        """Keep a client's state as of the end of ``round_``."""
        if isinstance(state, Nothing):
            return
        if self.resident:
            self._held[client] = (state, round_)
            self._dirty.add(client)
        else:
            self._write(client, state, round_)

    def _write(self, client: ClientId, state: State, round_: int) -> None:
        name = f"{client % 256:02x}/client-{client}-round-{round_}.safetensors"
        self._files[client] = (name, files.write(self.folder / name, files.dump(state)))

    def save(self) -> Entries:
        """Write what is not on disk yet; returns what a manifest needs to find it again."""
        for client in sorted(self._dirty):
            self._write(client, *self._held[client])
        self._dirty.clear()
        return {str(client): entry for client, entry in sorted(self._files.items())}

    def restore(self, entries: Mapping[str, Any]) -> None:
        """Go back to the states of a manifest."""
        self._held.clear()
        self._dirty.clear()
        self._files = {int(client): (str(name), str(sha256)) for client, (name, sha256) in entries.items()}
        self.sweep()

    def sweep(self) -> None:
        """Remove the files that no state refers to any more."""
        if not self.folder.exists():
            return
        current = {self.folder / name for name, _ in self._files.values()}
        for path in self.folder.glob("*/*"):
            if path not in current:
                path.unlink(missing_ok=True)
