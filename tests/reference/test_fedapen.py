"""Two rounds of FedAPEN against a loop written from its equations, and the faults of released code that it sees."""

from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
import toy
from auxiliary_by_hand import (
    AUXILIARY,
    DRIVERS,
    SETTINGS,
    WIDTHS,
    batches,
    cross,
    descend,
    held,
    kl,
    net,
    privates,
    start,
)
from torch import Tensor

from polyfed.algorithms.fedapen import FedAPEN


def learn_lambda(z: Tensor, g: Tensor, y: Tensor, lam: float, *, lr: float, epochs: int, batch: int) -> float:
    """SGD on one number, by autograd."""
    weight = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    for _ in range(epochs):
        for rows in torch.arange(len(y)).split(batch):
            (slope,) = torch.autograd.grad(cross(weight * z[rows] + (1 - weight) * g[rows], y[rows]), weight)
            weight = (weight.detach() - lr * slope).clamp(0, 1).requires_grad_()
    return float(weight.detach())


def fedapen(cls: type[FedAPEN], driver: str = "sequential") -> None:
    """Two rounds of it are two rounds by hand."""
    game = start(cls(auxiliary=AUXILIARY, holdout=0.5, lr_lambda=0.3, epochs_lambda=3), driver)
    private = {k: (toy.copy(p.F), p.weight) for k, p in privates(game).items()}
    for _ in (1, 2):
        G = toy.copy(game.server.G)  # noqa: N806
        game.round()
        sent = []
        for k in range(3):
            own, shared = plain.load(net(WIDTHS[k]), private[k][0]), plain.load(net((10, 5)), G)
            x, y = held(game, k)
            with torch.no_grad():
                z, g = own(x), shared(x)
            lam = learn_lambda(z, g, y, private[k][1], lr=0.3, epochs=3, batch=4)
            optimizer = SETTINGS.optimizer([*own.parameters(), *shared.parameters()])
            for x, y in batches(game, k):
                z, g = own(x), shared(x)
                fixed_z, fixed_g = z.detach(), g.detach()
                pri = cross(z, y) + kl(fixed_g, z) + cross(lam * z + (1 - lam) * fixed_g, y)
                sha = cross(g, y) + kl(fixed_z, g) + cross(lam * fixed_z + (1 - lam) * g, y)
                descend(optimizer, (pri, list(own.parameters())), (sha, list(shared.parameters())))
            private[k] = plain.saved(own), lam
            sent.append(plain.saved(shared))
            toy.close(game.private(k).F, private[k][0], 1e-9)
            assert game.private(k).weight == pytest.approx(lam, rel=1e-9)
            assert lam != 0.5
        toy.close(game.server.G, plain.mean(sent, [1, 1, 1]), 1e-9)


class MeanOverElements(FedAPEN):
    """KL as a mean over examples and classes: L times weaker."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        z, g, lam = nets["F"](x), nets["G"](x), nets["lambda"]["weight"]
        weak = (kl(g.detach(), z) + kl(z.detach(), g)) / z.shape[1]
        return cross(z, y) + cross(g, y) + 2 * cross(lam * z + (1 - lam) * g, y) + weak


class NotDetached(FedAPEN):
    """Each network receives the gradient of the other's loss, too."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        z, g, lam = nets["F"](x), nets["G"](x), nets["lambda"]["weight"]
        return cross(z, y) + cross(g, y) + 2 * cross(lam * z + (1 - lam) * g, y) + kl(g, z) + kl(z, g)


class LearntOnTraining(FedAPEN):
    """lambda_k is learnt on what both networks have fitted."""

    def predictor_parts(self, private: Any, msg: Any, client: Any) -> Any:
        return (yield from super().predictor_parts(private, msg, replace(client, held_out=client.train)))


class Forgets(FedAPEN):
    """lambda_k begins at 1/2 every time."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        return (yield from super().client_round(replace(private, weight=0.5), msg, client))


@DRIVERS
def test_rounds_are_those_of_the_equations(driver: str) -> None:
    fedapen(FedAPEN, driver)


@pytest.mark.parametrize("faulty", [MeanOverElements, NotDetached, LearntOnTraining, Forgets])
def test_the_faults_of_released_code_are_seen(faulty: type[FedAPEN]) -> None:
    with pytest.raises(AssertionError):
        fedapen(faulty)
