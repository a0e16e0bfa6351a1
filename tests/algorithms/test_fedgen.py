"""FedGen: what it sends, the generator that is trained, and classes that it does not know."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from by_class import federation, needs_equal_heads
from torch import Tensor

from polyfed.algorithms.fedgen import FedGen
from polyfed.algorithms.lg_fedavg import LGFedAvg
from polyfed.base import tree
from polyfed.base.errors import MessageError
from polyfed.base.rng import Rng
from polyfed.blocks.feature_generator import draw_classes
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.core.plan import Step
from polyfed.execute.local_training import bind
from polyfed.models.catalogue import ModelSpec

CNNS = tuple(map(ModelSpec.parse, ("cnn1", "cnn5")))


def test_fedgen_sends_what_the_card_says() -> None:
    """Catches bodies on the wire, a generator upwards or in an evaluation: |head| + L up, |G| + |head| down."""
    algorithm = FedGen()
    server = algorithm.init_server(Task((3, 32, 32), 10, architectures=CNNS), Rng((0,)))
    assert tree.numel(server.generator) == (32 + 10 + 1) * 256 + (256 + 1) * 500 == 139_508
    assert size(algorithm.message_for(server, ClientInfo(0))).values == 4 * 5_010
    game = toy.play(federation(FedGen(noise_dim=3, hidden=5, server_steps=1)), 1)
    for k in range(3):
        report = game.played[0].reports[k]
        assert report.down.values == 4 * ((6 + 1) * 8 + (3 + 8 + 1) * 5 + (5 + 1) * 6)
        assert report.up.values == 4 * ((6 + 1) * 8 + 8)


def made_for_class(algorithm: FedGen) -> None:
    """After some rounds the generator that clients get makes what the heads take for the class asked for."""
    game = toy.play(federation(algorithm, sizes=(16, 12, 9), train={"epochs": 4}), 6)
    sent = game.federation.algorithm
    game.round()
    msg, heads = game.sent[-1][0], [game.got[-2][k] for k in range(3)]
    step = Step(torch.arange(64), 0, 0)
    weights, counts = [h.head for h in heads], torch.stack([h.counts for h in heads])

    def loss(generator: Any) -> float:
        drawn = draw_classes(msg.classes, sent.noise_dim, Rng((5,)), step)
        return float(sent.server_loss(weights, counts, lambda step: drawn, generator, step))

    assert loss(msg.generator) < loss(game.sent[0][0].generator) - 0.2


class NeverSaved(FedGen):
    """HtFLlib: trained, and thrown away."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        after = yield from super().server_round(server, cohort)
        return replace(after, generator=server.generator)


def test_fedgen_clients_get_the_generator_that_was_trained() -> None:
    """Catches a generator that stays what it was drawn as."""
    keys = {"server_lr": 0.02, "server_steps": 30, "noise_dim": 4, "hidden": 16}
    made_for_class(FedGen(**keys))
    with pytest.raises(AssertionError):
        made_for_class(NeverSaved(**keys))


def test_fedgen_without_its_terms_is_lg_fedavg() -> None:
    """Catches a first round with terms of an untrained generator, and heads that do not weigh by examples."""
    algorithms = FedGen(server_steps=1), FedGen(alpha=0.0, beta=0.0, server_steps=1), LGFedAvg()
    with_it, without, other = (toy.play(federation(a)) for a in algorithms)
    for round_ in (1, 2):
        for game in (with_it, without, other):
            game.round()
        toy.close(without.server.head, other.server.head, 1e-5)
        assert (torch.allclose(with_it.server.head["weight"], other.server.head["weight"])) is (round_ == 1)


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def test_fedgen_says_nothing_of_a_class_that_the_generator_does_not_know() -> None:
    """Catches a divergence from what an untrained class looks like."""
    fed = federation(FedGen(alpha=0.0))
    local = fed.local(0, 2)
    model, algorithm = local.models["model"], fed.algorithm
    server = algorithm.init_server(fed.task, Rng((0,)))
    batch = local.train.batch(torch.tensor([0, 1]), dtype=torch.float64)
    drawn = draw_classes((1,), 32, Rng((1,)), Step(torch.arange(2), 0, 0))
    params = model.init(Rng((3,)))

    def value(known: list[float]) -> float:
        decay = torch.zeros(8)
        decay[:2] = torch.tensor(known)
        drawings = {"model": params, "G": server.generator, "decay": {"of": decay}, "drawn": drawn}
        parts = tree.map_parts(double, drawings)  # small differences of losses: in single precision mostly rounding
        return float(algorithm.loss(bind(local.models, parts), batch))

    both, only_1, only_0 = value([1.0, 1.0]), value([0.0, 1.0]), value([1.0, 0.0])
    plain = float(torch.nn.functional.cross_entropy(model(tree.map_leaves(double, params), batch[0]), batch[1]))
    assert both - plain == pytest.approx((only_1 - plain) + (only_0 - plain), rel=1e-4)
    assert min(only_1, only_0) > plain


def test_counts_that_are_none_are_refused() -> None:
    """Catches a share of nothing, which is NaN for everybody."""
    fed = federation(FedGen(server_steps=1))
    game = toy.play(fed, 1)
    up, down, info = game.got[0][0], game.sent[0][0], fed.info(0)
    fed.algorithm.check_upload(fed.task, info, down, up)
    for counts in (torch.zeros(8), torch.tensor([-1.0] + [2.0] * 7)):
        with pytest.raises(MessageError, match=r"counts are .*; expected numbers of examples"):
            fed.algorithm.check_upload(fed.task, info, down, replace(up, counts=counts))


def test_equal_heads_are_needed() -> None:
    """Catches heads that a server cannot run or mix, found after a round of training."""
    needs_equal_heads(FedGen())
