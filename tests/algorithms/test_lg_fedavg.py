"""LG-FedAvg: what it shares, weighs and needs."""

import pytest
import torch
import toy
from by_class import federation, inputs, predicted

from polyfed.algorithms.lg_fedavg import LGFedAvg
from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.models.catalogue import ModelSpec


def test_lg_fedavg_shares_the_head_and_nothing_else() -> None:
    """Catches the authors' layer list, which shares the convolutions and keeps the head, and heads that start apart."""
    game = toy.play(federation(LGFedAvg(), clients={"participation": 0.67}))
    assert game.server.head.keys() == {"weight", "bias"}
    before = {k: game.private(k).body for k in range(3)}
    assert all("fc3.weight" not in body and "fc1.weight" in body for body in before.values())
    assert not tree.same(before[0], before[2])
    first = game.server.head
    game.round()
    cohort = {client.id for client in game.played[0].cohort}
    assert len(cohort) == 2
    for k in range(3):
        assert tree.same(game.private(k).body, before[k]) is (k not in cohort)
    for k in cohort:
        assert tree.same(game.sent[0][k].head, first)
        assert game.got[0][k].head["weight"].shape == (8, 6)
        report = game.played[0].reports[k]
        assert report.up.values == report.down.values == 4 * (6 + 1) * 8
    x = inputs(6)
    (away,) = {0, 1, 2} - cohort  # tested under the head of today
    with torch.no_grad():
        r = (
            game.local(away)
            .models["model"]
            .represent({**before[away], "fc3.weight": first["weight"], "fc3.bias": first["bias"]}, x)
        )
    expected = r @ game.server.head["weight"].T + game.server.head["bias"]
    assert torch.allclose(predicted(game, away, x)["local"], expected, atol=1e-6)


@pytest.mark.parametrize(("classes", "count"), [(10, 5_010), (100, 50_100)])
def test_lg_fedavg_weighs_what_the_card_says(classes: int, count: int) -> None:
    """Catches more than the head on the wire: (d + 1) L numbers, for CNNs beside an MLP of the same width."""
    models = tuple(map(ModelSpec.parse, ("cnn1", "cnn5", "mlp(hidden=(500,))")))
    task = Task((3, 32, 32), classes, architectures=models)
    algorithm = LGFedAvg()
    algorithm.check(task)
    server = algorithm.init_server(task, Rng((0,)))
    assert size(algorithm.message_for(server, ClientInfo(0))).values == 4 * count


def test_lg_fedavg_needs_equal_heads_that_the_server_knows() -> None:
    """Catches heads that cannot be averaged, and a deployment whose networks are private."""
    fed = federation(LGFedAvg(), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"classifier is .*\(8, 6\).* but .*\(8, 5\)"):
        fed.algorithm.check(fed.task)
    with pytest.raises(ModelError, match="lg-fedavg needs networks whose classifiers the server knows"):
        LGFedAvg().check(Task((7,), 8))
