"""A unit of work: clients that are trained, or tested, together, in whatever process that happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import isgeneratorfunction
from typing import Any

from polyfed.base.types import ClientId, Parts
from polyfed.core.message import Message, Nothing, Size, State, compact, size
from polyfed.core.requests import drive
from polyfed.execute.drivers import Calls, Driver, Outcome, Work
from polyfed.execute.local_training import bind, tree_to
from polyfed.rounds.federation import Federation
from polyfed.rounds.scoring import Score, Scorer

#: Messages by client; None sends nothing.
Down = Mapping[ClientId, Message | None]
#: A client's private state; None for a client that has not trained yet.
States = Callable[[ClientId], Any]


@dataclass(frozen=True)
class Report:
    """What a client's part of one exchange cost.

    Args:
        work: computing.
        down: bytes that it received.
        up: bytes that it sent.
        score: its test just after its training, before aggregation, if that was asked for.
    """

    work: Work
    down: Size
    up: Size
    score: Score | None = None


@dataclass(frozen=True)
class Finished:
    """A client at the end of its part of an exchange.

    Args:
        private: what it keeps.
        upload: what it sends.
        report: what that cost.
    """

    private: State
    upload: Message | None
    report: Report


class UnitRunner:
    """Trains and tests units of clients with one driver.

    Args:
        federation: whose clients.
        driver: runs their coroutines.
    """

    def __init__(self, federation: Federation, driver: Driver) -> None:
        self.federation, self.driver = federation, driver
        self.scorer = Scorer(federation.algorithm, driver.placement, driver.costs)

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run the coroutines of clients to their ends."""
        return self.driver.play(calls)

    def train(self, round_: int, down: Down, states: States, *, score: bool) -> dict[ClientId, Finished]:
        """Run the clients' side of an exchange.

        Args:
            round_: its round.
            down: what each client of the unit receives.
            states: gives what each keeps.
            score: whether to test each as soon as it has trained; only then are its trained weights needed.
        """
        calls = {
            client: self.federation.algorithm.client_round(
                self._private(client, states), message, self.federation.local(client, round_)
            )
            for client, message in down.items()
        }
        received: dict[int, Size] = {}
        finished: dict[ClientId, Finished] = {}
        for client, outcome in self.play(calls).items():
            key = id(down[client])
            received[key] = received[key] if key in received else measure(down[client])
            tested = self._score(client, round_, outcome.trained) if score and outcome.trained else None
            report = Report(outcome.work, received[key], measure(outcome.upload), tested)
            # What was trained in a stack is a view of all of it.
            finished[client] = Finished(compact(outcome.private), outcome.upload, report)
        return finished

    def test(self, round_: int, down: Down, states: States) -> dict[ClientId, Score]:
        """Test each client on its own test data, with what it keeps and what it receives."""
        shared: dict[object, Parts] = {}
        scores: dict[ClientId, Score] = {}
        for client, message in down.items():
            private, local = self._private(client, states), self.federation.local(client, round_)
            # Clients that keep nothing and receive the same message have the same model, unless it takes their data.
            same = isinstance(private, Nothing) and not isgeneratorfunction(self.federation.algorithm.predictor_parts)
            kind = (id(message), replace(local.info, id=0)) if same else client
            work = Work()
            if kind not in shared:
                shared = {} if kind is client else shared
                steps = self.federation.algorithm.predictor_parts(private, message, local)
                made: Parts = drive(steps, lambda request, work=work: self.driver.perform(request, work))
                shared[kind] = tree_to(made, self.driver.testing(local.info))
            found = scores[client] = self._score(client, round_, shared[kind])
            found.flops_parts = work.flops
            found.seconds += work.seconds
        return scores

    def _private(self, client: ClientId, states: States) -> Any:
        state = states(client)
        return self.federation.first_state(client) if state is None else state

    def _score(self, client: ClientId, round_: int, parts: Parts) -> Score:
        local = self.federation.local(client, round_)
        placement = self.driver.testing(local.info)
        nets = bind(local.models, tree_to(parts, placement))
        return self.scorer.score(nets, self.federation.data.test(client), placement)


def measure(message: Message | None) -> Size:
    """The bytes of a message; nothing sent is no bytes."""
    return Size() if message is None else size(message)
