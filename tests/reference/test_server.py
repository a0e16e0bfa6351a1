"""Three rounds of FedGH, FedTGP, FedGen and FedL2G against plain loops, and the faults of released code they catch.

The clients are those of test_reference_knowledge: two architectures of one width, and some of eight classes each, some
several times. Batches, the server's included, are handed in. FedGen's classes and noise are not followed by hand: they
are what polyfed's own `draw_classes` draws, which tests/core/test_core_server.py looks at.
"""

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import plain
import pytest
import torch
import toy
from test_knowledge import (
    HIDDEN,
    SIZES,
    TRAIN,
    L,
    OfSums,
    begin,
    body,
    make,
    mean_over_holders,
    means,
    start,
)
from test_reference import batches, one_thread, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fedgen import FedGen
from polyfed.algorithms.fedgh import FedGH
from polyfed.algorithms.fedl2g import FedL2G
from polyfed.algorithms.fedtgp import FedTGP
from polyfed.base import tree
from polyfed.base.rng import Rng
from polyfed.blocks.classwise import class_means
from polyfed.blocks.feature_generator import draw_classes
from polyfed.blocks.losses import supervised
from polyfed.core.plan import Step
from polyfed.core.requests import exchange, fit

__all__ = ["one_thread"]

SETTINGS = plain.Settings(TRAIN["lr"], TRAIN["momentum"], TRAIN["weight_decay"])
TOLERANCE = 1e-9
ROUNDS = (1, 2, 3)


def server_rng(game: toy.Game, round_: int) -> Rng:
    return game.federation.rng.at("round", round_, "server")


def server_batches(rng: Rng, n: int, epochs: int, batch: int) -> list[Tensor]:
    """A new order in each epoch, cut into batches; a last batch of one is left out."""
    out = []
    for epoch in range(epochs):
        cuts = torch.randperm(n, generator=rng.at("training", "epoch", epoch).torch()).split(batch)
        out += [rows for rows in cuts if len(rows) > 1 or n == 1]
    return out


def descend(net: nn.Module, steps: list[Any], loss: Any) -> nn.Module:
    """Local training by a loss of (x, y) and the number of the step."""
    optimizer = SETTINGS.optimizer(net.parameters())
    for number, (x, y) in enumerate(steps):
        optimizer.zero_grad()
        loss(x, y, number).backward()
        optimizer.step()
    return net


def pooled(uploads: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    rows = [(upload[c], int(c)) for upload in uploads for c in upload]
    return torch.stack([row for row, _ in rows]), torch.tensor([c for _, c in rows])


def layer(client: int) -> str:
    """The name of a client's last layer."""
    return f"fc{len(HIDDEN[client % 2]) + 1}"


def under(weights: plain.Weights, head: plain.Weights, client: int) -> plain.Weights:
    return {**weights, **{f"{layer(client)}.{name}": value for name, value in head.items()}}


def apart(weights: plain.Weights, client: int) -> tuple[plain.Weights, plain.Weights]:
    head = {name: weights[f"{layer(client)}.{name}"] for name in ("weight", "bias")}
    return {name: v for name, v in weights.items() if not name.startswith(layer(client))}, head


# ------------------------------------------------------------------------------------------------------------- FedGH


def follow_fedgh(algorithm: FedGH, driver: str) -> None:
    game = begin(algorithm, driver)
    bodies, head = start(game, "body"), toy.copy(game.server.head)
    for round_ in ROUNDS:
        game.round()
        uploads = []
        for k in range(3):
            toy.close(game.sent[-1][k].head, head, TOLERANCE)
            steps = pairs(batches(game, k, round_))
            ended = plain.local_sgd(make(k), under(bodies[k], head, k), steps, SETTINGS)
            net = plain.load(make(k), ended).eval()
            uploads.append(means(game, k, partial(body, net)))
            bodies[k], _ = apart(ended, k)
            toy.close(game.private(k).body, bodies[k], TOLERANCE)
            toy.close(game.got[-1][k].means, uploads[k], TOLERANCE)
        rows, labels = pooled(uploads)
        leaves = {name: value.clone().requires_grad_() for name, value in head.items()}
        optimizer = torch.optim.SGD(leaves.values(), lr=algorithm.server_lr)
        steps = server_batches(server_rng(game, round_), len(labels), algorithm.server_epochs, algorithm.server_batch)
        for some in steps:
            optimizer.zero_grad()
            logits = rows[some] @ leaves["weight"].T + leaves["bias"]
            functional.cross_entropy(logits, labels[some]).backward()
            optimizer.step()
        head = {name: leaf.detach() for name, leaf in leaves.items()}
        toy.close(game.server.head, head, TOLERANCE)


class HeaderNeverMoves(FedGH):
    """The authors' code: the server steps with the optimizer of a client's network, in which the header is not."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        yield from super().server_round(server, cohort)
        return server


class StaleMeans(FedGH):
    """Means of the extractor from before the round."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        stale = yield from class_means(client, self.predictor_parts(private, msg, client), self.represent)
        kept, _ = yield from super().client_round(private, msg, client)
        return kept, self.Upload(stale)


class SummedRows(OfSums, FedGH):
    """Sums of representations."""


class OwnHeader(FedGH):
    """The client's own header goes on, and the server's is not loaded."""

    def predictor_parts(self, private: Any, msg: Any, client: Any) -> Any:
        model = client.models["model"]
        return {"model": model.with_head(private.body, model.head(model.init(Rng(("own",)))))}


# ------------------------------------------------------------------------------------------------------------ FedTGP


def follow_fedtgp(algorithm: FedTGP, driver: str) -> None:
    game = begin(algorithm, driver)
    models, weights = start(game, "model"), toy.copy(game.server.weights)
    sent: dict[str, Tensor] = {}
    for round_ in ROUNDS:
        game.round()
        uploads = []
        for k in range(3):
            toy.close(game.sent[-1][k].prototypes, sent, TOLERANCE)
            net = plain.load(make(k), models[k])

            def loss(x: Tensor, y: Tensor, _: int, net: nn.Module = net, P: Any = sent) -> Tensor:  # noqa: N803
                total, r = functional.cross_entropy(net(x), y), body(net, x)
                for row, label in zip(r, y.tolist(), strict=True):
                    if str(label) in P:
                        total = total + algorithm.weight * (row - P[str(label)]).square().mean() / len(y)
                return total

            models[k] = plain.saved(descend(net, pairs(batches(game, k, round_)), loss))
            uploads.append(means(game, k, partial(body, net)))
            toy.close(game.private(k).model, models[k], TOLERANCE)
            toy.close(game.got[-1][k].prototypes, uploads[k], TOLERANCE)
        mean = mean_over_holders(uploads)
        nearest, farthest = dict.fromkeys(mean, float("inf")), 0.0
        for a, b in combinations(mean, 2):
            distance = float((mean[a] - mean[b]).norm())
            nearest |= {a: min(nearest[a], distance), b: min(nearest[b], distance)}
            farthest = max(farthest, distance)
        gap = farthest if algorithm.margin_to == "farthest" else max(nearest.values())
        delta = min(algorithm.max_margin, gap)
        rows, labels = pooled(uploads)
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}

        def prototypes(w: plain.Weights) -> Tensor:
            inner = torch.relu(w["e"] @ w["fc1.weight"].T + w["fc1.bias"])
            return inner @ w["fc2.weight"].T + w["fc2.bias"]

        optimizer = torch.optim.SGD(leaves.values(), lr=algorithm.server_lr)
        for some in server_batches(
            server_rng(game, round_), len(labels), algorithm.server_epochs, algorithm.server_batch
        ):
            optimizer.zero_grad()
            P = prototypes(leaves)  # noqa: N806
            distance = (rows[some][:, None] - P).square().sum(2).clamp(min=1e-24).sqrt()
            distance = distance + delta * torch.eye(L, dtype=distance.dtype)[labels[some]]
            functional.cross_entropy(-distance, labels[some]).backward()
            optimizer.step()
        weights = {name: leaf.detach() for name, leaf in leaves.items()}
        sent = {c: prototypes(weights)[int(c)] for c in {*sent, *mean}}
        toy.close(game.server.weights, weights, 100 * TOLERANCE)
        toy.close(game.server.prototypes, sent, 100 * TOLERANCE)


class StalePrototypes(FedTGP):
    """The authors' code, HtFLlib: prototypes of the model from before this round's training."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        stale = yield from class_means(client, {"model": private.model}, self.represent)
        kept, _ = yield from super().client_round(private, msg, client)
        return kept, self.Upload(stale)


class SummedPrototypes(OfSums, FedTGP):
    """Sums of representations."""


class MarginEases(FedTGP):
    """The margin taken off the distance to the true class, which makes the task easier."""

    def contrast(self, rows: Any, labels: Any, *rest: Any) -> Tensor:
        return super().contrast(rows, labels, rest[0], -rest[1])


class LeastMargin(FedTGP):
    """The least of the distances between classes, not the largest of their least."""

    def margin(self, uploads: Any) -> float:
        rows = list(mean_over_holders(uploads).values())
        return min(float((a - b).norm()) for a, b in combinations(rows, 2))


class OtherMargin(FedTGP):
    """The released margin where the paper's is asked for, and the other way round."""

    def margin(self, uploads: Any) -> float:
        other = {"farthest": "nearest", "nearest": "farthest"}[self.margin_to]
        return FedTGP.margin(replace(self, margin_to=other), uploads)


class Untrained(FedTGP):
    """What was trained is not saved: every round begins from the first weights."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        after = yield from super().server_round(server, cohort)
        return replace(after, weights=server.weights)


# ------------------------------------------------------------------------------------------------------------ FedGen


def follow_fedgen(algorithm: FedGen, driver: str) -> None:
    game = begin(algorithm, driver)
    bodies, head, G = start(game, "body"), toy.copy(game.server.head), toy.copy(game.server.generator)  # noqa: N806
    classes: list[int] = []

    def make_latents(w: plain.Weights, eps: Tensor, y: Tensor) -> Tensor:
        inner = torch.cat([eps, functional.one_hot(y, L).to(eps.dtype)], dim=1) @ w["fc1.weight"].T + w["fc1.bias"]
        return torch.relu(inner) @ w["fc2.weight"].T + w["fc2.bias"]

    def given(known: list[int], rng: Rng, number: int, n: int) -> dict[str, Tensor]:
        with game.driver.placement.defaults():
            return draw_classes(known, algorithm.noise_dim, rng, Step(torch.arange(n), number, 0))

    def loss(net: Any, last: Any, rng: Any, t: int, x: Tensor, y: Tensor, number: int) -> Tensor:
        logits = net(x)
        total = functional.cross_entropy(logits, y)
        if not classes:
            return total
        drawn = given(classes, rng, number, len(y))
        latent = functional.cross_entropy(last(make_latents(G, drawn["eps"][0], drawn["y"])), drawn["y"])
        total = total + algorithm.alpha * algorithm.decay**t * latent
        target = torch.softmax(last(make_latents(G, drawn["eps"][1], y)), dim=1).detach()
        kl = (target * (target.log() - functional.log_softmax(logits, dim=1))).sum(1)
        known = torch.tensor([c in classes for c in y.tolist()])
        return total + algorithm.beta * algorithm.decay**t * (kl * known).mean()

    for round_ in ROUNDS:
        game.round()
        heads, counts = [], []
        for k in range(3):
            toy.close(game.sent[-1][k].generator, G, TOLERANCE)
            net, rng = plain.load(make(k), under(bodies[k], head, k)), game.local(k, round_).rng
            last = net.get_submodule(layer(k))

            descend(net, pairs(batches(game, k, round_)), partial(loss, net, last, rng, round_ - 1))
            bodies[k], own = apart(plain.saved(net), k)
            heads.append(own)
            labels = game.local(k).train.labels
            counts.append(torch.stack([(labels == c).sum() for c in range(L)]).double())
            toy.close(game.private(k).body, bodies[k], TOLERANCE)
            toy.close(game.got[-1][k].head, own, TOLERANCE)
            assert torch.equal(game.got[-1][k].counts, counts[k])
        leaves = {name: value.clone().requires_grad_() for name, value in G.items()}
        optimizer = torch.optim.Adam(leaves.values(), lr=algorithm.server_lr)
        present = [c for c in range(L) if sum(float(n[c]) for n in counts)]
        for number in range(algorithm.server_steps):
            drawn = given(present, server_rng(game, round_), number, algorithm.server_batch)
            y, eps = drawn["y"], drawn["eps"][0]
            z = make_latents(leaves, eps, y)
            rows = []
            for row, label in zip(z, y.tolist(), strict=True):
                total = sum(float(n[label]) for n in counts)
                logits = [float(n[label]) / total * (h["weight"] @ row + h["bias"])
                          for n, h in zip(counts, heads, strict=True)]  # fmt: skip
                rows.append(torch.stack(logits).sum(0))
            far = [
                (z[i] - z[j]).abs().mean() * (eps[i] - eps[j]).square().mean()
                for i in range(len(y))
                for j in range(len(y))
            ]
            optimizer.zero_grad()
            spread = torch.exp(-torch.stack(far).mean())
            (functional.cross_entropy(torch.stack(rows), y) + algorithm.diversity * spread).backward()
            optimizer.step()
        G = {name: leaf.detach() for name, leaf in leaves.items()}  # noqa: N806
        head, classes = plain.mean(heads, SIZES), sorted({*classes, *present})
        toy.close(game.server.generator, G, 10 * TOLERANCE)
        toy.close(game.server.head, head, TOLERANCE)


class GeneratorNeverSaved(FedGen):
    """HtFLlib: the trained generator is thrown away, and clients get the initial one for ever."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        after = yield from super().server_round(server, cohort)
        return replace(after, generator=server.generator)


class HeadsAlike(FedGen):
    """HtFLlib: heads weigh by their clients' numbers of examples, whatever the class."""

    def server_loss(self, heads: Any, counts: Any, *rest: Any) -> Tensor:
        return super().server_loss(heads, counts.sum(dim=1, keepdim=True).expand_as(counts), *rest)


class UniformNoise(FedGen):
    """The authors' generator, HtFLlib: noise from torch.rand. Here at the server alone, which is told already."""

    def server_loss(self, heads: Any, counts: Any, draw: Any, *rest: Any) -> Tensor:
        return super().server_loss(heads, counts, lambda step: flat(draw(step)), *rest)


def flat(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**drawn, "eps": 0.5 * (1 + torch.erf(drawn["eps"] / 2**0.5))}


class NoTerms(FedGen):
    """A generator that nobody learns from."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        kept, up = yield from super().client_round(private, replace(msg, classes=()), client)
        return kept, up


# ------------------------------------------------------------------------------------------------------------ FedL2G


def follow_fedl2g(algorithm: FedL2G, driver: str) -> None:
    game = begin(algorithm, driver)
    models, v = start(game, "model"), toy.copy(game.server.vectors)
    for round_ in ROUNDS:
        game.round()
        uploads = []
        for k in range(3):
            local = game.local(k, round_)
            net = plain.load(make(k), models[k])

            def output(net: Any, x: Tensor) -> Tensor:
                return net(x) if algorithm.guide == "logits" else body(net, x)

            def loss(x: Tensor, y: Tensor, _: int, net: Any = net, v: Any = v) -> Tensor:
                wanted = torch.stack([v[str(c)] for c in y.tolist()])
                return functional.cross_entropy(net(x), y) + (output(net, x) - wanted).square().mean()

            if round_ > algorithm.warmup:
                descend(net, pairs(batches(game, k, round_)), loss)
            models[k] = plain.saved(net)
            B = local.plan.batch_size  # noqa: N806
            study = torch.randperm(len(local.train), generator=local.rng.at("study").torch())[:B]
            quiz = torch.randperm(len(local.held_out), generator=local.rng.at("quiz").torch())[:B]
            x, y = local.train.batch(study, dtype=torch.float64)
            qx, qy = local.held_out.batch(quiz, dtype=torch.float64)
            # With J_i the derivative of the output for example i, dw'/dv_c = lr * 2 / (B m) * sum of J_i over class c.
            w = list(net.parameters())
            first = torch.autograd.grad(loss(x, y, 0), w)
            moved = plain.load(make(k), models[k])
            with torch.no_grad():
                for p, g in zip(moved.parameters(), first, strict=True):
                    p -= SETTINGS.lr * g
            q = torch.autograd.grad(functional.cross_entropy(moved(qx), qy), list(moved.parameters()))
            out = output(net, x)  # (B, m)
            along = torch.zeros_like(out)
            for i in range(out.shape[0]):
                for j in range(out.shape[1]):
                    J = torch.autograd.grad(out[i, j], w, retain_graph=True, materialize_grads=True)  # noqa: N806
                    along[i, j] = sum((a * b).sum() for a, b in zip(J, q, strict=True))
            each = SETTINGS.lr * 2 / out.numel() * along.detach()
            uploads.append({str(c): each[y == c].sum(0) for c in y.unique().tolist()})
            toy.close(game.private(k).model, models[k], TOLERANCE)
            toy.close(game.got[-1][k].gradients, uploads[k], TOLERANCE, floor=1e-6)
        mean = mean_over_holders(uploads)
        norm = float(torch.cat(list(mean.values())).norm())
        scale = min(1.0, algorithm.server_clip / (norm + 1e-6)) if algorithm.server_clip else 1.0
        v = {c: row - algorithm.server_lr * scale * mean.get(c, torch.zeros_like(row)) for c, row in v.items()}
        toy.close(game.server.vectors, v, TOLERANCE)


class Summed(FedL2G):
    """Gradients of a class added up, not averaged over the clients that have it."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        replies = yield from exchange(cohort, self.Broadcast(server.vectors))
        after = dict(server.vectors)
        for reply in replies:
            for c, g in reply.message.gradients.items():
                after[c] = after[c] - self.server_lr * g
        return self.Server(after)


class FirstOfTheArray(FedL2G):
    """The authors' code: the quiz asks of the first examples of the client's data, which it trains on here, too."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        return (yield from super().client_round(private, msg, replace(client, held_out=Ahead(client.train))))


class Ahead:
    """The first example of some data."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def batch(self, positions: Tensor, **more: Any) -> Any:
        return self.data.batch(positions, **more)


class TrainsInWarmUp(FedL2G):
    """Networks that learn before their guide does."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        if client.round <= self.warmup:
            fitted = yield from fit(client, {"model": private.model}, loss=supervised)
            private = self.Private(fitted.parts["model"])
        return (yield from super().client_round(private, msg, client))


class QuizBeforeTheStep(FedL2G):
    """The quiz taken at the weights that were not moved: its gradient for the vectors is zero."""

    def meta_gradient(self, lr: float, nets: Any, study: Any) -> Any:
        return tree.map_leaves(torch.zeros_like, super().meta_gradient(lr, nets, study))


# -------------------------------------------------------------------------------------------------------------- tests

SERVER = {"server_lr": 0.2, "server_batch": 4}
FOLLOW: list[Any] = [
    (follow_fedgh, FedGH, {**SERVER, "server_epochs": 3},
     [HeaderNeverMoves, StaleMeans, SummedRows, OwnHeader]),
    (follow_fedtgp, FedTGP, {**SERVER, "server_epochs": 4, "weight": 0.7},
     [StalePrototypes, SummedPrototypes, MarginEases, LeastMargin, OtherMargin, Untrained]),
    (follow_fedtgp, FedTGP, {**SERVER, "server_epochs": 4, "margin_to": "nearest"}, []),
    (follow_fedgen, FedGen, {"server_lr": 0.01, "server_batch": 5, "server_steps": 4, "noise_dim": 3, "hidden": 7,
                             "alpha": 0.8, "beta": 0.6, "diversity": 0.5, "decay": 0.9},
     [GeneratorNeverSaved, HeadsAlike, UniformNoise, NoTerms]),
    (follow_fedl2g, FedL2G, {"server_lr": 5.0, "warmup": 1, "holdout": 0.4},
     [Summed, FirstOfTheArray, TrainsInWarmUp, QuizBeforeTheStep]),
    (follow_fedl2g, FedL2G, {"server_lr": 5.0, "warmup": 0, "holdout": 0.3, "guide": "features", "server_clip": 1e-3},
     []),
]  # fmt: skip
NAMES = ["fedgh", "fedtgp", "fedtgp-nearest", "fedgen", "fedl2g", "fedl2g-features"]


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize(("follow", "cls", "keys"), [case[:3] for case in FOLLOW], ids=NAMES)
def test_three_rounds(follow: Any, cls: Any, keys: dict[str, Any], driver: str) -> None:
    """Catches a wrong loss, order of pass and training, batch, draw or optimizer, at clients and at the server."""
    follow(cls(**keys), driver)


@pytest.mark.parametrize(
    ("follow", "faulty", "keys"),
    [pytest.param(case[0], fault, case[2], id=fault.__name__) for case in FOLLOW for fault in case[3]],
)
def test_three_rounds_tell_the_faults_of_released_code(follow: Any, faulty: Any, keys: dict[str, Any]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow(faulty(**keys), "sequential")
