"""Draws: the promised distributions, and numbers that depend on nobody else."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from polyfed.base.rng import Rng
from polyfed.rounds.sampling import Weighted, draw_available


class Seeded(Rng):
    """A stream that starts at a number, to be compared with what others compute."""

    def seed(self) -> int:
        return 1234567


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    """Catches another generator, which would move every simulated clock. Outputs: rosettacode.org, Splitmix64."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert Seeded((0,)).uniform(range(5)).tolist() == [(z >> 11) * 2.0**-53 for z in known]


def test_a_clients_number_does_not_depend_on_whom_it_is_asked_with() -> None:
    rng = Rng((0, "day", 3))
    everyone = rng.uniform(np.arange(1000).reshape(10, 100)).ravel()
    assert everyone[[7, 999]].tolist() == rng.uniform([7, 999]).tolist()
    assert abs(everyone.mean() - 0.5) < 0.03
    assert everyone[7] != Rng((0, "day", 4)).uniform([7])[0]


def test_drawing_by_weight_is_successive_and_without_replacement() -> None:
    """Catches draws with replacement, and inclusion that is merely proportional to the weights."""
    weights = np.array([1.0, 2.0, 0.0, 5.0, 4.0])
    exact: Counter[tuple[int, ...]] = Counter()
    for a, b in permutations(range(5), 2):
        rest = weights.sum() - weights[a]
        exact[min(a, b), max(a, b)] += weights[a] / weights.sum() * weights[b] / rest  # type: ignore[assignment]
    draws, weighted = 20_000, Weighted(weights)
    rng = np.random.default_rng(0)
    seen = Counter(tuple(weighted.draw(rng, 2)) for _ in range(draws))
    for pair, p in exact.items():
        assert seen[pair] / draws == pytest.approx(p, abs=4 * (p * (1 - p) / draws) ** 0.5)


def test_drawing_by_weight_ends_where_one_client_weighs_nearly_all() -> None:
    weights = np.ones(1000)
    weights[13] = 1e15
    drawn = Weighted(weights).draw(np.random.default_rng(0), 400)
    assert 13 in drawn
    assert len(set(drawn)) == 400
    few = Weighted([0, 1, 0, 3, 0]).draw(np.random.default_rng(0), 4)
    assert few == [1, 3]


def test_those_that_are_there_are_equally_likely() -> None:
    """Catches a draw that looks at all clients only, or none of them enough times."""
    there = np.array([True, False, True, True, False, True, False, False])
    rng, draws = np.random.default_rng(1), 6000
    seen = Counter(k for _ in range(draws) for k in draw_available(rng, 8, 2, lambda clients: there[clients]))
    assert set(seen) == {0, 2, 3, 5}
    assert all(abs(n / draws - 0.5) < 0.03 for n in seen.values())
    often = Counter(k for _ in range(draws) for k in draw_available(rng, 80, 2, lambda clients: there[clients % 8]))
    assert len(often) == 40
    assert all(abs(n / draws - 0.05) < 0.015 for n in often.values())
    assert draw_available(rng, 8, 5, lambda clients: there[clients]) == [0, 2, 3, 5]
    assert draw_available(rng, 8, 2, lambda clients: np.zeros(len(clients), bool)) == []
