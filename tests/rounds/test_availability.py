"""Who is there: as many as the table says."""

import numpy as np
import pytest

from polyfed.base.rng import Rng
from polyfed.config.profiles import load_profiles
from polyfed.rounds.availability import Availability


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
