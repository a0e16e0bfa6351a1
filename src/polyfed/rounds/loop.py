"""The rounds of a run, from its start or its last checkpoint to its summary: one loop for simulation and deployment."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from polyfed.base.types import ClientId
from polyfed.core.message import Nothing, State
from polyfed.execute.drivers import Driver
from polyfed.rounds.clients import Clients
from polyfed.rounds.evaluation import Evaluation, Evaluator
from polyfed.rounds.federation import ServerView
from polyfed.rounds.ledger import Ledger, client_rows
from polyfed.rounds.round import Played
from polyfed.rounds.selection import sample
from polyfed.storage.run_dir import RunDir
from polyfed.storage.state_store import Store


class RoundLoop(ABC):
    """Plays rounds, evaluates, writes logs and checkpoints. A subclass says how a round is played.

    Args:
        view: what the server knows of the federation.
        run_dir: where everything is written.
        store: the private states that a checkpoint seals.
        driver: of this process; does the server's own requests.
        identity: what a later resume must find again.
    """

    clients: Clients
    evaluator: Evaluator
    ledger: Ledger

    def __init__(self, view: ServerView, run_dir: RunDir, store: Store, driver: Driver, identity: str) -> None:
        self.view, self.run_dir, self.store, self.driver, self.identity = view, run_dir, store, driver, identity
        self.round = 0
        self.server: State = Nothing()
        #: Whether server, store, ledger and logs agree on `round`: then a checkpoint may be written.
        self.whole = False

    # -------------------------------------------------------------------------------------- what differs

    @abstractmethod
    def play(self, round_: int) -> Played | None:
        """Play a round from `server`, without making anything final; None if it is void."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """What a checkpoint remembers beside server and states."""

    def evaluate(self, server: State, round_: int, played: Played | None) -> Evaluation | None:
        """The evaluation of a round that is due; None if there is nobody to ask."""
        reports = played.reports if played else None
        return self.evaluator.evaluate(server, self.clients, round_, self.chosen(round_), reports)

    def chosen(self, round_: int) -> list[ClientId]:
        """The clients that are tested after a round."""
        return sample(self.view, self.view.config.run.eval_clients, round_, "evaluate")

    def facts(self, played: Played | None) -> dict[str, Any]:
        """More for the round's line in rounds.jsonl."""
        return {}

    def ended(self, row: dict[str, Any]) -> None:  # noqa: B027 - nothing is the usual case
        """A round is over, and its line is written."""

    def checkpoint_due(self, round_: int) -> bool:
        """Whether a checkpoint is written after the round."""
        run = self.view.config.run
        return round_ > 0 and (round_ % run.checkpoint_every == 0 or round_ == run.rounds)

    # -------------------------------------------------------------------------------------- what is shared

    def restore(self) -> dict[str, Any] | None:
        """Go back to the last checkpoint; its progress, or None where there is none."""
        found = self.run_dir.restore(self.store, self.view.algorithm.states, self.identity)
        if found is None:
            return None
        self.round, self.server, progress = found
        self.whole = True
        return progress

    def rounds(self) -> None:
        """Play the rounds that are left."""
        run, algorithm = self.view.config.run, self.view.algorithm
        if not self.whole:
            self.server = algorithm.init_server(self.view.task, self.view.rng.at("server"))
            self._over(None, 0.0, self._evaluated(self.server, 0, None))
        for round_ in range(self.round + 1, run.rounds + 1):
            started, counting = time.perf_counter(), self.driver.costs.seconds
            played = self.play(round_)
            # Counting costs is no cost of the run, and testing the cohort is one of evaluation.
            other = self.driver.costs.seconds - counting + (played.testing if played else 0.0)
            seconds = time.perf_counter() - started - other
            server = self.server if played is None else played.server
            found = self._evaluated(server, round_, played)  # before anything is final: it takes time
            self.whole = False
            if played is not None:
                self.clients.commit()
            self.server, self.round = server, round_
            self._over(played, seconds, found)

    def due(self, round_: int) -> bool:
        """Whether the round is evaluated."""
        run = self.view.config.run
        return round_ % run.eval_every == 0 or round_ == run.rounds

    def save(self) -> None:
        """Write a checkpoint."""
        self.run_dir.save(self.round, self.server, self.store, self.progress(), self.identity)

    def _evaluated(self, server: State, round_: int, played: Played | None) -> Evaluation | None:
        return self.evaluate(server, round_, played) if self.due(round_) else None

    def _over(self, played: Played | None, seconds: float, found: Evaluation | None) -> None:
        """Enter a round into ledger and logs, and write a checkpoint if one is due."""
        row: dict[str, Any] = {"round": self.round, "rounds": self.view.config.run.rounds}
        if played is not None:
            row |= self.ledger.round(played, seconds)
        if found is not None:
            row |= self.ledger.evaluation(self.round, found)
        row["totals"] = self.ledger.totals()
        row |= self.facts(played)
        self.run_dir.append("rounds.jsonl", [row])
        self.run_dir.append("clients.jsonl", client_rows(self.view, self.round, played, found))
        self.whole = True
        self.ended(row)
        if self.checkpoint_due(self.round):
            self.save()
