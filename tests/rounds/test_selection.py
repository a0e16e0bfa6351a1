"""Who is asked and who is there: the promised distributions, the promised draws, and no list per client."""

import tracemalloc
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import running

from polyfed.base.rng import Rng
from polyfed.config.profiles import load_profiles
from polyfed.config.sections import oversampled
from polyfed.rounds.availability import Availability
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.sampling import Weighted, draw_available
from polyfed.rounds.selection import draw_cohort

MANY = 1_000_000


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


def federation(count: int = 12, **more: Any) -> Federation:
    clients = {"count": count, "participation": 0.25, **more.pop("clients", {})}
    return prepare(running.config(clients=clients, partition={"samples_per_client": None}, **more))


def test_uniform_cohorts_are_drawn_as_before() -> None:
    """Catches a new draw for runs that ask for nothing new."""
    found = federation()
    for round_ in (1, 2, 3):
        rng = found.rng.at("round", round_, "cohort").numpy()
        assert [c.id for c in draw_cohort(found, round_)] == sorted(rng.choice(12, 3, replace=False).tolist())


def test_by_size_and_by_capacity_weigh_what_they_say() -> None:
    sizes = federation(clients={"selection": "by-size"})
    assert sizes.weighted is not None
    assert sizes.weighted.weights.tolist() == [len(sizes.data.train(k)) for k in range(12)]
    capacities = federation(clients={"selection": "by-capacity", "capacities": [1.0, 0.25]})
    assert capacities.weighted is not None
    assert capacities.weighted.weights.tolist() == [1.0, 0.25] * 6
    drawn = Counter(c.id % 2 for round_ in range(200) for c in draw_cohort(capacities, round_))
    assert drawn[0] > 2 * drawn[1]
    assert len({tuple(c.id for c in draw_cohort(capacities, 5)) for _ in range(3)}) == 1


def test_over_sampling_asks_more_and_never_more_than_there_are() -> None:
    assert [oversampled(10, s) for s in (0.0, 0.1, 0.25, 0.31)] == [10, 11, 13, 14]
    assert len(draw_cohort(federation(devices={"oversample": 0.5}), 1)) == 5
    assert len(draw_cohort(federation(devices={"oversample": 9.0}), 1)) == 12


def test_a_million_clients_cost_their_cohort() -> None:
    """Catches a permutation, a list or an array of all clients in a round."""
    availability = Availability(load_profiles("cross-device"), Rng((0, "devices")))
    weighted = Weighted(np.arange(MANY) % 7 + 1)
    rng = np.random.default_rng(0)
    looked: list[int] = []

    def available(clients: Any) -> Any:
        looked.append(len(clients))
        return availability.available(clients, 0.0)

    draw_available(rng, MANY, 10, available)  # what is made once is made
    tracemalloc.start()
    try:
        assert len(draw_available(rng, MANY, 10, available)) == len(weighted.draw(rng, 10)) == 10
        assert len(rng.choice(MANY, 10, replace=False)) == 10
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert max(looked) <= 40


def test_devices_are_dealt_by_shares_or_in_turn() -> None:
    profiles = load_profiles("cross-device")
    clients = np.arange(50_000)
    rows = Availability(profiles, Rng((0,))).rows(clients)
    shares = np.bincount(rows, minlength=len(profiles)) / len(clients)
    assert shares.tolist() == pytest.approx([profile.share for profile in profiles], abs=0.01)
    assert (rows != Availability(profiles, Rng((1,))).rows(clients)).any()
    turn = Availability(profiles, Rng((0,)), "in-turn")
    assert [turn.profile(k).device for k in (0, 1, 5, 6)] == ["phone-slow", "phone", "phone-slow", "phone"]
    assert int(Availability(profiles, Rng((0,))).rows([17])[0]) == rows[17]


def test_as_many_are_there_as_the_table_says_and_not_anew_each_hour() -> None:
    availability = Availability(load_profiles("cross-device"), Rng((0,)), "random", start_hour=22.0)
    clients = np.arange(20_000)
    rows = availability.rows(clients)
    for hour in (0, 2, 14, 30):
        there = availability.available(clients, 3600.0 * hour)
        for row, profile in enumerate(availability.profiles):
            assert there[rows == row].mean() == pytest.approx(profile.hours[(22 + hour) % 24], abs=0.04)
    phones = clients[rows == 1]
    midnight, noon, tomorrow = (availability.available(phones, 3600.0 * hour) for hour in (2, 14, 26))
    assert not (noon & ~midnight).any()  # fewer are there at noon, and none that was not there at night
    assert (midnight != tomorrow).any()


def test_the_clock_knows_the_hour() -> None:
    availability = Availability(load_profiles("cross-silo"), Rng((0,)), start_hour=22.5)
    assert [availability.hour(now) for now in (0.0, 1799.0, 1800.0, 5400.0)] == [22, 22, 23, 24]
    assert availability.next_hour(0.0) == 1800.0
    assert availability.next_hour(1800.0) == 3600.0
    assert availability.next_hour(1800.0 - 1e-10) == pytest.approx(3600.0)  # rounding has not made it the hour before
