"""Local training of one client against plain torch: the same numbers, whatever the optimizer."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from fits import FP32, FP64, PLANS, Data, a_loss, by_hand, check, dropping, model, normed, request, two_parts
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from polyfed.base.errors import DivergedError
from polyfed.base.rng import Rng
from polyfed.base.types import Parts
from polyfed.blocks.losses import supervised
from polyfed.core.net import Batch, Nets
from polyfed.core.plan import LocalSGD
from polyfed.core.requests import Fit, Grad, Reduce, drive, reduce
from polyfed.execute.local_training import clip, run_fit, run_reduce
from polyfed.execute.stacked import run_stacked, signature


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


def fixed(asked: Fit, seed: int) -> Parts:
    """Corrections of the matrices, and of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part: {n: torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items() if "fc" in n}
        for part, params in asked.parts.items()
    }


@pytest.mark.parametrize("plan", PLANS)
def test_a_correction_comes_after_every_update(plan: str) -> None:
    """Catches a correction that is clipped, decays, enters momentum or moments, or has another part's rate."""
    asked = request(PLANS[plan], parts=2, lr={"other": 0.02}, dtype=torch.float64)
    asked = replace(asked, correction=fixed(asked, 3))
    check(run_fit(asked, FP64).parts, by_hand(asked, torch.float64), 1e-13)


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


def test_clipping_is_torchs() -> None:
    """Catches a norm per tensor, and scaling up."""
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    clipped = clip(grads, 1.0)
    assert torch.cat(list(clipped.values())).norm() == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(clipped["a"][0] * 4, clipped["b"] * 3)
    assert torch.equal(clip(grads, 10.0)["a"], grads["a"])
    assert clip(grads, 0.0) is grads


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


def test_reduce_keeps_what_some_batches_do_not_name() -> None:
    """Catches statistics of BatchNorm that are lost where the last batch has one example, of which there are none."""
    asked = request(PLANS["plain"], n=501)

    def count(nets: Nets, batch: Batch) -> dict[str, Tensor]:
        n = torch.tensor(len(batch[0]))
        return {"n": n, **({"several": n} if n > 1 else {})}

    found = run_reduce(Reduce(asked.client, asked.parts, count, None), FP32)
    assert {name: int(value) for name, value in found.items()} == {"n": 501, "several": 500}


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


def test_a_gradient_of_the_weights_leaves_nothing_behind() -> None:
    """Catches the graph of a gradient such as FIARSE's: as `.grad` of a weight it means that weight, and so itself."""
    seen: list[weakref.ref[Tensor]] = []

    def squared(grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        params = nets["model"].params
        seen.extend(map(weakref.ref, params.values()))
        return {"model": {name: g * params[name] ** 2 for name, g in grad(a_loss)["model"].items()}}

    out = run_fit(replace(request(PLANS["plain"]), gradient=squared), FP32)
    assert not out.parts["model"]["fc1.weight"].requires_grad
    gc.collect()
    assert seen
    assert not [one for one in seen if one() is not None]
