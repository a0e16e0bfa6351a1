"""Neuron-wise FIARSE: the bytes, which channels travel, nesting, FedAvg at capacity 1, and what is refused."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fiarse_neuron import FIARSENeuron
from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.blocks.neurons import open_channels
from polyfed.blocks.submodel import Slice
from polyfed.config import Config
from polyfed.core.message import size
from polyfed.execute.local_training import bind

RESNET = "resnet8(norm=group, width=8)"
VIT = "vit(patch=4, width=8, depth=1, heads=2)"


def game(
    capacities: list[float], rounds: int = 1, *, net: str = RESNET, train: Mapping[str, Any] | None = None, **keys: Any
) -> toy.Game:
    fed = toy.federation(
        FIARSENeuron(**keys),
        models=(net,), shape=(7,) if net == toy.MLP else (1, 8, 8), sizes=(11, 8, 6), train=train,
        clients={"capacities": capacities},
    )  # fmt: skip
    fed.algorithm.check(fed.task)
    return toy.play(fed, rounds)


def inside(small: Slice, large: Slice) -> bool:
    return all(set(n.tolist()) <= set(large.chosen[g].tolist()) for g, n in small.chosen.items())


@pytest.mark.parametrize("net", [RESNET, VIT])
def test_bytes_are_those_of_a_small_dense_network(net: str) -> None:
    """Catches positions or scores that travel, and full tensors for small clients."""
    played = game([1.0, 0.3, 0.5], net=net)
    for client in range(3):
        model = played.local(client).models["model"]
        weights = sum(shape.numel() for shape in model.shapes.values())
        for sent in (played.sent[0][client], played.got[0][client]):
            assert size(sent).values == 4 * weights
            assert size(sent).indices == 0
        full = sum(shape.numel() for shape in played.local(client).models["model"].whole.shapes.values())
        assert weights <= played.local(client).info.capacity * full


def test_the_strongest_channels_travel() -> None:
    """Catches prefixes, an order that does not follow the server's new weights, and channels in another order."""
    played = game([0.3], 0, net=toy.MLP, train={"lr": 1e-9})
    w, strong = dict(played.server.model), torch.tensor([2, 5, 7, 11])
    w["fc1.weight"] = w["fc1.weight"].clone()
    w["fc1.weight"][strong] *= 30
    played.server = replace(played.server, model=w)
    assert sorted(played.server.order["fc1.weight[0]"][:4].tolist()) != strong.tolist()
    played.round()
    held = played.server.neurons.part(played.server.order, 0.3)
    assert held.chosen["fc1.weight[0]"].tolist() == strong.tolist()
    played.round()
    assert torch.allclose(played.sent[1][0].model["fc1.weight"], w["fc1.weight"][strong], rtol=1e-6)


@pytest.mark.parametrize(("net", "gate"), [(toy.MLP, "biased"), (toy.MLP, "frozen"), (RESNET, "biased")])
def test_at_full_capacity_it_is_fedavg_with_equal_weights(net: str, gate: Any) -> None:
    """Catches anything else that it does: at capacity 1 the threshold is 0 and nothing closes."""
    settings: dict[str, Any] = {"models": (net,), "sizes": (8, 8, 8), "shape": (7,) if net == toy.MLP else (1, 8, 8)}
    one = toy.play(toy.federation(FIARSENeuron(gate=gate), clients={"capacities": [1.0]}, **settings))
    two = toy.play(toy.federation(FedAvg(), **settings))
    assert tree.same(one.server.model, two.server.model)
    for _ in range(2):
        toy.close(one.round().server.model, two.round().server.model, 1e-6)


@pytest.mark.parametrize("net", [toy.MLP, "resnet8(norm=batch, width=5)", VIT])
def test_submodels_nest_and_what_nobody_holds_stays_bitwise(net: str) -> None:
    """Catches capacities that hold unlike channels once scores change, and weights that move though nobody has them."""
    played = game([0.3, 0.6, 0.6], 0, net=net, train={"momentum": 0.9, "weight_decay": 0.1}, hysteresis=1.05)
    for _ in range(3):
        server = played.server
        parts = [server.neurons.part(server.order, c) for c in (0.3, 0.45, 0.6, 1.0)]
        assert all(inside(small, large) for small, large in itertools.pairwise(parts))
        covered = parts[2].coverage()
        played.round()
        changed = 0
        for name, value in played.server.model.items():
            assert torch.equal(value[~covered[name]], server.model[name][~covered[name]])
            changed += int((value != server.model[name]).sum())
        assert changed > 0
        assert sum(int((~m).sum()) for m in covered.values()) > 0


def test_hysteresis_holds_channels_where_they_are() -> None:
    """Catches a factor that the server forgets: at a large one nothing changes, without one channels do."""

    def choices(factor: float) -> list[dict[str, list[int]]]:
        found: list[dict[str, list[int]]] = []
        played = game([0.3, 0.6, 0.6], 0, net=toy.MLP, train={"lr": 0.3, "epochs": 3}, hysteresis=factor)
        for _ in range(4):
            server = played.server
            chosen = server.neurons.part(server.order, 0.3).chosen
            found.append({g: n.tolist() for g, n in chosen.items()})
            played.round()
        return found

    held, free = choices(1e9), choices(1.0)
    assert all(one == held[0] for one in held)
    assert any(one != free[0] for one in free)
    assert held[0] == free[0]


def test_channels_close_in_training_unless_frozen() -> None:
    """Catches a gate that never closes, one that closes all the same, and predictions that pass it by."""
    played = game([0.3, 0.3, 0.6], net=toy.MLP, train={"weight_decay": 0.3, "lr": 0.3})
    algorithm: Any = played.federation.algorithm
    found = 0
    for client in range(3):
        local = played.local(client)
        assert list(algorithm.predictor_parts(None, played.sent[0][client], local)) == ["model"]  # nothing closes
        parts = algorithm.gate_of(played.sent[0][client], local)
        masks = open_channels(played.got[0][client].model, parts)
        found += sum(int((~m).sum()) for m in masks.values())
        nets = bind(local.models, {**parts, "model": played.got[0][client].model})
        x = torch.randn(5, 7)
        masked = {n: v * masks[n] for n, v in played.got[0][client].model.items() if n in masks}
        expected = local.models["model"]({**played.got[0][client].model, **masked}, x)
        assert torch.equal(algorithm.predict(nets, x)["submodel"], expected)
    assert found > 0
    frozen = game([0.3], net=toy.MLP, gate="frozen")
    assert frozen.federation.algorithm.gate_of(frozen.sent[0][0], frozen.local(0)) == {}


def test_costs_of_multiply_adds_and_tables_change_the_sizes() -> None:
    """Catches a cost that the server uses and clients do not, or the other way round: shapes would not fit."""
    table: dict[str, Any] = {"capacity_in": "table", "table": {"conv1": 5.0, "layer1.0.conv1": 1.0}}
    macs: dict[str, Any] = {"capacity_in": "macs"}
    for keys in (macs, table):
        played = game([1.0, 0.3, 0.5], **keys)
        for client, capacity in enumerate((1.0, 0.3, 0.5)):
            sizes, held = (
                played.server.neurons.sizes(capacity),
                played.server.neurons.part(played.server.order, capacity),
            )
            assert {g: len(n) for g, n in held.chosen.items()} == sizes
            assert tree.shapes(played.sent[0][client].model) == tree.shapes(played.got[0][client].model)
        assert played.server.neurons.sizes(0.3) != game([0.3], 0).server.neurons.sizes(0.3)


def test_a_table_is_read_from_a_configuration() -> None:
    """Catches a key that TOML cannot write or that is not checked."""
    keys: dict[str, Any] = {
        "name": "fiarse-neuron",
        "capacity_in": "table",
        "table": {"layer1.0.conv1": 2},
        "hysteresis": 0.5,
    }
    with pytest.raises(ConfigError, match=r"algorithm\.hysteresis"):
        Config.parse({"algorithm": keys})
    keys["hysteresis"] = 1.0
    text = Config.parse({"algorithm": keys}).to_toml()
    assert "layer1.0.conv1" in text


def test_the_global_model_is_tested_at_capacities_that_fit() -> None:
    """Catches an unseen capacity that stops a run, or that is tested with the channels of another."""
    played = game([1.0, 0.3, 0.3], net=toy.MLP, unseen_capacities=(0.5, 0.01))
    algorithm, server = played.federation.algorithm, played.server
    nets = algorithm.global_nets(server, played.federation.task)
    assert list(nets) == ["capacity 1", "capacity 0.5", "capacity 0.3"]
    x = torch.randn(4, 7)
    for name, net in nets.items():
        held = server.neurons.part(server.order, float(name.split()[1]))
        full = played.local(0).models["model"].whole
        expected = full({n: v * m for (n, v), m in zip(server.model.items(), held.coverage().values(), strict=True)}, x)
        assert torch.allclose(algorithm.predict(net, x)["submodel"], expected, atol=1e-6)


def test_what_cannot_be_trained_is_refused() -> None:
    """Catches a capacity below one channel of each group, unlike networks, and a table that nothing reads."""
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"clients": {"capacities": [1.0, 0.01]}}, r"capacity 0\.01 is too small"),
        ({}, {"models": (toy.MLP, "mlp(hidden=(5, 5))")}, "fiarse-neuron needs one architecture"),
        (
            {"table": {"fc1": 1.0}},
            {},
            r"algorithm\.table: it has 1 layers where algorithm\.capacity_in is 'parameters'",
        ),
    ]
    for keys, settings, text in cases:
        fed = toy.federation(FIARSENeuron(**keys), **settings)
        with pytest.raises(ModelError, match=text):
            fed.algorithm.check(fed.task)
