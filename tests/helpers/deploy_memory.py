"""A transport without an engine: requests are answered in this process when somebody looks for replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polyfed.deploy.client.node import Frame, answer
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire.transport import Incoming, Outgoing

#: What happens to a request instead of its being answered: a frame, an engine's error, or None for nothing at all.
Instead = Callable[[Outgoing, Callable[[], Frame]], Frame | str | None]


class Memory:
    """Nodes by number, their settings, and what goes wrong with them."""

    def __init__(self, nodes: dict[int, NodeSettings]) -> None:
        self.settings = dict(nodes)
        self.online = set(nodes)
        self.instead: Instead = lambda message, go: go()
        self.waiting: dict[str, Outgoing] = {}
        self.late: dict[str, Incoming] = {}  # replies that come one look after they were given up
        self.log: list[Outgoing] = []
        self.replies: list[Frame] = []

    def nodes(self) -> list[int]:
        return sorted(self.online)

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        tickets: list[str | None] = []
        for message in messages:
            self.log.append(message)
            ticket = f"ticket-{len(self.log)}"
            self.waiting[ticket] = message
            tickets.append(ticket)
        return tickets

    def pull(self, tickets: Sequence[str]) -> list[Incoming]:
        found: list[Incoming] = []
        for ticket in tickets:
            if ticket in self.late:
                found.append(self.late.pop(ticket))
            message = self.waiting.pop(ticket, None)
            if message is None:
                continue
            settings = self.settings[message.node]

            def go(message: Outgoing = message, settings: NodeSettings = settings) -> Frame:
                frame = answer(message.header, message.body, settings)
                self.replies.append(frame)
                return frame

            outcome = self.instead(message, go)
            if outcome is None:
                continue
            found.append(Incoming(ticket, error=outcome) if isinstance(outcome, str) else Incoming(ticket, *outcome))
        return found
