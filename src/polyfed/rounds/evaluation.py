"""The evaluation of a round: all clients (or a sample), the cohort before aggregation, and the server's own models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from polyfed.base import tree
from polyfed.base.types import ClientId
from polyfed.core.message import Message
from polyfed.data.client import FederatedData
from polyfed.execute.cost import CostCounter
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import Clients
from polyfed.rounds.federation import ServerView
from polyfed.rounds.scoring import Score, Scorer
from polyfed.rounds.unit import Report, measure


@dataclass
class Evaluation:
    """The scores of a round.

    Args:
        scores: by client, all of them or the configured sample.
        before_aggregation: accuracy of the clients of the round just after their training, before aggregation.
        whole: accuracy of each of the server's own models on the test data of these clients pooled, and the mean of
            its accuracies on the single clients' test data.
        gradient: mean over a sample of clients of the squared norm of the whole local model's gradient.
        flops: FLOPs of the whole evaluation: forward passes, and the work of `Algorithm.predictor_parts` before them.
        seconds: seconds of the evaluation.
    """

    scores: dict[ClientId, Score]
    before_aggregation: float | None = None
    whole: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
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
        return list(next(iter(self.scores.values())).correct)

    def mean(self, predictor: str | None = None, clients: Sequence[ClientId] | None = None) -> float:
        """Return the mean accuracy over clients, without weights."""
        chosen = self.scores if clients is None else clients
        return float(np.mean([self.scores[k].accuracy(predictor) for k in chosen]))

    def worst_decile(self) -> float:
        """Return the mean over the worst tenth of the clients (at least one client)."""
        accuracies = sorted(score.accuracy() for score in self.scores.values())
        return float(np.mean(accuracies[: math.ceil(len(accuracies) / 10)]))


class Evaluator:
    """Tests clients and server models.

    Args:
        view: the server's knowledge of the federation.
        placement: device and precision of the server's own tests.
        costs: counts the FLOPs of the tests.
        test_data: all clients' test data; None if the server has no data, and so tests no models of its own.
    """

    def __init__(
        self, view: ServerView, placement: Placement, costs: CostCounter, test_data: FederatedData | None = None
    ) -> None:
        self.view, self.placement, self.costs, self.test_data = view, placement, costs, test_data
        self.scorer = Scorer(view.algorithm, placement, costs)

    def evaluate(
        self,
        server: Any,
        clients: Clients,
        round_: int,
        chosen: Sequence[ClientId],
        reports: Mapping[ClientId, Report] | None = None,
    ) -> Evaluation:
        """Test the chosen clients after aggregation, the cohort before it, and the server's models."""
        clock = self.costs.clock()
        before = [report.score for report in (reports or {}).values() if report.score is not None]
        scores = self._clients(server, clients, round_, chosen)
        whole, flops = self._whole(server, list(scores))
        return Evaluation(
            scores,
            float(np.mean([score.accuracy() for score in before])) if before else None,
            whole,
            flops=flops + sum(score.flops + score.flops_parts for score in (*before, *scores.values())),
            seconds=clock() + sum(score.seconds for score in before),
        )

    def _clients(self, server: Any, clients: Clients, round_: int, chosen: Sequence[ClientId]) -> dict[ClientId, Score]:
        algorithm = self.view.algorithm
        made: dict[object, tuple[Message | None, int]] = {}
        down: dict[ClientId, tuple[Message | None, int]] = {}
        for k in chosen:
            info = self.view.info(k)
            kind = info if algorithm.personal_message else replace(info, id=0)
            if kind not in made:
                message = algorithm.message_for(server, info)
                made[kind] = (message, measure(message).total)
            down[k] = made[kind]
        scores = clients.evaluate(round_, {k: message for k, (message, _) in down.items()})
        for k, score in scores.items():
            score.down = down[k][1]
        return scores

    def _whole(self, server: Any, clients: Sequence[ClientId]) -> tuple[dict[str, tuple[float, float]], float]:
        named = {} if self.test_data is None else self.view.algorithm.global_nets(server, self.view.task)
        if self.test_data is None or not named:
            return {}, 0
        data, positions, sizes = self.test_data.global_test(clients)
        starts = np.cumsum(sizes) - sizes
        out: dict[str, tuple[float, float]] = {}
        flops: float = 0
        for name, nets in named.items():
            placed = {
                part: replace(net, params=tree.map_leaves(self.placement.put, net.params)) for part, net in nets.items()
            }
            found, cost = self.scorer.right(placed, data, self.placement)
            flops += cost
            right = next(iter(found.values())).cpu().numpy()
            per_client = np.add.reduceat(right[positions], starts, dtype=np.int64) / sizes
            out[name] = (float(right.mean()), float(per_client.mean()))
        return out, flops
