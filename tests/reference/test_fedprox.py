"""Rounds of FedProx against plain torch: autograd of the objective as it is written."""

from typing import Any

import plain
import pytest
import toy
from layers_by_hand import RUNS, SIZES, hand
from torch import Tensor, nn

from polyfed.algorithms.fedprox import FedProx

MU = 0.3


def train(make: Any, start: plain.Weights, batches: Any, settings: plain.Settings) -> plain.Weights:
    def pulled(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = plain.cross_entropy(module, x, y)
        for name, p in module.named_parameters():
            loss = loss + MU / 2 * (p - start[name]).square().sum()
        return loss

    return plain.local_sgd(make, start, batches, settings, pulled)


@pytest.mark.parametrize(("average", "training", "precision", "driver"), RUNS)
def test_fedprox(average: str, training: str, precision: Any, driver: str) -> None:
    """Catches a pull of another strength, towards another model, or on running statistics; and a wrong mean."""
    by = hand(FedProx, average, training, precision, driver, mu=MU)
    w = toy.copy(by.game.server.model)
    for t in by.rounds(2):
        sent = [by.keyed(k, train(by.make(k), by.own(k, w), by.batches(k, t), by.settings)) for k in range(3)]
        w = plain.fedin_server(w, sent, SIZES)
        toy.close(by.game.server.model, w, by.tolerance)
        w = toy.copy(by.game.server.model) if precision == "fp32" else w
