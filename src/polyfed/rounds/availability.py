"""The devices of all clients, by formula: which client has which, and who is there when. No list per client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.config.profiles import Profile

_HOUR = 3600.0
_TICK = 1e-6  # seconds: a clock that stands at the full hour but for rounding has reached it


@dataclass(frozen=True)
class Availability:
    """Who computes on what.

    Args:
        profiles: the table.
        rng: of dealing and of coming and going.
        deal: "random" deals by the shares of the table, "in-turn" gives client i row i mod length.
        start_hour: hour of the day at which simulated second 0 is.
    """

    profiles: Sequence[Profile]
    rng: Rng
    deal: Literal["random", "in-turn"] = "random"
    start_hour: float = 0.0

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        return np.cumsum([profile.share for profile in self.profiles])

    @cached_property
    def _hours(self) -> NDArray[np.float64]:
        return np.array([profile.hours for profile in self.profiles])  # (profiles, 24)

    def rows(self, clients: ArrayLike) -> NDArray[np.int64]:
        """Which row of the table each client has."""
        if self.deal == "in-turn":
            return np.asarray(clients) % len(self.profiles)
        u = self.rng.at("deal").uniform(clients) * self._shares[-1]
        return self._shares.searchsorted(u, side="right")

    def profile(self, client: ClientId) -> Profile:
        """A client's device."""
        return self.profiles[int(self.rows([client])[0])]

    def hour(self, now: float) -> int:
        """Full hours since the midnight before simulated second 0."""
        return int((self.start_hour * _HOUR + now + _TICK) // _HOUR)

    def next_hour(self, now: float) -> float:
        """Seconds to the next full hour."""
        return (self.hour(now) + 1 - self.start_hour) * _HOUR - now

    def available(self, clients: ArrayLike, now: float) -> NDArray[np.bool_]:
        """Whether each client can be reached.

        A client draws one number per day and is there in the hours whose fraction exceeds it: as many are there as
        the table says, and each comes and goes a few times a day, not every hour.
        """
        day, hour = divmod(self.hour(now), 24)
        return self.rng.at("day", day).uniform(clients) < self._hours[self.rows(clients), hour]
