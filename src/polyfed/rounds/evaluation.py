"""The evaluation of a round: all clients (or a sample), the cohort before aggregation, and the server's own models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from polyfed.base import tree
from polyfed.base.types import ClientId
from polyfed.core.message import Message
from polyfed.data.client import FederatedData
from polyfed.execute.drivers import Sequential
from polyfed.metrics.catalogue import METRICS
from polyfed.metrics.metrics import Tallies, plus
from polyfed.rounds.clients import Clients
from polyfed.rounds.federation import ServerView
from polyfed.rounds.scoring import Score, Scorer
from polyfed.rounds.unit import Report, measure


@dataclass
class Evaluation:
    """The scores of a round.

    Args:
        scores: by client, all of them or the configured sample.
        before: the scores of the clients of the round just after their training, before aggregation.
        whole: of each of the server's own models the score on the test data of these clients pooled, and the scores on
            the single clients' test data.
        gradient: mean over a sample of clients of the squared norm of the whole local model's gradient.
        flops: FLOPs of the whole evaluation: forward passes, and the work of `Algorithm.predictor_parts` before them.
        seconds: seconds of the evaluation.
    """

    scores: dict[ClientId, Score]
    before: Sequence[Score] = ()
    whole: dict[str, tuple[Score, list[Score]]] = field(default_factory=dict[str, tuple[Score, list[Score]]])
    gradient: float | None = None
    flops: float = 0
    seconds: float = 0.0

    @property
    def flops_per_example(self) -> float:
        """FLOPs of predicting one example with all predictors; the mean over clients."""
        return float(np.mean([score.flops / score.examples for score in self.scores.values()]))

    @property
    def down(self) -> int:
        """Bytes sent for this evaluation."""
        return sum(score.down for score in self.scores.values())

    @property
    def predictors(self) -> list[str]:
        """Names of all predictors, the default first."""
        return next(iter(self.scores.values())).predictors

    def mean(
        self, predictor: str | None = None, clients: Sequence[ClientId] | None = None, metric: str = "accuracy"
    ) -> float | None:
        """Return the mean of a metric, without weights, over the clients where it is defined; None without any."""
        chosen = self.scores if clients is None else clients
        return mean_of([self.scores[k].value(metric, predictor) for k in chosen])

    def worst_decile(self, metric: str = "accuracy") -> float | None:
        """Return the mean over the worst tenth of the clients (at least one client) for which a metric is defined."""
        return worst_of(metric, [score.value(metric) for score in self.scores.values()])

    @cached_property
    def pooled(self) -> Tallies:
        """The tallies of all clients together; empty if the accuracy is the only metric."""
        return plus(*(score.tallies for score in self.scores.values()))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there; None if there are none."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def worst_of(metric: str, values: Sequence[float | None]) -> float | None:
    """Return the mean of the worst tenth, at least one, of the values that are there; None if there are none."""
    there = sorted((value for value in values if value is not None), reverse=not METRICS[metric].higher)
    return mean_of(there[: math.ceil(len(there) / 10)])


def messages_for(view: ServerView, server: Any, clients: Sequence[ClientId]) -> dict[ClientId, Message | None]:
    """Return the message from which each client predicts; clients that get equal messages share one object.

    Args:
        view: the server's knowledge of the federation.
        server: the server's state.
        clients: the clients.
    """
    algorithm = view.algorithm
    made: dict[object, Message | None] = {}
    down: dict[ClientId, Message | None] = {}
    for client in clients:
        info = view.info(client)
        kind = info if algorithm.personal_message else replace(info, id=0)
        if kind not in made:
            made[kind] = algorithm.message_for(server, info)
        down[client] = made[kind]
    return down


class Evaluator:
    """Tests clients and server models.

    Args:
        view: the server's knowledge of the federation.
        driver: says where and how networks are tested, and counts the FLOPs of the tests.
        test_data: all clients' test data; None if the server has no data, and so tests no models of its own.
    """

    def __init__(self, view: ServerView, driver: Sequential, test_data: FederatedData | None = None) -> None:
        self.view, self.driver, self.costs, self.test_data = view, driver, driver.costs, test_data
        self.scorer = Scorer(view.algorithm, driver.placement, driver.costs, view.config)

    def evaluate(
        self,
        server: Any,
        clients: Clients,
        round_: int,
        chosen: Sequence[ClientId],
        reports: Mapping[ClientId, Report] | None = None,
        *,
        final: bool = False,
    ) -> Evaluation:
        """Test the chosen clients after aggregation, the cohort before it, and the server's models.

        Args:
            server: the server's state.
            clients: the clients.
            round_: number of the round.
            chosen: the clients to test.
            reports: the reports of the round's cohort.
            final: whether the evaluation reports the run's result; see `Partition.evaluated`.
        """
        clock = self.costs.clock()
        before = [report.score for report in (reports or {}).values() if report.score is not None]
        scores = self._clients(server, clients, round_, chosen, final=final)
        whole, flops = self._whole(server, list(scores), final=final)
        return Evaluation(
            scores,
            before,
            whole,
            flops=flops + sum(score.flops + score.flops_parts for score in (*before, *scores.values())),
            seconds=clock() + sum(score.seconds for score in before),
        )

    def _clients(
        self, server: Any, clients: Clients, round_: int, chosen: Sequence[ClientId], *, final: bool
    ) -> dict[ClientId, Score]:
        down = messages_for(self.view, server, chosen)
        sizes = {id(message): measure(message).total for message in {id(m): m for m in down.values()}.values()}
        scores = clients.evaluate(round_, down, final=final)
        for k, score in scores.items():
            score.down = sizes[id(down[k])]
        return scores

    def _whole(
        self, server: Any, clients: Sequence[ClientId], *, final: bool
    ) -> tuple[dict[str, tuple[Score, list[Score]]], float]:
        named = {} if self.test_data is None else self.view.algorithm.global_nets(server, self.view.task)
        if self.test_data is None or not named:
            return {}, 0
        data, positions, sizes = self.test_data.global_test(clients, final=final)
        places = np.split(positions, np.cumsum(sizes)[:-1])
        out: dict[str, tuple[Score, list[Score]]] = {}
        flops: float = 0
        for name, nets in named.items():
            models = {part: net.model for part, net in nets.items() if net.model is not None}
            place = self.driver.testing_server(models)
            placed = {part: replace(net, params=tree.map_leaves(place.put, net.params)) for part, net in nets.items()}
            outputs, cost = self.scorer.outputs(placed, data, place)
            flops += cost
            predictor, found = next(iter(outputs.items()))
            whole = self.scorer.read({predictor: found}, data.labels)
            out[name] = whole, [self.scorer.read({predictor: found[at]}, data.labels[at]) for at in places]
        return out, flops
