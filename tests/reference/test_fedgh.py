"""Three rounds of FedGH against plain loops, and the faults of released code that they catch."""

from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from classes_by_hand import (
    SETTINGS,
    OfSums,
    apart,
    begin,
    body,
    make,
    means,
    pooled,
    server_batches,
    server_rng,
    start,
    under,
)
from rounds_by_hand import batches, pairs
from torch.nn import functional

from polyfed.algorithms.fedgh import FedGH
from polyfed.base.rng import Rng
from polyfed.blocks.classwise import class_means, representation

TOLERANCE = 1e-9
ROUNDS = (1, 2, 3)


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
        stale = yield from class_means(client, self.predictor_parts(private, msg, client), representation)
        kept, _ = yield from super().client_round(private, msg, client)
        return kept, self.Upload(stale)


class SummedRows(OfSums, FedGH):
    """Sums of representations."""


class OwnHeader(FedGH):
    """The client's own header goes on, and the server's is not loaded."""

    def predictor_parts(self, private: Any, msg: Any, client: Any) -> Any:
        model = client.models["model"]
        return {"model": model.with_head(private.body, model.head(model.init(Rng(("own",)))))}


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_three_rounds(driver: str) -> None:
    """Catches a wrong loss, order of pass and training, batch, draw or optimizer, at clients and at the server."""
    follow_fedgh(FedGH(server_lr=0.2, server_batch=4, server_epochs=3), driver)


@pytest.mark.parametrize("faulty", [HeaderNeverMoves, StaleMeans, SummedRows, OwnHeader])
def test_three_rounds_tell_the_faults_of_released_code(faulty: type[FedGH]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fedgh(faulty(server_lr=0.2, server_batch=4, server_epochs=3), "sequential")
