"""Stacked clients end where they would alone, whatever the optimizer and the company."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import toy
from fits import FP32, FP64, PLANS, by_hand, check, dropping, model, request, two_parts
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.base.errors import DivergedError
from polyfed.base.types import Parts
from polyfed.core.net import Nets
from polyfed.core.plan import LocalSGD
from polyfed.execute.local_training import run_fit
from polyfed.execute.replay import Product, Replays
from polyfed.execute.stacked import StackRule, Update, kind_of, run_stacked, signature
from polyfed.models.signals import KINDS, Signal
from polyfed.models.split import SplitModel


@pytest.mark.parametrize("plan", PLANS)
def test_stacked_clients_end_where_they_would_alone(plan: str) -> None:
    """Catches updates that reach other clients, wrong step counts, padding: four clients, no two of one size."""
    net = model()
    fits = [
        request(PLANS[plan], k=k, n=n, net=net, parts=2, lr={"other": 0.02}, dtype=torch.float64)
        for k, n in enumerate((11, 4, 6, 8))
    ]
    together = run_stacked(fits, FP64)
    for asked, got in zip(fits, together, strict=True):
        alone = run_fit(asked, FP64)
        check(got.parts, alone.parts, 1e-11)
        assert got.steps == alone.steps
        assert got.loss == pytest.approx(alone.loss, rel=1e-12)


@pytest.mark.parametrize("plan", [*PLANS, "plain with decay"])
def test_stacks_of_the_usual_size_add_products_in_and_end_there_too(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong sign, rate or decay where a gradient is never written, and a step that is not the usual one."""
    settings = PLANS.get(plan, LocalSGD(epochs=2, batch_size=4, lr=0.1, weight_decay=0.05))
    net, taken = model(), Counter[type]()
    fits = [
        request(settings, k=k, n=n, net=net, parts=2, lr={"other": 0.02}, dtype=torch.float64)
        for k, n in enumerate((11, 10, 11, 10, 10, 11, 11, 11))
    ]
    move = Update._move

    def watched(self: Update, weight: Tensor, g: Any, *given: Any) -> None:
        taken[type(g)] += 1
        move(self, weight, g, *given)

    monkeypatch.setattr(Update, "_move", watched)
    replays = Replays()
    for asked, got in zip(fits, run_stacked(fits, FP64, replays), strict=True):
        check(got.parts, run_fit(asked, FP64).parts, 1e-11)
    # Each epoch has two steps of all with a whole batch, and some of some or with less.
    epochs = settings.epochs or 2
    assert replays.count == 2 * epochs
    # Two networks of two dense layers; one has a bias, the other a BatchNorm of two; clipping needs them written.
    assert taken[Product] == (0 if settings.clip else replays.count * 4)
    assert taken[Tensor] > replays.count * 6


class Factored(nn.Module):
    """A dense layer whose weight is the product of two: the gradient of each is a product with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(0.3 * torch.randn(6, 3)), nn.Parameter(0.3 * torch.randn(3, 7))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(functional.linear(x, self.u @ self.v)))


def factored() -> nn.Module:
    return Factored()


def test_a_product_with_a_weight_is_made_before_that_weight_moves() -> None:
    """Catches the gradient of one factor of W = U V made with the other as it is after its update."""
    net = SplitModel("factored", factored, input_shape=(7,), classifier="fc")
    fits = [request(PLANS["plain"], k=k, n=12, net=net, dtype=torch.float64) for k in range(8)]
    replays = Replays()
    for asked, got in zip(fits, run_stacked(fits, FP64, replays), strict=True):
        check(got.parts, run_fit(asked, FP64).parts, 1e-11)
    assert replays.count == 6


class Signals(nn.Module):
    """The seven features as a signal of eight steps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = Signal((1, 8), kind=kind, width=4, depth=2, rep_dim=3, num_classes=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(functional.pad(x, (0, 1))[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_signals_are_stacked(kind: str) -> None:
    """Catches a recurrence or an attention that takes the state or the tokens of another client."""
    net = SplitModel(kind, partial(Signals, kind), input_shape=(7,), classifier="net.fc2")
    fits = [request(PLANS["plain"], k=k, n=n, net=net, dtype=torch.float64) for k, n in enumerate((6, 4))]
    for asked, got in zip(fits, run_stacked(fits, FP64), strict=True):
        check(got.parts, run_fit(asked, FP64).parts, 1e-11)


def test_running_statistics_move_under_stacking_as_alone() -> None:
    """Catches BatchNorm statistics that stay where they were, are shared, or move twice."""
    net = model()
    fits = [request(PLANS["plain"], k=k, net=net, dtype=torch.float64) for k in (0, 1, 2)]
    for asked, got in zip(fits, run_stacked(fits, FP64), strict=True):
        alone = run_fit(asked, FP64).parts["model"]
        for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
            assert torch.allclose(got.parts["model"][name], alone[name], rtol=1e-12, atol=0)
            assert not torch.equal(alone[name], asked.parts["model"][name])


@pytest.mark.parametrize("plan", PLANS)
def test_the_stacked_update_is_torchs_optimizer(plan: str) -> None:
    """Catches a wrong bias correction, decay or momentum, and state that a client loses when it sits out a step."""
    settings = PLANS[plan]
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    weights = {"a": {"w": stack.clone()}, "b": {"w": -stack}}
    update = Update(settings, weights, {"b": 0.5}, 3)
    leaves = {part: [stack[k].clone() * sign for k in range(3)] for part, sign in (("a", 1), ("b", -1))}
    options = {"weight_decay": settings.weight_decay}
    optimizers = [
        {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](groups, **options)
        if settings.optimizer != "sgd"
        else torch.optim.SGD(groups, momentum=settings.momentum, **options)
        for groups in (
            [
                {"params": [leaves["a"][k]], "lr": settings.lr * settings.factor},
                {"params": [leaves["b"][k]], "lr": 0.5 * settings.factor},
            ]
            for k in range(3)
        )
    ]
    for members in ([0, 1, 2], [0, 2], [1], [0, 1, 2], [2], [0, 1, 2]):
        grads = {p: {"w": torch.randn(len(members), 2, 2, generator=generator, dtype=torch.float64)} for p in "ab"}
        update.step(weights, grads, None if len(members) == 3 else torch.tensor(members))
        for i, k in enumerate(members):
            for part in "ab":
                leaves[part][k].grad = grads[part]["w"][i].clone()
            optimizers[k].step()
    for part in "ab":
        for k in range(3):
            assert torch.allclose(weights[part]["w"][k], leaves[part][k], rtol=1e-12, atol=1e-14)


def test_stacked_clients_have_corrections_of_their_own() -> None:
    """Catches a correction of another client or part, or of a client that sits out a step."""
    net = model()
    fits = [
        request(PLANS["momentum"], k=k, n=n, net=net, parts=2, lr={"other": 0.02}, dtype=torch.float64)
        for k, n in enumerate((11, 4, 6, 8))
    ]
    fits = [
        replace(fit, correction={part: {"fc1.weight": (k + 1.0) * p["fc1.weight"]} for part, p in fit.parts.items()})
        for k, fit in enumerate(fits)
    ]
    for asked, got in zip(fits, run_stacked(fits, FP64), strict=True):
        check(got.parts, run_fit(asked, FP64).parts, 1e-11)


def test_only_alike_requests_share_a_stack() -> None:
    """Catches a signature that overlooks the loss, the network, the shapes, the plan, a rate or the cadence."""
    net = model()
    base = request(PLANS["plain"], net=net)
    assert signature(base) == signature(request(PLANS["plain"], k=1, n=5, net=net))
    others = [
        request(PLANS["momentum"], net=net),
        request(PLANS["plain"], net=net, lr={"model": 0.3}),
        request(PLANS["plain"], net=net, every="epoch"),
        request(PLANS["plain"], net=net, dtype=torch.float64),
        request(PLANS["plain"], net=net, frozen={"x": {"y": torch.ones(1)}}),
        request(PLANS["plain"], net=net, correction={"model": {"fc2.bias": torch.ones(4)}}),
        request(PLANS["plain"], net=model(dropping)),
        replace(base, loss=two_parts),
        request(PLANS["plain"], net=net, weights=torch.ones(4)),
        request(replace(PLANS["plain"], factor=0.5), net=net),
        request(replace(PLANS["plain"], label_smoothing=0.1), net=net),
    ]
    assert all(signature(other) != signature(base) for other in others)


def test_a_schedule_makes_no_new_kind_of_step() -> None:
    """Catches a new trace and a new count of costs in every round, for steps that differ in their rate alone."""
    net = model()
    base = request(PLANS["plain"], net=net)
    assert kind_of(base) == kind_of(request(replace(PLANS["plain"], lr=0.3, factor=0.5), net=net, lr={"model": 0.1}))
    assert kind_of(base) != kind_of(request(replace(PLANS["plain"], label_smoothing=0.1), net=net))
    assert kind_of(base) != kind_of(request(PLANS["plain"], net=net, weights=torch.ones(4)))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_client_of_a_stack_has_class_weights_of_its_own(smoothing: float) -> None:
    """Catches one client's class weights that count for its neighbours, or that a trace keeps for the next stack."""
    net, replays, plan = model(), Replays(after=0), replace(PLANS["plain"], label_smoothing=smoothing)
    for seed in (0, 1):  # the second stack replays the first one's traces
        draws = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        fits = [
            request(plan, k=k, n=n, net=net, parts=2, dtype=torch.float64, weights=draws[k])
            for k, n in enumerate((11, 10, 11, 10, 10, 11, 11, 11))
        ]
        for k, (asked, got) in enumerate(zip(fits, run_stacked(fits, FP64, replays), strict=True)):
            check(got.parts, run_fit(asked, FP64).parts, 1e-11)
            if k == 0:
                check(got.parts, by_hand(asked, torch.float64), 1e-6)
    assert replays.count > 8


def test_a_state_that_was_trained_in_a_stack_is_kept_without_the_stack() -> None:
    """Catches memory that grows with every round, as one client of a stack keeps what all of it once were."""
    net = model()
    (first, *_) = run_stacked([request(PLANS["plain"], k=k, net=net) for k in range(3)], FP32)
    weight = first.parts["model"]["fc2.weight"]
    assert weight.untyped_storage().nbytes() == 3 * weight.nbytes, "an outcome is a view: nothing is copied twice"
    game = toy.play(toy.federation(Standalone()), rounds=1, driver="batched")
    assert game.driver.paths == {"stacked": 3}
    for client in range(3):
        kept = game.private(client).model.values()
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in kept)


def test_a_stack_names_the_one_client_that_diverged() -> None:
    """Catches a sum over the stack, in which one client's NaN would be everybody's, or nobody's."""
    net = model()
    well, ill = (request(PLANS["plain"], k=k, net=net) for k in (4, 7))
    ill = replace(ill, parts=tree.map_parts(lambda value: value * float("nan"), ill.parts))
    with pytest.raises(DivergedError, match="client 7, round 1"):
        run_stacked([well, ill], FP32)


@dataclass(frozen=True, kw_only=True)
class Held(Standalone):
    """What is small may not move."""

    name = "held"

    def moving(self, nets: Nets) -> Parts:
        return {"model": {n: v.abs() >= 0.2 for n, v in nets["model"].params.items() if v.dim() == 2}}


@pytest.mark.parametrize(("plan", "clients"), [("decay", 3), ("adamw", 8), ("clip", 8)])
def test_what_may_not_move_stays_bitwise(plan: str, clients: int) -> None:
    """Catches momentum, moments and decay that move it: alone, in a stack, in a replay; and what may move, held too."""
    net, sizes = model(), (11, 10, 11, 10, 10, 11, 11, 11)[:clients]
    settings = replace(PLANS[plan], epochs=4, steps=None)
    fits = [
        request(settings, k=k, n=n, net=net, parts=2, dtype=torch.float64, moves=Held().moving)
        for k, n in enumerate(sizes)
    ]
    replays = Replays(2)
    for asked, got in zip(fits, run_stacked(fits, FP64, replays, StackRule((8,), 2)), strict=True):
        alone = run_fit(asked, FP64).parts
        check(got.parts, alone, 1e-11)
        start = asked.parts["model"]
        for name in ("fc1.weight", "fc2.weight"):
            small = start[name].abs() < 0.2
            assert 0 < int(small.sum()) < small.numel()
            for ended in (got.parts["model"][name], alone["model"][name]):
                assert torch.equal(ended[small], start[name][small])
                assert not torch.equal(ended[~small], start[name][~small])
        assert not torch.equal(alone["other"]["fc1.weight"], asked.parts["other"]["fc1.weight"])
    assert replays.count > 0


def test_requests_with_and_without_it_are_not_stacked() -> None:
    """Catches a client whose weights are held as another's are."""
    plain, held = request(PLANS["adam"]), request(PLANS["adam"], moves=Held().moving)
    assert kind_of(plain) != kind_of(held)
