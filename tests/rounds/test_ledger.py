"""Sums over rounds, means over clients, and the worst tenth."""

from __future__ import annotations

import math

import pytest
import running

from polyfed.core.clients import Cohort
from polyfed.core.message import Nothing, Size
from polyfed.execute.drivers import Work
from polyfed.rounds.evaluation import Evaluation
from polyfed.rounds.federation import prepare
from polyfed.rounds.ledger import Ledger
from polyfed.rounds.round import Played
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Report


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


def test_sums_over_rounds_are_what_was_entered() -> None:
    """Catches a client without a loss that counts as one of 0, sums that forget, and a best round that is the last."""
    federation = prepare(
        running.config(clients={"count": 4, "models": ["mlp(hidden=(12, 8))"]}, algorithm={"name": "fedavg"})
    )
    ledger = Ledger(federation)
    works = (Work(flops=5, steps=2, loss=1.0), Work(flops=7, steps=2, loss=None), Work(flops=9, steps=2, loss=3.0))
    cohort = Cohort(tuple(map(federation.info, range(3))), 1, 3, federation.rng)
    reports = {k: Report(work, down=Size(values=10), up=Size(values=4)) for k, work in enumerate(works)}
    scores = {k: Score(10, {"a": 5}, down=100) for k in range(4)}
    for round_ in (1, 2):
        row = ledger.round(Played(Nothing(), cohort, reports), 1.5)
        assert (row["loss"], row["bytes"], row["flops"]) == (2.0, {"up": 12, "down": 30}, 21)
        ledger.evaluation(round_, Evaluation(scores))
    summary = ledger.summary("run", 3, "a hash")
    assert summary["clients"]["participations"] == 6
    assert [summary["bytes"][key] for key in ("up", "down", "evaluation_down")] == [24, 60, 800]
    assert (summary["flops"], summary["seconds"]) == (42, 3.0)
    assert summary["accuracy"]["best"] == {"mean": 0.5, "round": 1}
