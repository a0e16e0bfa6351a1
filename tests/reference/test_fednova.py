"""Rounds of FedNova against plain torch: the effective steps added up one by one."""

from typing import Any

import plain
import pytest
import toy
from layers_by_hand import RUNS, SIZES, hand

from polyfed.algorithms.fednova import FedNova


def effective(settings: plain.Settings, steps: int) -> float:
    """How far a gradient of 1 in each step moves a weight at rate 1."""
    velocity = moved = 0.0
    for _ in range(steps):
        velocity = settings.momentum * velocity + 1.0
        moved += velocity
    return moved


@pytest.mark.parametrize(("average", "training", "precision", "driver"), RUNS)
def test_fednova(average: str, training: str, precision: Any, driver: str) -> None:
    """Catches steps that are not effective ones, p_k over clients that lack the key, and normalised buffers."""
    by = hand(FedNova, average, training, precision, driver)
    w = toy.copy(by.game.server.model)
    for t in by.rounds(2):
        sent: list[plain.Weights] = []
        a: list[float] = []
        for k in range(3):
            found = by.batches(k, t)
            sent.append(by.keyed(k, plain.local_sgd(by.make(k), by.own(k, w), found, by.settings)))
            a.append(effective(by.settings, len(found)))
        assert len(set(a)) > 1
        new = plain.fedin_server(w, sent, SIZES)
        for key in {by.key(k, n) for k in range(3) for n in by.weights(k)}:
            own = by.owners(key)
            p = {k: SIZES[k] / sum(SIZES[j] for j in own) for k in own}
            direction = sum(p[k] * (w[key] - sent[k][key]).double() / a[k] for k in own)
            new[key] = (w[key] - sum(p[k] * a[k] for k in own) * direction).to(w[key].dtype)
        w = new
        toy.close(by.game.server.model, w, by.tolerance)
        w = toy.copy(by.game.server.model) if precision == "fp32" else w
