"""Evaluation: means over clients, and the worst tenth of them."""

import math

import pytest

from polyfed.rounds.evaluation import Evaluation
from polyfed.rounds.scoring import Score


@pytest.mark.parametrize(("count", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_the_worst_decile_is_a_tenth_rounded_up(count: int, worst: int) -> None:
    """Catches an empty tenth, and the best instead of the worst."""
    scores = {k: Score(100, {"a": 100 - k, "b": 0}) for k in range(count)}
    expected = sum((100 - k) / 100 for k in range(count - worst, count)) / worst
    assert Evaluation(scores).worst_decile() == pytest.approx(expected, abs=1e-12)
    assert math.ceil(count / 10) == worst


def test_predictors_and_groups_of_clients_are_means_over_clients() -> None:
    """Catches a group whose mean is weighted by examples, and a default predictor that is not the first."""
    scores = {0: Score(10, {"a": 10, "b": 0}), 1: Score(1000, {"a": 0, "b": 1000})}
    found = Evaluation(scores)
    assert (found.mean(), found.mean("b"), found.mean(clients=[1])) == (0.5, 0.5, 0.0)
    assert found.predictors == ["a", "b"]
