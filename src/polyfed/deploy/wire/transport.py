"""The interface that carries frames between server and clients: `polyfed.flower.grid` uses Flower, tests use memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

RequestKind = Literal["describe", "train", "evaluate", "keep"]


@dataclass(frozen=True)
class Outgoing:
    """A request to a node.

    Args:
        node: the receiver, by the engine's number.
        kind: the kind of request: describe, train, evaluate or keep.
        header: see `polyfed.deploy.wire.headers.RequestHeader`.
        body: the bytes of a message; None if the request carries no message.
        group: the name under which the engine logs the request: the round.
        ttl: seconds after which no answer is needed.
    """

    node: int
    kind: RequestKind
    header: str
    body: bytes | None
    group: str
    ttl: float


@dataclass(frozen=True)
class Incoming:
    """A reply, or the engine's report that there will be none.

    Args:
        ticket: the ticket of the request.
        header: see `polyfed.deploy.wire.headers.ReplyHeader`; "" where there is an error.
        body: the bytes of a message; None if the reply carries no message.
        error: the engine's error; "" if there is none.
    """

    ticket: str
    header: str = ""
    body: bytes | None = None
    error: str = ""


class Transport(Protocol):
    """Carries frames; never waits."""

    def nodes(self) -> list[int]:
        """Return the nodes that are connected now."""
        ...

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Send requests; return a ticket for each, None where the engine refused the request."""
        ...

    def pull(self, tickets: Sequence[str]) -> list[Incoming]:
        """Return the replies that have arrived."""
        ...
