"""The devices of all clients, by formula: the device of each client, and the hours at which it is available."""

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
_TICK = 1e-6  # seconds: a clock that misses the full hour by rounding alone has reached it


@dataclass(frozen=True)
class Availability:
    """The devices of clients and their hours.

    Args:
        profiles: the table of devices.
        rng: the randomness of the deal and of the availability.
        deal: "random" deals by the shares of the table, "in-turn" gives client i row i mod length.
        start_hour: hour of the day at simulated second 0.
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
        """Return the row of the table that each client has."""
        if self.deal == "in-turn":
            return np.asarray(clients) % len(self.profiles)
        return self._shares.searchsorted(self.rng.at("deal").uniform(clients) * self._shares[-1], side="right")

    def profile(self, client: ClientId) -> Profile:
        """Return a client's device."""
        return self.profiles[int(self.rows([client])[0])]

    def hour(self, now: float) -> int:
        """Return the full hours since the midnight before simulated second 0."""
        return int((self.start_hour * _HOUR + now + _TICK) // _HOUR)

    def next_hour(self, now: float) -> float:
        """Return the seconds to the next full hour."""
        return (self.hour(now) + 1 - self.start_hour) * _HOUR - now

    def available(self, clients: ArrayLike, now: float) -> NDArray[np.bool_]:
        """Return whether each client is available.

        A client draws one number per day and is available in the hours whose fraction exceeds it. So the table's
        fraction of clients is available, and each client changes a few times a day, not every hour.
        """
        day, hour = divmod(self.hour(now), 24)
        return self.rng.at("day", day).uniform(clients) < self._hours[self.rows(clients), hour]
