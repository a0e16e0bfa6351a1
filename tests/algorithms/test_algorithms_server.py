"""FedGH, FedTGP, FedGen and FedL2G: what they send, need and predict with, and where they would break."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from polyfed.algorithms.fedgen import FedGen
from polyfed.algorithms.fedgh import FedGH
from polyfed.algorithms.fedl2g import FedL2G
from polyfed.algorithms.fedtgp import FedTGP
from polyfed.algorithms.lg_fedavg import LGFedAvg
from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.base.errors import DivergedError, MessageError, ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.feature_generator import draw_classes
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.core.plan import Step
from polyfed.core.requests import Reduce, drive
from polyfed.execute.local_training import bind, run_reduce
from polyfed.models.catalogue import ModelSpec

TWO = (toy.MLP, "mlp(hidden=(9, 6))")
CNNS = tuple(map(ModelSpec.parse, ("cnn1", "cnn5")))


def federation(algorithm: Any, **keys: Any) -> Any:
    """Clients with some of eight classes, unequally often, so that each lacks some; or with ``sizes`` examples."""
    dealt = {} if "sizes" in keys else {"labels": toy.LABELS}
    return toy.federation(algorithm, **{"models": TWO, "classes": 8, **dealt, **keys})


def predicted(game: toy.Game, client: int, x: Tensor) -> dict[str, Tensor]:
    local, algorithm = game.federation.local(client, 1), game.federation.algorithm
    parts = algorithm.predictor_parts(game.private(client), algorithm.message_for(game.server, local.info), local)
    with torch.no_grad():
        return dict(algorithm.predict(bind(local.models, parts), x))


# ------------------------------------------------------------------------------------------------------------- bytes


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


@pytest.mark.parametrize(("classes", "own", "up", "down"), [(10, 2, 1_000, 5_000), (100, 10, 5_000, 50_000)])
def test_fedtgp_sends_what_the_card_says(classes: int, own: int, up: int, down: int) -> None:
    """Catches the server's embedding and layers on the wire: d numbers by class, both ways."""
    row = torch.zeros(500)
    assert size(FedTGP.Broadcast({str(c): row for c in range(classes)})).values == 4 * down
    assert size(FedTGP.Upload({str(c): row for c in range(own)})).values == 4 * up
    game = toy.play(federation(FedTGP(server_epochs=1)), 2)
    for k in range(3):
        first, second = (played.reports[k] for played in game.played)
        assert second.up.values == 4 * 6 * len(set(game.local(k).train.labels.tolist()))
        assert (first.down.values, second.down.values) == (0, 4 * 6 * 8)


def test_fedgen_sends_what_the_card_says() -> None:
    """Catches bodies on the wire, a generator upwards or in an evaluation: |head| + L up, |G| + |head| down."""
    algorithm = FedGen()
    server = algorithm.init_server(Task((3, 32, 32), 10, architectures=CNNS), Rng((0,)))
    assert tree.numel(server.generator) == (32 + 10 + 1) * 256 + (256 + 1) * 500 == 139_508
    assert size(algorithm.message_for(server, ClientInfo(0))).values == 4 * 5_010
    game = toy.play(federation(FedGen(noise_dim=3, hidden=5, server_steps=1)), 1)
    for k in range(3):
        report = game.played[0].reports[k]
        assert report.down.values == 4 * ((6 + 1) * 8 + (3 + 8 + 1) * 5 + (5 + 1) * 6)
        assert report.up.values == 4 * ((6 + 1) * 8 + 8)


@pytest.mark.parametrize(("guide", "width"), [("logits", 8), ("features", 6)])
def test_fedl2g_sends_what_the_card_says(guide: Any, width: int) -> None:
    """Catches rows of classes that the study batch did not have, and a guide of another width."""
    game = toy.play(federation(FedL2G(guide=guide, warmup=0)), 2)
    for k in range(3):
        local, report = game.local(k), game.played[-1].reports[k]
        study = torch.randperm(len(local.train), generator=local.rng.at("study").torch())[:4]
        touched = set(local.train.labels[study].tolist())
        assert set(game.got[-1][k].gradients) == {str(c) for c in touched}
        assert (report.up.values, report.down.values) == (4 * len(touched) * width, 4 * 8 * width)
    assert game.federation.algorithm.message_for(game.server, ClientInfo(0)) is None


# -------------------------------------------------------------------------------------------------------- regressions


def finite_contrast(algorithm: FedTGP) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    P = rows.clone().requires_grad_()  # noqa: N806
    value = algorithm.contrast(rows, torch.tensor([0, 1]), P, 0.5)
    value.backward()
    assert bool(torch.isfinite(value))
    assert P.grad is not None
    assert bool(torch.isfinite(P.grad).all())


class Unclamped(FedTGP):
    """The authors' code: the root of a^2 - 2 a b + b^2 as it comes."""

    def contrast(self, rows: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        P, delta = rest  # noqa: N806
        squared = rows.square().sum(1, keepdim=True) - 2 * rows @ P.T + P.square().sum(1)
        distance = squared.sqrt() + delta * torch.eye(len(P))[labels]
        return torch.nn.functional.cross_entropy(-distance, labels)


def test_fedtgp_has_a_gradient_where_a_representation_is_its_prototype() -> None:
    """Catches the root of zero, whose gradient is NaN and goes to every prototype from there."""
    finite_contrast(FedTGP())
    with pytest.raises(AssertionError):
        finite_contrast(Unclamped())


def test_fedtgp_keeps_classes_apart_by_the_largest_of_their_least_distances() -> None:
    """Catches the mean of clients left out, tau ignored, and a margin of infinity where there is one class."""
    uploads = [{"0": torch.tensor([0.0, 0.0]), "3": torch.tensor([3.0, 0.0])},
               {"0": torch.tensor([0.0, 2.0]), "5": torch.tensor([9.0, 1.0])}]  # fmt: skip
    # means: class 0 at (0, 1), 3 at (3, 0), 5 at (9, 1); the nearest of 5 is 3
    assert FedTGP().margin(uploads) == pytest.approx(37**0.5)
    assert FedTGP(max_margin=2.0).margin(uploads) == 2.0
    assert FedTGP().margin([{"4": torch.ones(2)}, {"4": torch.zeros(2)}]) == 0.0


def test_fedtgp_remembers_classes_that_are_away_and_invents_none() -> None:
    """Catches prototypes of classes that nobody has had, and those of a former cohort forgotten or not renewed."""
    game = toy.play(federation(FedTGP(server_epochs=2), clients={"participation": 0.34}))
    known: set[str] = set()
    x = torch.randn(9, 7, generator=Rng((0,)).torch())
    assert bool((predicted(game, 0, x)["prototype"].argmax(1) == 0).all())
    for _ in range(4):
        before = game.server.prototypes
        game.round()
        (upload,) = game.got[-1].values()
        known |= set(upload.prototypes)
        assert set(game.server.prototypes) == known
        assert all(not torch.equal(game.server.prototypes[c], before[c]) for c in before)
    away = known - set(upload.prototypes)
    assert away
    got = predicted(game, 0, x)
    local = game.local(0)
    with torch.no_grad():
        r = local.models["model"].represent(game.private(0).model, x)
    for i in range(9):
        distance = {int(c): float((r[i] - row).norm()) for c, row in game.server.prototypes.items()}
        assert int(got["prototype"][i].argmax()) == min(distance, key=distance.__getitem__)


def made_for_class(algorithm: FedGen) -> None:
    """After some rounds the generator that clients get makes what the heads take for the class asked for."""
    game = toy.play(federation(algorithm, sizes=(16, 12, 9), train={"epochs": 4}), 6)
    sent = game.federation.algorithm
    game.round()
    msg, heads = game.sent[-1][0], [game.got[-2][k] for k in range(3)]
    step = Step(torch.arange(64), 0, 0)
    weights, counts = [h.head for h in heads], torch.stack([h.counts for h in heads])

    def loss(generator: Any) -> float:
        drawn = draw_classes(msg.classes, sent.noise_dim, Rng((5,)), step)
        return float(sent.server_loss(weights, counts, lambda step: drawn, generator, step))

    assert loss(msg.generator) < loss(game.sent[0][0].generator) - 0.2


class NeverSaved(FedGen):
    """HtFLlib: trained, and thrown away."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        after = yield from super().server_round(server, cohort)
        return replace(after, generator=server.generator)


def test_fedgen_clients_get_the_generator_that_was_trained() -> None:
    """Catches a generator that stays what it was drawn as."""
    keys = {"server_lr": 0.02, "server_steps": 30, "noise_dim": 4, "hidden": 16}
    made_for_class(FedGen(**keys))
    with pytest.raises(AssertionError):
        made_for_class(NeverSaved(**keys))


def test_fedgen_without_its_terms_is_lg_fedavg() -> None:
    """Catches a first round with terms of an untrained generator, and heads that do not weigh by examples."""
    algorithms = FedGen(server_steps=1), FedGen(alpha=0.0, beta=0.0, server_steps=1), LGFedAvg()
    with_it, without, other = (toy.play(federation(a)) for a in algorithms)
    for round_ in (1, 2):
        for game in (with_it, without, other):
            game.round()
        toy.close(without.server.head, other.server.head, 1e-5)
        assert (torch.allclose(with_it.server.head["weight"], other.server.head["weight"])) is (round_ == 1)


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def test_fedgen_says_nothing_of_a_class_that_the_generator_does_not_know() -> None:
    """Catches a divergence from what an untrained class looks like."""
    fed = federation(FedGen(alpha=0.0))
    local = fed.local(0, 2)
    model, algorithm = local.models["model"], fed.algorithm
    server = algorithm.init_server(fed.task, Rng((0,)))
    batch = local.train.batch(torch.tensor([0, 1]), dtype=torch.float64)
    drawn = draw_classes((1,), 32, Rng((1,)), Step(torch.arange(2), 0, 0))
    params = model.init(Rng((3,)))

    def value(known: list[float]) -> float:
        decay = torch.zeros(8)
        decay[:2] = torch.tensor(known)
        drawings = {"model": params, "G": server.generator, "decay": {"of": decay}, "drawn": drawn}
        parts = tree.map_parts(double, drawings)  # small differences of losses: in single precision mostly rounding
        return float(algorithm.loss(bind(local.models, parts), batch))

    both, only_1, only_0 = value([1.0, 1.0]), value([0.0, 1.0]), value([1.0, 0.0])
    plain = float(torch.nn.functional.cross_entropy(model(tree.map_leaves(double, params), batch[0]), batch[1]))
    assert both - plain == pytest.approx((only_1 - plain) + (only_0 - plain), rel=1e-4)
    assert min(only_1, only_0) > plain


def test_fedl2g_asks_of_held_out_examples_and_never_of_none() -> None:
    """Catches a quiz that is trained on, is the first of the array, is the same in every round, or is empty."""
    fed = federation(FedL2G(warmup=0, holdout=0.5), sizes=(12, 2, 3))
    asked: dict[int, list[tuple[Any, ...]]] = {k: [] for k in range(3)}
    for round_ in (1, 2, 3):
        for k in range(3):
            local = fed.local(k, round_)
            held = {int(row) for row in local.held_out.rows}
            assert held
            assert not held & {int(row) for row in local.train.rows}
            msg = FedL2G.Broadcast(fed.algorithm.init_server(fed.task, Rng((0,))).vectors)
            private = fed.algorithm.init_client(fed.local(k, 0))
            requests: list[Any] = []

            def perform(request: Any, requests: list[Any] = requests) -> Any:
                requests.append(request)
                if isinstance(request, Reduce):
                    return run_reduce(request, toy.play(fed).driver.placement)
                return toy.play(fed).driver.perform(request)

            drive(fed.algorithm.client_round(private, msg, local), perform)
            quiz = requests[-1].parts["quiz"]
            everything = local.held_out.batch(torch.arange(len(local.held_out)))[0]
            rows = [int((everything == x).all(1).nonzero()[0]) for x in quiz["x"]]
            assert len(set(rows)) == len(rows) == min(4, len(held))
            assert torch.equal(quiz["y"], local.held_out.labels[rows])
            asked[k].append(tuple(rows))
    assert len({frozenset(rows) for rows in asked[0]}) > 1


def test_fedl2g_learns_its_vectors_before_its_networks() -> None:
    """Catches training in the warm-up, and vectors that stand still in it; afterwards both move."""
    game = toy.play(federation(FedL2G(warmup=2, server_lr=1.0)))
    with game.driver.placement.defaults():
        drawn = {k: game.private(k).model for k in range(3)}
    for round_ in (1, 2, 3):
        before = game.server.vectors
        game.round()
        for k in range(3):
            assert tree.same(game.private(k).model, drawn[k]) is (round_ <= 2)
            assert game.played[-1].reports[k].work.steps == (0 if round_ <= 2 else 2)
        moved = {c for c in before if not torch.equal(before[c], game.server.vectors[c])}
        assert moved == {c for k in range(3) for c in game.got[-1][k].gradients}


def test_fedl2g_guides_towards_what_helps_the_quiz() -> None:
    """Catches a gradient of the wrong sign: vectors that it moved make the step on paper better, not worse."""
    algorithm = FedL2G(warmup=0)
    fed = federation(algorithm, sizes=(12, 4, 3))
    local = fed.local(0, 1)
    model = local.models["model"]
    params = model.init(Rng((3,)))
    x, y = local.train.batch(torch.arange(8))
    quiz = dict(zip("xy", local.train.batch(torch.arange(8, len(local.train))), strict=True))

    def asked(rows: Tensor) -> tuple[float, Tensor]:
        guide = {"rows": rows, "held": torch.ones(8)}
        nets = bind(local.models, {"model": params, "guide": guide, "quiz": quiz})
        after = nets["model"].stepped(lambda net: algorithm.loss({**nets, "model": net}, (x, y)), 0.5)
        found = algorithm.meta_gradient(0.5, nets, (x, y))
        gradient = torch.stack([found.get(str(c), torch.zeros(8)) for c in range(8)])
        return float(torch.nn.functional.cross_entropy(after(quiz["x"]), quiz["y"]).detach()), gradient

    rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    loss, gradient = asked(rows)
    step = 0.1 / float(gradient.norm())
    better, _ = asked(rows - step * gradient)
    worse, _ = asked(rows + step * gradient)
    assert better < loss < worse
    assert (worse - better) / (2 * step) == pytest.approx(float(gradient.square().sum()), rel=1e-2)


def test_fedl2g_names_a_step_on_paper_that_overflows() -> None:
    """Catches vectors of NaN for everybody, where no training in the round would notice."""
    game = toy.play(federation(FedL2G(warmup=2), train={"lr": 1e30}))
    with pytest.raises(DivergedError, match=r"client 0, round 1: 'sum\.\d'"):
        game.round()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("algorithm", [FedGH(), FedGen()])
def test_equal_heads_are_needed(algorithm: Any) -> None:
    """Catches heads that a server cannot run or mix, found after a round of training."""
    fed = federation(algorithm, models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"classifier is .*\(8, 6\).* but .*\(8, 5\)"):
        fed.algorithm.check(fed.task)
    with pytest.raises(ModelError, match=f"{algorithm.name} needs networks whose classifiers the server knows"):
        algorithm.check(Task((7,), 8))


@pytest.mark.parametrize("algorithm", [FedTGP(), FedL2G(guide="features", warmup=0)])
def test_equal_widths_are_needed(algorithm: Any) -> None:
    """Catches prototypes of another width; and guided logits, which need none."""
    fed = federation(algorithm, models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"representation width is 6 in .* but 5 in"):
        fed.algorithm.check(fed.task)
    FedL2G(warmup=0).check(fed.task)
    with pytest.raises(ModelError, match="needs networks whose width the server knows"):
        algorithm.check(Task((7,), 8))


def test_fedl2g_needs_a_round_after_its_warm_up() -> None:
    """Catches a run that trains no network at all, as the default of 50 rounds easily makes."""
    fed = federation(FedL2G(warmup=3))
    with pytest.raises(ModelError, match=r"algorithm\.warmup = 3 .*run\.rounds = 3"):
        fed.algorithm.check(fed.task)


def test_counts_that_are_none_are_refused() -> None:
    """Catches a share of nothing, which is NaN for everybody."""
    fed = federation(FedGen(server_steps=1))
    game = toy.play(fed, 1)
    up, down, info = game.got[0][0], game.sent[0][0], fed.info(0)
    fed.algorithm.check_upload(fed.task, info, down, up)
    for counts in (torch.zeros(8), torch.tensor([-1.0] + [2.0] * 7)):
        with pytest.raises(MessageError, match=r"counts are .*; expected numbers of examples"):
            fed.algorithm.check_upload(fed.task, info, down, replace(up, counts=counts))


def test_servers_leave_what_clients_do_alone() -> None:
    """Catches FedGH's released server, which steps the client's network: round 1 trains bodies as Standalone does."""
    game, alone = toy.play(federation(FedGH())), toy.play(federation(Standalone()))
    local = game.federation.local(1, 1)
    model = local.models["model"]
    whole = model.with_head(game.private(1).body, game.server.head)
    alone.clients._kept[1] = (Standalone.Private(whole), 0)
    alone.round()
    game.round()
    toy.close(game.private(1).body, model.body(alone.private(1).model), 0.0)
