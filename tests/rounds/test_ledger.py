"""Sums over rounds."""

from __future__ import annotations

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
