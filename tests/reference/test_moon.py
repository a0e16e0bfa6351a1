"""Rounds of MOON against plain torch: three modules, the loss as it is written."""

from typing import Any

import plain
import pytest
import torch
import toy
from layers_by_hand import RUNS, SIZES, Chain, hand
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.moon import Moon

MU, T = 2.0, 0.3


def represent(module: nn.Module, x: Tensor) -> Tensor:
    return module.represent(x) if isinstance(module, Chain) else plain.inner(module, plain.extract(module, x))


def train(
    make: Any, start: plain.Weights, last: plain.Weights | None, batches: Any, settings: plain.Settings
) -> plain.Weights:
    received, previous = plain.load(make, start), plain.load(make, start if last is None else last)

    def contrasted(module: Any, x: Tensor, y: Tensor) -> Tensor:
        z = represent(module, x)
        loss = functional.cross_entropy(module.fc(z), y)
        if last is None:
            return loss
        with torch.no_grad():
            z_glob, z_prev = represent(received, x), represent(previous, x)
        near, far = (
            torch.exp((z * other).sum(1) / (z.norm(dim=1) * other.norm(dim=1)) / T) for other in (z_glob, z_prev)
        )
        return loss - MU * torch.log(near / (near + far)).mean()

    return plain.local_sgd(make, start, batches, settings, contrasted)


@pytest.mark.parametrize(("average", "training", "precision", "driver"), RUNS)
def test_moon(average: str, training: str, precision: Any, driver: str) -> None:
    """Catches models changed about, a temperature on one side, a gradient through frozen models, and statistics."""
    by = hand(Moon, average, training, precision, driver, mu=MU, temperature=T)
    w, last = toy.copy(by.game.server.model), [None] * 3
    for t in by.rounds(3):
        sent = [train(by.make(k), by.own(k, w), last[k], by.batches(k, t), by.settings) for k in range(3)]
        w = plain.fedin_server(w, [by.keyed(k, one) for k, one in enumerate(sent)], SIZES)
        last = sent
        if precision == "fp32" and t > 1:
            continue
        toy.close(by.game.server.model, w, by.tolerance)
        for k in range(3):
            toy.close(by.game.private(k).previous, last[k], by.tolerance)
