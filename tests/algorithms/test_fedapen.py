"""FedAPEN: what decides its weight, what predicts and what travels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from auxiliary import (
    BODY,
    MLP,
    agree,
    body,
    federation,
    held_out_are_not_trained_on,
    held_out_decide,
    labels_of_tests_decide_nothing,
    last,
    weighs,
)
from torch import Tensor

from polyfed.algorithms.fedapen import FedAPEN
from polyfed.core.requests import drive
from polyfed.execute.local_training import bind
from polyfed.rounds.evaluation import Evaluator


def fedapen_predicts(cls: type[FedAPEN]) -> None:
    game = toy.play(federation(cls(auxiliary=MLP, holdout=0.3)))
    local, own, shared = game.local(0, 1), game.private(0).F, game.server.G
    x, _ = local.train.batch(torch.arange(5))
    nets = bind(local.models, {"F": own, "G": shared, "lambda": {"weight": torch.tensor(0.3)}})
    (W, b), (V, c) = last(own), last(shared)  # noqa: N806
    z, g = body(own, x) @ W.T + b, body(shared, x) @ V.T + c
    agree(game.federation.algorithm.predict(nets, x), {"ensemble": 0.3 * z + 0.7 * g, "private": z, "shared": g})


class WeightOfTheOther(FedAPEN):
    """lambda on the shared network."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got, lam = super().predict(nets, x), nets["lambda"]["weight"]
        return {**got, "ensemble": (1 - lam) * got["private"] + lam * got["shared"]}


class OfProbabilities(FedAPEN):
    """A third party's: the ensemble is of probabilities, not of logits."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got, lam = super().predict(nets, x), nets["lambda"]["weight"]
        return {**got, "ensemble": lam * got["private"].softmax(1) + (1 - lam) * got["shared"].softmax(1)}


def test_the_weight_that_predicts_is_the_weight_that_trains_next() -> None:
    """Catches a stale lambda at prediction, one that evaluation keeps, a pass for free or taken for a prediction."""
    game = toy.play(federation(FedAPEN(auxiliary=MLP, holdout=0.3, lr_lambda=0.02)), 2)
    fed, was = game.federation, [game.private(k).weight for k in range(3)]
    found = {}
    for k in range(3):
        local = game.local(k, 2)
        made = drive(
            fed.algorithm.predictor_parts(game.private(k), fed.algorithm.message_for(game.server, local.info), local),
            game.driver.perform,
        )
        found[k] = float(made["lambda"]["weight"])
        assert found[k] != was[k]
    scores = game.clients.evaluate(2, {k: fed.algorithm.message_for(game.server, fed.info(k)) for k in range(3)})
    assert [game.private(k).weight for k in range(3)] == was
    for k, held in enumerate((3, 2, 2)):
        both = {**game.private(k).F, **{f"G.{name}": value for name, value in game.server.G.items()}}
        products = sum(value.numel() for value in both.values() if value.dim() > 1)
        assert scores[k].flops == 2 * products * 6  # six test examples
        assert scores[k].flops_parts == 2 * products * held
    whole = Evaluator(fed, game.driver, fed.data).evaluate(
        game.server, game.clients, 2, range(fed.config.clients.count)
    )
    assert whole.flops_per_example == pytest.approx(sum(score.flops for score in scores.values()) / 6 / 3)
    shared = (
        2 * sum(value.numel() for value in game.server.G.values() if value.dim() > 1) * 18
    )  # G on all test examples
    assert whole.flops == sum(score.flops + score.flops_parts for score in scores.values()) + shared
    assert list(scores[0].correct) == ["ensemble", "private", "shared"]
    game.round()
    assert [game.private(k).weight for k in range(3)] == pytest.approx([found[k] for k in range(3)], abs=1e-12)


def test_the_weight_goes_to_the_better_network_and_no_further() -> None:
    """Catches the weight on the wrong network, an ascent, and a lambda outside [0, 1]."""
    y = torch.tensor([0, 1, 2, 0])
    good, bad = 9.0 * torch.nn.functional.one_hot(y, 3).double(), torch.zeros(4, 3, dtype=torch.float64)
    algorithm = FedAPEN(lr_lambda=100.0)
    assert algorithm.learnt(0.5, {"z": good, "g": bad, "y": y}, 64) == 1.0
    assert algorithm.learnt(0.5, {"z": bad, "g": good, "y": y}, 64) == 0.0
    assert FedAPEN(lr_lambda=0.0).learnt(0.5, {"z": good, "g": bad, "y": y}, 64) == 0.5


def test_test_data_decide_nothing() -> None:
    """Catches a lambda that is chosen by test data: their labels may be anything."""
    labels_of_tests_decide_nothing(FedAPEN(auxiliary=MLP, holdout=0.3))


def test_held_out_examples_are_not_trained_on() -> None:
    """Catches a fit that sees them: with the choice taken away, they may be anything, over several rounds."""
    held_out_are_not_trained_on(FedAPEN(auxiliary=MLP, holdout=0.3, lr_lambda=0.0))


def test_held_out_examples_decide() -> None:
    """Catches a choice that looks at nothing."""
    held_out_decide(FedAPEN(auxiliary=MLP, holdout=0.3))


def test_predictors_are_their_formulas() -> None:
    """Catches predictors under each other's names, a weight of the wrong network, prefixes that are none."""
    fedapen_predicts(FedAPEN)


@pytest.mark.parametrize("faulty", [WeightOfTheOther, OfProbabilities])
def test_formulas_tell_faulty_predictors(faulty: type[FedAPEN]) -> None:
    """Catches a comparison of names alone."""
    with pytest.raises(AssertionError):
        fedapen_predicts(faulty)


def test_bytes_are_those_of_the_formula() -> None:
    """Catches more on the wire than the shared network: a lambda, a private part."""
    weighs(FedAPEN(auxiliary=MLP), BODY + 12 * 7 + 7 + 7 * 4 + 4)


def test_fedapen_weighs_what_it_learns_lambda_by() -> None:
    """Catches a lambda that descends another loss than torch's weighted and smoothed cross-entropy."""
    fed = toy.federation(FedAPEN(auxiliary=toy.MLP), models=(toy.MLP,), train={"label_smoothing": 0.2})
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    client = replace(fed.local(0, 1), class_weights=lambda: weights)
    generator = torch.Generator().manual_seed(0)
    z, g = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 1, 1, 3, 2, 3])
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(lam * z + (1 - lam) * g, y, weight=client.weights, label_smoothing=0.2)
    (slope,) = torch.autograd.grad(loss, lam)
    learnt = FedAPEN(lr_lambda=0.1, epochs_lambda=1).learnt(0.5, {"z": z, "g": g, "y": y}, 6, client.weigh)
    assert learnt == pytest.approx(0.5 - 0.1 * float(slope), rel=1e-12)
