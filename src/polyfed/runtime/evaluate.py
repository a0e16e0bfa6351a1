"""How good the models are: exact counts over whole test sets, every predictor in one pass, metered apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyfed.execute.cost import CostCounter
from polyfed.execute.fitting import EVAL_BATCH, bind, tree_to
from polyfed.execute.place import Place
from polyfed.message import Message, Nothing
from polyfed.nets import Nets
from polyfed.parties import ClientData
from polyfed.runtime.clients import Clients, Report, measure
from polyfed.runtime.federation import Federation
from polyfed.typing import ClientId, Parts


@dataclass
class Score:
    """One client's test.

    Args:
        examples: how many test examples.
        correct: right answers of each predictor, the default first.
        down: bytes sent to the client for this evaluation.
    """

    examples: int
    correct: dict[str, int]
    down: int = 0

    def accuracy(self, predictor: str | None = None) -> float:
        """The share of right answers of a predictor, or of the default one."""
        name = next(iter(self.correct)) if predictor is None else predictor
        return self.correct[name] / self.examples


@dataclass
class Evaluation:
    """The scores of a round.

    Args:
        scores: by client, all of them or the configured sample.
        official: accuracy of the clients of the round just after their training, before aggregation.
        whole: accuracy of each of the server's own models on all test data, and the mean of its accuracies on the
            single clients' test data.
        flops: of all forward passes.
        seconds: of the evaluation.
    """

    scores: dict[ClientId, Score]
    official: float | None = None
    whole: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    flops: int = 0
    seconds: float = 0.0

    @property
    def down(self) -> int:
        """Bytes sent for the sake of this evaluation."""
        return sum(score.down for score in self.scores.values())

    @property
    def predictors(self) -> list[str]:
        """All names, the default first."""
        return list(next(iter(self.scores.values())).correct)

    def mean(self, predictor: str | None = None, clients: Sequence[ClientId] | None = None) -> float:
        """The mean over clients, each counting once."""
        chosen = self.scores if clients is None else clients
        return float(np.mean([self.scores[k].accuracy(predictor) for k in chosen]))

    def worst_decile(self) -> float:
        """The mean over the worst tenth of the clients (at least one)."""
        accuracies = sorted(score.accuracy() for score in self.scores.values())
        return float(np.mean(accuracies[: math.ceil(len(accuracies) / 10)]))


class Evaluator:
    """Tests clients and server models on one place."""

    def __init__(self, federation: Federation, place: Place, costs: CostCounter) -> None:
        self.federation, self.place, self.costs = federation, place, costs
        self._flops = 0

    def evaluate(
        self, server: Any, clients: Clients, round_: int, reports: Mapping[ClientId, Report] | None = None
    ) -> Evaluation:
        """Test clients (all, or the sample) after aggregation, the cohort before it, and the server's models."""
        started, counting = time.perf_counter(), self.costs.seconds
        self._flops = 0
        official = self._official(reports or {})
        scores = self._clients(server, clients, round_)
        whole = self._whole(server)
        seconds = time.perf_counter() - started - (self.costs.seconds - counting)
        return Evaluation(scores, official, whole, self._flops, seconds)

    def _sample(self, round_: int) -> list[int]:
        count, sample = self.federation.config.clients.count, self.federation.config.run.eval_clients
        if sample is None or sample >= count:
            return list(range(count))
        rng = self.federation.rng.at("round", round_, "evaluate").numpy()
        return sorted(int(k) for k in rng.choice(count, sample, replace=False))

    def _clients(self, server: Any, clients: Clients, round_: int) -> dict[ClientId, Score]:
        algorithm, out = self.federation.algorithm, dict[ClientId, Score]()
        sent: dict[object, tuple[Message | None, int]] = {}
        shared: dict[object, Parts] = {}
        for k in self._sample(round_):
            info = self.federation.info(k)
            kind = info if algorithm.personal_broadcast else replace(info, id=0)
            if kind not in sent:
                message = algorithm.broadcast(server, info)
                sent[kind] = (message, measure(message).total)
            message, nbytes = sent[kind]
            private, local = clients.private(k), self.federation.local(k, round_)
            if not isinstance(private, Nothing):
                parts = tree_to(algorithm.parts(private, message, local), self.place)
            elif kind in shared:  # clients that keep nothing and receive the same have the same model
                parts = shared[kind]
            else:
                parts = shared[kind] = tree_to(algorithm.parts(private, message, local), self.place)
            out[k] = self._score(bind(local.models, parts), self.federation.data.test(k))
            out[k].down = nbytes
        return out

    def _official(self, reports: Mapping[ClientId, Report]) -> float | None:
        accuracies = [
            self._score(
                bind(self.federation.local(k, 0).models, tree_to(report.work.parts, self.place)),
                self.federation.data.test(k),
            ).accuracy()
            for k, report in reports.items()
            if report.work.parts
        ]
        return float(np.mean(accuracies)) if accuracies else None

    def _whole(self, server: Any) -> dict[str, tuple[float, float]]:
        named = self.federation.algorithm.global_nets(server, self.federation.task)
        if not named:
            return {}
        data, owner = self.federation.data.global_test(), self._owners()
        out: dict[str, tuple[float, float]] = {}
        for name, nets in named.items():
            moved = {
                part: replace(net, params={k: v.to(self.place.device) for k, v in net.params.items()})
                for part, net in nets.items()
            }
            right = next(iter(self._right(moved, data).values())).cpu().numpy()
            per_client = np.bincount(owner, right) / np.bincount(owner).clip(min=1)
            out[name] = (float(right.mean()), float(per_client.mean()))
        return out

    def _owners(self) -> np.ndarray:
        """Whose is each row of the global test set, which is all clients' rows in ascending order."""
        partition = self.federation.partition
        order = np.argsort(partition.test_rows, kind="stable")
        return np.searchsorted(partition.test_offsets, order, side="right") - 1

    def _score(self, nets: Nets, data: ClientData) -> Score:
        return Score(len(data), {name: int(right.sum()) for name, right in self._right(nets, data).items()})

    @torch.no_grad()
    def _right(self, nets: Nets, data: ClientData) -> dict[str, Tensor]:
        """For every predictor, which examples it gets right."""
        predict: Callable[[Tensor], Mapping[str, Tensor]]
        predict = lambda x: self.federation.algorithm.predict(nets, x)  # noqa: E731
        models = tuple((part, net.model.signature) for part, net in nets.items() if net.model is not None)
        for net in nets.values():
            if net.model is not None:
                net.model.train(False)
        found: dict[str, list[Tensor]] = {}
        for rows in torch.arange(len(data)).split(EVAL_BATCH):
            x, y = data.batch(rows, dtype=self.place.dtype, device=self.place.device)
            with self.place.autocast():
                cost = self.costs.forward(("predict", models, x.shape[1:]), predict, x)
                logits = predict(x)
            self._flops += cost.flops(len(x))
            for name, value in logits.items():
                found.setdefault(name, []).append(value.argmax(dim=1) == y)
        return {name: torch.cat(pieces) for name, pieces in found.items()}
