"""A client's networks: a slice without the whole; and what is refused when a client describes itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from deploy_toy import config, nodes
from requests_to_nodes import EXPERIMENT
from torch import Tensor, nn

from polyfed.core.algorithm import Task
from polyfed.deploy.client import local_setup
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
        found.networks(task)
    assert not own.empty
    assert models["model"].shapes["hidden.weight"] == (3, 8)
    assert caplog.text.count("client 0 makes its slice from the whole network") == 1
    assert "'first.bias', 'first.weight' belong to the architecture" in caplog.text


def test_a_part_that_leaves_nothing_out_is_tried_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a small client that builds the whole network and never says so, or tries anew at each message."""
    monkeypatch.setattr(local_setup, "_WHOLE", set[Any]())
    found = setup(tmp_path, "heterofl", "clients.capacities=[0.9]", 'clients.models=["mlp(hidden=(2,))"]')
    task = configured_task(found.config, found.dataset.input_shape, found.dataset.num_classes)
    built, build = list[bool](), Task.build

    def counted(task: Task, spec: Any, *, empty: bool = False) -> Any:
        built.append(empty)
        return build(task, spec, empty=empty)

    monkeypatch.setattr(Task, "build", counted)
    with caplog.at_level(logging.WARNING):
        assert [found.networks(task)[0].empty for _ in range(3)] == [False] * 3
    assert built == [True, False, False, False]
    assert caplog.text.count("client 0 makes its slice from the whole network: model leaves nothing out") == 1


@pytest.mark.parametrize("key", ["train.parts.nothing.lr=0.1", "train.class_weights=[1.0,2.0]"])
def test_keys_of_train_that_do_not_fit_are_refused_before_the_run(key: str, tmp_path: Path) -> None:
    """Catches a refusal in round 1, when the other clients have trained."""
    asked = RequestHeader(kind="describe", experiment=EXPERIMENT, config=config("fedavg", key).to_dict())
    header, _ = answer(headers.dump(asked), None, nodes(tmp_path)[100])
    assert (headers.load(ReplyHeader, header).error or "").startswith("ConfigError")
