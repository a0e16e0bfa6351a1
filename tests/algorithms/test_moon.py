"""MOON: FedAvg at a client's first participation, whose model is which, and FedAvg's bytes."""

import math
from typing import Any

import pytest
import torch
import toy
from layers_by_hand import federation, numel
from torch.nn import functional

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.moon import Moon
from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.core.message import size
from polyfed.execute.local_training import bind

AVERAGES = ("architecture", "layer")


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_first_round_is_fedavgs_and_the_second_is_not(average: Any, driver: str) -> None:
    """Catches a contrast with a model that there is not yet; bitwise."""
    ours, theirs = (toy.play(federation(a), driver=driver) for a in (Moon(average=average), FedAvg(average=average)))
    assert tree.same(ours.round().server.model, theirs.round().server.model)
    assert not tree.same(ours.round().server.model, theirs.round().server.model)


def test_without_mu_it_is_fedavg_bit_by_bit() -> None:
    """Catches a loss of weight 0 that is computed all the same, and rounds otherwise."""
    none, theirs = (toy.play(federation(a), 2) for a in (Moon(average="layer", mu=0.0), FedAvg(average="layer")))
    assert tree.same(none.server.model, theirs.server.model)
    local = none.local(0, 3)
    message = none.federation.algorithm.message_for(none.server, local.info)
    request: Any = next(none.federation.algorithm.client_round(none.private(0), message, local))
    assert not request.frozen, "two networks are run for nothing"


def test_the_last_model_is_that_of_the_last_participation() -> None:
    """Catches a buffer that moves while a client sits out, and one of the aggregated model."""
    game = toy.play(federation(Moon(average="layer"), clients={"participation": 0.34}))
    last: dict[int, Any] = {k: {} for k in range(3)}
    for _ in range(5):
        game.round()
        (k,) = game.got[-1]
        last[k] = game.got[-1][k].model
        assert all(tree.same(game.private(j).previous, last[j]) for j in range(3))
    assert len([k for k in range(3) if last[k]]) > 1


def test_the_loss_is_the_cross_entropy_of_two_similarities() -> None:
    """Catches similarities changed about, T left out, and a term that is not 0 where it has nothing to learn."""
    game = toy.play(federation(Moon(average="layer", mu=3.0, temperature=0.25)), 1)
    algorithm, local = game.federation.algorithm, game.local(1, 2)
    model, batch = local.models["model"], local.train.batch(torch.arange(6))
    w, far = game.server.model, game.private(1).previous
    model.train(True)

    def loss(received: Any, previous: Any) -> float:
        parts = {"model": toy.copy(w), "received": received, "previous": previous}
        return float(algorithm.loss(bind(local.models, parts), batch))

    plain = float(functional.cross_entropy(model(toy.copy(w), batch[0]), batch[1]))
    z, z_far = (model.represent(toy.copy(params), batch[0]) for params in (w, far))
    gap = (functional.cosine_similarity(z, z_far) - 1.0) / 0.25
    assert loss(w, far) == pytest.approx(plain + 3.0 * float(torch.log1p(gap.exp()).mean()), rel=1e-5)
    assert loss(far, w) == pytest.approx(plain + 3.0 * float(torch.log1p((-gap).exp()).mean()), rel=1e-5)
    assert loss(far, far) == pytest.approx(plain + 3.0 * math.log(2), rel=1e-5)
    statistics = {n: v.clone() for n, v in far.items()}
    loss(w, far)
    assert tree.same(far, statistics)  # a frozen model's running statistics stay what they are


def test_a_network_without_a_cut_before_its_classifier_is_refused() -> None:
    """Catches a fault that shows in the second round only."""
    fed = federation(Moon(), models=("layers_by_hand:Chain",))
    with pytest.raises(ModelError, match="classifier"):
        fed.algorithm.check(fed.task)


@pytest.mark.parametrize("average", AVERAGES)
def test_bytes_are_those_of_the_network(average: Any) -> None:
    """Catches the last model on the wire a second time."""
    game = toy.play(federation(Moon(average=average)), 2)
    for k in range(3):
        floats, counters = numel(k % 2 + 1)
        assert all(size(m[k]).values == 4 * floats + 8 * counters for m in (*game.sent, *game.got))
