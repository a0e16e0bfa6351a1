"""Draws without replacement, whose cost depends on the number that is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Numbers of clients, (n,).
ClientIds: TypeAlias = NDArray[np.int64]


class Weighted:
    """Draws different numbers from 0 to n - 1, each in proportion to the weights of the numbers that are left.

    Args:
        weights: ``(n,)`` not negative.
    """

    def __init__(self, weights: ArrayLike) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)
        self.positive = int(np.count_nonzero(self.weights))
        self._sums = np.cumsum(self.weights)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return ``count`` numbers in ascending order, or all numbers of positive weight if these are fewer."""
        count = min(count, self.positive)
        drawn: dict[int, None] = {}
        sums = self._sums
        while len(drawn) < count:
            found = sums.searchsorted(rng.random(2 * count) * sums[-1], side="right")
            drawn |= dict.fromkeys(found.tolist())  # who is drawn again was drawn at the first time
            if len(drawn) < count:  # rare: a few weigh nearly all
                rest = self.weights.copy()
                rest[list(drawn)] = 0
                sums = np.cumsum(rest)
        return sorted(list(drawn)[:count])


class Strata:
    """Draws different numbers from 0 to n - 1, equally likely, and of each stratum as many as its share of all numbers.

    Of a stratum with n_s of the n numbers come m n_s / n of m, rounded up or down at random by systematic sampling
    (W. G. Madow, 1949), so that it is m n_s / n in the mean.

    Args:
        keys: ``(n,)``; equal ones are one stratum.
    """

    def __init__(self, keys: ArrayLike) -> None:
        _, place, counts = np.unique(np.asarray(keys), return_inverse=True, return_counts=True)
        self._members = np.split(np.argsort(place, kind="stable"), np.cumsum(counts)[:-1])
        self._ends = np.cumsum(counts)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return ``count`` numbers in ascending order, at most n."""
        before = np.ceil(self._ends * count / self._ends[-1] - rng.random()).astype(int)
        each = np.diff(before, prepend=0)
        drawn = [rng.choice(some, k, replace=False) for some, k in zip(self._members, each, strict=True)]
        return sorted(np.concatenate(drawn).tolist())


def capacity_draw(selection: str, capacities: ArrayLike) -> Weighted | Strata | None:
    """What draws clients of these capacities where ``clients.selection`` is a rule about capacities; else None."""
    weights = np.asarray(capacities)
    if selection == "stratified":
        return Strata(weights)
    if selection == "largest":
        return Weighted(weights == weights.max())
    return Weighted(weights) if selection == "by-capacity" else None


def draw_available(
    rng: np.random.Generator, total: int, count: int, available: Callable[[ClientIds], NDArray[np.bool_]]
) -> list[int]:
    """Draw ``count`` different numbers below ``total``, equally likely among those ``available``, or all of these."""
    drawn: dict[int, None] = {}
    size = 4 * count
    while size < total:
        some = rng.integers(total, size=size)
        drawn |= dict.fromkeys(some[available(some)].tolist())  # who is drawn again was drawn at the first time
        if len(drawn) >= count:
            return sorted(list(drawn)[:count])
        size *= 2
    present = np.flatnonzero(available(np.arange(total)))  # few are available, or most of them are drawn
    return sorted((present if len(present) <= count else rng.choice(present, count, replace=False)).tolist())
