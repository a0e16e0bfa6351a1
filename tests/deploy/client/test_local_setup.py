"""A client's networks: a slice without the whole; and what is refused when a client describes itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from deploy_toy import config, nodes
from requests_to_nodes import EXPERIMENT
from torch import Tensor, nn

from polyfed.deploy.client.local_setup import LocalSetup
from polyfed.deploy.client.node import answer
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import ReplyHeader, RequestHeader
from polyfed.rounds.federation import configured_task


class Frozen(nn.Module):
    """A network with constants, which no server sends."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 8).requires_grad_(False)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.first(x.flatten(1))).relu())


def setup(folder: Path, algorithm: str, *keys: str) -> LocalSetup:
    return LocalSetup.of(nodes(folder)[100], config(algorithm, *keys))


@pytest.mark.parametrize("algorithm", ["heterofl", "fiarse-neuron", "fjord", "scalefl"])
def test_a_client_that_holds_a_slice_never_builds_the_whole(algorithm: str, tmp_path: Path) -> None:
    """Catches a small device that runs out of memory for a network of which it trains a sixteenth."""
    keys = ("clients.capacities=[0.25,1.0,0.25]", 'clients.models=["mlp(hidden=(24,20))"]')
    small = setup(tmp_path, algorithm, *keys)
    task = configured_task(small.config, small.dataset.input_shape, small.dataset.num_classes)
    own, models = small.networks(task)
    assert own.empty
    assert all(not model.empty and model.whole is own for model in models.values())
    usual = small.algorithm.models_at(task, task.build(small.spec), 0.25)
    assert {name: model.shapes for name, model in models.items()} == {n: model.shapes for n, model in usual.items()}


@pytest.mark.parametrize(("algorithm", "capacity"), [("heterofl", 1.0), ("fiarse", 0.25), ("fedavg", 0.25)])
def test_a_client_that_trains_the_whole_builds_it(algorithm: str, capacity: float, tmp_path: Path) -> None:
    found = setup(tmp_path, algorithm, f"clients.capacities=[{capacity}]")
    own, models = found.networks(configured_task(found.config, found.dataset.input_shape, found.dataset.num_classes))
    assert not own.empty
    assert models["model"] is own


def test_a_network_that_cannot_be_empty_is_built_as_ever_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = setup(tmp_path, "heterofl", "clients.capacities=[0.25]", f'clients.models=["{__name__}:Frozen"]')
    task = configured_task(found.config, found.dataset.input_shape, found.dataset.num_classes)
    with caplog.at_level(logging.WARNING):
        own, models = found.networks(task)
    assert not own.empty
    assert models["model"].shapes["hidden.weight"] == (3, 8)
    assert "client 0 makes its slice from the whole network" in caplog.text
    assert "'first.bias', 'first.weight' belong to the architecture" in caplog.text


@pytest.mark.parametrize("key", ["train.parts.nothing.lr=0.1", "train.class_weights=[1.0,2.0]"])
def test_keys_of_train_that_do_not_fit_are_refused_before_the_run(key: str, tmp_path: Path) -> None:
    """Catches a refusal in round 1, when the other clients have trained."""
    asked = RequestHeader(kind="describe", experiment=EXPERIMENT, config=config("fedavg", key).to_dict())
    header, _ = answer(headers.dump(asked), None, nodes(tmp_path)[100])
    assert (headers.load(ReplyHeader, header).error or "").startswith("ConfigError")
