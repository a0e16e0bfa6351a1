"""ScaleFL: bytes, levels, what nobody runs, when exits learn, the deepest exit, statistics, and FedAvg at one exit."""

from typing import Any

import pytest
import torch
import toy
from torch import Tensor
from torch.nn.functional import conv2d

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedrolex import FedRolex
from polyfed.algorithms.heterofl import HeteroFL
from polyfed.algorithms.scalefl import ScaleFL
from polyfed.base.errors import ModelError
from polyfed.blocks.depths import each_logits
from polyfed.core.message import Nothing, size
from polyfed.core.net import Net

RESNET = "resnet8(width=8)"
EXITS = ("maxpool", "layer1", "layer2")
LEVELS = ((1.0, 1.0, 4), (0.3, 0.5, 2), (0.1, 0.25, 2))


def game(rounds: int = 1, *, net: str = RESNET, capacities: tuple[float, ...] = (1.0, 0.3, 0.1), **keys: Any) -> Any:
    algorithm, shape = keys.pop("algorithm", ScaleFL), (7,) if net == toy.MLP else (1, 8, 8)
    run = keys.pop("run", None)
    settings = {**({"exits": EXITS, "levels": LEVELS} if net == RESNET else {}), **keys}
    fed = toy.federation(
        algorithm(**settings), models=(net,), shape=shape, clients={"capacities": list(capacities)}, run=run
    )
    return toy.play(fed, rounds)


def test_bytes_are_those_of_the_width_and_the_depth() -> None:
    """Catches layers or heads behind the last exit that travel, full channels, positions, and others' statistics."""
    played = game()

    def head(c: int) -> int:
        return 4 * c + 4

    def block(a: int, b: int) -> int:
        return 9 * (a * b + b * b) + 4 * b + (a * b + 2 * b if a != b else 0)

    w = {1.0: 8, 0.5: 4, 0.25: 2}
    weights = {
        s: [
            11 * c + head(c), block(c, c) + head(c), block(c, 2 * c) + head(2 * c), block(2 * c, 4 * c) + 16 * c + 4
        ]
        for s, c in w.items()
    }  # fmt: skip
    statistics = {s: [2 * c, 4 * c, 12 * c, 24 * c] for s, c in w.items()}  # means and variances of 1, 2, 3, 3 layers
    counters = [1, 2, 3, 3]
    for client, (_, s, e) in enumerate(LEVELS):
        for sent in (played.sent[0][client], played.got[0][client]):
            found = size(sent)
            assert found.indices == 0
            assert found.values == 4 * sum(weights[s][:e]) + 4 * sum(statistics[s][:e]) + 8 * sum(counters[:e])


def test_what_nobody_runs_stays_bitwise_and_does_not_count() -> None:
    """Catches deeper layers that a mean of nobody moves, and clients that count for layers that they did not run."""
    played = game(0, capacities=(0.3, 0.3, 0.3))
    first = played.server.model
    last = played.round().server.model
    for name, value in last.items():
        deep = name.startswith(("net.layer2", "net.layer3", "net.fc", "heads.2"))
        assert torch.equal(value, first[name]) == deep, name
    assert torch.equal(last["net.layer1.0.conv1.weight"][4:], first["net.layer1.0.conv1.weight"][4:])
    mixed = game()
    alone = mixed.got[0][0].model["net.layer3.0.conv1.weight"]
    assert torch.equal(mixed.server.model["net.layer3.0.conv1.weight"], alone)


def test_one_exit_at_full_capacity_is_fedavg_with_equal_weights() -> None:
    """Catches anything that happens besides."""
    settings: dict[str, Any] = {"models": (RESNET,), "shape": (1, 8, 8), "sizes": (8, 8, 8)}
    one = toy.play(toy.federation(ScaleFL(exits=1), **settings), 2)
    two = toy.play(toy.federation(FedAvg(), **settings), 2)
    got = {n.removeprefix("net."): v for n, v in {**one.server.model, **one.server.buffers["1.0"]}.items()}
    toy.close(got, two.server.model, 1e-6)


def test_exits_learn_from_the_deepest_after_a_quarter_of_the_rounds() -> None:
    """Catches a share of the wrong number of rounds, a first round that is one too early, and predictors that ask."""
    played = game(4, net=toy.MLP, run={"rounds": 8})
    assert [sent[0].kd_weight for sent in played.sent] == [0.0, 0.0, 0.05, 0.05]
    assert [sent[0].kd_weight for sent in game(2, net=toy.MLP, horizon=4).sent] == [0.0, 0.05]
    assert [sent[0].kd_weight for sent in game(1, net=toy.MLP, kd_start=0.0).sent] == [0.05]
    assert [sent[0].kd_weight for sent in game(1, net=toy.MLP, kd_start=0.0, kd_weight=0.0).sent] == [0.0]
    on, off = (game(1, net=toy.MLP, kd_start=0.0, kd_weight=weight).server.model for weight in (0.5, 0.0))
    assert not torch.equal(on["heads.0.fc.weight"], off["heads.0.fc.weight"])


class MeanOfExits(ScaleFL):
    """The released meter: its accuracy of the last exit is the mean over all."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        return {"submodel": torch.stack(each_logits(nets["model"], x)).mean(0)}


class ScaledTests(ScaleFL):
    """The released Scaler divides in tests, too."""

    def global_nets(self, server: Any, task: Any) -> Any:
        found = super().global_nets(server, task)
        for (s, _), nets in zip(server.chosen.values(), found.values(), strict=True):
            w = nets["model"].params
            rho = server.anatomy.scaler({n: v for n, v in w.items() if "bn" not in n and "downsample.1" not in n}, s)
            nets["model"] = Net(nets["model"].model, {n: v / rho.get(n, 1) for n, v in w.items()})
        return found


def check_tests(played: Any) -> None:
    """The network of each capacity predicts by its deepest exit, unscaled, with its own statistics."""
    algorithm, task, x = played.federation.algorithm, played.federation.task, torch.randn(5, 1, 8, 8)
    nets = algorithm.global_nets(played.server, task)
    assert list(nets) == ["capacity 1", "capacity 0.3", "capacity 0.1"]
    for (c, s, e), found in zip(LEVELS, nets.values(), strict=True):
        buffers = played.server.buffers[str(c)]
        full = played.server.anatomy.take(played.server.model, s, e)
        logits = found["model"].model({**full, **buffers}, x)
        got = algorithm.predict(found, x)["submodel"]
        assert logits.shape == (5, 4 * e)
        assert torch.equal(got, logits[:, -4:])


def test_each_capacity_is_tested_by_its_deepest_exit() -> None:
    """Catches another exit, the Scaler, and statistics of another width in tests."""
    check_tests(game(2))


@pytest.mark.parametrize("faulty", [MeanOfExits, ScaledTests])
def test_faults_of_released_tests_are_seen(faulty: type[ScaleFL]) -> None:
    """Catches a comparison that would pass whatever is tested."""
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        check_tests(game(2, algorithm=faulty))


def test_a_client_predicts_with_its_level() -> None:
    """Catches a client that predicts by an exit that it has not, or scaled."""
    played = game(1)
    algorithm, x = played.federation.algorithm, torch.randn(5, 1, 8, 8)
    for k, (_, _, e) in enumerate(LEVELS):
        local, msg = played.local(k), algorithm.message_for(played.server, played.federation.info(k))
        assert msg.kd_weight == 0.0
        parts = algorithm.predictor_parts(None, msg, local)
        nets = {name: Net(local.models.get(name), part) for name, part in parts.items()}
        whole = local.models["model"](parts["model"], x)
        assert whole.shape == (5, 4 * e)
        assert torch.equal(algorithm.predict(nets, x)["submodel"], whole[:, -4:])


def test_statistics_are_those_of_the_capacity() -> None:
    """Catches running statistics that are averaged over unlike widths, and by examples."""
    played = game(1, capacities=(1.0, 0.3))  # clients 0 and 2 have 1.0
    name = "net.bn1.running_mean"
    sent = [played.got[0][k].buffers[name] for k in range(3)]
    assert torch.equal(played.server.buffers["0.3"][name], sent[1])
    toy.close({"mean": played.server.buffers["1.0"][name]}, {"mean": (sent[0] + sent[2]) / 2}, 1e-6)
    assert not any("running" in n for n in played.server.model)
    before = game(0, capacities=(1.0, 0.3)).server.buffers
    assert before["0.3"].keys() < before["1.0"].keys()


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        (((1.0, 1.0, 4),), r"no row for capacity 0\.3; expected \[0\.3, width, exits\]"),
        (((1.0, 1.0, 5), (0.3, 1.0, 1), (0.1, 1.0, 1)), r"gives capacity 1 5 exits; expected at most 4"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(levels: Any, text: str) -> None:
    """Catches an index error at the first round."""
    fed = toy.federation(
        ScaleFL(exits=EXITS, levels=levels), models=(RESNET,), shape=(1, 8, 8), clients={"capacities": [1.0, 0.3, 0.1]}
    )
    with pytest.raises(ModelError, match=text):
        fed.algorithm.check(fed.task)


def test_a_head_of_ones_own_is_narrowed_and_travels() -> None:
    """Catches a head that keeps its hidden units, or that the clients' levels lack."""
    levels = ((1.0, 1.0, 3), (0.3, 0.5, 2), (0.1, 0.5, 1))
    played = game(0, head="mlp(hidden=(6,))", exits=("layer1", "layer2"), levels=levels)
    before = played.server.model["heads.0.fc1.weight"]
    assert not torch.equal(before, played.round().server.model["heads.0.fc1.weight"])
    sent = [played.got[0][k].model for k in range(3)]
    assert [part["heads.0.fc1.weight"].shape for part in sent] == [(6, 512), (3, 256), (3, 256)]
    assert [part["heads.0.fc2.weight"].shape for part in sent] == [(4, 6), (4, 3), (4, 3)]
    assert ["heads.1.fc1.weight" in part for part in sent] == [True, True, False]


@pytest.mark.parametrize("algorithm", [FedRolex(), HeteroFL(calibrate=False), ScaleFL()])
def test_statistics_are_of_the_outputs_that_tests_see(algorithm: Any) -> None:
    """Catches running statistics of outputs that the Scaler divided, beside which tests are of undivided ones."""
    train = {"lr": 1e-9, "epochs": None, "steps": 60, "batch_size": 64}
    clients = {"capacities": [0.25]}
    fed = toy.federation(
        algorithm, models=("resnet8(width=8)",), shape=(1, 8, 8), train=train, clients=clients, augment=False
    )
    played = toy.play(fed)
    local, net = played.local(0), "net." if isinstance(algorithm, ScaleFL) else ""
    call = algorithm.client_round(Nothing(), algorithm.message_for(played.server, local.info), local)
    w = played.driver.play({0: call})[0].trained["model"]
    x, _ = local.train.batch(torch.arange(len(local.train)))
    y = conv2d(x, w[f"{net}conv1.weight"], padding=1)  # (B, C, 8, 8)
    assert torch.allclose(w[f"{net}bn1.running_mean"], y.mean((0, 2, 3)), atol=0.01)
    assert torch.allclose(w[f"{net}bn1.running_var"], y.var((0, 2, 3)), rtol=0.02)
