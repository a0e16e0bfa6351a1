"""Clients with some of eight classes, played and followed by hand: what the references that know of classes share.

Two architectures of one width, and unequally many examples: class 0 is client 0's alone, class 3 is held by all, three
times by client 0, class 7 is client 2's alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import plain
import torch
import toy
from torch import Tensor, nn

from polyfed.base.rng import Rng
from polyfed.blocks.classwise import class_counts
from polyfed.core.algorithm import Algorithm
from polyfed.models.mlp import MLP

HIDDEN = ((12, 6), (9, 6))
TRAIN = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SETTINGS = plain.Settings(0.1, 0.9, 0.01)
SIZES = tuple(map(len, toy.LABELS))
L = 8


def network(hidden: tuple[int, ...]) -> nn.Module:
    return MLP((7,), hidden=hidden, num_classes=L)


def make(client: int) -> Callable[[], nn.Module]:
    return partial(network, HIDDEN[client % 2])


def body(net: Any, x: Tensor) -> Tensor:
    """All but the last layer."""
    for number in range(1, net.depth):
        x = torch.relu(net.get_submodule(f"fc{number}")(x))
    return x


def begin(algorithm: Algorithm, driver: str, **clients: Any) -> toy.Game:
    models = tuple(f"mlp(hidden={hidden})" for hidden in HIDDEN)
    fed = toy.federation(algorithm, models=models, labels=toy.LABELS, classes=L, train=TRAIN, clients=clients)
    return toy.play(fed, precision="fp64", driver=driver)


def start(game: toy.Game, field: str) -> dict[int, plain.Weights]:
    """What the clients begin with."""
    with game.driver.placement.defaults():
        return {k: toy.copy(getattr(game.private(k), field)) for k in range(3)}


def train(modules: list[nn.Module], steps: list[Any], losses: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    """Each module descends the loss in its place, and no other."""
    optimizers = [SETTINGS.optimizer(module.parameters()) for module in modules]
    for x, y in steps:
        found = losses(x, y)
        grads = [
            torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            for loss, module in zip(found, modules, strict=True)
        ]
        for module, grad in zip(modules, grads, strict=True):
            for p, g in zip(module.parameters(), grad, strict=True):
                p.grad = g
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def means(game: toy.Game, client: int, rows: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The mean row of each class of a client."""
    train = game.local(client).train
    x, y = train.batch(torch.arange(len(train)), dtype=torch.float64)
    return {str(c): rows(x)[y == c].mean(0) for c in sorted(set(y.tolist()))}


def mean_over_holders(uploads: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for upload in uploads for name in upload}
    return {name: torch.stack([upload[name] for upload in uploads if name in upload]).mean(0) for name in names}


class OfSums:
    """Sums over the examples of a class where means are due."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        kept, up = yield from super().client_round(private, msg, client)  # type: ignore[misc]
        (rows,) = (getattr(up, field.name) for field in fields(up))
        counts = class_counts(client)
        return kept, type(up)({c: row * counts[int(c)] for c, row in rows.items()})


SETTINGS = plain.Settings(TRAIN["lr"], TRAIN["momentum"], TRAIN["weight_decay"])


def server_rng(game: toy.Game, round_: int) -> Rng:
    return game.federation.rng.at("round", round_, "server")


def server_batches(rng: Rng, n: int, epochs: int, batch: int) -> list[Tensor]:
    """A new order in each epoch, cut into batches; a last batch of one is left out."""
    out = []
    for epoch in range(epochs):
        cuts = torch.randperm(n, generator=rng.at("training", "epoch", epoch).torch()).split(batch)
        out += [rows for rows in cuts if len(rows) > 1 or n == 1]
    return out


def descend(net: nn.Module, steps: list[Any], loss: Any) -> nn.Module:
    """Local training by a loss of (x, y) and the number of the step."""
    optimizer = SETTINGS.optimizer(net.parameters())
    for number, (x, y) in enumerate(steps):
        optimizer.zero_grad()
        loss(x, y, number).backward()
        optimizer.step()
    return net


def pooled(uploads: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    rows = [(upload[c], int(c)) for upload in uploads for c in upload]
    return torch.stack([row for row, _ in rows]), torch.tensor([c for _, c in rows])


def layer(client: int) -> str:
    """The name of a client's last layer."""
    return f"fc{len(HIDDEN[client % 2]) + 1}"


def under(weights: plain.Weights, head: plain.Weights, client: int) -> plain.Weights:
    return {**weights, **{f"{layer(client)}.{name}": value for name, value in head.items()}}


def apart(weights: plain.Weights, client: int) -> tuple[plain.Weights, plain.Weights]:
    head = {name: weights[f"{layer(client)}.{name}"] for name in ("weight", "bias")}
    return {name: v for name, v in weights.items() if not name.startswith(layer(client))}, head
