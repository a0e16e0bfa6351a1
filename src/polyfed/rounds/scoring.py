"""The test of one model on one test set: exact counts, all predictors in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import Examples
from polyfed.core.net import Nets
from polyfed.execute.cost import CostCounter
from polyfed.execute.local_training import EVAL_BATCH, reported, set_training
from polyfed.execute.placement import Placement


@dataclass
class Score:
    """The result of one client's test.

    Args:
        examples: number of test examples.
        correct: right answers of each predictor, the default first.
        flops: FLOPs of the forward passes on the test examples.
        flops_parts: FLOPs of `Algorithm.predictor_parts` before them, which do not depend on the test examples.
        seconds: seconds of both.
        down: bytes sent to the client for this evaluation.
    """

    examples: int
    correct: dict[str, int]
    flops: float = 0
    flops_parts: float = 0
    seconds: float = 0.0
    down: int = 0

    def accuracy(self, predictor: str | None = None) -> float:
        """Return the share of right answers of a predictor, by default of the default predictor."""
        name = next(iter(self.correct)) if predictor is None else predictor
        return self.correct[name] / self.examples


class Scorer:
    """Tests the models of one algorithm with one placement."""

    def __init__(self, algorithm: Algorithm, placement: Placement, costs: CostCounter) -> None:
        self.algorithm, self.placement, self.costs = algorithm, placement, costs

    def score(self, nets: Nets, data: Examples, placement: Placement | None = None) -> Score:
        """Return the counts of all predictors; ``placement`` may differ in layout from the scorer's."""
        clock = self.costs.clock()
        right, flops = self.right(nets, data, placement or self.placement)
        correct = {name: int(found.sum()) for name, found in right.items()}
        return Score(len(data), correct, flops, seconds=clock())

    @torch.no_grad()
    def right(self, nets: Nets, data: Examples, placement: Placement) -> tuple[dict[str, Tensor], float]:
        """Return for each predictor which examples it gets right, (n,) bool; and the FLOPs of the test."""
        predict = partial(self.algorithm.predict, nets)
        models = {part: net.model for part, net in nets.items() if net.model is not None}
        set_training(models, False)
        signatures = tuple((part, model.signature) for part, model in models.items())
        found: dict[str, list[Tensor]] = {}
        flops: float = 0
        for rows in torch.arange(len(data)).split(EVAL_BATCH):
            x, y = placement.batch(data, rows)
            with placement.autocast(), reported("a test"):
                flops += self.costs.forward(("predict", signatures, x.shape[1:]), predict, x)
                logits = predict(x)
            for name, value in logits.items():
                found.setdefault(name, []).append(value.argmax(dim=1) == y)
        return {name: torch.cat(pieces) for name, pieces in found.items()}, flops
