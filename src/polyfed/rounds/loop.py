"""The loop over the rounds of a run, from its start or last checkpoint to its end, for simulation and deployment."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from polyfed.base import files
from polyfed.base.types import ClientId
from polyfed.core.message import Nothing, State
from polyfed.execute.drivers import Sequential
from polyfed.rounds.clients import Clients
from polyfed.rounds.evaluation import Evaluation, Evaluator
from polyfed.rounds.federation import ServerView
from polyfed.rounds.ledger import Ledger, Tests, client_rows, longer
from polyfed.rounds.round import Played
from polyfed.rounds.selection import sample
from polyfed.storage.run_dir import TESTS, RunDir
from polyfed.storage.state_store import Store


class RoundLoop(ABC):
    """Plays rounds, evaluates, writes logs and checkpoints. A subclass defines how a round is played.

    Args:
        view: the server's knowledge of the federation.
        run_dir: the run directory.
        store: the private states that a checkpoint includes.
        driver: the driver of this process, which performs the server's own requests.
        identity: the hashes of configuration and partition, if it had so many rounds, which a later resume compares.
    """

    clients: Clients
    evaluator: Evaluator
    ledger: Ledger

    def __init__(
        self, view: ServerView, run_dir: RunDir, store: Store, driver: Sequential, identity: Callable[[int], str]
    ) -> None:
        self.view, self.run_dir, self.store, self.driver, self.identity = view, run_dir, store, driver, identity
        self.round = 0
        #: Whether the checkpoint is of a shorter run, which goes on after its end.
        self.goes_on = False
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

    @abstractmethod
    def at_best(self, round_: int) -> AbstractContextManager[None]:
        """Within the block the clients' private states are those at the end of ``round_``, the best round."""

    def evaluate(self, server: State, round_: int, played: Played | None) -> Evaluation | None:
        """Return the evaluation of a round; None if there is no client to test."""
        run = self.view.config.run
        reports = played.reports if played else None
        final = round_ == run.rounds and not run.selects
        return self.evaluator.evaluate(server, self.clients, round_, self.chosen(round_), reports, final=final)

    def test(self, server: State, round_: int) -> Evaluation | None:
        """Return the scores of a model on test rows, which chose nothing; None if there is no client to test."""
        return self.evaluator.evaluate(server, self.clients, round_, self.chosen(self.round), final=True)

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
        if self.pinned == round_ or self.ledger.stopped:
            return True
        return round_ > 0 and (round_ % run.checkpoint_every == 0 or round_ == run.rounds)

    @property
    def pinned(self) -> int | None:
        """The best round so far, if the run keeps it."""
        return self.ledger.best_round if self.view.config.run.keep == "best" else None

    # -------------------------------------------------------------------------------------- what is shared

    def restore(self) -> dict[str, Any] | None:
        """Go back to the last checkpoint and return its progress; None if there is no checkpoint."""
        run = self.view.config.run

        def edit(log: str, row: dict[str, Any], before: int) -> dict[str, Any] | None:
            return longer(log, row, before, run)

        found = self.run_dir.restore(self.store, self.view.algorithm.states, self.identity, run.rounds, edit)
        if found is None:
            return None
        self.round, self.server = found.round, found.server
        self.whole, self.goes_on = True, found.rounds != run.rounds
        return found.progress

    def rounds(self) -> None:
        """Play the rounds that are left, unless the run is to end before."""
        run, algorithm = self.view.config.run, self.view.algorithm
        if self.goes_on:
            self.ledger.reopen()
            self.save()
            self.goes_on = False
        if not self.whole:
            self.server = algorithm.init_server(self.view.task, self.view.rng.at("server"))
            self._over(None, 0.0, self.evaluate(self.server, 0, None))
        for round_ in range(self.round + 1, run.rounds + 1):
            if self.ledger.stopped:
                break
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
        rounds = self.view.config.run.rounds
        identity = self.identity(rounds)
        self.run_dir.save(self.round, self.server, self.store, self.progress(), identity, rounds, self.pinned)

    def tests(self) -> Tests:
        """Test what a run that selects keeps, once its rounds are over; write the clients' scores to tests.jsonl."""
        if not self.view.config.run.selects:
            return {}
        found: Tests = {}
        last = self.test(self.server, self.round)
        if last is not None:
            found["last"] = (self.round, last)
        if self.pinned == self.round and last is not None:
            found["best"] = found["last"]
        elif self.pinned is not None:
            round_, server = self.run_dir.best(self.view.algorithm.states)
            with self.at_best(round_):
                best = self.test(server, round_)
            if best is not None:
                found["best"] = (round_, best)
        rows = [
            {"kept": which, **row}
            for which, (round_, scores) in sorted(found.items())
            for row in client_rows(self.view, round_, None, scores)
        ]
        files.write(self.run_dir.path / TESTS, "".join(json.dumps(files.nulled(row)) + "\n" for row in rows).encode())
        return found

    def _over(self, played: Played | None, seconds: float, found: Evaluation | None) -> None:
        """Enter a round into ledger and logs, and write a checkpoint if one is due."""
        row: dict[str, Any] = {"round": self.round, "rounds": self.view.config.run.rounds}
        if played is not None:
            row |= self.ledger.round(played, seconds)
        if found is not None:
            row |= self.ledger.evaluation(self.round, found)
        row |= {"totals": self.ledger.totals(), **self.facts(played)}
        if facts := self.view.algorithm.facts(self.server):
            row["algorithm"] = dict(facts)
        if self.round in self.view.config.run.keep_rounds:
            self.run_dir.keep(self.round, self.server)
        self.run_dir.append("rounds.jsonl", [row])
        self.run_dir.append("clients.jsonl", client_rows(self.view, self.round, played, found))
        self.whole = True
        self.ended(files.nulled(row))
        if self.checkpoint_due(self.round):
            self.save()
