"""FedGH: what it sends and needs, and that its server leaves alone what clients do."""

import pytest
import torch
import toy
from by_class import federation, needs_equal_heads

from polyfed.algorithms.fedgh import FedGH
from polyfed.algorithms.standalone import Standalone
from polyfed.base.rng import Rng
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.models.catalogue import ModelSpec

CNNS = tuple(map(ModelSpec.parse, ("cnn1", "cnn5")))


@pytest.mark.parametrize(("classes", "own", "up", "down"), [(10, 2, 1_000, 5_010), (100, 10, 5_000, 50_100)])
def test_fedgh_sends_what_the_card_says(classes: int, own: int, up: int, down: int) -> None:
    """Catches the header upwards, and more than the header down: d numbers by class, (d + 1) L."""
    server = FedGH().init_server(Task((3, 32, 32), classes, architectures=CNNS), Rng((0,)))
    assert size(FedGH().message_for(server, ClientInfo(0))).values == 4 * down
    assert size(FedGH.Upload({str(c): torch.zeros(500) for c in range(own)})).values == 4 * up
    game = toy.play(federation(FedGH()), 1)
    for k in range(3):
        report = game.played[0].reports[k]
        assert report.up.values == 4 * 6 * len(set(game.local(k).train.labels.tolist()))
        assert report.down.values == 4 * (6 + 1) * 8


def test_servers_leave_what_clients_do_alone() -> None:
    """Catches FedGH's released server, which steps the client's network: round 1 trains bodies as Standalone does."""
    game, alone = toy.play(federation(FedGH())), toy.play(federation(Standalone()))
    local = game.federation.local(1, 1)
    model = local.models["model"]
    whole = model.with_head(game.private(1).body, game.server.head)
    alone.clients.store.put(1, Standalone.Private(whole), 0)
    alone.round()
    game.round()
    toy.close(game.private(1).body, model.body(alone.private(1).model), 0.0)


def test_equal_heads_are_needed() -> None:
    """Catches heads that a server cannot run or mix, found after a round of training."""
    needs_equal_heads(FedGH())
