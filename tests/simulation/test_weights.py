"""Clients whose networks start with weights of their own, in a run and in a deployment's client."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polyfed.base.errors import CheckpointError, ConfigError, ModelError
from polyfed.base.rng import Rng
from polyfed.config import Config
from polyfed.deploy.client.local_setup import LocalSetup
from polyfed.deploy.settings import NodeSettings
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.rounds.federation import prepare
from polyfed.simulation.simulate import resume, simulate

NET = "mlp(hidden=(12, 6))"


def config(algorithm: Any, *models: Any) -> Config:
    return Config.parse(
        {
            "run": {"rounds": 2, "eval_every": 2, "checkpoint_every": 1, "threads": 1, "driver": "sequential"},
            "data": {"dataset": "digits", "image_size": 8},
            "partition": {"kind": "iid", "samples_per_client": 20},
            "clients": {"count": 3, "models": list(models)},
            "train": {"batch_size": 10},
            "algorithm": algorithm,
        }
    )


def saved(path: Path, seed: int = 5) -> dict[str, torch.Tensor]:
    weights = prepare(config({"name": "standalone"}, NET)).own(0).init(Rng((seed,)))
    save_file(weights, path)
    return weights


def test_only_the_clients_own_network_starts_there(tmp_path: Path) -> None:
    """Catches weights that reach another client or the shared part, and a client that counts as another kind."""
    path = tmp_path / "w.safetensors"
    weights = saved(path)
    fedmrl = {"name": "fedmrl", "rep_dim": 6, "auxiliary": NET}
    with_file, without = (
        prepare(config(fedmrl, NET, f"{NET.removesuffix(')')}, weights={str(path)!r})")),
        prepare(config(fedmrl, NET)),
    )
    ours, plain = (fed.private(1, None) for fed in (with_file, without))
    assert all(torch.equal(ours.F[name], weights[name]) for name in weights)
    assert all(torch.equal(ours.G[name], plain.G[name]) for name in plain.G)
    first = with_file.private(0, None)
    assert all(torch.equal(first.F[name], value) for name, value in without.private(0, None).F.items())
    assert with_file.kind(0) == with_file.kind(1)
    assert len(with_file.task.architectures) == 1


def test_a_shared_head_comes_from_the_server(tmp_path: Path) -> None:
    """Catches a client whose head starts elsewhere than the documentation says."""
    weights = saved(tmp_path / "w.safetensors")
    fed = prepare(
        config({"name": "lg-fedavg"}, {"name": "mlp", "hidden": [12, 6], "weights": str(tmp_path / "w.safetensors")})
    )
    body = fed.private(0, None).body
    assert body.keys() == fed.own(0).body(weights).keys()
    assert all(torch.equal(value, weights[name]) for name, value in body.items())


@pytest.mark.parametrize("name", ["fedavg", "fiarse", "fedin", "depthfl", "scaffold", "moon"])
def test_an_algorithm_without_private_networks_refuses(name: str, tmp_path: Path) -> None:
    """Catches weights that no round would use."""
    saved(tmp_path / "w.safetensors")
    spec = {"name": "in-resnet10-small", "weights": str(tmp_path / "w.safetensors")}
    if name != "fedin":
        spec = {"name": "mlp", "hidden": [12, 6], "weights": str(tmp_path / "w.safetensors")}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=rf"weights: {name} gives every client the server's network"):
        prepare(config({"name": name}, spec))


def test_all_files_that_do_not_fit_are_told_before_the_run(tmp_path: Path) -> None:
    """Catches a run that ends when it comes to the second file."""
    saved(tmp_path / "w.safetensors")
    files = ["gone.safetensors", "w.safetensors"]
    specs = [{"name": "mlp", "hidden": [12, 7], "weights": str(tmp_path / name)} for name in files]
    with pytest.raises(ModelError) as caught:
        prepare(config({"name": "standalone"}, *specs))
    assert "gone.safetensors cannot be read" in str(caught.value)
    assert "fc3.weight: shape (10, 6), expected (10, 7)" in str(caught.value)


class Stop(Quiet):
    """Presses Ctrl-C after round 1."""

    def round_ended(self, row: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_does_not_go_on_with_another_file(tmp_path: Path) -> None:
    """Catches a resumption that starts a client, which has not trained yet, with other weights."""
    path = tmp_path / "w.safetensors"
    saved(path)
    settings = config({"name": "standalone"}, {"name": "mlp", "hidden": [12, 6], "weights": str(path)})
    with pytest.raises(Interrupted):
        simulate(settings, out=tmp_path / "run", callbacks=[Stop()])
    saved(path, seed=6)
    with pytest.raises(CheckpointError, match=r"data file .*w\.safetensors changed"):
        resume(tmp_path / "run")
    saved(path)
    resume(tmp_path / "run")


def test_a_node_starts_with_weights_of_its_own(tmp_path: Path) -> None:
    """Catches a node's file that is looked for elsewhere, and a network that is private and takes the server's file."""
    weights = saved(tmp_path / "w.safetensors")
    (tmp_path / "node.toml").write_text('[node]\nclient = 1\nstate_dir = "s"\nweights = "w.safetensors"\n')
    settings = NodeSettings.load(tmp_path / "node.toml")
    assert settings.weights == str(tmp_path / "w.safetensors")
    federation = prepare(config({"name": "standalone"}, NET))
    setup = LocalSetup.of(settings, federation.config)
    setup.check(federation.own(1))
    private = setup.algorithm.init_client(setup.local(federation.task, 0))
    assert all(torch.equal(private.model[name], weights[name]) for name in weights)  # type: ignore[attr-defined]
    assert setup.local(federation.task, 2).plan == federation.local(1, 2).plan
    with_file = config({"name": "standalone"}, {"name": "mlp", "hidden": [12, 6], "weights": "/gone.safetensors"})
    private_network = settings.model_copy(update={"weights": None, "model": "mlp"})
    assert LocalSetup.of(private_network, with_file).weights is None
    assert LocalSetup.of(settings.model_copy(update={"weights": None}), with_file).weights == "/gone.safetensors"
    with pytest.raises(ConfigError, match="fedavg gives every client the server's network"):
        LocalSetup.of(settings, config({"name": "fedavg"}, NET)).check(federation.own(1))
