"""The gradient of the whole local model, and the validation rows: what is measured for a study and for tuning."""

from pathlib import Path

import pytest
import running
import torch

from polyfed.base.errors import ConfigError
from polyfed.config import Config
from polyfed.core.net import Net
from polyfed.deploy.server.loop import create
from polyfed.deploy.settings import Deployment
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import deal, prepare
from polyfed.rounds.gradient import gradient_squared
from polyfed.simulation.simulate import simulate
from polyfed.storage.state_store import Store


def test_it_is_the_squared_norm_over_all_parts_on_all_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part left out, a sum over batches that is no mean, and the shared model of another round."""
    config = running.config(run={"gradient_clients": 4, "precision": "fp64"}, data={"augment": True})
    federation = prepare(config)
    placement = Placement.of("cpu", "fp64")
    with placement.defaults():
        algorithm = federation.algorithm
        clients = LocalClients(
            federation, make_driver("sequential", placement), Store(Path("-"), algorithm.states, resident=True)
        )
        server = algorithm.init_server(federation.task, federation.rng.at("server"))
        expected = []
        for k in range(4):
            local = federation.local(k, 1)
            parts = algorithm.predictor_parts(clients.private(k), algorithm.message_for(server, local.info), local)
            leaves = {p: {n: t.clone().requires_grad_() for n, t in params.items()} for p, params in parts.items()}
            nets = {part: Net(local.models[part], params) for part, params in leaves.items()}
            loss = algorithm.loss(nets, local.train.batch(torch.arange(len(local.train)), dtype=torch.float64))
            grads = torch.autograd.grad(loss, [t for params in leaves.values() for t in params.values()])
            expected.append(float(sum(g.square().sum() for g in grads)))
        whole = gradient_squared(server, clients, 0)
        monkeypatch.setattr("polyfed.rounds.gradient.EVAL_BATCH", 5)
        pieces = gradient_squared(server, clients, 0)
    assert whole == pytest.approx(sum(expected) / 4, rel=1e-9)
    assert pieces == pytest.approx(whole, rel=1e-9)


def test_measuring_changes_nothing_and_is_in_every_evaluated_round(tmp_path: Path) -> None:
    simulate(running.config(), out=tmp_path / "without")
    simulate(running.config(run={"gradient_clients": 2}), out=tmp_path / "with")
    plain, measured = (running.lines(tmp_path / name / "rounds.jsonl") for name in ("without", "with"))
    found = [row.pop("gradient_squared", None) for row in measured]
    assert [value is not None for value in found] == ["accuracy" in row for row in measured]
    assert all(value > 0 for value in found if value is not None)
    assert running.essence(plain) == running.essence(measured)


def test_validation_rows_are_training_rows_and_no_test_row_is_left() -> None:
    """Catches tuning on test data, rows that are trained on and validated on, and clients without validation rows."""
    _, usual = deal(running.config())
    dataset, validating = deal(running.config(data={"validation_fraction": 0.25}))
    y = dataset.y.numpy()
    for k in range(4):
        train, held = set(validating.train(k)), set(validating.test(k))
        assert held
        assert not train & held
        assert train | held == set(usual.train(k))
        assert set(y[list(held)]) <= set(y[list(train)])
        assert abs(len(held) - 0.25 * len(usual.train(k))) < 1
    assert validating.hash != usual.hash
    assert deal(running.config(data={"validation_fraction": 0.25}))[1].hash == validating.hash


@pytest.mark.parametrize("keys", [{"run": {"gradient_clients": 1}}])
def test_a_deployment_refuses_what_only_a_simulation_has(keys: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="simulated runs"):
        create(tmp_path / "r", Config.parse(keys), Deployment())
