"""A round by the simulated clock: its length, and the work that was wasted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polyfed.base.types import ClientId


@dataclass(frozen=True)
class Wasted:
    """The wasted work of a client.

    Args:
        reason: a key of `REASONS`.
        bytes_up: bytes that it sent.
        bytes_down: bytes that it received.
        flops: FLOPs that it computed.
        seconds: simulated seconds that it spent.
    """

    reason: str
    bytes_up: int = 0
    bytes_down: int = 0
    flops: float = 0
    seconds: float = 0.0

    def __add__(self, other: Wasted) -> Wasted:
        """Add the later waste of the same client, whose reason stands for both."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("bytes_up", "bytes_down", "flops", "seconds"))
        return Wasted(other.reason, *sums)


@dataclass
class Timing:
    """A round by the simulated clock.

    Args:
        start: seconds from the beginning of the run to that of the round.
        hour: hour of the day at its beginning, in [0, 24).
        seconds: seconds that the round lasted.
        clients: seconds of each client whose reply counted.
        losses: the wasted work of each client whose reply did not count.
        void: whether the round is void.
        testing: wall-clock seconds of testing clients whose replies did not count.
    """

    start: float
    hour: float = 0.0
    seconds: float = 0.0
    clients: dict[ClientId, float] = field(default_factory=dict[ClientId, float])
    losses: dict[ClientId, Wasted] = field(default_factory=dict[ClientId, Wasted])
    void: bool = False
    testing: float = 0.0


#: Why the reply of a client did not count, and the sentence that `Gathered.failed` holds for it.
REASONS: Mapping[str, str] = {
    "absent": "its device is not available at this hour",
    "memory": "its device has too little memory for a step",
    "dropped": "it vanished",
    "late": "no reply within the deadline",
    "surplus": "enough other clients had answered",
    "void": "too few clients answered: the round is void",
}
