"""FIARSE: the gradient, the masks, the mean over holders, the bytes, and the sizes nobody has."""

import itertools
import math
from dataclasses import replace
from typing import Any

import gaps_by_hand
import numpy as np
import pytest
import torch
import toy
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fiarse import FIARSE
from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.blocks.importance import competing
from polyfed.blocks.submodel import above
from polyfed.config import load_algorithm
from polyfed.core.clients import Cohort
from polyfed.core.gather import Fold, Gathered
from polyfed.core.message import Nothing
from polyfed.execute.local_training import bind
from polyfed.rounds.evaluation import Evaluator
from polyfed.rounds.unit import measure

RESNET = "resnet8(norm=group, width=4)"


def federation(sizes: tuple[float, ...] = (0.25, 0.5, 1.0), *, net: str = "mlp", train: Any = None, **keys: Any) -> Any:
    spec, shape = (toy.MLP, (7,)) if net == "mlp" else (net, (1, 8, 8))
    algorithm = FIARSE(**{"unseen_capacities": (), **keys})
    return toy.federation(
        algorithm, models=(spec,), shape=shape, sizes=(11, 8, 6), train=train, clients={"capacities": list(sizes)}
    )


def stepped(gate: str, x: dict[str, Tensor], theta: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of a step at weights ``x``, and dF/dw at w = x * M(x), the latter by hand; None: no thresholds."""
    fed = federation(gate=gate)
    local = fed.local(0, 1)
    batch = local.train.batch(torch.arange(5), dtype=torch.float64)
    gates = {} if theta is None else {name: torch.tensor(theta, dtype=torch.float64) for name in x}
    nets = bind(local.models, {"model": x, "gate": gates})
    masks = {name: v.abs() >= (theta or 0.0) for name, v in x.items()}

    def derivative(loss: Any, **replace: Any) -> dict[str, dict[str, Tensor]]:
        w = {name: v.clone().requires_grad_() for name, v in replace.get("model", x).items()}
        value = loss(bind(local.models, {"model": w}), batch)
        return {"model": dict(zip(w, torch.autograd.grad(value, list(w.values())), strict=True))}

    w = {name: (v * masks[name]).requires_grad_() for name, v in x.items()}
    r = batch[0]
    for layer in ("fc1", "fc2"):
        r = torch.relu(r @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])
    loss = functional.cross_entropy(r @ w["fc3.weight"].T + w["fc3.bias"], batch[1])
    dense = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    got = fed.algorithm.gradient(derivative, nets, batch, False)["model"]
    return dict(got), {name: g * masks[name] for name, g in dense.items()}


def weights(theta: float) -> dict[str, Tensor]:
    """Some weights, of which one of each tensor sits exactly at the threshold and one at zero."""
    fed = federation()
    x = {n: v.double() for n, v in fed.local(0, 1).models["model"].init(fed.rng).items()}
    for value in x.values():
        value.view(-1)[0] = -theta
        value.view(-1)[-1] = 0.0
    return x


def test_the_biased_gradient_is_equation_3() -> None:
    """Catches a factor on the wrong weights, and the released code's no-op (card 1.15, 1)."""
    theta = 0.1
    x = weights(theta)
    got, dense = stepped("biased", x, theta)
    for name, v in x.items():
        factor = 1 + 2 * v.abs() * theta / (v.abs() + theta) ** 2
        assert torch.allclose(got[name], dense[name] * factor, rtol=1e-12, atol=1e-15), name
    first = {name: (got[name].view(-1)[0], dense[name].view(-1)[0]) for name in x}
    assert any(float(d) != 0 for _, d in first.values())
    assert all(float(g) == pytest.approx(1.5 * float(d), rel=1e-12) for g, d in first.values())


def test_at_threshold_zero_the_factor_is_one() -> None:
    """Catches NaN from 0 / 0 at weights that are zero."""
    x = weights(0.0)
    got, dense = stepped("biased", x, 0.0)
    for name in x:
        assert torch.allclose(got[name], dense[name], rtol=1e-12, atol=1e-16)


def test_the_released_gradient_is_masked_and_no_more() -> None:
    """Catches a bias factor that the released code never runs."""
    x = weights(0.1)
    got, dense = stepped("released", x, 0.1)
    for name in x:
        assert torch.allclose(got[name], dense[name], rtol=1e-12, atol=1e-16)


def test_without_thresholds_the_gradient_is_that_of_what_is_held() -> None:
    """Catches a mask that follows the weights where it is that of the round's start, or a factor at capacity 1."""
    x = weights(0.1)
    got, dense = stepped("biased", x, None)
    for name in x:
        assert torch.equal(got[name], dense[name]) or torch.allclose(got[name], dense[name], rtol=1e-12, atol=1e-16)


def test_a_frozen_mask_lets_weights_go_on_below_the_threshold() -> None:
    """Catches a mask that follows the weights all the same, and weights outside that of the start that move."""
    fed = federation((0.25,), gate="frozen", train={"lr": 0.5, "epochs": 6})
    game = toy.play(fed, 1)
    mask, theta = fed.algorithm.extract(toy.play(fed, 0).server)(0.25)
    before, after = toy.play(fed, 0).server.model, game.server.model
    for name, held in mask.items():
        assert torch.equal(after[name][~held], before[name][~held])
    fell = sum(int((after[name][held].abs() < theta[0]).sum()) for name, held in mask.items())
    other = toy.play(federation((0.25,), gate="released", train={"lr": 0.5, "epochs": 6}), 1).server.model
    assert fell > 0
    assert any(not torch.equal(after[name], other[name]) for name in mask)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_smaller_submodels_lie_in_larger_ones(scope: Any) -> None:
    """Catches sizes that disagree about what matters; and a scope that is the other one."""
    fed = federation(scope=scope)
    game = toy.play(fed, 1)
    masks = [fed.algorithm.extract(game.server)(size)[0] for size in (0.1, 0.25, 0.5, 1.0)]
    total = sum(m.numel() for m in masks[0].values())
    for size, small, large in zip((0.1, 0.25, 0.5), masks, masks[1:], strict=False):
        assert all(bool((small[n] <= large[n]).all()) for n in small)
        kept = {n: int(m.sum()) for n, m in small.items()}
        each = {n: max(1, math.floor(size * m.numel())) for n, m in small.items()} if scope == "layer" else None
        assert kept == each if each else sum(kept.values()) == math.floor(size * total)
    assert all(bool(m.all()) for m in masks[-1].values())


@pytest.mark.parametrize("gate", ["biased", "released"])
def test_within_a_round_a_mask_only_shrinks(gate: Any) -> None:
    """Catches weights that come back into the submodel during plain SGD, and masks that never move."""
    fed = federation((0.25, 0.25, 0.25), gate=gate, train={"epochs": 4, "lr": 0.3})
    game = toy.play(fed)
    algorithm = fed.algorithm
    seen: list[dict[str, Tensor]] = []

    def noting(grad: Any, nets: Any, batch: Any, due: bool) -> Any:
        seen.append({n: m.clone() for n, m in algorithm.mask_now(nets).items()})
        return type(algorithm).gradient(algorithm, grad, nets, batch, due)

    object.__setattr__(algorithm, "gradient", noting)
    game.driver.charge = lambda *args: None  # type: ignore[method-assign]  # counting costs takes steps of its own
    game.round()
    steps = [seen[:12], seen[12:20], seen[20:]]
    for masks in steps:
        for before, after in itertools.pairwise(masks):
            assert all(bool((after[n] <= before[n]).all()) for n in after)
    assert any(not torch.equal(s[0][n], s[-1][n]) for s in steps for n in s[0])


def test_what_nobody_holds_stays_bitwise_as_it_was() -> None:
    """Catches decay, momentum or rounding on weights that were not sent to anybody."""
    fed = federation((0.25, 0.5, 0.25), train={"epochs": 2, "momentum": 0.9, "weight_decay": 0.1})
    game = toy.play(fed)
    for _ in range(3):
        before = game.server
        game.round()
        mask = fed.algorithm.extract(before)(0.5)[0]
        outside = {n: ~m for n, m in mask.items()}
        assert sum(int(o.sum()) for o in outside.values()) > 0
        for name, nobody in outside.items():
            assert torch.equal(game.server.model[name][nobody], before.model[name][nobody])
            assert not torch.equal(game.server.model[name], before.model[name]) or not mask[name].any()


def test_the_mean_counts_masks_not_movements() -> None:
    """Catches the released count of non-zero deltas: a holder that did not move halves the step of the other."""
    fed = federation((1.0, 1.0, 1.0))
    algorithm = fed.algorithm
    game = toy.play(fed)
    server = game.server
    cohort = Cohort(tuple(fed.info(k) for k in range(2)), 1, 3, fed.rng)
    round_ = algorithm.server_round(server, cohort)
    fold = Fold(next(round_).gather)
    delta = {n: torch.ones_like(v).reshape(-1) if n in server.masked else v * 0 for n, v in server.model.items()}
    still = {n: torch.zeros_like(v) for n, v in delta.items()}
    for client, sent in zip(cohort, (delta, still), strict=True):
        fold.add(client, algorithm.Upload(sent))
    with pytest.raises(StopIteration) as stop:
        round_.send(fold.finish({}))
    after = stop.value.value
    for name in server.masked:
        assert torch.allclose(after.model[name], server.model[name] + 0.5, rtol=0, atol=1e-6)


def test_norm_layers_are_held_and_averaged_by_all() -> None:
    """Catches norm weights that compete, or are averaged over large clients alone."""
    fed = federation((0.05, 0.05, 1.0), net=RESNET)
    game = toy.play(fed)
    before = game.server
    norms = [n for n in before.model if "bn" in n or "downsample.1" in n]
    assert norms
    assert not set(norms) & set(before.masked)
    game.round()
    for name in norms:
        place = sorted(before.model).index(name)
        assert all(game.sent[0][k].submodel.values[place].shape == before.model[name].shape for k in range(3))
        mean = torch.stack([game.got[0][k].delta[name].double() for k in range(3)]).mean(0)
        assert torch.allclose(
            game.server.model[name], (before.model[name].double() + mean).float(), rtol=1e-6, atol=1e-7
        )
        assert bool(mean.any())


@pytest.mark.parametrize("capacity", [0.5, 0.02, 1.0])
def test_the_bytes_are_those_of_the_card(capacity: float) -> None:
    """Catches positions that travel up, values at full size, and a dearer form of positions (card 1.8)."""
    fed = federation((capacity,) * 3, net=RESNET)
    game = toy.play(fed, 1)
    start = toy.play(fed).server
    d = sum(start.model[n].numel() for n in start.masked)
    u = sum(v.numel() for n, v in start.model.items() if n not in start.masked)
    k = d if capacity == 1.0 else math.floor(capacity * d)
    for report in game.played[0].reports.values():
        assert report.down.values == report.up.values == 4 * (k + u)
        assert report.up.indices == 0
        assert report.down.indices == coded(fed.algorithm.extract(start)(capacity)[0])
        assert report.down.indices <= min(math.ceil(d / 8), 4 * k)
        assert capacity < 1 or report.down.indices == 0


def coded(mask: dict[str, Tensor]) -> int:
    """The bytes of the positions of a mask, by hand."""
    return sum(len(gaps_by_hand.code(held.flatten().tolist())) for held in mask.values())


def test_a_client_gets_the_largest_weights_and_nothing_else() -> None:
    """Catches a submodel that is not x * M(x), and thresholds that do not say what was kept."""
    fed = federation((0.25, 0.5, 1.0))
    game = toy.play(fed)
    x = game.server.model
    game.round()
    everything = torch.cat([x[n].flatten() for n in game.server.masked]).abs().sort(descending=True).values
    for k, size in enumerate((0.25, 0.5, 1.0)):
        message = game.sent[0][k]
        theta = 0.0 if size == 1.0 else float(everything[math.floor(size * len(everything)) - 1])
        assert message.threshold == (theta,)
        for name, value in message.submodel.dense({n: value.shape for n, value in x.items()}).items():
            assert torch.equal(value, x[name] * (x[name].abs() >= theta))


@pytest.mark.parametrize("gate", ["biased", "released", "frozen"])
def test_at_full_capacity_it_is_fedavg_with_equal_weights(gate: Any) -> None:
    """Catches anything that FIARSE does besides: at capacity 1 nothing is dropped and the factor is 1."""
    settings: dict[str, Any] = {"models": (toy.MLP,), "sizes": (8, 8, 8), "train": {"epochs": 2, "lr": 0.1}}
    one = toy.play(toy.federation(FIARSE(gate=gate), clients={"capacities": [1.0]}, **settings))
    two = toy.play(toy.federation(FedAvg(), **settings))
    assert tree.same(one.server.model, two.server.model)
    for _ in range(2):
        toy.close(one.round().server.model, two.round().server.model, 1e-6)


def test_the_server_rate_scales_the_step() -> None:
    """Catches eta_s that is ignored."""
    full, half = (toy.play(federation(server_lr=rate)) for rate in (1.0, 0.5))
    x = full.server.model
    one, two = full.round().server.model, half.round().server.model
    for name in full.server.masked:
        assert torch.allclose(two[name] - x[name], 0.5 * (one[name] - x[name]), rtol=1e-4, atol=1e-7)


def test_sizes_that_nobody_has_are_tested_too() -> None:
    """Catches a report of trained sizes only, and a size that is tested with more weights than it holds."""
    fed = federation((0.25, 0.5, 0.25), unseen_capacities=(1.0, 0.1))
    game = toy.play(fed, 1)
    found = fed.algorithm.global_nets(game.server, fed.task)
    assert list(found) == ["capacity 1", "capacity 0.5", "capacity 0.25", "capacity 0.1"]
    x, batch = game.server.model, fed.local(0, 1).train.batch(torch.arange(5))[0]
    d = sum(x[n].numel() for n in game.server.masked)
    for name, nets in found.items():
        size = float(name.split()[1])
        masks = above(nets["model"].params, nets["gate"].params)
        assert sum(int(m.sum()) for m in masks.values()) == (d if size == 1.0 else math.floor(size * d))
        w = {n: v * masks[n] for n, v in x.items()}
        expected = fed.local(0, 1).models["model"](w, batch)
        assert torch.equal(fed.algorithm.predict(nets, batch)["submodel"], expected)


def test_networks_that_differ_are_refused() -> None:
    """Catches submodels of two models."""
    fed = toy.federation(FIARSE(), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match="fiarse needs one architecture"):
        fed.algorithm.check(fed.task)


def test_every_client_is_tested_with_the_submodel_of_its_own_capacity() -> None:
    """Catches one message for clients of unlike capacities: bytes and answers of the first client's for all."""
    fed = federation((0.25, 0.5, 1.0))
    game = toy.play(fed, 2)
    scores = Evaluator(fed, game.driver).evaluate(game.server, game.clients, 2, range(fed.config.clients.count)).scores
    found = []
    for k in range(3):
        local = game.local(k)
        message = fed.algorithm.message_for(game.server, fed.info(k))
        parts = fed.algorithm.predictor_parts(game.private(k), message, local)
        test = fed.data.test(k)
        x, y = test.batch(torch.arange(len(test)))
        with torch.no_grad():
            logits = fed.algorithm.predict(bind(local.models, parts), x)["submodel"]
        found.append(measure(message).total)
        assert scores[k].down == found[k]
        assert scores[k].correct["submodel"] == int((logits.argmax(1) == y).sum())
    assert len(set(found)) == 3


def falls(optimizer: dict[str, Any], sticky: bool) -> tuple[int, int, int]:
    """How often in a round a weight fell below its threshold, came back, and moved though it was below."""
    fed = federation((0.75, 0.75, 0.75), sticky=sticky, train={"epochs": 6, **optimizer})
    game = toy.play(fed)
    algorithm = fed.algorithm
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def noting(grad: Any, nets: Any, batch: Any, due: bool) -> Any:
        x = {name: v.detach().clone() for name, v in nets["model"].params.items()}
        seen.append((x, {n: m.clone() for n, m in algorithm.mask_now(nets).items()}))
        return type(algorithm).gradient(algorithm, grad, nets, batch, due)

    object.__setattr__(algorithm, "gradient", noting)
    game.driver.charge = lambda *args: None  # type: ignore[method-assign]  # counting costs takes steps of its own
    game.round()
    fell = back = moved = 0
    for steps in (seen[:18], seen[18:30], seen[30:]):
        for (x, before), (y, after) in itertools.pairwise(steps):
            fell += sum(int((before[n] & ~after[n]).sum()) for n in after)
            back += sum(int((~before[n] & after[n]).sum()) for n in after)
            moved += sum(int((x[n] != y[n])[~before[n]].sum()) for n in after)
    return fell, back, moved


@pytest.mark.parametrize(
    "optimizer",
    [
        {"lr": 0.5, "momentum": 0.9},
        {"lr": 0.2, "weight_decay": 0.1},
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01, "clip": 0.5},
        {"lr": 0.1, "optimizer": "adam"},
        {"lr": 0.03, "optimizer": "adam", "weight_decay": 0.1, "clip": 0.5},
        {"lr": 0.03, "optimizer": "adamw", "weight_decay": 0.5},
    ],
    ids=["momentum", "decay", "both, clipped", "adam", "adam with decay", "adamw"],
)
def test_a_weight_that_fell_stays_where_it_fell(optimizer: Any) -> None:
    """Catches momentum, moments and decay of weights without a gradient; the released Adam's, that come back (1.6)."""
    fell, back, moved = falls(optimizer, True)
    assert fell > 0
    assert (back, moved) == (0, 0)
    fell, back, moved = falls(optimizer, False)
    assert fell > 0
    assert moved > 0
    assert back > 0 or len(optimizer) > 2 or "weight_decay" in optimizer


@pytest.mark.parametrize("sticky", [True, False])
def test_plain_steps_are_the_same_with_and_without(sticky: bool) -> None:
    """Catches a copy of all weights in each step where nothing moves a weight without a gradient."""
    fed = federation(sticky=sticky, train={"lr": 0.3, "epochs": 3})
    local = fed.local(0, 1)
    server = toy.play(fed).server
    request = next(fed.algorithm.client_round(Nothing(), fed.algorithm.message_for(server, fed.info(0)), local))
    assert request.moves is None


@pytest.mark.parametrize("capacity_in", ["parameters", "macs"])
@pytest.mark.parametrize("scope", ["model", "layer", "stage", "groups"])
def test_a_vision_transformer_under_every_scope(scope: Any, capacity_in: Any) -> None:
    """Catches thresholds of other layers, tokens that compete as norms do, and budgets that are not kept."""
    groups = (("patches.places",), ("patches.map", "fc"), ("block",)) if scope == "groups" else ()
    keys: dict[str, Any] = {"scope": scope, "capacity_in": capacity_in, "groups": groups}
    fed = federation((0.1, 0.5, 0.1), net="vit(width=8, depth=2, heads=2, patch=4)", train={"momentum": 0.9}, **keys)
    game = toy.play(fed)
    before = game.server
    assert not [name for name in before.masked if "norm" in name]
    macs = {"patches.map.weight": 4, "fc.weight": 1} | {n: 4 for n in before.masked if n.endswith(".weight")}
    macs |= {"fc.weight": 1}
    number = len({*competing(before.masked, scope, groups)})
    assert number == {"model": 1, "layer": len(before.masked), "stage": 4, "groups": 3}[scope]
    game.round()
    for k, capacity in enumerate((0.1, 0.5, 0.1)):
        message = game.sent[0][k]
        assert len(message.threshold) == number
        mask = message.submodel.mask({n: v.shape for n, v in before.model.items()})
        costs = macs if capacity_in == "macs" else dict.fromkeys(before.masked, 1)
        for group in range(number):
            own = [n for n, g in zip(before.masked, competing(before.masked, scope, groups), strict=True) if g == group]
            total = sum(costs.get(n, 0) * mask[n].numel() for n in own)
            spent = sum(costs.get(n, 0) * int(mask[n].sum()) for n in own)
            assert spent <= max(capacity * total, max(costs.get(n, 0) for n in own)) or any(
                before.model[n].eq(0).any() for n in own
            )
            assert total == 0 or spent > 0.8 * capacity * total - max(costs.values())
    nobody = {n: ~fed.algorithm.extract(before)(0.5)[0][n] for n in before.masked}
    assert sum(int(m.sum()) for m in nobody.values()) > 0
    assert all(torch.equal(game.server.model[n][m], before.model[n][m]) for n, m in nobody.items())
    assert not tree.same(game.server.model, before.model)


@pytest.mark.parametrize("importance", ["gradient", "fisher"])
def test_scores_choose_and_travel_as_positions(importance: Any) -> None:
    """Catches a further message, a mask that follows the weights, and Eq. 3's factor where there is no threshold."""
    fed = federation((0.25, 0.5, 0.25), importance=importance, train={"momentum": 0.9})
    game = toy.play(fed, 2)
    server, d = game.server, sum(game.server.model[n].numel() for n in game.server.masked)
    assert sum(v.numel() for v in server.scores.values()) == d
    mask, theta = fed.algorithm.extract(server)(0.25)
    assert theta == (0.0,)
    assert sum(int(m.sum()) for m in mask.values()) == math.floor(0.25 * d)
    weakest = min(float(server.scores[n].abs()[m].min()) for n, m in mask.items() if m.any())
    assert all(bool((server.scores[n].abs()[~m] <= weakest).all()) for n, m in mask.items())
    game.round()
    for k, capacity in enumerate((0.25, 0.5, 0.25)):
        report, held = game.played[-1].reports[k], math.floor(capacity * d)
        assert (report.down.values, report.up.values) == (4 * held, 4 * held)
        assert (report.down.indices, report.up.indices) == (coded(fed.algorithm.extract(server)(capacity)[0]), 0)
    found = fed.algorithm.global_nets(server, fed.task)["capacity 0.25"]
    x = fed.local(0, 1).train.batch(torch.arange(5))[0]
    expected = fed.local(0, 1).models["model"]({n: v * mask[n] for n, v in server.model.items()}, x)
    assert torch.equal(fed.algorithm.predict(found, x)["submodel"], expected)


def test_contradicting_keys_are_told_together() -> None:
    """Catches keys that do nothing, one at a time."""
    with pytest.raises(ConfigError) as caught:
        load_algorithm(
            "fiarse",
            {"groups": [["fc"]], "threshold": "adaptive", "importance": "fisher", "gate": "released", "sticky": False},
        )
    idle = "which has no effect: importance = 'fisher' fixes masks; leave it at"
    assert [fault.split(": ", 1)[1] for fault in caught.value.faults] == [
        "fiarse refused its keys: threshold = 'adaptive' needs a deadline in seconds",
        "got (('fc',),), which has no effect: scope = 'model' takes no list; leave it at ()",
        f"got 'released', {idle} 'biased'",
        f"got False, {idle} True",
    ]
    with pytest.raises(ConfigError, match="scope = 'groups' needs groups") as caught:
        FIARSE(scope="groups", deadline=3.0)
    assert "deadline: got 3.0, which has no effect: threshold = 'top-k' follows no deadline" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"memory": 0.5}, "memory: got 0.5, .*: importance = 'magnitude' has no running means; leave it at 0.9"),
        ({"least_capacity": 0.5}, "least_capacity: got 0.5, .*: threshold = 'top-k' follows no deadline"),
        ({"gate": "frozen", "sticky": False}, "sticky: got False, .*: gate = 'frozen' fixes masks"),
        ({"gate": "frozen", "importance": "gradient"}, "gate: got 'frozen', .*: importance = 'gradient' fixes masks"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], text: str) -> None:
    """Catches two configurations that are one run."""
    with pytest.raises(ConfigError, match=text):
        FIARSE(**keys)


@pytest.mark.parametrize(
    ("what", "largest", "keys", "dead"),
    [
        ("weight", 0.5, {}, "fc2.weight"),
        ("weight", 0.5, {"scope": "layer"}, "fc2.weight"),
        ("weight", 0.5, {"scope": "groups", "groups": (("fc1", "fc2", "alpha"), ("fc3",))}, "fc2.weight"),
        ("weight", 0.5, {"capacity_in": "macs"}, "fc2.weight"),
        ("alpha", 0.5, {"scope": "layer"}, "alpha"),
        ("alpha", 0.5, {"capacity_in": "macs"}, "alpha"),
        ("alpha", 0.5, {"scope": "layer", "capacity_in": "macs"}, ""),  # a group that costs nothing is held whole
        ("bias", 0.5, {"scope": "layer"}, ""),
        ("weight", 1.0, {}, ""),
        ("weight", 0.5, {"scope": "layer", "importance": "gradient"}, ""),
    ],
)
def test_weights_that_nobody_would_ever_train_are_refused(
    what: str, largest: float, keys: dict[str, Any], dead: str
) -> None:
    """Catches a tensor of zeros that stays as it is for ever, and a refusal of one that somebody trains."""
    fed = toy.federation(
        FIARSE(**keys), models=(f"own_nets:Blank(what={what})",), clients={"capacities": [0.25, largest, 0.25]}
    )
    if dead:
        with pytest.raises(ModelError, match=rf"all weights of '{dead}' begin at 0, .* with other values$"):
            fed.algorithm.check(fed.task)
    else:
        fed.algorithm.check(fed.task)
    game, names = toy.play(fed, 6), {"weight": "fc2.weight", "alpha": "alpha", "bias": "fc2.bias"}
    assert bool(game.server.model[names[what]].any()) is not (bool(dead) or what == "bias")


@pytest.mark.parametrize("keys", [{}, {"scope": "layer"}, {"importance": "gradient"}, {"capacity_in": "macs"}])
def test_weights_in_bfloat16_are_chosen_from_as_well(keys: dict[str, Any]) -> None:
    """Catches numpy, which has no such type."""
    fed = toy.federation(FIARSE(**keys), models=("own_nets:Halves",), clients={"capacities": [0.25, 0.5, 0.25]})
    game = toy.play(fed, 2)
    assert game.server.model["fc1.weight"].dtype == torch.bfloat16
    mask, theta = fed.algorithm.extract(game.server)(0.25)
    assert all(value.isfinite().all() for value in game.server.model.values())
    held, d = sum(int(m.sum()) for m in mask.values()), sum(m.numel() for m in mask.values())
    assert 0 < held <= 0.3 * d + len(theta)


def test_a_network_that_trains_normalisation_alone_has_nothing_to_choose() -> None:
    fed = toy.federation(FIARSE(), models=("own_nets:Norms",))
    with pytest.raises(ModelError, match=r"fiarse: model 'own_nets:Norms' trains nothing but normalisation"):
        fed.algorithm.check(fed.task)


def test_groups_have_to_fit_the_network() -> None:
    """Catches a tensor that competes nowhere, or twice; and a prefix with a slip of the pen."""
    fed = federation(scope="groups", groups=(("fc1",), ("fc", "cf3")))
    with pytest.raises(ModelError) as caught:
        fed.algorithm.check(fed.task)
    assert str(caught.value).splitlines() == [
        "algorithm.groups: no masked tensor begins with 'cf3'; the model is 'mlp(hidden=(12, 6))'",
        "algorithm.groups: groups 0 and 1 both have 'fc1.weight' and 1 more tensors of 'fc1'; the model is "
        "'mlp(hidden=(12, 6))'",
    ]


def test_capacities_follow_a_deadline() -> None:
    """Catches a capacity above the declared one, of another client, or that forgets clients that were not asked."""
    fed = federation((0.25, 0.5, 1.0), threshold="adaptive", deadline=10.0, least_capacity=0.1)
    game = toy.play(fed, 1)
    algorithm, server = fed.algorithm, game.server
    assert server.paces == {}  # no clock, no change
    cohort = Cohort(tuple(fed.info(k) for k in range(3)), 1, 3, fed.rng)
    at = {k: algorithm.reach(server, fed.info(k)) for k in range(3)}
    masks = {capacity: algorithm.extract(server)(capacity)[0] for capacity in at.values()}
    got = Gathered({"delta": {}}, cohort.clients[1:], {}, {1: 20.0, 2: 5.0})
    server = algorithm.learnt(server, cohort, got, at, masks)[1]
    assert server.paces == {1: 0.25, 2: 1.0}
    got = Gathered({"delta": {}}, cohort.clients[:1], {}, {0: float("inf")})
    server = algorithm.learnt(server, Cohort(cohort.clients[:1], 2, 3, fed.rng), got, at, masks)[1]
    assert server.paces == {0: 0.125, 1: 0.25, 2: 1.0}
    assert [algorithm.reach(server, fed.info(k)) for k in range(3)] == [0.125, 0.25, 1.0]
    d = sum(v.numel() for v in server.model.values())
    for k, capacity in enumerate((0.125, 0.25, 1.0)):
        values = algorithm.message_for(server, fed.info(k)).submodel.values
        assert sum(v.numel() for v in values) == math.floor(capacity * d)
    assert algorithm.personal_message
    assert not FIARSE().personal_message


def test_a_capacity_that_follows_a_deadline_is_that_of_training_and_of_the_mean() -> None:
    """Catches a client that trains at the declared capacity, and a mean over declared masks."""
    fed = federation((0.5, 0.5, 1.0), threshold="adaptive", deadline=10.0)
    game = toy.play(fed)
    game.server = replace(game.server, paces={0: 0.125, 2: 0.25})
    before = game.server
    game.round()
    d = sum(v.numel() for v in before.model.values())
    sizes = [sum(v.numel() for v in game.got[0][k].delta.values()) for k in range(3)]
    assert sizes == [math.floor(c * d) for c in (0.125, 0.5, 0.25)]
    nobody = {n: ~m for n, m in fed.algorithm.extract(before)(0.5)[0].items()}
    assert all(torch.equal(game.server.model[n][m], before.model[n][m]) for n, m in nobody.items())
    third = fed.algorithm.extract(before)(0.25)[0]  # held by two, and not by the smallest
    own = {n: m & ~fed.algorithm.extract(before)(0.125)[0][n] for n, m in third.items()}
    for name, where in own.items():
        sums = torch.zeros_like(before.model[name])
        for k, capacity in ((1, 0.5), (2, 0.25)):
            held = fed.algorithm.extract(before)(capacity)[0][name]
            sums[held] += game.got[0][k].delta[name]
        mean = before.model[name] + sums / 2
        assert torch.allclose(game.server.model[name][where], mean[where], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keys", [{"capacity_in": "macs"}, {"importance": "gradient"}])
def test_a_round_sorts_once_whatever_the_capacities(monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    """Catches a sort for each client or capacity, in a round and in the test of the global model."""
    fed = federation((0.125, 0.25, 0.5), **keys)
    game, sorts = toy.play(fed, 0), list[str]()
    for name in ("argsort", "lexsort"):
        sort: Any = getattr(np, name)
        monkeypatch.setattr(np, name, lambda x, name=name, sort=sort: (sorts.append(name), sort(x))[1])
    game.round()
    assert len(sorts) == 1
    sorts.clear()
    assert len(fed.algorithm.global_nets(game.server, fed.task)) == 3
    assert len(sorts) == 1
