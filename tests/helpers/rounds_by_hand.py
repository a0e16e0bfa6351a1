"""What the tests of tests/reference share: drivers and tolerances, settings of training, a client's batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import toy
from torch import nn

from polyfed.models.mlp import MLP
from polyfed.models.resnet import ResNet

IMAGE = (1, 16, 16)
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}
RUNS = [("fp32", "sequential"), ("fp64", "sequential"), ("fp64", "batched")]
#: in [train], and for the plain loops
TRAINING: dict[str, tuple[dict[str, Any], plain.Settings]] = {
    "sgd": ({"lr": 0.1}, plain.Settings(0.1)),
    "momentum, decay, clip": (
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "clip": 0.5},
        plain.Settings(0.05, 0.9, 0.01, 0.5),
    ),
}


def batches(game: toy.Game, client: int, round_: int) -> list[Any]:
    """The batches of a client's training, images augmented, with whether an epoch starts."""
    local = game.local(client, round_)
    schedule, shifts = local.plan.schedule(len(local.train), local.rng.at("batches")), local.rng.at("augment").torch()
    place = game.driver.placement
    with place.defaults():
        return [
            (*local.train.batch(step.rows, generator=shifts, dtype=place.dtype), step.in_epoch == 0)
            for step in schedule
        ]


def pairs(found: list[Any]) -> list[Any]:
    return [(x, y) for x, y, _ in found]


def mlp() -> nn.Module:
    return MLP((7,), hidden=(12, 6), num_classes=4)


def resnet8(norm: str) -> Callable[[], nn.Module]:
    return partial(ResNet, (1, 8, 8), stem="plain", blocks=(1, 1, 1), width=4, norm=norm, num_classes=4)
