"""FedProto: what it sends, needs and predicts with."""

from typing import Any

import pytest
import torch
import toy
from by_class import federation, inputs, predicted
from torch import Tensor

from polyfed.algorithms.fedproto import FedProto
from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.rounds.evaluation import Evaluator


@pytest.mark.parametrize("classes", ["own", "all"])
def test_fedproto_sends_what_the_card_says(classes: Any) -> None:
    """Catches weights on the wire, and prototypes of classes that the client lacks: d numbers for each of its own."""
    game = toy.play(federation(FedProto(classes=classes)), 2)
    evaluator = Evaluator(game.federation, game.driver)
    scores = evaluator.evaluate(game.server, game.clients, 2, range(3)).scores
    for k in range(3):
        own = set(game.local(k).train.labels.tolist())
        down = {str(c) for c in (own if classes == "own" else range(8))}
        assert game.sent[0][k].prototypes == {}
        assert set(game.sent[1][k].prototypes) == down
        assert game.played[-1].reports[k].up.values == 4 * len(own) * 6
        assert game.played[-1].reports[k].down.values == 4 * len(down) * 6
        told = game.federation.algorithm.message_for(game.server, game.federation.info(k))
        assert set(told.prototypes) == down
        assert scores[k].down == size(told).total
    row = torch.zeros(500)
    for own, all_, up, down in ((2, 10, 1_000, 5_000), (10, 100, 5_000, 50_000)):
        assert size(FedProto.Upload({str(c): row for c in range(own)})).values == 4 * up
        assert size(FedProto.Broadcast({str(c): row for c in range(all_)})).values == 4 * down


def test_fedproto_sends_four_kilobytes_where_all_classes_take_twenty() -> None:
    """Catches a broadcast of all classes to clients with two: table 1 of FedMRL has d = 500 and two of ten classes."""
    labels = [(2 * k, 2 * k + 1, 2 * k) for k in range(5)]
    sizes = {}
    for classes in ("own", "all"):
        fed = toy.federation(
            FedProto(classes=classes), models=("mlp(hidden=(500,))",), labels=labels, classes=10, train={"epochs": 1}
        )
        sizes[classes] = toy.play(fed, 2).played[-1].reports[0].down
    assert sizes["own"].values == 4_000
    assert sizes["own"].total < 4_300
    assert sizes["all"].values == 20_000


def test_fedproto_sends_all_classes_until_it_knows_the_clients_own() -> None:
    """Catches a client that joins late and gets nothing; a server that forgets the classes of who is away."""
    game = toy.play(federation(FedProto(), clients={"participation": 0.34}))
    algorithm, met = game.federation.algorithm, set[int]()
    for _ in range(4):
        game.round()
        met |= {client.id for client in game.played[-1].cohort}
        for k in range(3):
            own = {str(c) for c in game.local(k).train.labels.tolist()}
            got = algorithm.message_for(game.server, game.federation.info(k)).prototypes
            assert set(got) == (own if k in met else set(game.server.prototypes))
    assert len(met) == 2


def test_fedproto_keeps_the_prototypes_of_classes_that_are_away() -> None:
    """Catches a server that forgets what the last cohort did not have (HtFLlib), and weights by examples."""
    game = toy.play(federation(FedProto(), clients={"participation": 0.34}))
    known: dict[str, Tensor] = {}
    for _ in range(4):
        game.round()
        (upload,) = game.got[-1].values()
        known |= upload.prototypes
        assert tree.same(dict(game.server.prototypes), known)
    assert len(known) > len(upload.prototypes)
    all_ = toy.play(federation(FedProto()), 1)
    a, b, c = (all_.got[0][k].prototypes["3"] for k in range(3))
    assert torch.allclose(all_.server.prototypes["3"], (a + b + c) / 3)


@pytest.mark.parametrize("classes", ["own", "all"])
def test_fedproto_predicts_by_the_nearest_prototype_of_its_candidates(classes: Any) -> None:
    """Catches predictors that are mixed, a candidate set of one's own classes where all are meant, and vice versa."""
    game = toy.play(federation(FedProto(classes=classes)), 2)
    x = inputs(18)
    for k in range(3):
        got = predicted(game, k, x)
        assert list(got) == ["prototype", "header"]
        local, model = game.local(k), game.private(k).model
        net, own = local.models["model"], set(local.train.labels.tolist())
        with torch.no_grad():
            r = net.represent(model, x)
            assert torch.allclose(got["header"], net(model, x), atol=1e-6)
        distance = {c: (r - game.server.prototypes[str(c)]).square().mean(1) for c in range(8)}
        candidates = own if classes == "own" else set(range(8))
        nearest = [min(candidates, key=lambda c, i=i: float(distance[c][i])) for i in range(18)]
        assert got["prototype"].argmax(1).tolist() == nearest
    all_ = toy.play(federation(FedProto(classes="all")))
    assert bool((predicted(all_, 0, x)["prototype"].argmax(1) == 0).all())


def test_fedproto_never_predicts_a_class_that_the_client_lacks() -> None:
    """Catches class 0 where no own class has a prototype yet, and others' classes where only some have one."""
    game = toy.play(federation(FedProto(), clients={"participation": 0.34}))
    x = inputs(18)
    for _ in range(4):
        for k in range(3):
            own, held = set(game.local(k, 1).train.labels.tolist()), {int(c) for c in game.server.prototypes}
            answers = set(predicted(game, k, x)["prototype"].argmax(1).tolist())
            assert answers <= ((own & held) or own)
        game.round()


def test_fedproto_needs_equal_widths_that_the_server_knows() -> None:
    """Catches prototypes of another width found in round 2 only, private networks, and a first upload of any width."""
    fed = federation(FedProto(), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"representation width is 6 in .* but 5 in"):
        fed.algorithm.check(fed.task)
    with pytest.raises(ModelError, match="fedproto needs networks whose width the server knows; these are private"):
        FedProto().check(Task((7,), 8))
    task, first = federation(FedProto()).task, FedProto.Broadcast({})
    FedProto().check_upload(task, ClientInfo(0), first, FedProto.Upload({"3": torch.zeros(6)}))
    with pytest.raises(MessageError, match=r"prototypes\['3'\]"):
        FedProto().check_upload(task, ClientInfo(0), first, FedProto.Upload({"3": torch.zeros(5)}))
