"""Local training alone and stacked against plain torch: the same numbers, whatever the optimizer and the company."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.base.errors import DivergedError
from polyfed.base.rng import Rng
from polyfed.blocks.losses import supervised
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.net import Batch, Nets
from polyfed.core.plan import LocalSGD
from polyfed.core.requests import Fit, Reduce, drive, fit, reduce
from polyfed.execute import drivers
from polyfed.execute.choice import ExecutionName
from polyfed.execute.drivers import Auto, Batched, Work, make_driver
from polyfed.execute.local_training import clip, run_fit, run_reduce
from polyfed.execute.placement import Placement
from polyfed.execute.replay import Product, Replays
from polyfed.execute.stacked import Update, run_stacked, signature, why_not
from polyfed.models.split import SplitModel
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.round import play_round
from polyfed.storage.state_store import Store

FP32, FP64 = (Placement(torch.device("cpu"), p) for p in ("fp32", "fp64"))
PLANS = {
    "plain": LocalSGD(epochs=2, batch_size=4, lr=0.1),
    "momentum": LocalSGD(epochs=3, batch_size=4, lr=0.05, momentum=0.9),
    "decay": LocalSGD(epochs=3, batch_size=4, lr=0.05, momentum=0.9, weight_decay=0.01),
    "clip": LocalSGD(epochs=2, batch_size=4, lr=0.5, momentum=0.5, clip=0.3),
    "steps": LocalSGD(steps=5, batch_size=4, lr=0.1),
    "adam": LocalSGD(epochs=3, batch_size=4, lr=0.01, optimizer="adam"),
    "adam with decay": LocalSGD(epochs=3, batch_size=4, lr=0.01, optimizer="adam", weight_decay=0.1),
}


class Normed(nn.Module):
    """Two dense layers with a BatchNorm between: buffers that training moves."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 6, bias=False)  # before BatchNorm a bias has gradient 0, which Adam would blow up
        self.bn = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc2 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(torch.relu(self.bn(self.fc1(x)))))


def normed() -> nn.Module:
    return Normed()


def dropping() -> nn.Module:
    return Normed(0.5)


def model(factory: Any = normed) -> SplitModel:
    return SplitModel(factory.__name__, factory, input_shape=(7,), classifier="fc2")


class Data:
    """A client's examples."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 7, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 4, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def batch(
        self, positions: Tensor, *, generator: Any = None, dtype: Any = torch.float32, device: Any = "cpu"
    ) -> Batch:
        return self.x[positions].to(dtype), self.labels[positions]


def a_loss(nets: Nets, batch: Batch) -> Tensor:
    return functional.cross_entropy(nets["model"](batch[0]), batch[1])


def two_parts(nets: Nets, batch: Batch) -> Tensor:
    return functional.cross_entropy(nets["model"](batch[0]) + nets["other"](batch[0]), batch[1])


def request(
    plan: LocalSGD,
    *,
    k: int = 0,
    n: int = 11,
    net: SplitModel | None = None,
    parts: int = 1,
    dtype: Any = None,
    **keys: Any,
) -> Fit:
    """What client ``k`` with ``n`` examples asks for."""
    net = net or model()
    models = {"model": net, "other": net} if parts == 2 else {"model": net}
    client = LocalClient(ClientInfo(k), models, Data(n, k), plan, Rng((0, "client", k)), 1)  # type: ignore[arg-type]
    start = {
        part: {
            name: v.to(dtype) if dtype and v.is_floating_point() else v for name, v in net.init(Rng((k, part))).items()
        }
        for part in models
    }
    return next(fit(client, start, loss=two_parts if parts == 2 else a_loss, **keys))  # type: ignore[return-value]


def by_hand(asked: Fit, dtype: torch.dtype, fused: bool | None = None) -> dict[str, dict[str, Tensor]]:
    """The same training as anybody would write it: modules, torch.optim, clip_grad_norm_."""
    client, plan = asked.client, asked.client.plan
    modules = {part: normed().to(dtype) for part in asked.parts}
    for part, module in modules.items():
        module.load_state_dict(dict(asked.parts[part]))
    groups = [{"params": list(m.parameters()), "lr": asked.lr.get(p, plan.lr)} for p, m in modules.items()]
    if plan.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, weight_decay=plan.weight_decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=fused)
    for step in plan.schedule(len(client.train), client.rng.at("batches")):
        x, y = client.train.batch(step.rows, dtype=dtype)
        logits = (
            torch.stack([module(x) for module in modules.values()]).sum(0) if len(modules) > 1 else modules["model"](x)
        )
        optimizer.zero_grad()
        functional.cross_entropy(logits, y).backward()
        if plan.clip:
            for module in modules.values():
                torch.nn.utils.clip_grad_norm_(module.parameters(), plan.clip)
        optimizer.step()
    return {part: module.state_dict() for part, module in modules.items()}


def check(
    got: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]], tolerance: float
) -> None:
    assert sorted(got) == sorted(expected)
    for part, params in expected.items():
        toy.close(got[part], params, tolerance)


@pytest.mark.parametrize("plan", PLANS)
def test_training_alone_is_the_loop_that_anybody_would_write(plan: str) -> None:
    """Catches a wrong optimizer, a gradient that adds up over steps, a clip over all parts, a lost buffer."""
    asked = request(PLANS[plan], parts=2, lr={"other": 0.02})
    # By the same kernel of the optimizer: at a small gradient, rounding makes Adam's step another by several ulps.
    check(run_fit(asked, FP32).parts, by_hand(asked, torch.float32, fused=True), 1e-6)
    asked = request(PLANS[plan], parts=2, lr={"other": 0.02}, dtype=torch.float64)
    check(run_fit(asked, FP64).parts, by_hand(asked, torch.float64), 1e-13)


@pytest.mark.parametrize("plan", ["plain", "momentum", "decay", "adam"])
def test_training_alone_is_bitwise_that_loop(plan: str) -> None:
    """Catches any arithmetic of our own between the gradient and the optimizer."""
    asked = request(PLANS[plan])
    check(run_fit(asked, FP32).parts, by_hand(asked, torch.float32, fused=True), 0.0)


def test_a_part_keeps_its_own_learning_rate() -> None:
    """Catches rates that are dealt to the wrong part or ignored: rate 0 for one, none for the other."""
    asked = request(PLANS["plain"], parts=2, lr={"other": 0.0})
    out = run_fit(asked, FP32).parts
    for name in ("fc1.weight", "fc2.bias", "bn.weight"):
        assert torch.equal(out["other"][name], asked.parts["other"][name])
        assert not torch.equal(out["model"][name], asked.parts["model"][name])


@pytest.mark.parametrize("stacked", [False, True])
def test_what_comes_in_is_not_written(stacked: bool) -> None:
    """Catches leaves that are the server's own tensors; buffers, which a forward writes, and frozen parts too."""
    net = model()
    frozen = {"other": net.init(Rng((9,)))}
    fits = [request(PLANS["momentum"], k=k, net=net, frozen=frozen) for k in (0, 1)]
    fits = [
        replace(
            f,
            client=replace(f.client, models={"model": net, "other": net}),
            loss=two_parts,
            gradient=lambda grad, nets, batch, due: grad(two_parts),
        )
        for f in fits
    ]
    before = [toy.copy(f.parts["model"]) for f in fits], toy.copy(frozen["other"])
    out = run_stacked(fits, FP32) if stacked else [run_fit(f, FP32) for f in fits]
    for asked, old in zip(fits, before[0], strict=True):
        toy.close(asked.parts["model"], old, 0.0)
    toy.close(frozen["other"], before[1], 0.0)
    assert all(int(o.parts["model"]["bn.num_batches_tracked"]) == 9 for o in out)


def test_the_optimizer_is_new_every_time() -> None:
    """Catches the released FedMRL's fault B2: momentum that leaks into the next client or round."""
    asked = request(PLANS["momentum"])
    one, two = run_fit(asked, FP32), run_fit(asked, FP32)
    check(one.parts, two.parts, 0.0)


def test_losses_are_averaged_over_the_steps() -> None:
    """Catches the last batch's loss in the place of the mean, and one too many per step."""
    asked = request(LocalSGD(epochs=2, batch_size=4, lr=0.0001))
    out = run_fit(asked, FP32)
    assert out.steps == 6
    module = normed()
    module.load_state_dict(dict(asked.parts["model"]))
    schedule = asked.client.plan.schedule(11, asked.client.rng.at("batches"))
    batches = [asked.client.train.batch(step.rows) for step in schedule]
    expected = sum(float(functional.cross_entropy(module(x), y).detach()) for x, y in batches) / 6
    assert out.loss == pytest.approx(expected, abs=1e-2)
    assert run_stacked([asked, asked], FP32)[1].loss == pytest.approx(out.loss, rel=1e-5)


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
        torch.optim.Adam(groups, **options)
        if settings.optimizer == "adam"
        else torch.optim.SGD(groups, momentum=settings.momentum, **options)
        for groups in (
            [{"params": [leaves["a"][k]], "lr": settings.lr}, {"params": [leaves["b"][k]], "lr": 0.5}] for k in range(3)
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


def test_clipping_is_torchs() -> None:
    """Catches a norm per tensor, and scaling up."""
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    clipped = clip(grads, 1.0)
    assert torch.cat(list(clipped.values())).norm() == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(clipped["a"][0] * 4, clipped["b"] * 3)
    assert torch.equal(clip(grads, 10.0)["a"], grads["a"])
    assert clip(grads, 0.0) is grads


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
        request(PLANS["plain"], net=model(dropping)),
        replace(base, loss=two_parts),
    ]
    assert all(signature(other) != signature(base) for other in others)


def coroutines(fits: list[Fit]) -> dict[int, Any]:
    def ask(asked: Fit) -> Any:
        fitted = yield asked
        return fitted, None

    return {asked.client.info.id: ask(asked) for asked in fits}


def test_stacks_are_really_taken_and_single_clients_run_alone() -> None:
    """Catches a batched driver that quietly runs everything in turn."""
    net = model()
    fits = [request(PLANS["plain"], k=k, net=net) for k in range(3)]
    fits.append(request(PLANS["plain"], k=3, net=model(normed), lr={"model": 0.7}))
    driver = Batched(FP32)
    out = driver.play(coroutines(fits))
    assert driver.paths == {"stacked": 3, "sequential": 1}
    assert list(out) == [0, 1, 2, 3]


def test_networks_that_draw_random_numbers_run_alone_and_the_reason_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches dropout whose stacked draws would differ, and a log that repeats itself every round."""
    net = model(dropping)
    assert net.random
    fits = [request(PLANS["plain"], k=k, net=net) for k in range(3)]
    assert "draws random numbers" in (why_not(fits[0]) or "")
    driver = Batched(FP32)
    with caplog.at_level(logging.INFO, "polyfed"):
        first = driver.play(coroutines(fits))
        driver.play(coroutines(fits))
    assert driver.paths == {"sequential": 6}
    assert [r.message for r in caplog.records if r.levelno == logging.INFO].count(
        "clients run one by one: " + str(why_not(fits[0]))
    ) == 1
    for asked in fits:
        mine: Any = first[asked.client.info.id].private
        check(mine.parts, run_fit(asked, FP32).parts, 0.0)


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


def test_dropout_follows_the_clients_key_and_moves_no_other_stream() -> None:
    """Catches draws that depend on who ran before, and a global generator that training moves."""
    asked = request(PLANS["plain"], net=model(dropping))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = run_fit(asked, FP32)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(5)
    check(run_fit(asked, FP32).parts, one.parts, 0.0)
    other = replace(asked, client=replace(asked.client, rng=Rng((5,))))
    assert not torch.equal(run_fit(other, FP32).parts["model"]["fc1.weight"], one.parts["model"]["fc1.weight"])


@pytest.mark.parametrize(
    ("driver", "execution", "path"),
    [
        ("auto", "stacked", "stacked"),
        ("auto", "channels-last", "channels-last"),
        ("auto", "sequential", "sequential"),
        ("auto", None, "sequential"),
        ("batched", "sequential", "stacked"),
        ("sequential", "stacked", "sequential"),
    ],
)
def test_auto_goes_the_way_that_was_found_and_others_their_own(
    driver: str, execution: ExecutionName | None, path: str
) -> None:
    """Catches a choice that is stored and not followed, and one that reaches a driver which does not choose."""
    federation = toy.federation(FedAvg(), models=("cnn5",), shape=(1, 16, 16), sizes=(4, 4))
    clients = LocalClients(federation, make_driver(driver, FP32), Store(Path("-"), (), resident=True))
    works = clients.driver
    if isinstance(works, Auto) and execution is not None:
        works.choice.by_kind["cnn5 at 1: supervised"] = execution
    play_round(federation, federation.algorithm.init_server(federation.task, federation.rng), 1, clients, works)
    assert works.paths == {path: 2}


def test_a_stack_takes_no_more_than_its_memory_and_computes_the_same() -> None:
    """Catches groups that are as large as the cohort, whatever it takes."""
    net = model()
    fits = [request(PLANS["momentum"], k=k, net=net, dtype=torch.float64) for k in range(5)]
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drivers, "run_stacked", lambda few, *_, **__: sizes.append(len(few)) or run_stacked(few, FP64))
        alone = Batched(FP64)._together(fits, [Work() for _ in fits])  # pyright: ignore[reportPrivateUsage]
        peak = Batched(FP64).costs.peak("-", fits[0], 4, False)
        tight = Batched(FP64, memory=2 * peak + 1)._together(fits, [Work() for _ in fits])  # pyright: ignore[reportPrivateUsage]
    assert sizes == [5, 1, 2, 2]
    assert alone is not None
    assert tight is not None
    for one, other in zip(alone, tight, strict=True):
        check(one.parts, other.parts, 1e-12)


def test_a_gradient_that_lies_unlike_its_weight_is_applied_where_it_belongs() -> None:
    """Catches torch's fused optimizers, which walk both memories in step: a transposed gradient ends elsewhere."""
    asked = request(PLANS["plain"], dtype=torch.float64)

    def turned(grad: Any, nets: Nets, batch: Batch, due: bool) -> Any:
        found = grad(supervised)["model"]
        return {"model": {n: g.t().contiguous().t() if g.dim() == 2 else g for n, g in found.items()}}

    check(run_fit(replace(asked, gradient=turned, loss=None), FP64).parts, run_fit(asked, FP64).parts, 0.0)


@pytest.mark.parametrize("plan", ["plain", "decay", "adam"])
def test_a_part_without_a_gradient_in_a_step_stays_where_it_is(plan: str) -> None:
    """Catches the gradient of an earlier step applied once more, and steps of Adam counted that were none."""

    def partial(grad: Any, nets: Nets, batch: Batch, due: bool) -> Any:
        found = grad(two_parts)
        return found if due else {"other": found["other"]}

    net = model()
    asked = [request(PLANS[plan], k=k, parts=2, net=net, every="epoch", dtype=torch.float64) for k in (4, 7)]
    fits = [replace(one, gradient=partial, loss=None) for one in asked]
    alone = run_fit(fits[0], FP64)
    check(run_stacked(fits, FP64)[0].parts, alone.parts, 1e-12)

    def never(grad: Any, nets: Nets, batch: Batch, due: bool) -> Any:
        return partial(grad, nets, batch, False)

    still = run_fit(replace(fits[0], gradient=never), FP64).parts["model"]
    names = [name for name in still if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(still[name], fits[0].parts["model"][name]) for name in names)
    assert not all(torch.equal(alone.parts["model"][name], still[name]) for name in names)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_weight_that_is_not_finite_names_client_round_and_tensor(stacked: bool) -> None:
    """Catches NaN that spreads over the federation."""
    net = model()
    fits = [request(replace(PLANS["plain"], lr=lr), k=k, net=net) for k, lr in ((4, 1e30), (7, 1e30))]
    with pytest.raises(DivergedError, match=r"client 4, round 1: tensor 'model\.[a-z0-9.]+' is not finite"):
        _ = run_stacked(fits, FP32) if stacked else run_fit(fits[0], FP32)


def test_a_stack_names_the_one_client_that_diverged() -> None:
    """Catches a sum over the stack, in which one client's NaN would be everybody's, or nobody's."""
    net = model()
    well, ill = (request(PLANS["plain"], k=k, net=net) for k in (4, 7))
    ill = replace(ill, parts=tree.map_parts(lambda value: value * float("nan"), ill.parts))
    with pytest.raises(DivergedError, match="client 7, round 1"):
        run_stacked([well, ill], FP32)


def test_reduce_sums_over_all_rows_in_evaluation_mode() -> None:
    """Catches a missing last batch, a mean of batches, training mode, and a gradient that is kept."""
    net = model()
    asked = request(PLANS["plain"], n=1203, net=net)

    def count(nets: Nets, batch: Batch) -> dict[str, Tensor]:
        return {"n": torch.tensor(len(batch[0])), "logits": nets["model"](batch[0]).sum(0)}

    everything = run_reduce(Reduce(asked.client, asked.parts, count, None), FP32)
    assert int(everything["n"]) == 1203
    module = normed()
    module.load_state_dict(dict(asked.parts["model"]))
    module.eval()
    x, _ = asked.client.train.batch(torch.arange(1203))
    assert torch.allclose(everything["logits"], module(x).sum(0), rtol=1e-4, atol=1e-3)
    assert not everything["logits"].requires_grad
    some = run_reduce(Reduce(asked.client, asked.parts, count, torch.tensor([5, 3])), FP32)
    assert torch.allclose(some["logits"], module(x[[5, 3]]).sum(0), rtol=1e-5, atol=1e-6)


def test_reduce_goes_over_held_out_examples_where_asked() -> None:
    """Catches a look at the training examples instead, and one at nothing where nothing is held out."""
    net = model()
    asked = request(PLANS["plain"], n=7, net=net)
    client = replace(asked.client, held_out=Data(3, 5))

    def count(nets: Nets, batch: Batch) -> dict[str, Tensor]:
        return {"n": torch.tensor(len(batch[0])), "x": batch[0].sum(0)}

    found = drive(reduce(client, asked.parts, count, held_out=True), lambda asked: run_reduce(asked, FP32))
    assert int(found["n"]) == 3
    assert torch.equal(found["x"], Data(3, 5).batch(torch.arange(3))[0].sum(0))
    with pytest.raises(TypeError, match="holdout"):
        drive(reduce(asked.client, asked.parts, count, held_out=True), lambda asked: run_reduce(asked, FP32))


def test_a_network_on_its_own_weights_is_the_module() -> None:
    """Catches a split model that computes another function than its module."""
    net, x = model(), Data(5, 0).x.float()
    params = net.init(Rng((0,)))
    module = normed().eval()
    assert torch.equal(net(params, x), functional_call(module, params, (x,)))


def noisy(nets: Nets, batch: Batch) -> Tensor:
    return a_loss(nets, (batch[0] + nets["drawn"]["noise"], batch[1]))


@pytest.mark.parametrize("draws", [True, False])
def test_what_a_step_draws_is_seen_at_that_step(draws: bool) -> None:
    """Catches draws of another step or client, drawn once for all steps, or lost in the stack."""

    def asked(k: int) -> Fit:
        rng, seen = Rng((0, "client", k)), []

        def draw(step: Any) -> dict[str, Tensor]:
            seen.append(step.index)
            noise = torch.randn(len(step.rows), 7, generator=rng.at("noise", step.index).torch(), dtype=torch.float64)
            return {"noise": noise * draws}

        made = request(PLANS["momentum"], k=k, n=9 + k, dtype=torch.float64, draw=draw)
        return replace(made, loss=noisy, gradient=lambda grad, nets, batch, due: grad(noisy))

    def by_hand_with_noise(made: Fit) -> dict[str, Tensor]:
        module, client = normed().double(), made.client
        module.load_state_dict(dict(made.parts["model"]))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for step in client.plan.schedule(len(client.train), client.rng.at("batches")):
            x, y = client.train.batch(step.rows, dtype=torch.float64)
            noise = torch.randn(
                len(step.rows), 7, generator=client.rng.at("noise", step.index).torch(), dtype=torch.float64
            )
            optimizer.zero_grad()
            functional.cross_entropy(module(x + noise * draws), y).backward()
            optimizer.step()
        return {name: value.detach() for name, value in module.state_dict().items()}

    fits = [asked(k) for k in range(3)]
    plain = request(PLANS["momentum"])
    assert signature(fits[0]) == signature(replace(fits[0], client=fits[1].client))
    assert signature(replace(plain, draw=None)) != signature(replace(plain, draw=fits[0].draw))
    for made, stacked in zip(fits, run_stacked(fits, FP64), strict=True):
        expected = by_hand_with_noise(made)
        for got in (run_fit(made, FP64), stacked):
            toy.close(got.parts["model"], expected, 1e-12)
