"""One round of FedAPEN, FedKD, FedMRL-E and adaptive FedMRL against loops written from their equations.

Modules, torch.optim and autograd; of polyfed only its networks' modules and the batches are used.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import plain
import pytest
import torch
import toy
from test_reference import one_thread
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fedapen import FedAPEN
from polyfed.algorithms.fedkd import FedKD
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.algorithms.fedmrl_adaptive import FedMRLAdaptive
from polyfed.algorithms.fedmrl_e import FedMRLE
from polyfed.base import tree
from polyfed.blocks.lowrank import LowRank
from polyfed.blocks.submodel import padded
from polyfed.core.requests import exchange
from polyfed.models.mlp import MLP

__all__ = ["one_thread"]

SIZES = (12, 9, 7)
MODELS = ("mlp(hidden=(12, 6))", "mlp(hidden=(8,))")
WIDTHS = {0: (12, 6), 1: (8,), 2: (12, 6)}
AUXILIARY = "mlp(hidden=(10, 5))"
TRAIN = {"epochs": 2, "batch_size": 4, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
SETTINGS = plain.Settings(0.05, 0.9, 0.01)
DRIVERS = pytest.mark.parametrize("driver", ["sequential", "batched"])


def start(algorithm: Any, driver: str, **more: Any) -> toy.Game:
    fed = toy.federation(algorithm, models=MODELS, sizes=SIZES, train=TRAIN, **more)
    return toy.play(fed, driver=driver, precision="fp64")


def privates(game: toy.Game) -> dict[int, Any]:
    with game.driver.placement.defaults():
        return {k: game.private(k) for k in range(3)}


def batches(game: toy.Game, client: int) -> list[Any]:
    local = game.local(client)
    with game.driver.placement.defaults():
        schedule = local.plan.schedule(len(local.train), local.rng.at("batches"))
        return [local.train.batch(step.rows, dtype=torch.float64) for step in schedule]


def held(game: toy.Game, client: int) -> tuple[Tensor, Tensor]:
    data = game.local(client).held_out
    return data.batch(torch.arange(len(data)), dtype=torch.float64)


def net(hidden: tuple[int, ...]) -> Callable[[], nn.Module]:
    return partial(MLP, (7,), hidden=hidden, num_classes=4)


def inside(mlp: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A dense network up to its last layer, and that layer."""
    for number in range(1, mlp.depth):
        x = torch.relu(getattr(mlp, f"fc{number}")(x))
    return x, getattr(mlp, f"fc{mlp.depth}")


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(p(target) || p(logits)), the mean over rows."""
    p = target.softmax(1)
    return (p * (target.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()


def leaves(weights: Any) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in weights.items()}


def descend(optimizer: torch.optim.Optimizer, *losses: tuple[Tensor, list[Tensor]]) -> None:
    """One step, each loss for its own weights."""
    optimizer.zero_grad()
    for loss, params in losses:
        for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
            p.grad = g if p.grad is None else p.grad + g
    optimizer.step()


def cross(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y)


# ------------------------------------------------------------------------------------------------------------ FedAPEN


def learn_lambda(z: Tensor, g: Tensor, y: Tensor, lam: float, *, lr: float, epochs: int, batch: int) -> float:
    """SGD on one number, by autograd."""
    weight = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    for _ in range(epochs):
        for rows in torch.arange(len(y)).split(batch):
            (slope,) = torch.autograd.grad(cross(weight * z[rows] + (1 - weight) * g[rows], y[rows]), weight)
            weight = (weight.detach() - lr * slope).clamp(0, 1).requires_grad_()
    return float(weight.detach())


def fedapen(cls: type[FedAPEN], driver: str = "sequential") -> None:
    """Two rounds of it are two rounds by hand."""
    game = start(cls(auxiliary=AUXILIARY, holdout=0.5, lr_lambda=0.3, epochs_lambda=3), driver)
    private = {k: (toy.copy(p.F), p.weight) for k, p in privates(game).items()}
    for _ in (1, 2):
        G = toy.copy(game.server.G)  # noqa: N806
        game.round()
        sent = []
        for k in range(3):
            own, shared = plain.load(net(WIDTHS[k]), private[k][0]), plain.load(net((10, 5)), G)
            x, y = held(game, k)
            with torch.no_grad():
                z, g = own(x), shared(x)
            lam = learn_lambda(z, g, y, private[k][1], lr=0.3, epochs=3, batch=4)
            optimizer = SETTINGS.optimizer([*own.parameters(), *shared.parameters()])
            for x, y in batches(game, k):
                z, g = own(x), shared(x)
                fixed_z, fixed_g = z.detach(), g.detach()
                pri = cross(z, y) + kl(fixed_g, z) + cross(lam * z + (1 - lam) * fixed_g, y)
                sha = cross(g, y) + kl(fixed_z, g) + cross(lam * fixed_z + (1 - lam) * g, y)
                descend(optimizer, (pri, list(own.parameters())), (sha, list(shared.parameters())))
            private[k] = plain.saved(own), lam
            sent.append(plain.saved(shared))
            toy.close(game.private(k).F, private[k][0], 1e-9)
            assert game.private(k).weight == pytest.approx(lam, rel=1e-9)
            assert lam != 0.5
        toy.close(game.server.G, plain.mean(sent, [1, 1, 1]), 1e-9)


# -------------------------------------------------------------------------------------------------------------- FedKD


def truncated(matrix: Tensor, energy: float) -> tuple[Tensor, int]:
    """The nearest matrix of the smallest rank that holds this energy, by numpy; and how many numbers it takes."""
    flat = matrix.reshape(len(matrix), -1).numpy()
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    r = next(r for r in range(1, len(s) + 1) if (s[:r] ** 2).sum() >= energy * (s**2).sum() or r == len(s))
    numbers = r * (sum(flat.shape) + 1)
    if numbers >= flat.size:
        return matrix, flat.size
    return torch.from_numpy((u[:, :r] @ np.diag(s[:r]) @ v[:r]).reshape(matrix.shape)), numbers


def fedkd(cls: type[FedKD], driver: str = "sequential") -> None:
    """Two rounds of it are two rounds by hand, and measured bytes the numbers that the ranks need."""
    game = start(cls(auxiliary=AUXILIARY, energy=(0.5, 0.8)), driver)
    before = privates(game)
    teachers = {k: toy.copy(p.F) for k, p in before.items()}
    maps = {k: toy.copy(p.W) for k, p in before.items()}
    G = toy.copy(game.server.G)  # noqa: N806
    shrunk = False
    for t in (1, 2):
        game.round()
        energy = 0.5 + 0.3 * t / 3
        updates = []
        for k in range(3):
            F, student = plain.load(net(WIDTHS[k]), teachers[k]), plain.load(net((10, 5)), G)  # noqa: N806
            W = maps[k]["weight"].clone().requires_grad_()  # noqa: N806
            assert W.shape == (WIDTHS[k][-1], 5)
            optimizer = SETTINGS.optimizer([*F.parameters(), *student.parameters(), W])
            for x, y in batches(game, k):
                (h_t, head_t), (h_s, head_s) = inside(F, x), inside(student, x)
                z, g = head_t(h_t), head_s(h_s)
                s = float((cross(z, y) + cross(g, y)).detach())
                hidden = (h_t - h_s @ W.T).square().mean() / s
                teach = cross(z, y) + kl(g.detach(), z) / s + hidden
                learn = cross(g, y) + kl(z.detach(), g) / s + hidden
                descend(optimizer, (teach, list(F.parameters())), (learn, list(student.parameters())), (hidden, [W]))
            teachers[k], maps[k] = plain.saved(F), {"weight": W.detach()}
            toy.close(game.private(k).F, teachers[k], 1e-9)
            toy.close(game.private(k).W, maps[k], 1e-9)
            update, numbers = {}, 0
            for name, value in plain.saved(student).items():
                update[name], count = (
                    truncated(value - G[name], energy) if value.dim() > 1 else (value - G[name], len(value))
                )
                numbers += count
            updates.append(update)
            assert game.played[-1].reports[k].up.values == 8 * numbers
            shrunk |= numbers < sum(value.numel() for value in G.values())
        mean = plain.mean(updates, SIZES)
        G = {name: v + (truncated(mean[name], energy)[0] if v.dim() > 1 else mean[name]) for name, v in G.items()}  # noqa: N806
        toy.close(game.server.G, G, 1e-9)
    assert shrunk


# ----------------------------------------------------------------------------------------------------- FedMRL's kin


def forward(w: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """The first layers of a dense network, by hand."""
    for layer in range(1, layers + 1):
        x = torch.relu(x @ w[f"fc{layer}.weight"].T + w[f"fc{layer}.bias"])
    return x


def losses_at(
    theta: dict[str, Tensor], w: dict[str, Tensor], phi: dict[str, Tensor], depth: int, ladder: list[int], batch: Any
) -> list[Tensor]:
    """CE of both headers with G cut at each width, from products of slices."""
    x, y = batch
    small, large = forward(theta, x, 2), forward(w, x, depth)
    found = []
    for m in ladder:
        fused = small[:, :m] @ phi["fc1.weight"][:, :m].T + large @ phi["fc1.weight"][:, 5:].T + phi["fc1.bias"]
        coarse = fused[:, :m] @ theta["fc3.weight"][:, :m].T + theta["fc3.bias"]
        fine = fused @ w[f"fc{depth + 1}.weight"].T + w[f"fc{depth + 1}.bias"]
        found.append(cross(coarse, y) + cross(fine, y))
    return found


def fedmrl_e(
    cls: type[FedMRLE], driver: str = "sequential", granularities: tuple[int, ...] = (2, 5), header: Any = "local"
) -> None:
    """One round of it is one by hand."""
    game = start(cls(auxiliary=AUXILIARY, rep_dim=5, granularities=granularities, header=header), driver)
    before = privates(game)
    theta, shared = toy.copy(game.server.G), toy.copy(game.server.H)
    assert sorted(theta) == ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
    game.round()
    sent, heads = [], []
    for k in range(3):
        last = f"fc{len(WIDTHS[k]) + 1}"
        begun = toy.copy(before[k].F)
        if header == "shared":  # the first d1 columns and the bias are everybody's
            begun[f"{last}.weight"][:, :5] = shared["weight"]
            begun[f"{last}.bias"][:] = shared["bias"]
        G, F, P = leaves(theta), leaves(begun), leaves(before[k].P)  # noqa: N806
        optimizer = SETTINGS.optimizer([*G.values(), *F.values(), *P.values()])
        for x, y in batches(game, k):
            small, large = forward(G, x, 2), forward(F, x, len(WIDTHS[k]))
            fused = torch.cat([small, large], 1) @ P["fc1.weight"].T + P["fc1.bias"]
            W, b = F[f"{last}.weight"], F[f"{last}.bias"]  # noqa: N806
            widths = [*(granularities or (5,)), fused.shape[1]]
            loss = torch.stack([cross(fused[:, :m] @ W[:, :m].T + b, y) for m in widths]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        toy.close(game.private(k).F, {n: v.detach() for n, v in F.items()}, 1e-9)
        toy.close(game.private(k).P, {n: v.detach() for n, v in P.items()}, 1e-9)
        sent.append({n: v.detach() for n, v in G.items()})
        heads.append({"weight": F[f"{last}.weight"].detach()[:, :5], "bias": F[f"{last}.bias"].detach()})
    toy.close(game.server.G, plain.mean(sent, SIZES), 1e-9)
    toy.close(game.server.H, plain.mean(heads, SIZES) if header == "shared" else {}, 1e-9)


def fedmrl_e_shared(cls: type[FedMRLE], driver: str = "sequential") -> None:
    """The same with a shared header."""
    fedmrl_e(cls, driver, header="shared")


def fedmrl_adaptive(cls: type[FedMRLAdaptive], driver: str = "sequential") -> None:
    """One round of it is one by hand: three clients at three widths."""
    algorithm = cls(auxiliary=AUXILIARY, rep_dim=5, granularities=(2, 3), holdout=0.4, tolerance=0.05, patience=1)
    game = start(algorithm, driver)
    held_widths = {0: 2, 1: 5, 2: 3}
    game.server = type(game.server)(game.server.G, game.server.shapes, {0: 2, 2: 3})
    before = privates(game)
    theta = toy.copy(game.server.G)
    game.round()
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    count = {name: torch.zeros_like(value) for name, value in theta.items()}
    for k, d in held_widths.items():
        G = leaves(theta)  # noqa: N806
        F, P = leaves(before[k].F), leaves(before[k].P)  # noqa: N806
        optimizer = SETTINGS.optimizer([*G.values(), *F.values(), *P.values()])
        ladder = [m for m in (2, 3, 5) if m <= d]
        losses = partial(losses_at, G, F, P, len(WIDTHS[k]), ladder)
        for batch in batches(game, k):
            optimizer.zero_grad()
            torch.stack(losses(batch)).mean().backward()
            optimizer.step()
        toy.close(game.private(k).F, {n: v.detach() for n, v in F.items()}, 1e-9)
        toy.close(game.private(k).P, {n: v.detach() for n, v in P.items()}, 1e-9)
        values = [float(v.detach()) for v in losses(held(game, k))]
        chosen = next(m for m, v in zip(ladder, values, strict=True) if v <= 1.05 * min(values))
        wider = {2: 3, 3: 5, 5: 5}[d]
        assert game.server.widths[k] == (wider if chosen == d else chosen)
        for name, value in G.items():
            block = tuple(slice(d) if size == 5 else slice(None) for size in value.shape)  # 5 is D, and nothing else
            total[name][block] += SIZES_LEFT[k] * value.detach()[block]
            count[name][block] += SIZES_LEFT[k]
    expected = {name: torch.where(count[name] > 0, total[name] / count[name], theta[name]) for name in theta}
    toy.close(game.server.G, expected, 1e-9)


#: Training examples without the 40 % that are held out.
SIZES_LEFT = [12 - 5, 9 - 4, 7 - 3]


@DRIVERS
@pytest.mark.parametrize(
    ("check", "cls"),
    [
        (fedapen, FedAPEN),
        (fedkd, FedKD),
        (fedmrl_e, FedMRLE),
        (fedmrl_e_shared, FedMRLE),
        (fedmrl_adaptive, FedMRLAdaptive),
    ],
)
def test_rounds_are_those_of_the_equations(check: Any, cls: Any, driver: str) -> None:
    check(cls, driver)


@DRIVERS
def test_without_granularities_fedmrl_e_has_that_of_d1(driver: str) -> None:
    fedmrl_e(FedMRLE, driver, ())


# -------------------------------------------------------------------------------------------- faults of released code


class MeanOverElements(FedAPEN):
    """KL as a mean over examples and classes: L times weaker."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        z, g, lam = nets["F"](x), nets["G"](x), nets["lambda"]["weight"]
        weak = (kl(g.detach(), z) + kl(z.detach(), g)) / z.shape[1]
        return cross(z, y) + cross(g, y) + 2 * cross(lam * z + (1 - lam) * g, y) + weak


class NotDetached(FedAPEN):
    """Each network receives the gradient of the other's loss, too."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        z, g, lam = nets["F"](x), nets["G"](x), nets["lambda"]["weight"]
        return cross(z, y) + cross(g, y) + 2 * cross(lam * z + (1 - lam) * g, y) + kl(g, z) + kl(z, g)


class LearntOnTraining(FedAPEN):
    """lambda_k is learnt on what both networks have fitted."""

    def predictor_parts(self, private: Any, msg: Any, client: Any) -> Any:
        return (yield from super().predictor_parts(private, msg, replace(client, held_out=client.train)))


class Forgets(FedAPEN):
    """lambda_k begins at 1/2 every time."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        return (yield from super().client_round(replace(private, weight=0.5), msg, client))


class GradientOfTheDenominator(FedKD):
    """s is not detached: a larger cross-entropy makes the rest smaller."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        h_t, h_s = nets["F"].represent(x), nets["G"].represent(x)
        z, g = nets["F"].classify(h_t), nets["G"].classify(h_s)
        s = cross(z, y) + cross(g, y)
        hidden = (h_t - h_s @ nets["W"]["weight"].T).square().mean()
        return s + (kl(z.detach(), g) + kl(g.detach(), z) + hidden) / s


class TwiceTheMap(FedKD):
    """The hidden term is counted in both losses and nothing is detached: all of it counts twice."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        h_t, h_s = nets["F"].represent(x), nets["G"].represent(x)
        hidden = (h_t - h_s @ nets["W"]["weight"].T).square().mean()
        s = cross(nets["F"].classify(h_t), y) + cross(nets["G"].classify(h_s), y)
        return FedKD.loss(self, nets, batch) + hidden / s.detach()


class TruncatesWeights(FedKD):
    """The student's weights are cut to a low rank, not its update."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        kept, up = yield from super().client_round(private, msg, client)
        after = tree.add(kept.G, up.update.full(kept.G))
        cut = LowRank.of(after, msg.energy).full(after)
        return kept, replace(up, update=LowRank.of(tree.sub(cut, kept.G), 1.0))


class TwoOptimizers(FedMRLE):
    """B6: two headers share their storage, and each one's optimizer decays it."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        head = nets["F"].model.head(nets["F"].params)
        shared = sum(head["weight"][:, :m].square().sum() + head["bias"].square().sum() for m in self.nested)
        return super().loss(nets, batch) + 0.5 * SETTINGS.weight_decay * shared


class SliceOfTheInput(FedMRLE):
    """The prefixes are those of [R_G ; R_F], not of what the projector makes of it."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        joined = torch.cat([nets["G"].represent(x), nets["F"].represent(x)], dim=1)
        fused = nets["P"](joined)
        prefixes = [joined[:, : fused.shape[1]] * (torch.arange(fused.shape[1]) < m) for m in self.nested]
        return sum((cross(nets["F"].classify(r), y) for r in prefixes), cross(nets["F"].classify(fused), y))


class GoesOnWithItsOwn(FedMRLE):
    """What is shared of the header does not take the place of the client's own."""

    def predictor_parts(self, private: Any, msg: Any, client: Any) -> Any:
        return super().predictor_parts(private, replace(msg, H={}), client)


class HeadersAlike(FedMRLE):
    """Headers averaged without their clients' numbers of examples."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        replies = yield from exchange(cohort, self.Broadcast(server.G, server.H))
        n = replies.all("num_examples")
        return self.Server(plain.mean(replies.all("G"), n), plain.mean(replies.all("H"), [1] * len(n)))


class ZerosCount(FedMRLAdaptive):
    """Who does not hold a coordinate counts as a zero."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        replies = yield from exchange(cohort, lambda client: self.message_for(server, client))
        models = [padded(model, tree.shapes(server.G)) for model in replies.all("G")]
        widths = {reply.client.id: reply.message.width for reply in replies}
        return self.Server(plain.mean(models, replies.all("num_examples")), server.shapes, widths)


@pytest.mark.parametrize(
    ("check", "cls"),
    [
        *((fedapen, cls) for cls in (MeanOverElements, NotDetached, LearntOnTraining, Forgets)),
        *((fedkd, cls) for cls in (GradientOfTheDenominator, TwiceTheMap, TruncatesWeights)),
        *((fedmrl_e, cls) for cls in (TwoOptimizers, SliceOfTheInput)),
        *((fedmrl_e_shared, cls) for cls in (GoesOnWithItsOwn, HeadersAlike)),
        (fedmrl_adaptive, ZerosCount),
    ],
)
def test_the_faults_of_released_code_are_seen(check: Any, cls: Any) -> None:
    with pytest.raises(AssertionError):
        check(cls)


@DRIVERS
def test_a_ladder_of_one_width_is_fedmrl(driver: str) -> None:
    """Catches a loss of another scale, and masks that change numbers: bitwise the same small model as FedMRL's."""
    adaptive = start(FedMRLAdaptive(auxiliary=AUXILIARY, rep_dim=5, granularities=(5,), holdout=0.01), driver)
    ordinary = start(Held(auxiliary=AUXILIARY, rep_dim=5), driver)
    for _ in (1, 2):
        adaptive.round()
        ordinary.round()
    toy.close(adaptive.server.G, toy.copy(ordinary.server.G), 1e-14)
    for k in range(3):
        toy.close(adaptive.private(k).P, toy.copy(ordinary.private(k).P), 1e-14)


class Held(FedMRL):
    """FedMRL that trains on as few examples."""

    holdout = 0.01
