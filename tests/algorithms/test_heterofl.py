"""HeteroFL, and what FedRolex has of it: bytes, widths, label masks, the Scaler, statistics, equality with FedAvg."""

import math
from typing import Any

import pytest
import torch
import toy

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedrolex import FedRolex
from polyfed.algorithms.heterofl import HeteroFL
from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.blocks.losses import cross_entropy, cross_entropy_among, without
from polyfed.blocks.static_norm import Statistics, check_statistics, statistics_at
from polyfed.blocks.submodel import Slice
from polyfed.core.message import Nothing, size
from polyfed.execute.local_training import bind, set_training

RESNET = "resnet8(width=4)"
ALL = tuple((0, 1, 2, 3) * 2 for _ in range(3))


def federation(
    algorithm: HeteroFL, sizes: tuple[float, ...] = (1.0, 0.25, 0.04), *, net: str = "mlp", **keys: Any
) -> Any:
    spec, shape = (toy.MLP, (7,)) if net == "mlp" else (net, (1, 8, 8))
    return toy.federation(algorithm, models=(spec,), shape=shape, clients={"capacities": list(sizes)}, **keys)


@pytest.mark.parametrize("algorithm", [HeteroFL(), FedRolex(), FedRolex(window="random")])
def test_bytes_are_those_of_small_tensors(algorithm: HeteroFL) -> None:
    """Catches index bytes, and full tensors for small clients."""
    fed = federation(algorithm)
    game = toy.play(fed, 1)
    for client, capacity in enumerate((1.0, 0.25, 0.04)):
        rho = math.sqrt(capacity)
        a, b = math.ceil(rho * 12), math.ceil(rho * 6)
        weights = 4 * (7 * a + a + a * b + b + b * 4 + 4)
        down, up = size(game.sent[0][client]), size(game.got[0][client])
        assert (down.indices, up.indices) == (0, 0)
        assert down.values == weights
        assert up.values == weights + 4  # a byte for each class


@pytest.mark.parametrize("algorithm", [HeteroFL(), FedRolex()])
def test_statistics_cost_an_exchange_of_their_own(algorithm: HeteroFL) -> None:
    """Catches statistics that are not counted, and a question where nothing is asked."""
    game = toy.play(federation(algorithm, net=RESNET), 1)
    queries = [type(message).__name__ for sent in game.sent for message in sent.values()]
    assert queries == ["Broadcast"] * 3 + ["Query"] * 3 * algorithm.calibrate
    if algorithm.calibrate:
        widths = [math.ceil(math.sqrt(0.25) * n) for n in (4, 4, 4, 8, 8, 8, 16, 16, 16)]
        answer = game.got[1][1]
        names = [n for n in answer.statistics if n.endswith("mean")]
        assert sorted(len(answer.statistics[n]) for n in names) == sorted(widths)
        assert size(answer).values == 4 * 2 * sum(widths)
        assert not set(names) & set(game.got[0][1].model)


@pytest.mark.parametrize("algorithm", [HeteroFL(calibrate=False), FedRolex(), FedRolex(window="random")])
def test_at_full_capacity_it_is_fedavg_with_equal_weights(algorithm: HeteroFL) -> None:
    """Catches anything that happens besides: at capacity 1, with all classes everywhere."""
    for net in (toy.MLP, RESNET):
        settings: dict[str, Any] = {"models": (net,), "labels": ALL, "shape": (7,) if net == toy.MLP else (1, 8, 8)}
        one = toy.play(toy.federation(algorithm, clients={"capacities": [1.0]}, **settings))
        two = toy.play(toy.federation(FedAvg(), **settings))
        assert tree.same(one.server.model, two.server.model)
        for _ in range(2):
            toy.close(one.round().server.model, two.round().server.model, 1e-6)


def test_a_class_that_is_absent_never_wins() -> None:
    """Catches logits that are filled with 0, as in the released code: above the negative ones of present classes."""
    logits, present = torch.tensor([[-2.0, -1.0, -3.0, -3.0]]), torch.tensor([True, True, False, False])
    batch = (torch.zeros(1, 1), torch.tensor([1]))
    assert int(without(logits, present).argmax()) == 1
    assert int(without(logits, present, 0.0).argmax()) == 2
    excluded, zero, kept = (cross_entropy_among(logits, batch, present, how) for how in ("excluded", "zero", "kept"))
    assert float(excluded) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(zero) == pytest.approx(math.log(math.exp(-2) + math.exp(-1) + 2) + 1)
    assert float(kept) == pytest.approx(float(cross_entropy(logits, batch)))


def test_the_scaler_is_off_in_tests() -> None:
    """Catches a Scaler that tests, too, divide by."""
    game = toy.play(federation(HeteroFL()), 1)
    local, message = game.local(1), game.federation.algorithm.message_for(game.server, game.federation.info(1))
    nets = bind(local.models, game.federation.algorithm.predictor_parts(game.private(1), message, local))
    x, _ = local.train.batch(torch.arange(3))
    assert torch.equal(game.federation.algorithm.predict(nets, x)["submodel"], local.models["model"](message.model, x))


def test_just_after_training_the_scaler_is_on_beside_statistics_of_scaled_outputs() -> None:
    """Catches outputs that BatchNorm normalises by the statistics of others: without the Scaler they are 1 / rho."""
    outputs: list[torch.Tensor] = []
    for algorithm in (HeteroFL(), HeteroFL(calibrate=False)):  # the second trains without the Scaler
        train = {"lr": 1e-9, "epochs": None, "steps": 120, "batch_size": 64}
        game = toy.play(federation(algorithm, (0.0625,) * 3, net="resnet8(width=8)", train=train, augment=False))
        local = game.local(0)
        call = algorithm.client_round(Nothing(), algorithm.message_for(game.server, local.info), local)
        trained = game.driver.play({0: call})[0].trained
        x, _ = local.train.batch(torch.arange(8))
        set_training(local.models, False)
        outputs.append(algorithm.predict(bind(local.models, trained), x)["submodel"])
    scaled, plain = outputs
    assert torch.allclose(scaled, plain, rtol=0.01, atol=0.01), (scaled, plain)
    assert float(plain.std(0).max()) > 0.05  # there is something to see


def test_global_models_of_every_width_have_statistics_of_their_own() -> None:
    """Catches statistics of the largest width for all, and a width above all clients' that is tested all the same."""
    game = toy.play(federation(HeteroFL(unseen_capacities=(0.5, 0.1)), (0.25, 0.25, 0.04), net=RESNET), 1)
    found = game.federation.algorithm.global_nets(game.server, game.federation.task)
    assert list(found) == ["capacity 0.25", "capacity 0.1", "capacity 0.04"]
    for capacity in ("0.25", "0.04"):
        params = found[f"capacity {capacity}"]["model"].params
        assert all(torch.equal(params[n], v) for n, v in game.server.statistics[capacity].items())
    name = "bn1.running_mean"
    assert torch.equal(found["capacity 0.1"]["model"].params[name], game.server.statistics["0.25"][name][:2])
    assert statistics_at({}, 0.5, lambda _: Slice({}, {})) == {}  # type: ignore[arg-type]


def test_width_can_be_the_capacity() -> None:
    """Catches a switch that does nothing."""
    game = toy.play(federation(HeteroFL(width="capacity"), (0.25, 1.0, 1.0)), 1)
    assert game.sent[0][0].model["fc1.weight"].shape == (3, 7)


def test_uploads_that_would_harm_are_refused() -> None:
    """Catches classes of another number, none at all, and variances below 0."""
    game = toy.play(federation(HeteroFL(), net=RESNET), 1)
    fed, (down, query), (up, answer) = game.federation, (s[0] for s in game.sent), (g[0] for g in game.got)
    fed.algorithm.check_upload(fed.task, fed.info(0), down, up)
    fed.algorithm.check_upload(fed.task, fed.info(0), query, answer)
    with pytest.raises(MessageError, match="names no class"):
        fed.algorithm.check_upload(fed.task, fed.info(0), down, type(up)(up.model, torch.zeros(4, dtype=torch.bool)))
    with pytest.raises(MessageError, match="where statistics were asked for"):
        check_statistics(up, query.statistics)
    with pytest.raises(MessageError, match="negative variance"):
        check_statistics(Statistics({n: -v.abs() - 1 for n, v in answer.statistics.items()}, 3), query.statistics)


def test_networks_that_differ_are_refused() -> None:
    """Catches slices of two models."""
    fed = toy.federation(HeteroFL(), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match="heterofl needs one architecture"):
        fed.algorithm.check(fed.task)
