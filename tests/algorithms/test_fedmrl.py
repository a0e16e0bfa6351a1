"""FedMRL: which gradients reach what, what persists, what travels and what that weighs."""

from dataclasses import replace
from typing import Any

import auxiliary
import pytest
import torch
import toy
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size
from polyfed.execute.local_training import bind
from polyfed.models.zoo import build

IMAGE = (1, 16, 16)
MODELS = ("cnn5(rep_dim=6)", "cnn2(rep_dim=8)")
HEAD = {"fc3.weight", "fc3.bias"}


def federation(models: tuple[str, ...] = MODELS, sizes: tuple[int, ...] = (11, 8, 6), **keys: Any) -> Any:
    train = keys.pop("train", {"epochs": 1, "momentum": 0.9})
    clients = keys.pop("clients", None)
    algorithm = FedMRL(**{"auxiliary": "cnn5", "rep_dim": 4, **keys})
    return toy.federation(algorithm, models=models, shape=IMAGE, sizes=sizes, train=train, clients=clients)


def leaves(game: toy.Game, client: int = 0) -> tuple[Any, dict[str, dict[str, Tensor]], Any]:
    """A client's networks on weights that learn, and a batch."""
    local = game.federation.local(client, 1)
    parts = game.federation.algorithm.predictor_parts(
        game.private(client), game.federation.algorithm.message_for(game.server, local.info), local
    )
    own = {part: {n: v.clone().requires_grad_() for n, v in params.items()} for part, params in parts.items()}
    return bind(local.models, own), own, local.train.batch(torch.arange(5))


def reached(value: Tensor, own: dict[str, dict[str, Tensor]]) -> set[str]:
    """The weights that a loss reaches, by part and piece."""
    flat = [(part, name, leaf) for part, params in own.items() for name, leaf in params.items()]
    grads = torch.autograd.grad(value, [leaf for *_, leaf in flat], allow_unused=True, retain_graph=True)
    return {
        f"{part}.{'head' if name in HEAD else 'body'}"
        for (part, name, _), g in zip(flat, grads, strict=True)
        if g is not None and bool(g.any())
    }


def test_gradients_reach_exactly_what_they_should() -> None:
    """Catches headers that learn from the wrong loss, and extractors that miss one of the two (card 1.15, c)."""
    game = toy.play(federation())
    nets, own, batch = leaves(game)
    coarse, fine = (replace(game.federation.algorithm, weights=w) for w in ((1.0, 0.0), (0.0, 1.0)))
    shared = {"G.body", "F.body", "P.body"}
    assert reached(coarse.loss(nets, batch), own) == shared | {"G.head"}
    assert reached(fine.loss(nets, batch), own) == shared | {"F.head"}
    assert reached(game.federation.algorithm.loss(nets, batch), own) == shared | {"G.head", "F.head"}
    without = replace(game.federation.algorithm, mrl=False)
    assert reached(without.loss(nets, batch), own) == shared | {"F.head"}


def represent(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A CNN before its last layer, by hand."""
    for layer in ("conv1", "conv2"):
        x = functional.max_pool2d(torch.relu(functional.conv2d(x, p[f"{layer}.weight"], p[f"{layer}.bias"])), 2)
    x = x.flatten(1)
    for layer in ("fc1", "fc2"):
        x = torch.relu(x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
    return x


def head(p: dict[str, Tensor], r: Tensor) -> Tensor:
    return r @ p["fc3.weight"].T + p["fc3.bias"]


@pytest.mark.parametrize("client", [0, 1])
def test_the_four_modes_are_their_formulas(client: int) -> None:
    """Catches large before small, a slice of the input instead of the output, a ReLU on the fused vector (B5)."""
    game = toy.play(federation(), 1)
    nets, own, (x, _) = leaves(game, client)
    small, large = represent(own["G"], x), represent(own["F"], x)
    fused = torch.cat([small, large], dim=1) @ own["P"]["fc1.weight"].T + own["P"]["fc1.bias"]
    assert own["P"]["fc1.weight"].shape == (large.shape[1], 4 + large.shape[1])
    expected = {
        "mix-large": head(own["F"], fused),
        "mix-small": head(own["G"], fused[:, :4]),
        "single-large": head(own["F"], large),
        "single-small": head(own["G"], small),
    }
    got = game.federation.algorithm.predict(nets, x)
    assert next(iter(got)) == "mix-large"
    assert got.keys() == expected.keys()
    for mode, logits in expected.items():
        assert torch.allclose(got[mode], logits, rtol=1e-5, atol=1e-6), mode


def test_equal_widths_make_equal_slices() -> None:
    """Catches a coarse slice that is not the beginning of the fine one: at d1 = d2 they are the same (card, d)."""
    game = toy.play(federation(models=("cnn5(rep_dim=4)",)))
    nets, own, (x, y) = leaves(game)
    own["G"].update({name: own["F"][name] for name in HEAD})
    nets = bind(game.federation.local(0, 1).models, own)
    modes = game.federation.algorithm.predict(nets, x)
    assert torch.allclose(modes["mix-small"], modes["mix-large"], rtol=1e-6, atol=1e-7)
    twice = game.federation.algorithm.loss(nets, (x, y))
    once = functional.cross_entropy(modes["mix-large"], y)
    assert torch.allclose(twice, 2 * once, rtol=1e-5)


def test_a_small_model_wider_than_a_private_one_is_refused() -> None:
    """Catches a slice that is shorter than the header expects, found in round 1 only."""
    fed = federation(rep_dim=7)
    with pytest.raises(ModelError, match=r"cnn5\(rep_dim=6\).*d2 = 6.*rep_dim"):
        fed.local(0, 1)
    assert fed.local(1, 1).models["P"].input_shape == (7 + 8,)


def test_the_projector_persists_and_changes_only_when_its_client_trains() -> None:
    """Catches HtFLlib's fault H1 (a projector that starts anew every round), and one that all clients share."""
    game = toy.play(federation(sizes=(6,) * 4, clients={"participation": 0.5}))
    before = {k: game.private(k) for k in range(4)}
    assert not tree.same(before[0].P, before[2].P)
    seen = set()
    for _ in range(4):
        game.round()
        cohort = {client.id for client in game.played[-1].cohort}
        seen |= {frozenset(cohort)}
        for k in range(4):
            now = game.private(k)
            for part in ("P", "F"):
                assert tree.same(getattr(now, part), getattr(before[k], part)) is (k not in cohort)
            before[k] = now
    assert len(seen) > 1


def test_theta_is_the_weighted_mean_of_what_was_sent() -> None:
    """Catches the released fault B1: theta equal to the last client's small model."""
    game = toy.play(federation(), 1)
    sent = game.got[0]
    assert [sent[k].num_examples for k in range(3)] == [11, 8, 6]
    for name, value in game.server.G.items():
        expected = sum(sent[k].num_examples * sent[k].G[name].double() for k in range(3)) / 25
        assert torch.allclose(value, expected.float(), rtol=1e-6, atol=1e-8)
        assert not torch.equal(value, sent[2].G[name])


def test_the_small_model_starts_from_theta_at_every_participation() -> None:
    """Catches a client that goes on with its own copy of G."""
    game = toy.play(federation(train={"epochs": 1, "lr": 1e-30}), 2)
    for k in range(3):
        assert tree.same(game.got[1][k].G, game.sent[1][k].G)
    assert tree.same(game.sent[1][0].G, game.server.G)


def test_only_the_small_model_travels_and_weighs_what_the_card_says() -> None:
    """Catches private weights on the wire, and G at full width: |theta| = 465,658 at d1 = 100, 3x32x32, L = 10."""
    task = Task((3, 32, 32), 10)
    algorithm = FedMRL(rep_dim=100)
    server = algorithm.init_server(task, Rng((0,)))
    info = ClientInfo(0)
    assert size(algorithm.message_for(server, info)).values == 465_658 * 4  # type: ignore[arg-type]
    for d1, count in {150: 491_208, 250: 542_308, 500: 670_058}.items():
        assert tree.numel(FedMRL(rep_dim=d1).init_server(task, Rng((0,))).G) == count
    projector = algorithm.models(task, build("cnn1", input_shape=(3, 32, 32), num_classes=10))["P"]
    assert sum(s.numel() for s in projector.shapes.values()) == 300_500
    game = toy.play(federation(), 1)
    report = game.played[0].reports[0]
    assert report.down.values == report.up.values == 4 * tree.numel(game.server.G)


def test_without_mrl_the_header_neither_learns_nor_travels() -> None:
    """Catches bytes that do not shrink by exactly the header (d1 + 1) * L, and a header that moves all the same."""
    plain, without = toy.play(federation(), 1), toy.play(federation(mrl=False), 0)
    before = {k: without.private(k).G for k in range(3)}
    without.round()
    assert HEAD.isdisjoint(without.server.G)
    assert set(plain.server.G) - set(without.server.G) == HEAD
    for k in range(3):
        full, less = plain.played[0].reports[k], without.played[0].reports[k]
        assert full.up.values - less.up.values == full.down.values - less.down.values == 4 * (4 + 1) * 4
        assert set(before[k]) >= HEAD
        assert tree.same(tree.pick(without.private(k).G, HEAD), tree.pick(before[k], HEAD))
    assert not HEAD & set(plain.private(0).G)


def test_without_sharing_nothing_travels_and_nobody_matters() -> None:
    """Catches a control that is none: a client's path must not depend on the others."""
    together = toy.play(federation(share=False), 2)
    for sent, got in zip(together.sent, together.got, strict=True):
        assert all(message is None for message in (*sent.values(), *got.values()))
    assert all(r.up.total == r.down.total == 0 for p in together.played for r in p.reports.values())
    some = toy.play(federation(share=False, sizes=(11, 8)), 2)
    fewer = toy.play(federation(share=False, sizes=(11, 9)), 2)  # another neighbour
    for part in ("F", "P", "G"):
        assert tree.same(getattr(some.private(0), part), getattr(fewer.private(0), part))
        assert not tree.same(
            getattr(some.private(0), part), toy.play(federation(share=False)).private(0).__dict__[part]
        )
    assert together.server.G == {}


@pytest.mark.parametrize("part", ["G", "F", "P"])
def test_each_module_has_its_own_learning_rate(part: str) -> None:
    """Catches rates dealt to the wrong module: at rate 1e-30 one stays where it is, the others move."""
    key = {"G": "lr_auxiliary", "F": "lr_private", "P": "lr_projector"}[part]
    game = toy.play(federation(**{key: 1e-30}))
    start = {k: game.private(k) for k in range(3)}
    theta = game.server.G
    game.round()
    for k in range(3):
        now = {"F": game.private(k).F, "P": game.private(k).P, "G": game.got[0][k].G}
        old = {"F": start[k].F, "P": start[k].P, "G": theta}
        for name in now:
            assert tree.same(now[name], old[name]) is (name == part), name


def test_clients_start_from_models_of_their_own() -> None:
    """Catches the released code's equal starts: two clients of one architecture draw differently, by their number."""
    game = toy.play(federation())
    assert not tree.same(game.private(0).F, game.private(2).F)
    again = toy.play(federation())
    assert tree.same(game.private(2).F, again.private(2).F)


def test_an_mlp_projector_has_two_layers() -> None:
    """Catches a projector option that does nothing."""
    game = toy.play(federation(projector="mlp"), 1)
    assert {n for n in game.private(0).P if n.endswith("weight")} == {"fc1.weight", "fc2.weight"}
    assert game.private(0).P["fc1.weight"].shape == (6, 10)
    assert game.private(1).P["fc2.weight"].shape == (8, 8)


def test_a_local_header_of_fedmrl_learns_at_home() -> None:
    """Catches a header that stays as it was, and one that is everybody's all the same."""
    game = toy.play(auxiliary.federation(FedMRL(auxiliary=auxiliary.MLP, rep_dim=8, header="local")))
    before = {k: game.private(k).G["fc3.weight"] for k in range(3)}
    game.round()
    assert not {"fc3.weight", "fc3.bias"} & set(game.server.G)
    for k in range(3):
        assert set(game.private(k).G) == {"fc3.weight", "fc3.bias"}
        assert not torch.equal(game.private(k).G["fc3.weight"], before[k])
    assert not tree.same(game.private(0).G, game.private(2).G)


def test_bytes_are_those_of_the_formula() -> None:
    """Catches more on the wire than the shared network: a header that stays at home, a private part."""
    auxiliary.weighs(FedMRL(auxiliary=auxiliary.MLP, rep_dim=8, header="local"), auxiliary.BODY + 12 * 8 + 8)
