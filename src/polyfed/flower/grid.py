"""`polyfed.deploy.wire.transport.Transport` by Flower's Grid: one array of bytes and one header per message."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from polyfed.deploy.wire.transport import Incoming, Outgoing

_TYPES = {
    "describe": MessageType.QUERY,
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "keep": MessageType.QUERY,
}
#: Seconds to wait for a query; a later result is returned by a later call.
_PATIENCE = 15.0


def pack(header: str, body: bytes | None) -> RecordDict:
    """Return a frame as Flower carries it."""
    records = RecordDict({"polyfed": ConfigRecord({"header": header})})
    if body is not None:
        # "polyfed" names a serialization, as Flower requires: the bytes are no array that Flower could read.
        records["body"] = ArrayRecord({"0": Array("uint8", (len(body),), "polyfed", body)})
    return records


def unpack(records: RecordDict) -> tuple[str, bytes | None]:
    """Return the frame that `pack` packed."""
    header = records.config_records["polyfed"]["header"]
    if not isinstance(header, str):
        raise TypeError(f"the header is a {type(header).__name__}; expected a str")
    arrays = records.array_records.get("body")
    return header, None if arrays is None else bytes(arrays["0"].data)


class GridTransport:
    """Carries frames over a Grid.

    Args:
        grid: the Grid of the ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._looking: set[str] = set()
        self._found: dict[str, list[Message]] = {}  # results of queries that took longer than the wait
        self._looked: queue.SimpleQueue[tuple[str, list[Message] | Exception]] = queue.SimpleQueue()

    def nodes(self) -> list[int]:
        """Return the nodes that are connected now; each call asks Flower."""
        return sorted(self.grid.get_node_ids())

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Send requests; return a ticket for each."""
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
        return tickets if len(tickets) == len(told) else [None] * len(told)  # too large together: Flower took nothing

    def pull(self, tickets: Sequence[str]) -> list[Incoming]:
        """Return the replies that have arrived.

        If a node is killed while it sends, Flower waits minutes for the rest of its reply, and holds back all other
        replies of the same query. So a query asks for a single ticket, in a thread that is abandoned if it does not
        return in time. Only one query runs at a time: a Grid that several threads used at once was seen to stall.
        """
        for ticket in tickets:
            if ticket not in self._looking and ticket not in self._found:  # Flower returns a reply once
                self._looking.add(ticket)
                threading.Thread(target=self._look, args=(ticket,), daemon=True).start()
                self._collect(ticket)
        self._collect()
        return [_incoming(message) for ticket in tickets for message in self._found.pop(ticket, [])]

    def _collect(self, until: str | None = None) -> None:
        """Collect the results of queries: those that are ready, and that for ``until``, for which it waits a while."""
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
        except Exception as error:  # raised later, in the thread that collects
            self._looked.put((ticket, error))


def _incoming(message: Message) -> Incoming:
    ticket = message.metadata.reply_to_message_id
    if message.has_error():
        return Incoming(ticket, error=f"Flower reports error {message.error.code}: {message.error.reason}")
    try:
        return Incoming(ticket, *unpack(message.content))
    except (KeyError, TypeError, ValueError) as error:
        return Incoming(ticket, error=f"got a message without header ({type(error).__name__}: {error})")
