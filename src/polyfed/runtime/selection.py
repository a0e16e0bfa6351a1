"""Who takes part in a round: drawn by seed and round, at a cost that depends on the cohort and not on all clients.

docs/clocks.md says what each kind of selection means for the average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyfed.parties import Cohort
from polyfed.rng import Rng
from polyfed.typing import ClientId

if TYPE_CHECKING:
    from polyfed.runtime.federation import Federation

Clients = NDArray[np.int64]


class Weighted:
    """Draws of different numbers from 0 to n - 1, each next one in proportion to the weights of those that are left.

    Args:
        weights: ``(n,)`` not negative.
    """

    def __init__(self, weights: ArrayLike) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)
        self._sums = np.cumsum(self.weights)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """``count`` numbers in ascending order, or all those of positive weight where there are fewer."""
        count = min(count, int(np.count_nonzero(self.weights))) if 2 * count > len(self.weights) else count
        drawn: dict[int, None] = {}
        sums = self._sums
        while len(drawn) < count:
            found = sums.searchsorted(rng.random(2 * count) * sums[-1], side="right")
            drawn |= dict.fromkeys(found.tolist())  # who is drawn again was drawn at the first time
            if len(drawn) < count:  # rare: a few weigh nearly all
                rest = self.weights.copy()
                rest[list(drawn)] = 0
                sums = np.cumsum(rest)
                if sums[-1] == 0:
                    break
        return sorted(list(drawn)[:count])


def draw_there(
    rng: np.random.Generator, total: int, count: int, there: Callable[[Clients], NDArray[np.bool_]]
) -> list[int]:
    """``count`` different numbers below ``total``, equally likely among those that are ``there``, or all of these."""
    drawn: dict[int, None] = {}
    size = 4 * count
    while size < total:
        some = rng.integers(total, size=size)
        drawn |= dict.fromkeys(some[there(some)].tolist())  # who is drawn again was drawn at the first time
        if len(drawn) >= count:
            return sorted(list(drawn)[:count])
        size *= 2
    present = np.flatnonzero(there(np.arange(total)))  # hardly any are there, or most are asked
    return sorted((present if len(present) <= count else rng.choice(present, count, replace=False)).tolist())


def draw_cohort(federation: Federation, round_: int, now: float = 0.0) -> Cohort:
    """The clients that are asked in a round.

    Args:
        federation: whose clients.
        round_: number of the round.
        now: simulated seconds since the beginning of the run.
    """
    config = federation.config
    clients, devices = config.clients, config.devices
    count = clients.wanted if devices is None else devices.asked(clients)
    rng = federation.rng.at("round", round_)
    chosen = _chosen(federation, rng.at("cohort"), count, now)
    return Cohort(tuple(map(federation.info, chosen)), round_, config.run.rounds, rng.at("server"))


def _chosen(federation: Federation, rng: Rng, count: int, now: float) -> range | list[ClientId]:
    total, fleet = federation.config.clients.count, federation.fleet
    if federation.config.clients.selection == "available":
        assert fleet is not None, "the configuration was checked"
        return draw_there(rng.numpy(), total, count, lambda clients: fleet.there(clients, now))
    if count == total:
        return range(total)
    if federation.weighted is not None:
        return federation.weighted.draw(rng.numpy(), count)
    # NumPy's way (Floyd's) costs the cohort where that is at most a fiftieth of many clients.
    return sorted(rng.numpy().choice(total, count, replace=False).tolist())
