"""Requests to a client of the toy deployment, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from deploy_toy import config
from safetensors.torch import load_file

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.base.rng import Rng
from polyfed.config import load_algorithm
from polyfed.core.message import encode
from polyfed.deploy.client.node import answer
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import ReplyHeader, RequestHeader, TaskFacts

EXPERIMENT = "test-1"


def facts(settings: NodeSettings) -> TaskFacts:
    header, _ = answer(
        headers.dump(RequestHeader(kind="describe", experiment=EXPERIMENT, config=config().to_dict())), None, settings
    )
    about = headers.load(ReplyHeader, header).about
    assert about is not None
    return TaskFacts(input_shape=about.input_shape, num_classes=about.num_classes, agreed=about.agreement)


def train(settings: NodeSettings, round_: int, **more: Any) -> tuple[str, bytes]:
    """A request to train, and its body."""
    from polyfed.deploy.client.local_setup import task_of

    told = config()
    task = facts(settings)
    algorithm = load_algorithm(told.algorithm.name, told.algorithm.keys)
    server = algorithm.init_server(task_of(told, task), Rng((0, "server")))
    body = encode(FedMRL.Broadcast(server.G))
    fields = {"kind": "train", "experiment": EXPERIMENT, "key": (round_, 1, 1), "client": settings.client}
    request = RequestHeader(**fields, config=told.to_dict(), task=task, **more)
    return headers.dump(request), body


def kept(settings: NodeSettings) -> dict[tuple[int, ...], dict[str, torch.Tensor]]:
    folder = Path(settings.state_dir) / EXPERIMENT / f"client-{settings.client}"
    if not (folder / "pointer.json").exists():
        return {}
    entries = json.loads((folder / "pointer.json").read_text())["entries"]
    return {tuple(entry["key"]): load_file(folder / entry["state"][0]) for entry in entries}
