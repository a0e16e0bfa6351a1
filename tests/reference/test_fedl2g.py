"""Three rounds of FedL2G against plain loops, and the faults of released code that they catch."""

from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
import toy
from classes_by_hand import SETTINGS, begin, body, descend, make, mean_over_holders, start
from rounds_by_hand import batches, pairs
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fedl2g import FedL2G
from polyfed.base import tree
from polyfed.blocks.losses import supervised
from polyfed.core.requests import each, exchange, fit

TOLERANCE = 1e-9
ROUNDS = (1, 2, 3)


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
        got = yield from exchange(cohort, self.Broadcast(server.vectors), gather={"gradients": each})
        after = dict(server.vectors)
        for gradients in got["gradients"].values():
            for c, g in gradients.items():
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


LOGITS: dict[str, Any] = {"server_lr": 5.0, "warmup": 1, "holdout": 0.4}
FEATURES: dict[str, Any] = {"server_lr": 5.0, "warmup": 0, "holdout": 0.3, "guide": "features", "server_clip": 1e-3}


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("keys", [LOGITS, FEATURES], ids=["logits", "features"])
def test_three_rounds(keys: dict[str, Any], driver: str) -> None:
    """Catches a wrong loss, order of pass and training, batch, draw or optimizer, at clients and at the server."""
    follow_fedl2g(FedL2G(**keys), driver)


@pytest.mark.parametrize("faulty", [Summed, FirstOfTheArray, TrainsInWarmUp, QuizBeforeTheStep])
def test_three_rounds_tell_the_faults_of_released_code(faulty: type[FedL2G]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fedl2g(faulty(**LOGITS), "sequential")
