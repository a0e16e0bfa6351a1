"""The loop over the rounds of a run, from its start or last checkpoint to its end, for simulation and deployment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from polyfed.base import files
from polyfed.base.types import ClientId
from polyfed.core.message import Nothing, State
from polyfed.execute.drivers import Sequential
from polyfed.rounds.clients import Clients
from polyfed.rounds.evaluation import Evaluation, Evaluator
from polyfed.rounds.federation import ServerView
from polyfed.rounds.ledger import Ledger, client_rows
from polyfed.rounds.round import Played
from polyfed.rounds.selection import sample
from polyfed.storage.run_dir import RunDir
from polyfed.storage.state_store import Store


class RoundLoop(ABC):
    """Plays rounds, evaluates, writes logs and checkpoints. A subclass defines how a round is played.

    Args:
        view: the server's knowledge of the federation.
        run_dir: the run directory.
        store: the private states that a checkpoint includes.
        driver: the driver of this process, which performs the server's own requests.
        identity: the hashes of configuration and partition, which a later resume compares.
    """

    clients: Clients
    evaluator: Evaluator
    ledger: Ledger

    def __init__(self, view: ServerView, run_dir: RunDir, store: Store, driver: Sequential, identity: str) -> None:
        self.view, self.run_dir, self.store, self.driver, self.identity = view, run_dir, store, driver, identity
        self.round = 0
        self.server: State = Nothing()
        #: Whether server, store, ledger and logs agree on `round`, so that a checkpoint may be written.
        self.whole = False

    # -------------------------------------------------------------------------------------- what differs

    @abstractmethod
    def play(self, round_: int) -> Played | None:
        """Play a round from `server` without committing it; None if it is void."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """Return the values that a checkpoint stores beside server and states."""

    def evaluate(self, server: State, round_: int, played: Played | None) -> Evaluation | None:
        """Return the evaluation of a round; None if there is no client to test."""
        reports = played.reports if played else None
        return self.evaluator.evaluate(server, self.clients, round_, self.chosen(round_), reports)

    def chosen(self, round_: int) -> list[ClientId]:
        """Return the clients that are tested after a round."""
        return sample(self.view, self.view.config.run.eval_clients, round_, "evaluate")

    def facts(self, played: Played | None) -> dict[str, Any]:
        """Return further entries for the round's line in rounds.jsonl."""
        return {}

    def ended(self, row: dict[str, Any]) -> None:  # noqa: B027 - nothing is the usual case
        """Called when a round is over and its line is written."""

    def checkpoint_due(self, round_: int) -> bool:
        """Whether a checkpoint is written after the round."""
        run = self.view.config.run
        return round_ > 0 and (round_ % run.checkpoint_every == 0 or round_ == run.rounds)

    # -------------------------------------------------------------------------------------- what is shared

    def restore(self) -> dict[str, Any] | None:
        """Go back to the last checkpoint and return its progress; None if there is no checkpoint."""
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
            self._over(None, 0.0, self.evaluate(self.server, 0, None))
        for round_ in range(self.round + 1, run.rounds + 1):
            clock = self.driver.costs.clock()
            played = self.play(round_)
            # The seconds of testing the cohort belong to the evaluation.
            seconds = clock() - (played.testing if played else 0.0)
            server = self.server if played is None else played.server
            # Before the commit, as it takes time.
            found = self.evaluate(server, round_, played) if self.due(round_) else None
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

    def _over(self, played: Played | None, seconds: float, found: Evaluation | None) -> None:
        """Enter a round into ledger and logs, and write a checkpoint if one is due."""
        row: dict[str, Any] = {"round": self.round, "rounds": self.view.config.run.rounds}
        if played is not None:
            row |= self.ledger.round(played, seconds)
        if found is not None:
            row |= self.ledger.evaluation(self.round, found)
        row |= {"totals": self.ledger.totals(), **self.facts(played)}
        self.run_dir.append("rounds.jsonl", [row])
        self.run_dir.append("clients.jsonl", client_rows(self.view, self.round, played, found))
        self.whole = True
        self.ended(files.nulled(row))
        if self.checkpoint_due(self.round):
            self.save()
