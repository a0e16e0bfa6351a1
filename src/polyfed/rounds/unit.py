"""A unit of work: clients that one process trains or tests together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyfed.base.errors import DivergedError
from polyfed.base.types import ClientId, Parts
from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import LocalClient, NeedsDataError, NoData
from polyfed.core.message import Message, Nothing, Size, State, compact, size
from polyfed.core.requests import drive
from polyfed.execute.drivers import Calls, Outcome, Sequential, Work
from polyfed.execute.local_training import bind, tree_to
from polyfed.rounds.federation import Federation
from polyfed.rounds.scoring import Score, Scorer, majority

#: Messages by client; None stands for no message.
Down = Mapping[ClientId, Message | None]
#: A client's private state; None for a client that has not trained yet.
States = Callable[[ClientId], Any]


@dataclass(frozen=True)
class Report:
    """The costs of a client's part of one exchange.

    Args:
        work: the costs of computing.
        down: bytes that it received.
        up: bytes that it sent.
        score: its test just after its training, before aggregation; None without a test, or if it neither received
            nor sent anything.
    """

    work: Work
    down: Size
    up: Size
    score: Score | None = None


@dataclass(frozen=True)
class Finished:
    """A client at the end of its part of an exchange.

    Args:
        private: the state that the client keeps.
        upload: the message that it sends.
        report: the costs.
    """

    private: State
    upload: Message | None
    report: Report


class UnitRunner:
    """Trains and tests units of clients with one driver.

    Args:
        federation: the federation of these clients.
        driver: runs the clients' coroutines.
    """

    def __init__(self, federation: Federation, driver: Sequential) -> None:
        self.federation, self.driver = federation, driver
        self.scorer = Scorer(federation.algorithm, driver.placement, driver.costs, federation.config)

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run the coroutines of clients to their ends."""
        return self.driver.play(calls)

    def train(self, round_: int, down: Down, states: States, *, score: bool) -> dict[ClientId, Finished]:
        """Run the clients' side of an exchange.

        Args:
            round_: number of the round.
            down: the message that each client of the unit receives.
            states: returns the private state of a client.
            score: whether to test each client as soon as it has trained; only then its trained weights are needed.
        """
        calls = {
            client: self.federation.algorithm.client_round(
                self.federation.private(client, states(client)), message, self.federation.local(client, round_)
            )
            for client, message in down.items()
        }
        received: dict[int, Size] = {}
        score = score and self.federation.algorithm.fit_predicts
        finished: dict[ClientId, Finished] = {}
        for client, outcome in self.play(calls).items():
            key = id(down[client])
            received[key] = received[key] if key in received else measure(down[client])
            report = Report(
                outcome.work,
                received[key],
                measure(outcome.upload),
                self._score(client, round_, outcome.trained) if score and worth_a_test(outcome, down[client]) else None,
            )
            # The results of a stack are views of the whole stack.
            finished[client] = Finished(compact(outcome.private), outcome.upload, report)
        return finished

    def test(self, round_: int, down: Down, states: States, *, final: bool = False) -> dict[ClientId, Score]:
        """Test each client on its own data, with its private state and the message that it receives.

        Args:
            round_: number of the round.
            down: the message that each client receives.
            states: returns the private state of a client.
            final: whether the evaluation reports the run's result; see `Partition.evaluated`.
        """
        federation = self.federation
        self.scorer.keep = final and federation.config.run.predictions
        shared: dict[object, Parts | None] = {}
        scores: dict[ClientId, Score] = {}
        for client, message in down.items():
            private = self.federation.private(client, states(client))
            local, work = self.federation.local(client, round_), Work()
            # Clients without state that receive the same message have the same model, unless it depends on their data.
            kind = (id(message), replace(local.info, id=0))
            if isinstance(private, Nothing) and kind not in shared:
                shared[kind] = self._shared_parts(private, message, local)
            parts = shared.get(kind)
            if parts is None:
                made = federation.algorithm.predictor_parts(private, message, local)
                parts = self._placed(drive(made, lambda request, work=work: self.driver.perform(request, work)), local)
            found = scores[client] = self._score(client, round_, parts, final=final)
            found.flops_parts = work.flops
            found.seconds += work.seconds
            if final:
                rows = (federation.partition.train(client), federation.partition.test(client))
                train, test = (federation.dataset.y[torch.tensor(some)] for some in rows)
                found.majority = majority(train, test, federation.dataset.num_classes, federation.config.metrics)
        return scores

    def _shared_parts(self, private: State, message: Message | None, local: LocalClient) -> Parts | None:
        try:
            return self._placed(parts_without_data(self.federation.algorithm, private, message, local), local)
        except NeedsDataError:
            return None

    def _placed(self, parts: Parts, local: LocalClient) -> Parts:
        return tree_to(parts, self.driver.testing(local.info))

    def _score(self, client: ClientId, round_: int, parts: Parts, *, final: bool = False) -> Score:
        local = self.federation.local(client, round_)
        placement = self.driver.testing(local.info)
        nets = bind(local.models, tree_to(parts, placement))
        try:
            return self.scorer.score(nets, self.federation.data.evaluated(client, final=final), placement)
        except DivergedError as error:
            raise DivergedError(f"client {client}, round {round_}: {error}") from error


def parts_without_data(algorithm: Algorithm, private: Any, message: Message | None, client: LocalClient) -> Parts:
    """Return the parts with which a client predicts, without its data.

    Args:
        algorithm: the algorithm.
        private: the client's private state.
        message: the message from which it predicts.
        client: the client; its data are not used.

    Raises:
        NeedsDataError: that takes the client's data.
    """

    def refuse(request: Any) -> Any:
        raise NeedsDataError(f"{type(request).__name__.lower()} was requested")

    return drive(
        algorithm.predictor_parts(private, message, replace(client, train=NoData(), held_out=NoData())), refuse
    )


def worth_a_test(outcome: Outcome, message: Message | None) -> bool:
    """Return whether a test before aggregation says something: the client trained, and received or sent something."""
    return bool(outcome.trained) and (message is not None or outcome.upload is not None)


def measure(message: Message | None) -> Size:
    """Return the size of a message; None has size 0."""
    return Size() if message is None else size(message)
