"""Evaluation: means over clients, and the worst tenth of them."""

import math

import numpy as np
import pytest

from polyfed.metrics.metrics import tallies, value
from polyfed.metrics.tallies import Predictions
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


def test_pooling_clients_copies_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are copied again with each client that is added: minutes for ten thousand clients."""
    rng = np.random.default_rng(0)
    rows = [Predictions(rng.integers(0, 2, 5), rng.dirichlet([1, 1], 5)) for _ in range(50)]
    scores = {k: Score(5, {"a": 0}, tallies=tallies(["auroc"], one)) for k, one in enumerate(rows)}
    concatenate, copied = np.concatenate, list[int]()

    def counted(arrays: list[np.ndarray]) -> np.ndarray:
        whole = concatenate(arrays)
        copied.append(len(whole))
        return whole

    monkeypatch.setattr(np, "concatenate", counted)
    pooled = Evaluation(scores).pooled
    assert copied == [250, 250]  # the labels, and the scores
    monkeypatch.undo()
    whole = Predictions(np.concatenate([one.y for one in rows]), np.concatenate([one.scores for one in rows]))
    assert value("auroc", pooled) == value("auroc", tallies(["auroc"], whole))
