"""FedL2G: what it sends, whom it asks, and the step on paper."""

from typing import Any

import pytest
import torch
import toy
from by_class import federation, needs_equal_widths
from torch import Tensor

from polyfed.algorithms.fedl2g import FedL2G
from polyfed.base import tree
from polyfed.base.errors import DivergedError, ModelError
from polyfed.base.rng import Rng
from polyfed.config import Config
from polyfed.core.clients import ClientInfo
from polyfed.core.requests import Reduce, drive
from polyfed.execute.local_training import bind, run_reduce


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


@pytest.mark.parametrize(("guide", "rate"), [("logits", 0.1), ("features", 100.0)])
def test_fedl2g_has_a_rate_of_its_kind(guide: Any, rate: float) -> None:
    """Catches 0.01 for both, the default of the authors' parser, at which vectors hardly move; and a hidden rate."""
    game = toy.play(federation(FedL2G(guide=guide, warmup=1, server_clip=0.0)))
    before = game.server.vectors
    game.round()
    c = next(iter(game.got[0][2].gradients.keys() - game.got[0][0].gradients.keys() - game.got[0][1].gradients.keys()))
    assert torch.allclose(game.server.vectors[c], before[c] - rate * game.got[0][2].gradients[c])
    config = Config.parse({"algorithm": {"name": "fedl2g", "guide": guide}})
    told = Config.parse({"algorithm": {"name": "fedl2g", "guide": guide, "server_lr": rate}})
    assert config.resolved().algorithm.keys["server_lr"] == rate
    assert config.hash() == told.hash()


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


def test_fedl2g_needs_a_round_after_its_warm_up() -> None:
    """Catches a run that trains no network at all, as the default of 50 rounds easily makes."""
    fed = federation(FedL2G(warmup=3))
    with pytest.raises(ModelError, match=r"algorithm\.warmup = 3 .*run\.rounds = 3"):
        fed.algorithm.check(fed.task)


def test_equal_widths_are_needed() -> None:
    """Catches guided features of another width; and guided logits, which need none."""
    needs_equal_widths(FedL2G(guide="features", warmup=0))
    FedL2G(warmup=0).check(federation(FedL2G(warmup=0), models=(toy.MLP, "mlp(hidden=(5,))")).task)
