"""FedAvg: with a single client it is local SGD, and it averages all that a network holds."""

from typing import Any

import pytest
import torch
import toy

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedin import FedIN
from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.core.algorithm import Task

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


FAMILY = ("in-resnet10-small(width=4)", "in-resnet14-small(width=4)", "in-resnet18-small(width=4)")


def family(algorithm: Any, rounds: int = 2, **keys: Any) -> toy.Game:
    train = {"epochs": 1, "lr": 0.01}
    fed = toy.federation(algorithm, models=FAMILY, shape=(1, 16, 16), sizes=(8, 12, 8), train=train, **keys)
    return toy.play(fed, rounds)


@pytest.mark.parametrize("participation", [1.0, 0.34])
def test_layer_by_layer_it_is_fedin_without_in_steps(participation: float) -> None:
    """Catches an ablation of FedIN with another base line: another start, mean, or layer without an owner; bitwise."""
    clients = {"participation": participation}
    ours, theirs = (family(a, 3, clients=clients) for a in (FedAvg(average="layer"), FedIN(every="never")))
    assert tree.same(ours.server.model, theirs.server.layers)
    assert [set(sent) for sent in ours.sent] == [set(sent) for sent in theirs.sent]


def test_by_architecture_it_is_a_fedavg_of_each() -> None:
    """Catches clients of equal networks averaged with others, and weights that are not of their own group."""
    fed = toy.federation(FedAvg(average="architecture"), models=(toy.MLP, "mlp(hidden=(5,))"), sizes=(8, 5, 4, 9))
    game = toy.play(fed)
    first = game.server.model
    game.round()
    for name, own in ((toy.MLP, (0, 2)), ("mlp(hidden=(5,))", (1, 3))):
        sent = [game.got[0][k] for k in own]
        n = [up.num_examples for up in sent]
        expected = {
            f"{name}: {key}": sum(s * up.model[key].double() for s, up in zip(n, sent, strict=True)).float() / sum(n)
            for key in sent[0].model
        }
        toy.close({key: game.server.model[key] for key in expected}, expected, 1e-6)
        assert all(tree.same(game.sent[0][k].model, game.sent[0][own[0]].model) for k in own)
        assert all(torch.equal(game.sent[0][own[0]].model[key], first[f"{name}: {key}"]) for key in sent[0].model)
    assert list(fed.algorithm.global_nets(game.server, fed.task)) == [toy.MLP, "mlp(hidden=(5,))"]


def test_networks_without_a_common_layer_are_refused_layer_by_layer() -> None:
    """Catches federations that fall apart in silence, and a refusal that does not say why or what would go."""
    fed = toy.federation(FedAvg(average="layer"), models=(toy.MLP, "layers_by_hand:Named"))
    with pytest.raises(ModelError, match=r"'mlp.*' shares no layer by name with 'layers_by_hand:Named'.*one family"):
        fed.algorithm.check(fed.task)
    fed = toy.federation(FedAvg(average="layer"), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"layer 'fc1\.weight' is \(12, 7\) in .* but \(5, 7\) in"):
        fed.algorithm.check(fed.task)
    FedAvg(average="architecture").check(fed.task)
    for average in ("architecture", "layer"):
        with pytest.raises(ModelError, match=r"fedavg needs networks that the server knows; these are private"):
            FedAvg(average=average).check(Task((7,), 4))  # type: ignore[arg-type]
