"""Three rounds of FedGen against plain loops, and the faults of released code that they catch.

Classes and noise are not followed by hand: they are what polyfed's own `draw_classes` draws, which
tests/blocks/test_feature_generator.py looks at.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from classes_by_hand import SIZES, L, apart, begin, descend, layer, make, server_rng, start, under
from rounds_by_hand import batches, pairs
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fedgen import FedGen
from polyfed.base.rng import Rng
from polyfed.blocks.feature_generator import draw_classes
from polyfed.core.plan import Step

TOLERANCE = 1e-9
ROUNDS = (1, 2, 3)


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


KEYS: dict[str, Any] = {
    "server_lr": 0.01, "server_batch": 5, "server_steps": 4, "noise_dim": 3, "hidden": 7,
    "alpha": 0.8, "beta": 0.6, "diversity": 0.5, "decay": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_three_rounds(driver: str) -> None:
    """Catches a wrong loss, order of pass and training, batch, draw or optimizer, at clients and at the server."""
    follow_fedgen(FedGen(**KEYS), driver)


@pytest.mark.parametrize("faulty", [GeneratorNeverSaved, HeadsAlike, UniformNoise, NoTerms])
def test_three_rounds_tell_the_faults_of_released_code(faulty: type[FedGen]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fedgen(faulty(**KEYS), "sequential")
