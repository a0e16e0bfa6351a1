"""`polyfed.deploy.wire.transport.Transport` by Flower's Grid: one array of bytes and one header per message."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from polyfed.deploy.wire.transport import Incoming, Outgoing

_TYPES = {"describe": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
#: How the bytes are called where Flower asks for a serialization: they are not an array that it could read.
_STYPE = "polyfed"
#: Seconds for which a look is waited for; what it finds later is told later.
_PATIENCE = 15.0


def pack(header: str, body: bytes | None) -> RecordDict:
    """A frame as Flower carries it."""
    records = RecordDict({"polyfed": ConfigRecord({"header": header})})
    if body is not None:
        records["body"] = ArrayRecord({"0": Array("uint8", (len(body),), _STYPE, body)})
    return records


def unpack(records: RecordDict) -> tuple[str, bytes | None]:
    """The frame of `pack`."""
    header = records.config_records["polyfed"]["header"]
    if not isinstance(header, str):
        raise TypeError(f"the header is a {type(header).__name__}")
    arrays = records.array_records.get("body")
    return header, None if arrays is None else bytes(arrays["0"].data)


class GridTransport:
    """Frames over a Grid.

    Args:
        grid: the ServerApp's.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._looking: set[str] = set()
        self._found: dict[str, list[Message]] = {}  # by looks that took longer than somebody waited for them
        self._looked: queue.SimpleQueue[tuple[str, list[Message] | Exception]] = queue.SimpleQueue()

    def nodes(self) -> list[int]:
        """Who is connected now; read anew at each call."""
        return sorted(self.grid.get_node_ids())

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Send; a ticket for each."""
        if not messages:
            return []
        told = [
            Message(
                pack(message.header, message.body),
                message.node,
                _TYPES[message.kind],
                ttl=message.ttl,
                group_id=message.group,
            )
            for message in messages
        ]
        tickets: list[str | None] = [ticket or None for ticket in self.grid.push_messages(told)]
        return tickets if len(tickets) == len(told) else [None] * len(told)  # too large together: nothing was taken

    def pull(self, tickets: Sequence[str]) -> list[Incoming]:
        """The replies that are there.

        Where a node was killed while it was sending, Flower waits minutes for the rest of its reply, with all others
        that it was asked for at once in its hands. So each ticket is looked for by itself, in a thread that is left
        alone when it does not come back. There is no second one before that: a Grid that several threads ask at once
        was seen to stall.
        """
        for ticket in tickets:
            if ticket not in self._looking and ticket not in self._found:  # Flower tells a reply once
                self._looking.add(ticket)
                threading.Thread(target=self._look, args=(ticket,), daemon=True).start()
                self._collect(ticket)
        self._collect()
        return _incoming([message for ticket in tickets for message in self._found.pop(ticket, [])])

    def _collect(self, until: str | None = None) -> None:
        """Take what looks have found: what is there, and for a while what the one for ``until`` finds."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                ticket, outcome = self._looked.get(until is not None, max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            self._looking.discard(ticket)
            if isinstance(outcome, Exception):
                raise outcome
            if outcome:
                self._found[ticket] = outcome
            if ticket == until:
                return

    def _look(self, ticket: str) -> None:
        try:
            self._looked.put((ticket, list(self.grid.pull_messages([ticket]))))
        except Exception as error:  # raised where it can be told
            self._looked.put((ticket, error))


def _incoming(messages: Sequence[Message]) -> list[Incoming]:
    found: list[Incoming] = []
    for message in messages:
        ticket = message.metadata.reply_to_message_id
        if message.has_error():
            error = message.error
            found.append(Incoming(ticket, error=f"Flower reports error {error.code}: {error.reason}"))
            continue
        try:
            header, body = unpack(message.content)
        except (KeyError, TypeError, ValueError) as error:
            found.append(Incoming(ticket, error=f"a message without header came ({type(error).__name__}: {error})"))
        else:
            found.append(Incoming(ticket, header, body))
    return found
