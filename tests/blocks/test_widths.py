"""Rounds at unlike widths: which networks a client has, which rows are averaged by class, what asks and what scales."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import toy
from running import config as digits

from polyfed.algorithms.fedrolex import FedRolex
from polyfed.algorithms.fiarse_neuron import FIARSENeuron
from polyfed.algorithms.fjord import FjORD
from polyfed.algorithms.heterofl import HeteroFL
from polyfed.algorithms.scalefl import ScaleFL
from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.blocks.widths import Widths
from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import Cohort
from polyfed.core.gather import Fold, Gathered
from polyfed.core.message import Message, Nothing
from polyfed.core.requests import Exchange
from polyfed.rounds.federation import prepare

RESNET = "resnet8(width=4, norm=batch)"


def federation(algorithm: Algorithm, capacities: tuple[float, ...], net: str = RESNET, **keys: Any) -> Any:
    shape = (1, 8, 8) if net == RESNET else (7,)
    return toy.federation(algorithm, models=(net,), shape=shape, clients={"capacities": list(capacities)}, **keys)


def answered(request: Exchange, uploads: Mapping[int, Message]) -> Gathered:
    """What the server learns where these clients reply and the others do not."""
    fold = Fold(request.gather)
    for client in request.cohort:
        if client.id in uploads:
            fold.add(client, uploads[client.id])
    return fold.finish({})


@pytest.mark.parametrize("algorithm", [HeteroFL(), FIARSENeuron(), FjORD(widths=(0.2, 0.5)), ScaleFL(exits=2)])
def test_a_client_has_no_network_that_it_does_not_run(algorithm: Algorithm) -> None:
    """Catches the full network counted as a small client's work, by which its execution is chosen."""
    fed = federation(algorithm, (0.25, 0.25, 0.25))
    own = fed.own(0)
    models = algorithm.models_at(fed.task, own, 0.25)
    weights = sum(shape.numel() for shape in own.shapes.values())
    assert all(sum(s.numel() for s in net.shapes.values()) < 0.4 * weights for net in models.values())
    for net in models.values():
        assert net.whole is net.fresh().whole is own
    assert own.whole is own


def test_rates_are_for_parts_that_clients_have() -> None:
    """Catches a rate for a part of no client that is passed over, and one for a width's part that is refused."""

    def rates(part: str) -> Any:
        return digits(
            algorithm={"name": "fjord", "widths": [0.5]},
            clients={"capacities": [0.25]},
            train={"parts": {part: {"lr": 0.1}}},
        )

    prepare(rates("0.5"))
    with pytest.raises(ConfigError, match=r"fjord has no part full; it trains model, 0\.5"):
        prepare(rates("full"))


def test_the_scaler_divides_layers_alone() -> None:
    """Catches PReLU's slopes, a layer scale and the affine part of a norm of one's own that a width divides."""
    layers = ["a.bias", "a.weight", "b.weight", "head.bias", "head.weight"]
    scale = ScaleFL(exits=("slope",), levels=((0.25, 0.5, 2),))
    for algorithm, prefix in ((HeteroFL(), ""), (scale, "net.")):
        fed = federation(algorithm, (0.25, 0.25, 0.25), "slice_nets:Scales(classifier=head)")
        message = fed.algorithm.message_for(fed.algorithm.init_server(fed.task, fed.rng), fed.info(1))
        request: Any = next(fed.algorithm.client_round(Nothing(), message, fed.local(1, 1)))
        assert sorted(request.frozen["rho"]) == [f"{prefix}{name}" for name in layers]


def test_rows_of_the_last_layer_alone_are_averaged_by_class() -> None:
    """Catches a hidden layer of the classifier with as many units as there are classes."""
    fed = federation(HeteroFL(), (0.25, 0.25, 0.25), "slice_nets:Scales(classifier=head)")
    assert fed.algorithm.init_server(fed.task, fed.rng).head == ("out.bias", "out.weight")


@pytest.mark.parametrize("algorithm", [HeteroFL(), FedRolex()])
def test_rows_by_class_take_a_classifier(algorithm: Widths) -> None:
    """Catches a network without a cut that is refused in the middle of a run, or where nothing needs the cut."""
    fed = federation(algorithm, (0.25, 0.25, 0.25), "slice_nets:Scales")
    with pytest.raises(ModelError, match=r"names no classifier; .*algorithm\.own_rows = false"):
        algorithm.check(fed.task)
    free = replace(algorithm, own_rows=False)
    free.check(fed.task)
    assert free.init_server(fed.task, fed.rng).head == ()


def test_unseen_capacities_have_to_run() -> None:
    """Catches a run that stops at its first test."""
    fed = federation(HeteroFL(own_rows=False), (0.25, 0.25, 0.25), "slice_nets:Wide")
    with pytest.raises(ModelError, match=r"algorithm\.unseen_capacities: .* at capacity 0\.03125; .*four channels"):
        fed.algorithm.check(fed.task)
    HeteroFL(own_rows=False, unseen_capacities=(0.5, 0.125)).check(fed.task)


def test_windows_elsewhere_have_no_statistics_of_their_own() -> None:
    """Catches offsets that are passed over without a word."""
    both = FedRolex(calibrate=True, test_offsets=(2,))
    with pytest.raises(ModelError, match=r"algorithm\.test_offsets: with algorithm\.calibrate"):
        both.check(federation(both, (0.25, 0.25, 0.25)).task)
    both.check(federation(both, (0.25, 0.25, 0.25), toy.MLP).task)


def test_who_did_not_reply_is_not_asked_for_statistics() -> None:
    """Catches a question to a client that is gone, and statistics of its capacity that are lost."""
    game = toy.play(federation(HeteroFL(), (1.0, 0.25, 0.25)), 1)
    fed, before = game.federation, game.server
    cohort = Cohort(tuple(map(fed.info, range(3))), 2, 3, fed.rng.at("round", 2, "server"))
    steps = fed.algorithm.server_round(before, cohort)
    first: Any = next(steps)
    assert sorted(first.down) == [0, 1, 2]
    second: Any = steps.send(answered(first, {k: game.got[0][k] for k in (1, 2)}))
    assert sorted(second.down) == [1, 2]
    assert {type(message).__name__ for message in second.down.values()} == {"Query"}
    with pytest.raises(StopIteration) as done:
        steps.send(answered(second, {k: game.got[1][k] for k in (1, 2)}))
    after = done.value.value.statistics
    assert tree.same(after["1.0"], before.statistics["1.0"])
    assert after.keys() == before.statistics.keys()
