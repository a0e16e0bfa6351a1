"""One round: runs the server's coroutine and adds up the costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyfed.base.types import ClientId
from polyfed.core.clients import Cohort
from polyfed.core.message import State, compact
from polyfed.core.requests import Exchange, drive
from polyfed.execute.drivers import Sequential, Work
from polyfed.rounds.clients import Clients
from polyfed.rounds.federation import ServerView
from polyfed.rounds.timing import Timing
from polyfed.rounds.unit import Report


@dataclass(frozen=True)
class Played:
    """The outcome of a round.

    Args:
        server: the new state.
        cohort: the clients that took part.
        reports: the costs of each client whose reply counted, over all exchanges of the round.
        timing: the round by the simulated clock; None without it.
    """

    server: State
    cohort: Cohort
    reports: dict[ClientId, Report]
    timing: Timing | None = None

    @property
    def testing(self) -> float:
        """Wall-clock seconds of testing clients before aggregation."""
        scores = (report.score.seconds for report in self.reports.values() if report.score)
        return sum(scores) + (self.timing.testing if self.timing else 0.0)


def play_round(
    view: ServerView,
    server: Any,
    cohort: Cohort,
    clients: Clients,
    driver: Sequential,
    *,
    score: bool = False,
) -> Played:
    """Play one round; with ``score``, test the cohort before aggregation. `Clients.commit` must follow."""
    reports: dict[ClientId, Report] = {}

    def perform(request: Any) -> Any:
        if not isinstance(request, Exchange):
            return driver.perform(request)
        gathered, costs = clients.exchange(request, score=score)
        for client, report in costs.items():
            reports[client] = join(reports[client], report) if client in reports else report
        return gathered

    # Compact, as tensors of a reply may be views of a stack.
    return Played(compact(drive(view.algorithm.server_round(server, cohort), perform)), cohort, reports)


def join(a: Report, b: Report) -> Report:
    """Return the costs of two exchanges of one client."""
    work = Work(
        flops=a.work.flops + b.work.flops,
        seconds=a.work.seconds + b.work.seconds,
        peak_bytes=max(a.work.peak_bytes, b.work.peak_bytes),
        steps=a.work.steps + b.work.steps,
        loss=b.work.loss if b.work.loss is not None else a.work.loss,
        execution=b.work.execution or a.work.execution,
    )
    return Report(work, a.down + b.down, a.up + b.up, b.score or a.score)
