"""FD, FedProto, LG-FedAvg and FML: what they send, need and predict with."""

from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from polyfed.algorithms.fd import FD, Means
from polyfed.algorithms.fedproto import FedProto
from polyfed.algorithms.fml import FML
from polyfed.algorithms.lg_fedavg import LGFedAvg
from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.base.rng import Rng
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.execute.local_training import bind
from polyfed.models.catalogue import ModelSpec
from polyfed.models.zoo import build
from polyfed.rounds.evaluation import Evaluator

TWO = (toy.MLP, "mlp(hidden=(9, 6))")
CIFAR = ((3, 32, 32), 10), ((3, 32, 32), 100)


def federation(algorithm: Any, **keys: Any) -> Any:
    """Clients with some of eight classes, unequally often, so that each lacks some; or with ``sizes`` examples."""
    dealt = {} if "sizes" in keys else {"labels": toy.LABELS}
    return toy.federation(algorithm, **{"models": TWO, "classes": 8, **dealt, **keys})


def inputs(count: int) -> Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(0))


def predicted(game: toy.Game, client: int, x: Tensor) -> dict[str, Tensor]:
    local, algorithm = game.federation.local(client, 1), game.federation.algorithm
    parts = algorithm.predictor_parts(game.private(client), algorithm.message_for(game.server, local.info), local)
    with torch.no_grad():
        return dict(algorithm.predict(bind(local.models, parts), x))


# ---------------------------------------------------------------------------------------------------------------- FD


def test_fd_sends_what_the_card_says() -> None:
    """Catches weights on the wire, and tables at full size upwards: L numbers for each class of the client."""
    game = toy.play(federation(FD()), 2)
    for k in range(3):
        own = set(game.local(k).train.labels.tolist())
        assert set(game.got[-1][k].means) == {str(c) for c in own}
        assert game.played[-1].reports[k].up.values == 4 * len(own) * 8
        held = {int(c) for j in range(3) if j != k for c in game.got[0][j].means}
        assert game.played[-1].reports[k].down.values == 4 * len(held) * 8
        assert game.played[0].reports[k].down.values == 0
        for mean in game.got[-1][k].means.values():
            assert bool((mean >= 0).all())
            assert float(mean.sum()) == pytest.approx(1)
    row = torch.zeros(10)
    assert size(FD.Upload({"0": row, "7": row})).values == 4 * 20
    assert size(FD.Broadcast({str(c): row for c in range(10)})).values == 4 * 100
    row = torch.zeros(100)
    assert size(FD.Upload({str(c): row for c in range(10)})).values == 4 * 1_000
    assert size(FD.Broadcast({str(c): row for c in range(100)})).values == 4 * 10_000


def test_fd_leaves_out_the_clients_own_vector() -> None:
    """Catches a target that holds the client's own, a wrong divisor, and one where nobody else has the class."""
    e = torch.eye(3)
    bank = {0: Means({"0": e[0], "1": e[1]}, 4), 1: Means({"0": e[1]}, 4), 2: Means({"0": e[2]}, 3)}
    server, algorithm = FD.Server(bank), FD()
    targets = algorithm.targets(server, ClientInfo(0))
    assert targets.keys() == {"0"}
    total = e[0] + e[1] + e[2]
    assert torch.allclose(targets["0"], (total - e[0]) / (3 - 1))
    assert torch.allclose(algorithm.targets(server, ClientInfo(9))["0"], total / 3)
    assert torch.equal(algorithm.targets(server, ClientInfo(1))["1"], e[1])
    assert algorithm.targets(FD.Server({}), ClientInfo(0)) == {}


def test_fd_forgets_after_max_age_and_no_sooner() -> None:
    """Catches a bank that grows stale for ever, or one that forgets who is away for a round."""
    fed = federation(FD(max_age=2), sizes=(4,) * 6, clients={"participation": 0.34})
    game = toy.play(fed)
    last: dict[int, int] = {}
    for round_ in range(1, 7):
        game.round()
        last |= {client.id: round_ for client in game.played[-1].cohort}
        assert {k: means.round for k, means in game.server.bank.items()} == {
            k: r for k, r in last.items() if round_ - r < 2
        }
    assert len(last) > len(game.server.bank)


def test_fd_with_weight_zero_is_standalone() -> None:
    """Catches a term that gamma does not reach, and a first round with a term."""
    with_it, without, alone = (toy.play(federation(a)) for a in (FD(), FD(weight=0.0), Standalone()))
    for round_ in (1, 2):
        for game in (with_it, without, alone):
            game.round()
        for k in range(3):
            assert tree.same(without.private(k).model, alone.private(k).model)
            assert tree.same(with_it.private(k).model, alone.private(k).model) is (round_ == 1)


# ---------------------------------------------------------------------------------------------------------- FedProto


@pytest.mark.parametrize("classes", ["own", "all"])
def test_fedproto_sends_what_the_card_says(classes: Any) -> None:
    """Catches weights on the wire, and prototypes of classes that the client lacks: d numbers for each of its own."""
    game = toy.play(federation(FedProto(classes=classes)), 2)
    evaluator = Evaluator(game.federation, game.driver.placement, game.driver.costs)
    scores = evaluator.evaluate(game.server, game.clients, 2).scores
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


# --------------------------------------------------------------------------------------------------------- LG-FedAvg


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


# --------------------------------------------------------------------------------------------------------------- FML


@pytest.mark.parametrize(("classes", "count"), [(10, 670_058), (100, 715_148)])
def test_fml_weighs_what_the_card_says(classes: int, count: int) -> None:
    """Catches a private network on the wire, and a meme of another size."""
    server = FML().init_server(Task((3, 32, 32), classes), Rng((0,)))
    assert size(FML().message_for(server, ClientInfo(0))).values == 4 * count
    assert FML().models(Task((3, 32, 32), 10), build("cnn1", input_shape=(3, 32, 32), num_classes=10))["F"].name


def test_fml_merges_buffers_too() -> None:
    """Catches a merge in which statistics are added up or left behind (the authors' code), and weights by examples."""
    fed = toy.federation(FML(auxiliary="resnet8(width=4)"), models=("mlp(hidden=(5,))",), shape=(1, 8, 8), sizes=(8, 4))
    game = toy.play(fed, 1)
    a, b = game.got[0][0].G, game.got[0][1].G
    moved = [name for name in a if "running" in name]
    assert moved
    for name in (*moved, "fc.weight"):
        assert torch.allclose(game.server.G[name], (a[name] + b[name]) / 2, atol=1e-6)
        assert not torch.equal(a[name], b[name])
    report = game.played[0].reports[0]
    assert report.up.values == report.down.values == sum(v.numel() * v.element_size() for v in a.values())
    assert tree.same(game.sent[0][0].G, game.sent[0][1].G)


def test_fml_with_labels_alone_does_not_listen() -> None:
    """Catches alpha and beta dealt to the wrong network: at 1 a network learns from labels alone."""
    meme = "mlp(hidden=(5,))"

    def after(**keys: float) -> tuple[Any, Any]:
        game = toy.play(federation(FML(auxiliary=meme, **keys)), 1)
        return game.private(0).F, game.got[0][0].G

    (f1, g1), (f2, g2) = after(alpha=1.0, beta=0.5), after(alpha=1.0, beta=0.2)
    assert tree.same(f1, f2)
    assert not tree.same(g1, g2)
    (f3, g3), (f4, g4) = after(alpha=0.5, beta=1.0), after(alpha=0.2, beta=1.0)
    assert tree.same(g3, g4)
    assert not tree.same(f3, f4)


def test_fml_tests_both_networks_and_the_meme_alone() -> None:
    """Catches predictors that are swapped, and a global model that needs a private network."""
    game = toy.play(federation(FML(auxiliary="mlp(hidden=(5,))")), 1)
    x = inputs(6)
    got, local = predicted(game, 1, x), game.local(1)
    assert list(got) == ["private", "meme"]
    with torch.no_grad():
        assert torch.allclose(got["private"], local.models["F"](game.private(1).F, x))
        assert torch.allclose(got["meme"], local.models["G"](game.server.G, x))
        nets = game.federation.algorithm.global_nets(game.server, game.federation.task)["meme"]
        assert torch.equal(game.federation.algorithm.predict(nets, x)["meme"], got["meme"])
