"""Who is asked: the promised draws, and no list for each client."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import running

from polyfed.base.rng import Rng
from polyfed.config.profiles import load_profiles
from polyfed.config.sections import oversampled
from polyfed.rounds.availability import Availability
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.sampling import Strata, Weighted, draw_available
from polyfed.rounds.selection import draw_cohort, draw_connected

MANY = 1_000_000


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
    assert isinstance(sizes.draw, Weighted)
    assert sizes.draw.weights.tolist() == [len(sizes.data.train(k)) for k in range(12)]
    capacities = federation(clients={"selection": "by-capacity", "capacities": [1.0, 0.25]})
    assert isinstance(capacities.draw, Weighted)
    assert capacities.draw.weights.tolist() == [1.0, 0.25] * 6
    drawn = Counter(c.id % 2 for round_ in range(200) for c in draw_cohort(capacities, round_))
    assert drawn[0] > 2 * drawn[1]
    assert len({tuple(c.id for c in draw_cohort(capacities, 5)) for _ in range(3)}) == 1


def test_stratified_cohorts_have_each_capacity_and_take_all_clients_equally_often() -> None:
    """Catches a capacity that is missing, shares of the cohort that are not the clients', and likelier clients."""
    found = federation(count=16, clients={"selection": "stratified", "capacities": [1.0, 0.25, 0.0625, 0.0625]})
    cohorts = [[c.id for c in draw_cohort(found, round_)] for round_ in range(400)]
    assert all(len(cohort) == 4 and cohort == sorted(set(cohort)) for cohort in cohorts)
    assert {tuple(sorted(Counter(k % 4 for k in cohort if k % 4 < 2).items())) for cohort in cohorts} == {
        ((0, 1), (1, 1))
    }
    times = Counter(k for cohort in cohorts for k in cohort)
    assert all(70 < times[k] < 130 for k in range(16))  # 100 expected, of deviation 8.7
    strata, rng = Strata([2, 1, 1, 1, 2, 1, 1]), np.random.default_rng(0)  # 2 and 5 of 7: of 3 come 6/7 and 15/7
    drawn = [strata.draw(rng, 3) for _ in range(1400)]
    assert Counter(sum(k in (0, 4) for k in some) for some in drawn).keys() == {0, 1}
    assert [sum(k in some for some in drawn) for k in range(7)] == pytest.approx([600] * 7, abs=75)
    assert cohorts[5] == [c.id for c in draw_cohort(found, 5)]
    there = [0, 1, 2, 3, 6, 7, 10, 11]  # of a deployment: one client of capacity 1, one of 0.25, six small ones
    asked = [{c.id for c in draw_connected(found, round_, there, 0.0)} for round_ in range(40)]
    assert all(len(some) == 4 and len(some & {2, 3, 6, 7, 10, 11}) == 3 for some in asked)
    assert {min(some) for some in asked} == {0, 1}


def test_largest_draws_among_the_clients_of_the_largest_capacity_alone() -> None:
    """Catches a smaller client that trains, also where a round wants more clients than there are large ones."""
    clients = {"selection": "largest", "capacities": [0.5, 0.25, 0.5]}
    found = [[c.id for c in draw_cohort(federation(clients=clients), round_)] for round_ in range(20)]
    assert {len(cohort) for cohort in found} == {3}
    assert {k for cohort in found for k in cohort} == {k for k in range(12) if k % 3 != 1}
    for wanted in (0.75, 1.0):  # 9 and 12 of 4
        few = federation(clients={"selection": "largest", "capacities": [0.25, 1.0, 0.25], "participation": wanted})
        assert [c.id for c in draw_cohort(few, 1)] == [1, 4, 7, 10]


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
