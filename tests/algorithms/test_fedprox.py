"""FedProx: FedAvg at mu = 0, less movement at larger ones, and FedAvg's bytes."""

from typing import Any

import pytest
import toy
from layers_by_hand import federation, numel

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedprox import FedProx
from polyfed.base import tree
from polyfed.core.message import size

AVERAGES = ("architecture", "layer")


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("average", AVERAGES)
def test_at_mu_0_it_is_fedavg(average: Any, driver: str) -> None:
    """Catches anything that FedProx does besides; bitwise."""
    prox, avg = (
        toy.play(federation(a, train={"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}), 3, driver=driver)
        for a in (FedProx(average=average, mu=0.0), FedAvg(average=average))
    )
    assert tree.same(prox.server.model, avg.server.model)


def test_clients_stay_the_nearer_the_larger_mu_is() -> None:
    """Catches a pull of the wrong sign, and one that pulls towards the weights themselves."""
    moved: list[float] = []
    for mu in (0.0, 1.0, 5.0):
        game = toy.play(federation(FedProx(average="layer", mu=mu)), 1)
        names = game.local(1).models["model"].parameter_names
        ends, start = game.got[0][1].model, game.sent[0][1].model
        moved.append(sum(float((ends[n] - start[n]).square().sum()) for n in names) ** 0.5)
    assert moved[0] > 1.1 * moved[1] > 1.3 * moved[2] > 0


@pytest.mark.parametrize("average", AVERAGES)
def test_bytes_are_those_of_the_network(average: Any) -> None:
    """Catches w_t sent a second time."""
    game = toy.play(federation(FedProx(average=average)), 1)
    for k in range(3):
        floats, counters = numel(k % 2 + 1)
        assert size(game.sent[0][k]).values == size(game.got[0][k]).values == 4 * floats + 8 * counters
