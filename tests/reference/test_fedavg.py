"""One round of FedAvg against the plain implementation."""

from typing import Any

import plain
import pytest
import torch
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


@pytest.mark.parametrize("augment", [True, False])
def test_images_are_augmented_if_and_only_if_the_configuration_says_so(augment: bool) -> None:
    """Catches ``data.augment`` ignored, and training on shifted images where none were asked for."""
    fed = toy.federation(
        FedAvg(), models=("resnet8(norm=group, width=4)",), shape=(1, 8, 8), sizes=(9, 8), train={"lr": 0.1},
        augment=augment,
    )  # fmt: skip
    assert fed.local(0, 1).train.augment is augment
    game = toy.play(fed, precision="fp64")
    w = toy.copy(game.server.model)
    game.round()
    ended = [plain.local_sgd(resnet8("group"), w, pairs(batches(game, k, 1)), plain.Settings(0.1)) for k in range(2)]
    toy.close(game.server.model, plain.mean(ended, [9, 8]), TOLERANCE["fp64"])
    same = []
    for k in range(2):
        local = game.local(k, 1)
        with game.driver.placement.defaults():
            rows = [step.rows for step in local.plan.schedule(len(local.train), local.rng.at("batches"))]
            raw = [local.train.batch(these, dtype=torch.float64)[0] for these in rows]
        same += [torch.equal(x, y) for x, (y, _) in zip(raw, pairs(batches(game, k, 1)), strict=True)]
    assert all(same) is not augment
    assert any(same) is not augment
