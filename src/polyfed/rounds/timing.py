"""A round by the simulated clock: how long it lasted, and what was done in vain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polyfed.base.types import ClientId


@dataclass(frozen=True)
class Wasted:
    """What a client did in vain.

    Args:
        reason: a key of `REASONS`.
        bytes_up: that it sent.
        bytes_down: that it received.
        flops: that it computed.
        seconds: simulated, that it spent.
    """

    reason: str
    bytes_up: int = 0
    bytes_down: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: Wasted) -> Wasted:
        """Two losses of one client, the later last; its reason stands for both."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("bytes_up", "bytes_down", "flops", "seconds"))
        return Wasted(other.reason, *sums)


@dataclass
class Timing:
    """A round by the simulated clock.

    Args:
        start: seconds since the beginning of the run at which it began.
        hour: of the day at which it began, in [0, 24).
        seconds: that it lasted.
        clients: seconds of each client whose reply counted.
        losses: of each client that did something, or nothing, in vain.
        void: whether it counts for nothing.
        testing: wall-clock seconds of testing clients whose replies did not count.
    """

    start: float
    hour: float = 0.0
    seconds: float = 0.0
    clients: dict[ClientId, float] = field(default_factory=dict[ClientId, float])
    losses: dict[ClientId, Wasted] = field(default_factory=dict[ClientId, Wasted])
    void: bool = False
    testing: float = 0.0


#: Why a client that was asked did not count, and the sentence of it in the algorithm's `Gathered.failed`.
REASONS: Mapping[str, str] = {
    "absent": "its device is not there at this hour",
    "memory": "its device has too little memory for a step",
    "dropped": "it vanished",
    "late": "no reply within the deadline",
    "surplus": "enough others had answered",
    "void": "too few answered: the round is void",
}
