"""The test of one model on one test set: exact counts and metrics, all predictors in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from polyfed.base.errors import DivergedError
from polyfed.blocks.losses import probabilities
from polyfed.config import Config
from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import Examples
from polyfed.core.net import Nets
from polyfed.execute.cost import CostCounter
from polyfed.execute.local_training import EVAL_BATCH, reported, set_training
from polyfed.execute.placement import Placement
from polyfed.metrics.catalogue import beyond_accuracy
from polyfed.metrics.metrics import Tallies, tallies, value
from polyfed.metrics.tallies import Predictions


@dataclass
class Score:
    """The result of one client's test.

    Args:
        examples: number of test examples.
        correct: right answers of each predictor, the default first; empty for a regression.
        flops: FLOPs of the forward passes on the test examples.
        flops_parts: FLOPs of `Algorithm.predictor_parts` before them, which do not depend on the test examples.
        seconds: seconds of both.
        down: bytes sent to the client for this evaluation.
        values: the metrics of each predictor, the default first; empty if the accuracy is the only one.
        tallies: what these metrics are computed from, of the default predictor: they add over clients.
        rows: the scores of each test row, by predictor, where they are kept.
        majority: the metrics of a client that predicts its most frequent training class, or for a regression its mean
            training target, for every test row; where they are asked for.
    """

    examples: int
    correct: dict[str, int]
    flops: float = 0
    flops_parts: float = 0
    seconds: float = 0.0
    down: int = 0
    values: dict[str, dict[str, float | None]] = field(default_factory=dict[str, dict[str, float | None]])
    tallies: Tallies = field(default_factory=dict)
    rows: dict[str, Predictions] = field(default_factory=dict[str, Predictions])
    majority: dict[str, float | None] = field(default_factory=dict[str, float | None])

    @property
    def predictors(self) -> list[str]:
        """Names of all predictors, the default first."""
        return list(self.correct or self.values)

    def value(self, metric: str, predictor: str | None = None) -> float | None:
        """Return a metric of a predictor, by default of the default predictor; None where it is not defined."""
        if metric == "accuracy":
            return self.accuracy(predictor)
        return self.values[self.predictors[0] if predictor is None else predictor][metric]

    def accuracy(self, predictor: str | None = None) -> float:
        """Return the share of right answers of a predictor, by default of the default predictor."""
        name = next(iter(self.correct)) if predictor is None else predictor
        return self.correct[name] / self.examples


def majority(train: Tensor, test: Tensor, num_classes: int, metrics: Sequence[str]) -> dict[str, float | None]:
    """Return the metrics of predicting the most frequent training class (the first of equals), or the mean target.

    Args:
        train: labels of the training rows, (n,); those of -1 are of rows without a label, and do not count.
        test: labels of the test rows, (m,).
        num_classes: L, or 1 for a regression.
        metrics: names of metrics.
    """
    if train.is_floating_point():
        scores = np.full((len(test), 1), float(train.mean()))
    else:
        scores = np.eye(num_classes)[[int(train[train >= 0].bincount().argmax())] * len(test)]
    sums = tallies(metrics, Predictions(test.cpu().numpy(), scores))
    return {name: value(name, sums) for name in metrics}


class Scorer:
    """Tests the models of one algorithm with one placement.

    Args:
        algorithm: the algorithm.
        placement: where it is tested.
        costs: counts the FLOPs.
        config: the configuration: the task, and the metrics.

    Attributes:
        keep: whether scores keep those of each row.
    """

    keep = False

    def __init__(self, algorithm: Algorithm, placement: Placement, costs: CostCounter, config: Config) -> None:
        self.algorithm, self.placement, self.costs, self.data = algorithm, placement, costs, config.data
        self.metrics = beyond_accuracy(config.metrics)

    def score(self, nets: Nets, data: Examples, placement: Placement | None = None) -> Score:
        """Return the counts and metrics of all predictors; ``placement`` may differ in layout from the scorer's."""
        clock = self.costs.clock()
        outputs, flops = self.outputs(nets, data, placement or self.placement)
        found = self.read(outputs, data.labels)
        found.flops, found.seconds = flops, clock()
        return found

    def read(self, outputs: Mapping[str, Tensor], labels: Tensor) -> Score:
        """Return the score of some rows by the outputs of each predictor, (n, L), and the labels, (n,)."""
        found = Score(len(labels), {})
        if self.data.task == "classification":
            found.correct = {name: int((out.argmax(1) == labels.to(out.device)).sum()) for name, out in outputs.items()}
        rows = {name: self.predictions(out, labels) for name, out in outputs.items() if self.metrics or self.keep}
        if self.metrics:
            every = {name: tallies(self.metrics, seen) for name, seen in rows.items()}
            found.values = {name: {m: value(m, sums) for m in self.metrics} for name, sums in every.items()}
            found.tallies = next(iter(every.values()))
        found.rows = rows if self.keep else {}
        return found

    @torch.no_grad()
    def outputs(self, nets: Nets, data: Examples, placement: Placement) -> tuple[dict[str, Tensor], float]:
        """Return the outputs of each predictor, (n, L), and the FLOPs of the test."""
        predict = partial(self.algorithm.predict, nets)
        models = {part: net.model for part, net in nets.items() if net.model is not None}
        set_training(models, False)
        signatures = tuple((part, model.signature) for part, model in models.items())
        found: dict[str, list[Tensor]] = {}
        flops: float = 0
        for rows in torch.arange(len(data)).split(EVAL_BATCH):
            x, _ = placement.batch(data, rows)
            with placement.autocast(), reported("a test"):
                flops += self.costs.forward(("predict", signatures, x.shape[1:]), predict, x)
                logits = predict(x)
            for name, some in logits.items():
                found.setdefault(name, []).append(some)
        return {name: torch.cat(pieces) for name, pieces in found.items()}, flops

    def predictions(self, outputs: Tensor, labels: Tensor) -> Predictions:
        """Return probabilities, or the predictions of a regression in the unit of the data.

        Raises:
            DivergedError: an output is NaN or infinite, but for the logit -inf of a class that is no candidate.
        """
        regression = self.data.task == "regression"
        if not bool((outputs.isfinite() | ((outputs == -torch.inf) & (not regression))).all()):
            raise DivergedError("an output on test data is not finite; lower train.lr or set train.clip")
        exact, y = outputs.double(), labels.cpu().numpy()
        if regression:
            return Predictions(y, (exact * self.data.target_scale + self.data.target_offset).cpu().numpy())
        return Predictions(y, probabilities(outputs).cpu().numpy(), outputs.argmax(dim=1).cpu().numpy())
