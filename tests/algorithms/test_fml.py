"""FML: what it weighs, merges and tests."""

from typing import Any

import pytest
import torch
import toy
from by_class import federation, inputs, predicted

from polyfed.algorithms.fml import FML
from polyfed.base import tree
from polyfed.base.rng import Rng
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.models.zoo import build


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
