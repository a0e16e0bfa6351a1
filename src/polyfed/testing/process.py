"""Clients in a process of their own: a deployed client's code answers there, and only bytes cross a pipe."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from polyfed.base.types import ClientId
from polyfed.core.message import State
from polyfed.deploy.client.node import answer
from polyfed.deploy.client.state_dir import ClientStateDir
from polyfed.deploy.server.clients import RemoteClients
from polyfed.deploy.server.registry import ClientRegistry
from polyfed.deploy.settings import NodeSettings, Rounds
from polyfed.deploy.wire.frames import Frame, pack, unpack
from polyfed.deploy.wire.transport import Incoming, Outgoing
from polyfed.rounds.federation import Federation
from polyfed.testing.compare import digest


class Child:
    """A process that answers as clients until it is closed; one serves any number of runs, one after another."""

    def __init__(self) -> None:
        self._connection, there = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from polyfed.testing.process import serve; serve({there.fileno()})"],
            pass_fds=[there.fileno()],
            # The same modules must be importable there, an algorithm beside the tests among them.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.DEVNULL,
        )
        there.close()

    def ask(self, settings: NodeSettings, frame: Frame) -> Frame:
        """Send a request to the client with these settings and wait for its answer.

        Raises:
            RuntimeError: the process ended.
        """
        try:
            self._connection.send_bytes(settings.model_dump_json().encode())
            self._connection.send_bytes(pack(*frame))
            return unpack(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the clients' process ended (exit code {self._process.wait()})") from error

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()


class _Transport:
    """Carries a frame to the child as soon as it is sent. A `polyfed.deploy.wire.transport.Transport`."""

    def __init__(self, child: Child, nodes: dict[int, NodeSettings]) -> None:
        self._child, self._nodes = child, nodes
        self._replies: dict[str, Incoming] = {}
        self._tickets = map(str, itertools.count(1))

    def nodes(self) -> list[int]:
        return sorted(self._nodes)

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        tickets = [next(self._tickets) for _ in messages]
        for ticket, message in zip(tickets, messages, strict=True):
            frame = self._child.ask(self._nodes[message.node], (message.header, message.body))
            self._replies[ticket] = Incoming(ticket, *frame)
        return [*tickets]

    def pull(self, tickets: Sequence[str]) -> list[Incoming]:
        return [self._replies.pop(ticket) for ticket in tickets if ticket in self._replies]


class ProcessClients(RemoteClients):
    """The clients of a federation as a deployed server meets them, answered by a `Child`.

    Args:
        child: where they live.
        federation: the server's view; each client loads its data from the configuration.
        folder: for the clients' states.
    """

    def __init__(self, child: Child, federation: Federation, folder: Path) -> None:
        self.federation = federation
        home = tempfile.mkdtemp(dir=folder)
        # Costs are not asked for: counting takes longer than the laws' few steps.
        self._nodes = {
            client: NodeSettings(client=client, state_dir=f"{home}/{client}", tell=("scores",))
            for client in range(federation.config.clients.count)
        }
        transport, config = _Transport(child, self._nodes), federation.config.resolved()
        registry = ClientRegistry(transport, config, "laws", _silent)
        registry.refresh()  # asks the nodes who they are
        registry.refresh()  # hears what they say
        registry.task = registry.facts()
        super().__init__(
            transport, registry, config, federation.algorithm, "laws", Rounds(on_error="abort", poll=0.001), _silent
        )

    def commit(self) -> None:
        """The round counts; another begins."""
        super().commit()
        self.begin(1, None)

    def digests(self) -> dict[ClientId, str]:
        """A hash of every client's private state."""
        return {client: digest(self._state(client)) for client in self._nodes}

    def _state(self, client: ClientId) -> State:
        root, classes = Path(self._nodes[client].state_dir), self.federation.algorithm.states
        state, _ = ClientStateDir(root, self.experiment, client, classes).state(self.settled.get(client))
        return self.federation.private(client, state)


def _silent(*_: object, **__: object) -> None:
    """Hears of events, and does nothing."""


def serve(descriptor: int) -> None:
    """The other process: answer requests until the connection closes."""
    connection = Connection(descriptor)
    while True:
        try:
            settings = NodeSettings.model_validate_json(connection.recv_bytes())
            frame = unpack(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pack(*answer(*frame, settings)))
