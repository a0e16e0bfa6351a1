"""A private network and a small shared one, played and followed by hand: what the references of such algorithms share.

Modules, torch.optim and autograd; of polyfed only its networks' modules and the batches are used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from torch import Tensor, nn
from torch.nn import functional

from polyfed.models.mlp import MLP

SIZES = (12, 9, 7)
MODELS = ("mlp(hidden=(12, 6))", "mlp(hidden=(8,))")
WIDTHS = {0: (12, 6), 1: (8,), 2: (12, 6)}
AUXILIARY = "mlp(hidden=(10, 5))"
TRAIN = {"epochs": 2, "batch_size": 4, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
SETTINGS = plain.Settings(0.05, 0.9, 0.01)
DRIVERS = pytest.mark.parametrize("driver", ["sequential", "batched"])


def start(algorithm: Any, driver: str, **more: Any) -> toy.Game:
    fed = toy.federation(algorithm, models=MODELS, sizes=SIZES, train=TRAIN, **more)
    return toy.play(fed, driver=driver, precision="fp64")


def privates(game: toy.Game) -> dict[int, Any]:
    with game.driver.placement.defaults():
        return {k: game.private(k) for k in range(3)}


def batches(game: toy.Game, client: int) -> list[Any]:
    local = game.local(client)
    with game.driver.placement.defaults():
        schedule = local.plan.schedule(len(local.train), local.rng.at("batches"))
        return [local.train.batch(step.rows, dtype=torch.float64) for step in schedule]


def held(game: toy.Game, client: int) -> tuple[Tensor, Tensor]:
    data = game.local(client).held_out
    return data.batch(torch.arange(len(data)), dtype=torch.float64)


def net(hidden: tuple[int, ...]) -> Callable[[], nn.Module]:
    return partial(MLP, (7,), hidden=hidden, num_classes=4)


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(p(target) || p(logits)), the mean over rows."""
    p = target.softmax(1)
    return (p * (target.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()


def leaves(weights: Any) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in weights.items()}


def descend(optimizer: torch.optim.Optimizer, *losses: tuple[Tensor, list[Tensor]]) -> None:
    """One step, each loss for its own weights."""
    optimizer.zero_grad()
    for loss, params in losses:
        for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
            p.grad = g if p.grad is None else p.grad + g
    optimizer.step()


def cross(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y)


def forward(w: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """The first layers of a dense network, by hand."""
    for layer in range(1, layers + 1):
        x = torch.relu(x @ w[f"fc{layer}.weight"].T + w[f"fc{layer}.bias"])
    return x
