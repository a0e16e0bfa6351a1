"""FedAvg: with a single client it is local SGD, and it averages all that a network holds."""

import pytest
import torch
import toy

from polyfed.algorithms.fedavg import FedAvg
from polyfed.base.errors import ModelError

TRAIN = {"momentum": 0.9, "lr": 0.05}


def test_fedavg_with_one_client_is_local_sgd() -> None:
    """Catches a server that changes what a single client sends; momentum starts anew in each round."""
    fed = toy.federation(FedAvg(), sizes=(11,), train=TRAIN)
    game = toy.play(fed)
    net = torch.nn.Sequential(
        torch.nn.Linear(7, 12), torch.nn.ReLU(), torch.nn.Linear(12, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)
    )
    names = dict(zip(net.state_dict(), game.server.model, strict=True))
    net.load_state_dict({mine: game.server.model[theirs].clone() for mine, theirs in names.items()})
    for round_ in (1, 2, 3):
        game.round()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        local = game.local(0, round_)
        for step in local.plan.schedule(11, local.rng.at("batches")):
            x, y = local.train.batch(step.rows)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        toy.close(game.server.model, {theirs: net.state_dict()[mine] for mine, theirs in names.items()}, 2e-6)


def test_fedavg_averages_counters_and_statistics_too() -> None:
    """Catches BatchNorm statistics that stay at their initial values (HtFLlib's fault H2)."""
    fed = toy.federation(FedAvg(), models=("resnet8(width=4)",), shape=(1, 8, 8), sizes=(8, 4))
    game = toy.play(fed)
    before = game.server.model
    game.round()
    for name in before:
        if "running" in name:
            expected = (8 * game.got[0][0].model[name].double() + 4 * game.got[0][1].model[name].double()) / 12
            assert torch.allclose(game.server.model[name], expected.float(), rtol=1e-6)
            assert not torch.equal(game.server.model[name], before[name])
    counters = [n for n in before if n.endswith("num_batches_tracked")]
    assert counters
    assert all(int(game.server.model[n]) == 3 for n in counters)  # (8 * 4 + 4 * 2) / 12, rounded


def test_fedavg_refuses_networks_that_differ() -> None:
    """Catches a mean of what cannot be averaged."""
    fed = toy.federation(FedAvg(), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(
        ModelError, match=r"fedavg needs one architecture.*mlp\(hidden=\(12, 6\)\), mlp\(hidden=\(5,\)\)"
    ):
        fed.algorithm.check(fed.task)
