"""What carries frames between server and clients. `polyfed.flower.grid` does it by Flower; tests do it in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

RequestKind = Literal["describe", "train", "evaluate"]


@dataclass(frozen=True)
class Outgoing:
    """A request on its way.

    Args:
        node: the engine's name of the receiver.
        kind: what is asked.
        header: see `polyfed.deploy.wire.headers.RequestHeader`.
        body: the bytes of a message, if one is sent.
        group: by which the engine's log names it: the round.
        ttl: seconds after which nobody needs to answer.
    """

    node: int
    kind: RequestKind
    header: str
    body: bytes | None
    group: str
    ttl: float


@dataclass(frozen=True)
class Incoming:
    """A reply, or the engine's word that there will be none.

    Args:
        ticket: of the request.
        header: see `polyfed.deploy.wire.headers.ReplyHeader`; "" where there is an error.
        body: the bytes of a message, if one was sent.
        error: the engine's.
    """

    ticket: str
    header: str = ""
    body: bytes | None = None
    error: str = ""


class Transport(Protocol):
    """Carries frames; never waits."""

    def nodes(self) -> list[int]:
        """Who is connected now."""
        ...

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        """Send; a ticket for each, None where the engine did not take it."""
        ...

    def pull(self, tickets: Sequence[str]) -> list[Incoming]:
        """The replies that are there."""
        ...
