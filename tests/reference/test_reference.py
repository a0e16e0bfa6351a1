"""One round (FedIN: two) of every algorithm against the plain implementation beside this file, one thread each."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from torch import nn

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedin import FedIN
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.algorithms.fiarse import FIARSE
from polyfed.algorithms.standalone import Standalone
from polyfed.models.cnn import CNN
from polyfed.models.mlp import MLP
from polyfed.models.resnet import SIZES, ResNet

IMAGE = (1, 16, 16)
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}
RUNS = [("fp32", "sequential"), ("fp64", "sequential"), ("fp64", "batched")]

#: in [train], and for the plain loops
TRAINING: dict[str, tuple[dict[str, Any], plain.Settings]] = {
    "sgd": ({"lr": 0.1}, plain.Settings(0.1)),
    "momentum, decay, clip": (
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "clip": 0.5},
        plain.Settings(0.05, 0.9, 0.01, 0.5),
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in another order are other sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(game: toy.Game, client: int, round_: int) -> list[Any]:
    """The batches of a client's training, images augmented, with whether an epoch starts."""
    local = game.local(client, round_)
    schedule, shifts = local.plan.schedule(len(local.train), local.rng.at("batches")), local.rng.at("augment").torch()
    place = game.driver.placement
    with place.defaults():
        return [
            (*local.train.batch(step.rows, generator=shifts, dtype=place.dtype), step.in_epoch == 0)
            for step in schedule
        ]


def pairs(found: list[Any]) -> list[Any]:
    return [(x, y) for x, y, _ in found]


def mlp() -> nn.Module:
    return MLP((7,), hidden=(12, 6), num_classes=4)


def resnet8(norm: str) -> Callable[[], nn.Module]:
    return partial(ResNet, (1, 8, 8), stem="plain", blocks=(1, 1, 1), width=4, norm=norm, num_classes=4)


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("training", TRAINING)
def test_fedavg(training: str, precision: Any, driver: str) -> None:
    """Catches a mean that is not by numbers of examples, and training that is not SGD; BatchNorm's buffers included."""
    keys, settings = TRAINING[training]
    net = "resnet8(norm=batch, width=4)"
    fed = toy.federation(FedAvg(), models=(net,), shape=(1, 8, 8), sizes=(11, 8, 6), train=keys)
    game = toy.play(fed, precision=precision, driver=driver)
    w = toy.copy(game.server.model)
    game.round()
    ended = [plain.local_sgd(resnet8("batch"), w, pairs(batches(game, k, 1)), settings) for k in range(3)]
    toy.close(
        game.server.model, plain.mean(ended, [11, 8, 6]), TOLERANCE[precision] * (100 if driver == "batched" else 1)
    )


@pytest.mark.parametrize("augment", [True, False])
def test_images_are_augmented_if_and_only_if_the_configuration_says_so(augment: bool) -> None:
    """Catches ``data.augment`` ignored, and training on shifted images where none were asked for."""
    fed = toy.federation(
        FedAvg(), models=("resnet8(norm=group, width=4)",), shape=(1, 8, 8), sizes=(9, 8), train={"lr": 0.1},
        augment=augment,
    )  # fmt: skip
    assert fed.local(0, 1).train.augment is augment
    game = toy.play(fed, precision="fp64")
    w = toy.copy(game.server.model)
    game.round()
    ended = [plain.local_sgd(resnet8("group"), w, pairs(batches(game, k, 1)), plain.Settings(0.1)) for k in range(2)]
    toy.close(game.server.model, plain.mean(ended, [9, 8]), TOLERANCE["fp64"])
    same = []
    for k in range(2):
        local = game.local(k, 1)
        with game.driver.placement.defaults():
            rows = [step.rows for step in local.plan.schedule(len(local.train), local.rng.at("batches"))]
            raw = [local.train.batch(these, dtype=torch.float64)[0] for these in rows]
        same += [torch.equal(x, y) for x, (y, _) in zip(raw, pairs(batches(game, k, 1)), strict=True)]
    assert all(same) is not augment
    assert any(same) is not augment


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("training", TRAINING)
def test_standalone(training: str, precision: Any, driver: str) -> None:
    """Catches anything that travels after all, over two rounds: each client trains as if the others did not exist."""
    keys, settings = TRAINING[training]
    game = toy.play(toy.federation(Standalone(), train=keys), precision=precision, driver=driver)
    with game.driver.placement.defaults():
        models = {k: toy.copy(game.private(k).model) for k in range(3)}
    for round_ in (1, 2):
        game.round()
        for k in range(3):
            models[k] = plain.local_sgd(mlp, models[k], pairs(batches(game, k, round_)), settings)
            toy.close(game.private(k).model, models[k], 10 * TOLERANCE[precision])


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"weights": (0.5, 2.0), "lr_auxiliary": 0.02, "lr_projector": 0.2},
        {"mrl": False},
        {"projector": "mlp"},
        {"header": "local"},
        {"share": False},
    ],
    ids=["as in the paper", "weights and rates", "without MRL", "MLP projector", "local header", "nothing shared"],
)
def test_fedmrl(keys: dict[str, Any], precision: Any, driver: str) -> None:
    """Catches every fault of the card: order, slice, projector, rates, shared optimizers, the last client's model.

    And what does not travel of G kept as it was, or not kept at home.
    """
    train, settings = TRAINING["momentum, decay, clip"]
    algorithm = FedMRL(auxiliary="cnn5", rep_dim=4, **keys)
    widths = {0: ("cnn5", 6), 1: ("cnn2", 8), 2: ("cnn5", 6)}
    fed = toy.federation(
        algorithm,
        models=("cnn5(rep_dim=6)", "cnn2(rep_dim=8)"),
        shape=IMAGE,
        sizes=(11, 8, 6),
        train=train | {"epochs": 1},
    )
    game = toy.play(fed, precision=precision, driver=driver)
    with game.driver.placement.defaults():
        before = {k: game.private(k) for k in range(3)}
    theta = toy.copy(game.server.G)
    game.round()

    def cnn(name: str, rep_dim: int) -> nn.Module:
        channels, width = {"cnn5": (32, 500), "cnn2": (16, 2000)}[name]
        return CNN(IMAGE, channels2=channels, width1=width, rep_dim=rep_dim, num_classes=4)

    rates = [keys.get("lr_auxiliary", settings.lr), settings.lr, keys.get("lr_projector", settings.lr)]
    sent = []
    tolerance = TOLERANCE[precision] * (100 if driver == "batched" else 1)
    for k, width in widths.items():
        whole = {**before[k].G, **theta}
        G, F, P = plain.fedmrl_client(  # noqa: N806
            partial(cnn, "cnn5", 4), partial(cnn, *width), whole, dict(before[k].F), dict(before[k].P),
            pairs(batches(game, k, 1)), settings,
            rates=rates, m=algorithm.weights, mrl=algorithm.mrl,
        )  # fmt: skip
        toy.close(game.private(k).F, F, tolerance)
        toy.close(game.private(k).P, P, tolerance)
        toy.close(game.private(k).G, {name: G[name] for name in G if name not in theta}, tolerance)
        sent.append({name: G[name] for name in theta})
    toy.close(game.server.G, plain.mean(sent, [11, 8, 6]), tolerance)


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("gate", ["biased", "released", "frozen"])
@pytest.mark.parametrize("net", ["mlp", "group", "batch"])
def test_fiarse(net: str, gate: Any, scope: Any, precision: Any, driver: str) -> None:
    """Catches a wrong threshold, gradient, mask, count or server rate; norm layers whole, coordinates nobody holds.

    With BatchNorm a server rate that scales running statistics too.
    """
    keys, settings = TRAINING["sgd"]
    make, spec, shape = (
        (mlp, toy.MLP, (7,)) if net == "mlp" else (resnet8(net), f"resnet8(norm={net}, width=4)", (1, 8, 8))
    )
    sizes = (0.25, 0.5, 0.25)
    fed = toy.federation(
        FIARSE(gate=gate, scope=scope, server_lr=0.7, unseen_capacities=()),
        models=(spec,), shape=shape, sizes=(11, 8, 6), train=keys, clients={"capacities": list(sizes)},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    x0 = toy.copy(game.server.model)
    game.round()
    masked = plain.masked_names(make())
    assert sorted(game.server.masked) == sorted(masked)
    theta = [plain.thresholds(x0, masked, size, scope) for size in sizes]
    after = [plain.fiarse_client(make, x0, theta[k], pairs(batches(game, k, 1)), settings, gate) for k in range(3)]
    expected = plain.fiarse_server(x0, after, theta, 0.7)
    toy.close(game.server.model, expected, TOLERANCE[precision] * (100 if driver == "batched" else 1))
    untouched = {name: x0[name].abs() < min(t[name] for t in theta) for name in masked}
    assert sum(int(u.sum()) for u in untouched.values()) > 0
    for name, nobody in untouched.items():
        assert torch.equal(game.server.model[name][nobody], x0[name][nobody])


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("align", ["none", "local_primary", "in_primary_sum", "always"])
def test_fedin(align: Any, precision: Any, driver: str) -> None:
    """Catches a pair that is not the donor's, IN steps that reach stem, head or statistics, owners counted wrong."""
    # Batches of four at least: BatchNorm over two examples of 1x1 maps knows only signs, and amplifies rounding.
    keys, settings = (
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "epochs": 1, "batch_size": 6},
        plain.Settings(0.01, 0.9, 0.01),
    )
    if precision == "fp32":  # one step in each round, before rounding has made any ReLU flip
        keys |= {"batch_size": 12}
    names = ("in-resnet10-small", "in-resnet14-small", "in-resnet10-small")
    fed = toy.federation(
        FedIN(align=align, weight=0.6, feature_batch=8),
        models=tuple(f"{name}(width=4)" for name in names), shape=IMAGE, sizes=(12, 10, 10), train=keys,
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)

    def make(k: int) -> Callable[[], nn.Module]:
        stem, blocks = SIZES[names[k]]
        return partial(ResNet, IMAGE, stem=stem, blocks=blocks, width=4, norm="batch", num_classes=4)

    layers = toy.copy(game.server.layers)
    bank: dict[int, Any] = {}
    tolerance = {"fp32": 3e-6, "fp64": 1e-11}[precision] * (100 if driver == "batched" else 1)
    for round_ in (1, 2):
        game.round()
        given = {k: donor(game.sent[-1][k].pairs, bank, tolerance) for k in range(3)}
        assert all((given[k] is not None) is (round_ == 2) and given[k] != k for k in range(3))
        ended, made = [], {}
        for k in range(3):
            own = {name: layers[name] for name in make(k)().state_dict()}
            pair = None if given[k] is None else bank[given[k]]
            w = plain.fedin_client(make(k), own, batches(game, k, round_), pair, settings, align=align, weight=0.6)
            local = game.local(k, round_)
            order = torch.randperm(len(local.train), generator=local.rng.at("features").torch())[:8]
            with game.driver.placement.defaults():
                made[k] = plain.features(make(k), w, local.train.batch(order, dtype=game.driver.placement.dtype)[0])
            ended.append(w)
        layers, bank = plain.fedin_server(layers, ended, [12, 10, 10]), made
        toy.close(
            game.server.layers, layers, tolerance * (1 if round_ == 1 else 10), floor=0.1
        )  # fresh biases are tiny
        for k in range(3):
            toy.close({"s_in": game.server.bank[k].s_in, "s_out": game.server.bank[k].s_out},
                      {"s_in": bank[k][0], "s_out": bank[k][1]}, tolerance * 10)  # fmt: skip


def donor(given: tuple[Any, ...], bank: dict[int, Any], tolerance: float) -> int | None:
    """Whose pair it is, both halves of it."""
    for pair in given:
        for k, (s_in, s_out) in bank.items():
            if pair.s_in.shape == s_in.shape and (pair.s_in - s_in).norm() <= tolerance * s_in.norm():
                assert (pair.s_out - s_out).norm() <= tolerance * s_out.norm()
                return k
        raise AssertionError("a pair of nobody's")
    return None
