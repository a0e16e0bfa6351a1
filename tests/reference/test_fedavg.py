"""One round of FedAvg against the plain implementation."""

from typing import Any

import plain
import pytest
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, pairs, resnet8

from polyfed.algorithms.fedavg import FedAvg


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("training", TRAINING)
def test_fedavg(training: str, precision: Any, driver: str) -> None:
    """Catches a mean that is not by numbers of examples, and training that is not SGD; BatchNorm's buffers included."""
    keys, settings = TRAINING[training]
    net = "resnet8(norm=batch, width=4)"
    fed = toy.federation(FedAvg(), models=(net,), shape=(1, 8, 8), sizes=(11, 8, 6), train=keys)
    game = toy.play(fed, precision=precision, driver=driver)
    w = toy.copy(game.server.model)
    game.round()
    ended = [plain.local_sgd(resnet8("batch"), w, pairs(batches(game, k, 1)), settings) for k in range(3)]
    toy.close(
        game.server.model, plain.mean(ended, [11, 8, 6]), TOLERANCE[precision] * (100 if driver == "batched" else 1)
    )
