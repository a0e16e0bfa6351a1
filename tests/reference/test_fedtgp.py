"""Three rounds of FedTGP against plain loops, and the faults of released code that they catch."""

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import plain
import pytest
import torch
import toy
from classes_by_hand import (
    L,
    OfSums,
    begin,
    body,
    descend,
    make,
    mean_over_holders,
    means,
    pooled,
    server_batches,
    server_rng,
    start,
)
from rounds_by_hand import batches, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fedtgp import FedTGP
from polyfed.blocks.classwise import class_means, representation

TOLERANCE = 1e-9
ROUNDS = (1, 2, 3)


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
        stale = yield from class_means(client, {"model": private.model}, representation)
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


SERVER = {"server_lr": 0.2, "server_batch": 4, "server_epochs": 4}


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("keys", [{"weight": 0.7}, {"margin_to": "nearest"}], ids=["farthest", "nearest"])
def test_three_rounds(keys: dict[str, Any], driver: str) -> None:
    """Catches a wrong loss, order of pass and training, batch, draw or optimizer, at clients and at the server."""
    follow_fedtgp(FedTGP(**SERVER, **keys), driver)


@pytest.mark.parametrize(
    "faulty", [StalePrototypes, SummedPrototypes, MarginEases, LeastMargin, OtherMargin, Untrained]
)
def test_three_rounds_tell_the_faults_of_released_code(faulty: type[FedTGP]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fedtgp(faulty(**SERVER, weight=0.7), "sequential")
