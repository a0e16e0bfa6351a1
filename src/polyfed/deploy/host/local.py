"""A whole deployment on this machine: server and clients as real processes on loopback, in one command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyfed.base import files
from polyfed.deploy.host import commands, keys
from polyfed.deploy.host.processes import ProcessEndedError, Processes, free_ports, listening
from polyfed.deploy.settings import NODES, Deployment, NodeSettings, Server

#: Seconds within which the server must answer, nodes must register, and a submitted run must begin.
_START = 180.0


@dataclass
class Local(AbstractContextManager["Local"]):
    """Server and clients on loopback, which end with the ``with`` block.

    Args:
        folder: the folder of logs, keys, Flower's own files and the clients' states.
        count: number of clients.
        tls: whether to use TLS with a new authority, and a key for each node.
        late: clients that do not start with the others.
        settings: settings of single clients, on top of number and state directory.
        environment: environment variables of single clients' processes.
        say: receives each command.
        database: whether the server keeps its records on disk.
        workers: whether a process per client keeps torch and data loaded; else each message has a process of its own.
    """

    folder: Path
    count: int
    tls: bool = False
    late: Sequence[int] = ()
    settings: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    environment: Mapping[int, Mapping[str, str]] = field(default_factory=dict[int, Mapping[str, str]])
    say: Callable[[str], None] = lambda text: None
    database: bool = False
    workers: bool = True

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute()
        self.home = self.folder / "flwr"
        self.processes = Processes(self.folder / "logs")
        # A temporary folder, as the path of a socket has at most 107 bytes.
        self.sockets = Path(tempfile.mkdtemp(prefix="polyfed-")) if self.workers else None
        server, *self.ports = free_ports(self.count + 1)
        certificates = str(self.folder / "certificates") if self.tls else None
        self.deployment = Deployment(
            server=Server(address=f"127.0.0.1:{server}", certificates=certificates, node_keys=self.tls)
        )

    def __enter__(self) -> Local:
        self.processes.__enter__()
        try:
            self.app = commands.write_app(self.folder)
            commands.write_connection(self.home, self.deployment)
            if self.tls:
                keys.authority(self.folder / "certificates", ["localhost", "127.0.0.1"])
                for client in range(self.count):
                    keys.node_key(self.folder / "keys" / f"client-{client}")
            self.start_server()
            if self.tls:
                keys.bind_nodes(self.folder / "keys", self.folder / NODES, self._register)
            for client in range(self.count):
                if client not in self.late:
                    self.start_client(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.end_all()
        if self.sockets is not None:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def _register(self, key: Path) -> str | None:
        command = commands.register(self.home, key)
        self.say(str(command))
        return self.processes.register(command)

    def start_server(self) -> None:
        """Start the server and wait until it answers."""
        command = commands.superlink(
            self.home, self.deployment, self.folder / "superlink.db" if self.database or self.tls else None
        )
        self.say(str(command))
        self.processes.start("server", command)
        end = time.monotonic() + _START
        while not listening(self.deployment.server.address):
            self.processes.check("server")
            if time.monotonic() > end:
                raise ProcessEndedError(
                    f"the server did not answer within {_START:g} s:\n{self.processes.tail('server')}"
                )
            time.sleep(0.1)

    def node_file(self, client: int) -> Path:
        """Return the path of the client's node.toml."""
        return self.folder / "clients" / str(client) / "node.toml"

    def start_client(self, client: int) -> None:
        """Start a client's node, and its worker unless that runs."""
        path = self.node_file(client)
        told = {"client": client, "state_dir": str(path.parent / "state"), **self.settings.get(client, {})}
        files.write(path, NodeSettings.model_validate(told).to_toml().encode())
        socket = None if self.sockets is None else self.sockets / f"{client}.sock"
        started: dict[str, commands.Command] = {}
        if socket is not None and f"worker-{client}" not in self.processes.running:
            started[f"worker-{client}"] = commands.worker(socket, path)
        started[f"client-{client}"] = commands.supernode(
            path.parent / "flwr",
            self.deployment.server.address,
            path,
            port=self.ports[client],
            ca=self.folder / "certificates" / "ca.crt" if self.tls else None,
            key=self.folder / "keys" / f"client-{client}" if self.tls else None,
            worker=socket,
        )
        for name, command in started.items():
            self.say(str(command))
            self.processes.start(name, command, self.environment.get(client))

    def submit(self, run_dirs: Sequence[Path]) -> str:
        """Submit runs, which follow one another, and return Flower's number of them together."""
        command = commands.run(self.home, self.app, run_dirs)
        self.say(str(command))
        return str(json.loads(self.processes.call(command))["run-id"])

    def tend(self) -> None:
        """Check that the server runs, and restart every started client that has ended.

        Raises:
            ProcessEndedError: the server ended, or a client does not stay up.
        """
        self.processes.check("server")
        for client in range(self.count):
            if f"client-{client}" in self.processes.running:
                self.processes.tend(f"client-{client}")

    def engine_bytes(self, run_id: str) -> dict[str, int]:
        """Return the bytes that Flower counted for a run."""
        return engine_bytes(self.processes.call(commands.listing(self.home)), run_id)


def engine_bytes(listing: str, run_id: str) -> dict[str, int]:
    """Return Flower's counts of a run's bytes, from `flwr list --format json`; empty if the run is not in it."""
    traffic = {str(run.get("run-id")): run.get("network-traffic", {}) for run in json.loads(listing).get("runs", [])}
    return {
        key.removesuffix("-bytes"): int(value)
        for key, value in traffic.get(run_id, {}).items()
        if key.endswith("-bytes")
    }


class Following:
    """Watches the files of a run; made before the run is submitted.

    Args:
        run_dir: the run directory.
        seen: receives ``"row"`` and ``"event"`` lines as they are written.
        patience: seconds within which the run must begin.
    """

    def __init__(
        self,
        run_dir: Path,
        seen: Callable[[str, dict[str, Any]], None] = lambda kind, row: None,
        *,
        patience: float = _START,
    ) -> None:
        self.run_dir, self.seen, self.patience, self.began = run_dir, seen, patience, time.time()
        logs = (run_dir / "events.jsonl", run_dir / "rounds.jsonl")
        self.places = {log: log.stat().st_size if log.exists() else 0 for log in logs}

    def until_ended(self, check: Callable[[], None] = lambda: None, *, timeout: float | None = None) -> None:
        """Watch until the run ends.

        Args:
            check: raises if a process that the run needs is gone.
            timeout: seconds after which to give up; None waits for ever.

        Raises:
            ProcessEndedError: it failed, or its process is gone.
        """
        while not self.look():
            check()
            if timeout is not None and time.time() - self.began > timeout:
                raise ProcessEndedError(f"the run did not end within {timeout:g} s")
            time.sleep(0.25)

    def look(self) -> bool:
        """Pass on new lines and return whether the run has ended well.

        Raises:
            ProcessEndedError: it failed, or its process is gone.
        """
        status: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            status = json.loads((self.run_dir / "status.json").read_bytes())
        for path, kind in zip(self.places, ("event", "row"), strict=True):
            if path.exists():
                self._lines(path, kind)
        if status.get("time", 0) < self.began:  # left by an earlier start
            if time.time() - self.began > self.patience:
                raise ProcessEndedError(f"the run did not begin within {self.patience:g} s; see the server's log")
            return False
        if status["state"] == "failed":
            raise ProcessEndedError(f"the run ended: {status.get('error')}")
        if status["state"] != "finished" and Path("/proc").exists() and not Path(f"/proc/{status['pid']}").exists():
            raise ProcessEndedError("the server's process of the run is gone; to continue, run `polyfed deploy resume`")
        return status["state"] == "finished"

    def _lines(self, path: Path, kind: str) -> None:
        with open(path, "rb") as file:
            # A resumed server cuts a log back to its checkpoint and may have written more since: begin at a line.
            place = min(self.places[path], os.fstat(file.fileno()).st_size)
            while place > 0 and os.pread(file.fileno(), 1, place - 1) != b"\n":
                place -= 1
            file.seek(place)
            for line in file:
                if line.endswith(b"\n"):
                    place += len(line)
                    self.seen(kind, json.loads(line))
            self.places[path] = place
