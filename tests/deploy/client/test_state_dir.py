"""A client's private state: the owner's alone, and never half of it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from deploy_toy import nodes
from requests_to_nodes import EXPERIMENT, train

from polyfed.base.errors import MessageError, StorageError
from polyfed.core.message import State
from polyfed.deploy.client.node import answer
from polyfed.deploy.client.state_dir import ClientStateDir


def test_private_state_is_the_owners_alone(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    root = Path(settings.state_dir)
    for folder in (root, root / EXPERIMENT, root / EXPERIMENT / "client-0"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = [path for path in folder.iterdir() if path.name.startswith(("state-", "reply-", "pointer"))]
    assert len(kept) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", "A", "."])
def test_the_name_of_an_experiment_is_no_path(name: str, tmp_path: Path) -> None:
    header = json.dumps({"polyfed": 2, "kind": "describe", "experiment": name, "key": [0, 0, 0], "config": {}})
    with pytest.raises(MessageError, match="experiment"):
        answer(header, None, nodes(tmp_path)[100])


def test_another_holder_of_the_state_is_waited_for_and_then_told(tmp_path: Path) -> None:
    state_dir = ClientStateDir(tmp_path, EXPERIMENT, 0, (State,))
    other = ClientStateDir(tmp_path, EXPERIMENT, 0, (State,))
    with state_dir.held(), pytest.raises(StorageError, match="held by another process"), other.held(0.2):
        raise AssertionError("both hold it")
