"""SCAFFOLD: FedAvg in round 1, K of each key, bytes, and whose control variates are whose."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from layers_by_hand import DEPTHS, federation, numel

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.scaffold import Scaffold
from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size

AVERAGES = ("architecture", "layer")


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_first_round_is_fedavgs_and_the_second_is_not(average: Any, driver: str) -> None:
    """Catches control variates that do not begin at 0, and any that are never used; bitwise."""
    ours, theirs = (
        toy.play(federation(a, sizes=(11, 8, 7, 9)), driver=driver)
        for a in (Scaffold(average=average), FedAvg(average=average))
    )
    assert tree.same(ours.round().server.model, theirs.round().server.model)
    assert not tree.same(ours.round().server.model, theirs.round().server.model)


@pytest.mark.parametrize("average", AVERAGES)
def test_c_is_a_sum_of_changes_over_all_clients_that_own_the_tensor(average: Any) -> None:
    """Catches a denominator of the round's clients, or of all clients of the federation, for a tensor that some own."""
    names = list(DEPTHS)
    fed = federation(Scaffold(average=average), sizes=(8, 11, 7, 8, 9), clients={"participation": 0.6})
    game = toy.play(fed)
    shallow, deep = 3, 2  # clients 0, 2, 4 and 1, 3
    for _ in range(3):
        before = game.server.control
        game.round()
        cohort = {client.id for client in game.played[-1].cohort}
        assert len(cohort) == 3
        for key, value in game.server.control.items():
            name = key.rpartition(": ")[2]
            apart = key.startswith(names[0]), key.startswith(names[1])
            owners = {k for k in range(5) if k % 2 or not name.startswith("fc2.")}
            owners -= {k for k in range(5) if average == "architecture" and not apart[k % 2]}
            total = {5: 5, shallow: 3, deep: 2}[len(owners)]
            changes = [game.got[-1][k].control[name] for k in owners & cohort]
            if not changes:
                assert torch.equal(value, before[key])
                continue
            toy.close({key: value}, {key: before[key] + sum(changes) / total}, 1e-5)
    assert {game.server.clients[key] for key in game.server.control} == ({5, 2} if average == "layer" else {3, 2})


def test_who_sits_out_keeps_its_control_and_the_mean_of_all_is_c() -> None:
    """Catches c_k of another client; and, as all c_k begin at 0, c that is not their mean while all take part."""
    fed = toy.federation(Scaffold(), models=("mlp(hidden=(9,))",), sizes=(8, 5, 6), clients={"participation": 0.67})
    game = toy.play(fed)
    for _ in range(4):
        before = {k: game.private(k).control for k in range(3)}
        game.round()
        cohort = {client.id for client in game.played[-1].cohort}
        for k in range(3):
            assert tree.same(game.private(k).control, before[k]) is (k not in cohort)
        mean = {n: sum(game.private(k).control[n] for k in range(3)) / 3 for n in before[0]}
        toy.close(game.server.control, mean, 1e-4)


@pytest.mark.parametrize("average", AVERAGES)
def test_traffic_is_twice_that_of_the_weights(average: Any) -> None:
    """Catches statistics that have a control variate, and c sent to who only predicts."""
    game = toy.play(federation(Scaffold(average=average)), 2)
    for k in range(3):
        floats, counters = numel(k % 2 + 1)
        weights, _ = numel(k % 2 + 1, buffers=False)
        for sent, got in zip(game.sent, game.got, strict=True):
            assert size(sent[k]).values == size(got[k]).values == 4 * (floats + weights) + 8 * counters
        alone = game.federation.algorithm.message_for(game.server, game.federation.info(k))
        assert size(alone).values == 4 * floats + 8 * counters


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_and_rate_are_those_of_the_round(optimizer: str) -> None:
    """Catches a rate before the schedule's factor, and steps of another client: the definition, by what was sent."""
    schedule = {"kind": "step", "every": 1, "gamma": 0.5}
    fed = federation(Scaffold(average="layer"), train={"optimizer": optimizer, "lr": 0.02, "schedule": schedule})
    game = toy.play(fed, 2)
    for k, n in enumerate((11, 8, 7)):
        c, up = game.sent[1][k].control, game.got[1][k]
        start, steps = game.sent[1][k].model, 2 * -(-n // 4)
        change = {name: (start[name] - up.model[name]) / (steps * 0.01) - c[name] for name in c}
        toy.close(up.control, change, 1e-3)


def test_a_network_that_the_server_does_not_have_is_refused() -> None:
    """Catches a new client, for `polyfed adapt`, that would be sent nothing."""
    game = toy.play(federation(Scaffold(average="architecture")), 1)
    with pytest.raises(ModelError, match=r"the server has no network 'mlp'"):
        game.federation.algorithm.message_for(game.server, ClientInfo(9, architecture="mlp"))


def test_an_upload_without_its_buffers_is_refused() -> None:
    """Catches fields that fit one another's shapes: a network without its running statistics is as large as c."""
    game = toy.play(federation(Scaffold(average="layer"), clients={"participation": 1.0}), 1)
    algorithm, task = game.federation.algorithm, game.federation.task
    info, up = game.local(1, 2).info, game.got[-1][1]
    down = replace(algorithm.message_for(game.server, info), control=up.control)
    algorithm.check_upload(task, info, down, up)
    with pytest.raises(MessageError, match="model"):
        algorithm.check_upload(task, info, down, replace(up, model=tree.pick(up.model, up.control)))
    with pytest.raises(MessageError, match="control"):
        algorithm.check_upload(task, info, down, replace(up, control=up.model))
