"""What a deployed client predicts from when the run is over. docs/deploy/index.md lists the files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from polyfed.base.errors import CheckpointError, RunDirError
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message, State, decode
from polyfed.data.client import Standardise
from polyfed.data.conform import schema_of
from polyfed.data.schema import Schema
from polyfed.deploy.client.local_setup import LocalSetup, task_of
from polyfed.deploy.wire.headers import TaskFacts
from polyfed.models.catalogue import ModelSpec
from polyfed.storage import state_files


@dataclass(frozen=True)
class ClientPredictor:
    """What a client predicts from.

    Args:
        config: the configuration of the run.
        algorithm: its algorithm.
        task: what the server and all clients know.
        info: the server's knowledge of the client.
        model: the specification of the client's network, its own or the configuration's.
        round: the round after which state and message are those of the predictor.
        state: the private state.
        message: the last message of the server, `Algorithm.message_for` of its last state; None if there is none.
        schema: the names and order of classes, columns and categories, and the mean and deviation of pixels.
        stats: how features or series are standardised, by the client's training rows; None for images and tokens.
        kind: what a row of the data is: "image", "features", "series" or "tokens".
        channels_first: whether series are ``(C, T)``.
    """

    config: Config
    algorithm: Algorithm
    task: Task
    info: ClientInfo
    model: ModelSpec
    round: int
    state: State
    message: Message | None
    schema: Schema
    stats: Standardise | None
    kind: str
    channels_first: bool


def about_client(setup: LocalSetup, experiment: str) -> dict[str, Any]:
    """Return the content of client.json: which client of which run it is, and with which network and data."""
    settings = setup.settings
    return {
        "experiment": experiment,
        "client": settings.client,
        "algorithm": setup.config.algorithm.name,
        "model": str(setup.spec),
        "model_is_private": settings.model is not None,
        "capacity": setup.info.capacity,
        "data": settings.data or settings.path or setup.config.data.path or setup.config.data.dataset,
        "data_options": settings.data_options,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "polyfed": version("polyfed"),
    }


def about_data(setup: LocalSetup, facts: TaskFacts) -> dict[str, Any]:
    """Return the entries of predictor.json on the task, and on what was fitted to the client's training rows."""
    stats = setup.data.train(setup.place).stats
    return {
        "task": facts.model_dump(mode="json"),
        "kind": setup.dataset.kind,
        "channels_first": setup.dataset.channels_first,
        "schema": schema_of(setup.dataset).model_dump(mode="json"),
        "mean": None if stats is None else stats.mean.tolist(),
        "inverse": None if stats is None else stats.inverse.tolist(),
    }


def load_predictor(folder: Path) -> ClientPredictor:
    """Return what a client kept at the end of a run.

    Args:
        folder: the client's state directory if it holds the predictor of one run, or the folder
            ``STATE/EXPERIMENT/client-K`` of a run.

    Raises:
        RunDirError: there is no predictor, or there are several.
        CheckpointError: a file is damaged.
    """
    place = _place(folder)
    config = Config.load(place / "config.toml")
    algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
    try:
        client = json.loads((place / "client.json").read_bytes())
        kept = json.loads((place / "predictor.json").read_bytes())
        architecture = "" if client["model_is_private"] else client["model"]
        info = ClientInfo(client["client"], client["capacity"], architecture)
        fitted = [torch.tensor(kept[name], dtype=torch.float64) for name in ("mean", "inverse") if kept[name]]
        stats = Standardise(*fitted) if fitted else None
        task, schema = task_of(config, TaskFacts.model_validate(kept["task"])), Schema.model_validate(kept["schema"])
        name, sha256 = kept["state"]
        message = None
        if "message" in kept:
            data = (place / kept["message"][0]).read_bytes()
            state_files.check(data, kept["message"][1], str(place / kept["message"][0]))
            message = decode(data, *algorithm.messages)
        return ClientPredictor(
            config,
            algorithm,
            task,
            info,
            ModelSpec.parse(client["model"]),
            kept["round"],
            state_files.load(place / name, sha256, *algorithm.states),
            message,
            schema,
            stats,
            kept["kind"],
            kept["channels_first"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{place}: the predictor cannot be read ({type(error).__name__}: {error}); start the client, and run "
            "`polyfed deploy resume` at the server, which sends it again"
        ) from error


def _place(folder: Path) -> Path:
    """Return the folder of the only predictor in a state directory."""
    found = [path.parent for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{depth}predictor.json"))]
    if not found:
        raise RunDirError(
            f"{folder} holds no predictor: a client keeps it when its run is over; if the run is over, the client was "
            "not connected then: start it, and run `polyfed deploy resume` at the server"
        )
    if len(found) > 1:
        raise RunDirError(
            f"{folder} holds the predictors of {len(found)} runs; give one of {', '.join(map(str, found))}"
        )
    return found[0]
