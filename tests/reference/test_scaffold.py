"""Rounds of SCAFFOLD against plain torch: control variates by client and by key, with loops."""

from typing import Any

import plain
import pytest
import torch
import toy
from layers_by_hand import RUNS, SIZES, hand
from torch import nn

from polyfed.algorithms.scaffold import Scaffold


def train(
    make: Any, start: plain.Weights, c: plain.Weights, c_k: plain.Weights, batches: Any, settings: plain.Settings
) -> plain.Weights:
    @torch.no_grad()
    def corrected(module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p -= settings.lr * (c[name] - c_k[name])

    return plain.local_sgd(make, start, batches, settings, after=corrected)


@pytest.mark.parametrize(("average", "training", "precision", "driver"), RUNS)
def test_scaffold(average: str, training: str, precision: Any, driver: str) -> None:
    """Catches a correction of the wrong sign, size or moment, c of the wrong round, and the wrong K of a key."""
    by = hand(Scaffold, average, training, precision, driver)
    w = toy.copy(by.game.server.model)
    keys = {by.key(k, n) for k in range(3) for n in by.weights(k)}
    c = {key: torch.zeros_like(w[key]) for key in keys}
    c_k = [{n: torch.zeros_like(w[by.key(k, n)]) for n in by.weights(k)} for k in range(3)]
    clients = {key: len(by.owners(key)) for key in keys}
    assert set(clients.values()) == {"all": {3}, "architecture": {1, 2}, "layer": {1, 3}}[average]
    for t in by.rounds(3):
        sent: list[plain.Weights] = []
        changes = {key: torch.zeros_like(value) for key, value in c.items()}
        for k in range(3):
            start, own, found = by.own(k, w), by.own(k, c), by.batches(k, t)
            sent.append(train(by.make(k), start, own, c_k[k], found, by.settings))
            for n in by.weights(k):
                new = c_k[k][n] - own[n] + (start[n] - sent[k][n]) / (len(found) * by.settings.lr)
                changes[by.key(k, n)] += new - c_k[k][n]
                c_k[k][n] = new
        w = plain.fedin_server(w, [by.keyed(k, one) for k, one in enumerate(sent)], SIZES)
        c = {key: value + changes[key] / clients[key] for key, value in c.items()}
        if precision == "fp32" and t > 1:
            continue  # a difference of weights over their rate has few digits left in single precision
        toy.close(by.game.server.model, w, by.tolerance)
        toy.close(by.game.server.control, c, by.tolerance * (1000 if precision == "fp32" else 10))
        for k in range(3):
            toy.close(by.game.private(k).control, c_k[k], by.tolerance * (1000 if precision == "fp32" else 10))
