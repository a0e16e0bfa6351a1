"""A look into finished runs: what is measured there equals its plain definition, and belongs to the round it says."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from torch import Tensor

import polyfed
from polyfed.algorithms.fedin import FedIN
from polyfed.base.errors import CheckpointError, ConfigError
from polyfed.comparison.specs import RunSpec, Setting
from polyfed.config import Config
from polyfed.experiments.catalogue import find, items
from polyfed.experiments.inside import Inside, conflicts, embedded, linear_cka, mixing, needs_tsne, stage_outputs
from polyfed.experiments.inside_views import differences, whole
from polyfed.experiments.reproduce import reproduce
from polyfed.experiments.study import Study
from polyfed.experiments.views import Results
from polyfed.simulation.simulate import simulate

MODELS = ["in-resnet10-small(width=2)", "in-resnet14-small(width=2)"]


def config(algorithm: dict[str, Any], models: list[str]) -> Config:
    """Two rounds of four clients, who all take part; both rounds are kept."""
    return running.config(
        run={"rounds": 2, "eval_every": 2, "keep_rounds": [1, 2], "precision": "fp64"},
        clients={"participation": 1.0, "models": models},
        algorithm=algorithm,
    )


@pytest.fixture(scope="module")
def fedin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of FedIN with two depths."""
    folder = tmp_path_factory.mktemp("inside") / "run"
    simulate(config({"name": "fedin", "feature_batch": 4}, MODELS), out=folder, progress=False)
    return folder


def by_definition(x: Tensor, y: Tensor) -> float:
    """||Y^T H X||_F^2 / (||X^T H X||_F ||Y^T H Y||_F), with the centring matrix H written out."""
    n = len(x)
    h = torch.eye(n).double() - torch.ones(n, n).double() / n
    x, y = x.double().reshape(n, -1), y.double().reshape(n, -1)
    return float((y.T @ h @ x).square().sum() / ((x.T @ h @ x).norm() * (y.T @ h @ y).norm()))


def test_cka_is_its_definition_and_does_not_depend_on_rotation_or_scale() -> None:
    """Catches features that are not centred, another norm, and a result that units or axes of features change."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, 2, generator=draw) + 5, torch.randn(9, 4, generator=draw)
    y[:, 0] += x[:, 0, 0]
    found = linear_cka(x, y)
    assert found == pytest.approx(by_definition(x, y), rel=1e-9)
    assert 0 < found < 1
    turned = torch.linalg.qr(torch.randn(6, 6, generator=draw).double())[0]
    assert linear_cka(x.double().flatten(1) @ turned, y) == pytest.approx(found, rel=1e-6)
    assert linear_cka(3 * x - 7, 0.1 * y) == pytest.approx(found, rel=1e-6)
    assert linear_cka(x, x.flatten(1).double() @ turned) == pytest.approx(1.0)
    assert linear_cka(x, torch.ones(9, 2)) == 0.0


def test_stages_are_what_the_network_computes_on_the_way(fedin: Path) -> None:
    """Catches outputs in training mode, of other weights, or before a stage's last layer."""
    kept = polyfed.kept_round(fedin, 2)
    x = torch.randn(5, 1, 16, 16).double()
    for nets in kept.nets.values():
        net = nets["model"]
        found = stage_outputs(net, x)
        assert list(found) == ["layer1", "layer2", "layer3", "last"]
        assert net.model is not None
        module = net.model.new_module().double().eval()
        module.load_state_dict({**module.state_dict(), **net.params})
        with torch.no_grad():
            at = module.maxpool(module.relu(module.bn1(module.conv1(x))))
            for name in ("layer1", "layer2", "layer3"):
                at = module.get_submodule(name)(at)
                torch.testing.assert_close(found[name], at)
            torch.testing.assert_close(found["last"], module.layer4(at).mean((2, 3)))
            torch.testing.assert_close(net.classify(found["last"]), net(x))


def test_clients_begin_the_round_that_the_run_played(tmp_path: Path) -> None:
    """Catches clients that train from another round's weights, with other draws or on other rows."""
    simulate(config({"name": "fedavg"}, ["mlp(hidden=(6,))"]), out=tmp_path / "run", progress=False)
    inside = Inside(tmp_path / "run", 1)
    trained = inside.trained(range(4))
    sizes = {k: len(inside.federation.partition.train(k)) for k in trained}
    (after,) = polyfed.kept_round(tmp_path / "run", 2).nets.values()
    for name, value in after["model"].params.items():
        mean = sum(sizes[k] * net.params[name] for k, net in trained.items()) / sum(sizes.values())
        torch.testing.assert_close(mean, value)
    assert inside.some(2) == [0, 1]
    rows = inside.tests(3)
    assert rows.shape == (3, 1, 16, 16)
    held = sorted(row for k in range(4) for row in inside.federation.partition.test(k))
    labels = inside.federation.dataset.y[torch.tensor(held)].tolist()
    assert len(inside.tests(1000, label=2)) == labels.count(2)
    with pytest.raises(CheckpointError, match="does not keep the server's state of round 5"):
        Inside(tmp_path / "run", 5)


def test_conflicts_are_products_of_the_two_gradients(fedin: Path) -> None:
    """Catches a gradient of other examples or pairs, the other gradient's norm, biases, and a wrong stage."""
    inside = Inside(fedin, 2)
    algorithm = inside.kept.algorithm
    assert isinstance(algorithm, FedIN)
    assert inside.some(1) == [0, 1]
    for client, fit in inside.fits([0, 1, 2, 3]).items():
        with inside.placement.defaults():
            found = conflicts(fit, algorithm, inside.placement, most=1)
        model = fit.client.models["model"]
        pair = fit.frozen["pair"]
        others = [pairs for k, pairs in inside.kept.server.bank.items() if k != client]  # pyright: ignore[reportAttributeAccessIssue]
        assert any(torch.equal(pair["s_in"], other.s_in) for other in others)
        start = inside.kept.nets[str(inside.federation.info(client).architecture)]["model"].params
        leaves = {n: v.clone().requires_grad_(n in model.parameter_names) for n, v in start.items()}
        data = fit.client.train
        x, y = data.batch(torch.arange(min(len(data), 8)), dtype=torch.float64)
        model.train(True)
        own = torch.nn.functional.cross_entropy(model(leaves, x), y)
        foreign = (model.intermediate(leaves, pair["s_in"]) - pair["s_out"]).square().mean()
        model.train(False)
        expected: dict[str, list[float]] = {}
        for name in sorted(model.parameter_names & model.intermediate_names):
            if leaves[name].dim() > 1:
                g, r = (torch.autograd.grad(loss, leaves[name], retain_graph=True)[0] for loss in (foreign, own))
                stage = name.split(".")[0].replace("layer4", "last")
                expected.setdefault(stage, []).append(float((g * r).sum() / (r * r).sum()))
        assert found.keys() == expected.keys() == {"layer1", "layer2", "layer3", "last"}
        for stage, values in expected.items():
            assert sorted(found[stage]) == pytest.approx(sorted(values), rel=1e-6, abs=1e-12)


def test_a_run_without_pairs_has_no_conflicts(fedin: Path, tmp_path: Path) -> None:
    simulate(
        config({"name": "fedin", "feature_batch": 4}, MODELS).replace("run", rounds=1, eval_every=1, keep_rounds=[0]),
        out=tmp_path / "run",
        progress=False,
    )
    inside = Inside(tmp_path / "run", 0)
    algorithm = inside.kept.algorithm
    assert isinstance(algorithm, FedIN)
    (fit, *_) = inside.fits([0]).values()
    assert conflicts(fit, algorithm, inside.placement, most=1) == {}


def test_neighbours_of_other_clients() -> None:
    """Catches a point that is its own neighbour, and shares of the same client."""
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    assert mixing(points, torch.tensor([0, 0, 1, 1]), neighbours=1) == 0.0
    assert mixing(points, torch.tensor([0, 1, 0, 1]), neighbours=1) == 1.0
    assert mixing(points, torch.tensor([0, 0, 1, 1]), neighbours=3) == pytest.approx(2 / 3)


def test_planes_are_the_same_each_time_and_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.cat([torch.randn(8, 5), torch.randn(8, 5) + 30])
    plane = embedded(points)
    assert plane.shape == (16, 2)
    assert torch.equal(plane, embedded(points))
    assert mixing(plane, torch.arange(16) // 8, neighbours=3) == 0.0
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ConfigError, match=r"tsne needs scikit-learn; run: pip install 'polyfed\[tsne\]'"):
        needs_tsne()


def results(tmp_path: Path, values: dict[tuple[str, int], dict[str, float]], means: dict[str, float]) -> Results:
    """Made-up results: of each label and seed the accuracy of each network of the server; without one, the clients'."""
    settings = config({"name": "fedavg"}, ["mlp"])
    cells = [RunSpec(Setting("s"), label, seed, settings) for label, seed in values]
    found = Results(Study(title="t"), cells, tmp_path)
    found.__dict__["done"] = {
        cell: {
            "accuracy": {"mean": means.get(cell.label, 0.9), "global": values[cell.label, cell.seed]},
            "bytes": {"up": 300, "down": 500},
            "clients": {"participations": 4},
            "flops": 6000,
        }
        for cell in cells
    }
    return found


def test_accuracy_on_all_test_data_and_differences_with_intervals(tmp_path: Path) -> None:
    """Catches another mean, two means in one difference, costs of all clients together, and another quantile."""
    made = {
        ("a", 0): {"small": 0.5, "large": 0.7},
        ("a", 1): {"small": 0.6, "large": 0.8},
        ("b", 0): {"small": 0.4, "large": 0.5},
        ("b", 1): {"small": 0.5, "large": 0.7},
        ("c", 1): {},
    }
    found = results(tmp_path, made, {"c": 0.75})
    rows = {row[1:3]: row[3:] for row in whole(found).rows}
    assert set(rows) == {(label, name) for label in "ab" for name in ("mean", "small", "large")}
    assert rows["a", "small"] == (pytest.approx(0.55), pytest.approx(0.0707107, abs=1e-6), 2, 200.0, 750.0)
    assert rows["a", "mean"][0] == pytest.approx(0.65)
    b, c = differences(found).rows
    assert b[:4] == ("s", "b", "a", 2)
    half = 12.706204736 * 0.025  # t of one degree of freedom, times the standard error of -0.15 and -0.1
    assert b[4:] == (pytest.approx(-0.125), pytest.approx(-0.125 - half), pytest.approx(-0.125 + half))
    assert c == ("s", "c", "a", 1, pytest.approx(0.75 - 0.9), None, None)  # of clients, as c's server has no network


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the committed studies share their cells."""
    return tmp_path_factory.mktemp("fedin")


@pytest.mark.parametrize("item", [item for item in items() if item.startswith("fedin/")])
def test_every_study_of_fedin_runs(item: str, out: Path) -> None:
    """At smoke scale, of which two cells are enough here; all studies share them."""
    _, page = reproduce(find(item), "smoke", out, only=["fedin,layer-wise FedAvg,IN off", "seed 0"])
    text = (page / "page.md").read_text()
    study = Study.load(find(item), "smoke")
    note, labels = study.note.replace("InCo Aggregation", ""), {cell.label for cell in study.cells()}
    assert [label for label in study.entries if label in note and label not in labels] == []
    for name in study.show:
        rows = list(csv.DictReader((page / f"{name}.csv").read_text().splitlines()))
        assert rows, name
        assert (page / f"{name}.png").exists()
        assert f"[{name}.csv]({name}.csv)" in text
    assert "FedIN is a reconstruction" in text or "default of the reconstruction" in text
    assert len(list((out / "cells").iterdir())) <= 3
