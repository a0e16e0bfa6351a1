"""``trained_model``: a predictor of a run directory as a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import polyfed
from polyfed.base.errors import CheckpointError, ConfigError, ModelError, RunDirError
from polyfed.base.text import hint
from polyfed.base.types import ClientId, Parts
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, NeedsDataError
from polyfed.core.message import Message, size
from polyfed.core.net import Net
from polyfed.execute.placement import Placement
from polyfed.models.catalogue import ModelSpec
from polyfed.models.split import SplitModel
from polyfed.rounds.federation import columns_read, configured_info, configured_task, input_networks
from polyfed.rounds.identity import Content
from polyfed.storage.run_dir import SavedRun
from polyfed.trained.assemble import AssembledParts, without_data
from polyfed.trained.inputs import prepared
from polyfed.trained.model import TrainedModel
from polyfed.trained.preprocessing import Preprocessing, statistics
from polyfed.trained.single import NAME as OWN
from polyfed.trained.single import SingleClient


def trained_model(
    run_dir: Path | str,
    client: ClientId | str | None = None,
    *,
    predictor: str | None = None,
    capacity: float | None = None,
) -> TrainedModel:
    """Return a trained predictor with its preprocessing; needs no data.

    It is that of the round that the run keeps (``run.keep``): the last checkpoint, or the best round.

    Args:
        run_dir: a run directory that no run is writing to, or the folder that a deployed client kept.
        client: the client's number or name; None takes the server's own model, or the client of the folder.
        predictor: a name of ``TrainedModel.predictors``, or for the server a name of its models; None takes the first,
            which of the server's is the largest.
        capacity: the size of the submodel, in (0, 1], where clients have submodels of a server's model, such as those
            of FIARSE and DepthFL; None takes the client's own capacity, and the server's first model.

    Returns:
        A module on the CPU, in evaluation mode. Its forward takes a batch as ``inputs`` describes it and returns
        probabilities (B, L) float64, or predictions (B, 1) of a regression in the unit of its targets. It computes in
        float32, or in float64 where the run did, whatever the device and bfloat16 of the run.

    Raises:
        RunDirError: the folder holds no run, or a run is in progress.
        CheckpointError: there is no checkpoint, it is damaged, or your own network's code or frozen weights changed.
        ModelError: your own network cannot be imported, or the server has no model of its own.
        ConfigError: no such client or predictor, or a capacity that does not fit.
    """
    folder = run_folder(run_dir)
    config = Config.load(folder / "config.toml")
    about = Preprocessing.read(folder)
    if (folder / OWN).exists():
        with Placement.of("cpu", config.run.precision).defaults():
            return _of_folder(folder, config, about, client, predictor, capacity)
    with Placement.of("cpu", config.run.precision).defaults():
        return _Loader(folder, config, about).model(client, predictor, capacity)


def run_folder(path: Path | str) -> Path:
    """Return the run directory that ``path`` is, or the deployed client's folder of a run that it is or holds.

    Raises:
        RunDirError: there is none, or a state directory holds the models of several runs.
    """
    folder = Path(path)
    begun = (folder / "client.json").exists() and not (folder / OWN).exists()  # a client's run that is not over
    if (folder / "config.toml").exists() and not begun:
        return folder
    found = [place.parent for depth in ("*", "*/*") for place in sorted(folder.glob(f"{depth}/{OWN}"))]
    if len(found) > 1:
        raise RunDirError(f"{folder} holds the models of {len(found)} runs; give one of {', '.join(map(str, found))}")
    if not found:
        raise RunDirError(
            f"{folder} holds no run: it has no config.toml; give the run directory of a run"
            if not begun
            else f"{folder} has no model yet: a client keeps it when its run is over; if the run is over, the client "
            "was not connected then: start it, and run `polyfed deploy resume` at the server"
        )
    return found[0]


def client_number(text: str, clients: int, names: Sequence[str]) -> ClientId:
    """Return the client of a name or a number in digits.

    Raises:
        ConfigError: there is no such client.
    """
    if text in names:
        return list(names).index(text)
    if text.isdecimal() and int(text) < clients:
        return int(text)
    more = f", or one of the names {', '.join(names)}" if names else ""
    raise ConfigError(f"client: got {text!r}; expected a number from 0 to {clients - 1}{more}")


def _of_folder(
    folder: Path,
    config: Config,
    about: Preprocessing,
    client: ClientId | str | None,
    predictor: str | None,
    capacity: float | None,
) -> TrainedModel:
    """Return the model in the folder of a deployed client."""
    own = SingleClient.read(folder)
    names = config.clients.names or ()
    known = {None, own.client, str(own.client), *names[own.client : own.client + 1]}
    if client not in known or capacity is not None:
        what = f"client: got {client!r}" if client not in known else f"capacity: got {capacity}"
        raise ConfigError(f"{what}; {folder} holds the model of client {own.client} alone; leave the option out")
    algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
    task = own.task(config, about)
    models = algorithm.models_at(task, task.build(own.model), own.capacity)
    whose: dict[str, Any] = {"client": own.client, "round": own.round}
    specs = input_networks(algorithm, (ModelSpec.parse(own.model),))
    return _made(folder, config, about, algorithm, models, own.parts(folder), 0, predictor, whose, specs)


def _made(
    folder: Path,
    config: Config,
    about: Preprocessing,
    algorithm: Algorithm,
    models: Mapping[str, SplitModel],
    parts: Parts,
    place: int | None,
    predictor: str | None,
    whose: Mapping[str, Any],
    specs: Sequence[ModelSpec],
) -> TrainedModel:
    """Return the model of these parts; ``place`` is that of the client's statistics, None of all clients' together."""
    columns = about.feature_columns
    reads = dict.fromkeys(name for spec in specs for name in columns_read(spec, columns))
    return TrainedModel(
        algorithm,
        models,
        parts,
        prepared(
            about,
            statistics(folder, place) if about.kind in ("features", "series") else None,
            torch.float64 if config.run.precision == "fp64" else torch.float32,
        ),
        predictor=predictor,
        classes=about.classes,
        target=(about.target_offset, about.target_scale),
        about={"polyfed": polyfed.__version__, "algorithm": config.algorithm.name, **whose}
        | ({"tokenizer": about.tokenizer} if about.tokenizer else {}),
        reads=tuple(reads),
    )


def check_saved(folder: Path, config: Config, task: Task, saved: SavedRun) -> None:
    """Refuse weights that belong to another configuration, or to frozen weights that changed.

    Args:
        folder: the run directory.
        config: its configuration.
        task: the common knowledge of server and clients.
        saved: its checkpoint.

    Raises:
        ModelError: a network cannot be built.
        CheckpointError: the configuration, code or frozen weights changed.
    """
    settings, _, *frozen = saved.identity.split("-")
    try:
        family = task.family()
    except ModelError as error:
        if any(spec.own for spec in task.architectures):
            raise ModelError(
                f"{error}. {folder} holds weights, not the code of your own network: put its module where "
                "Python finds it; an export as pt2 or onnx, made where the code is, needs none"
            ) from error
        raise
    digests = [d[:16] for model in family.values() if (d := model.constants_digest)]
    before = Content.read(folder)
    now = Content.of(config, before.data)
    if changed := replace(before, source=now.source).changes(before):
        raise CheckpointError(
            f"your own code changed since {folder} was written: {'; '.join(changed)}; restore it, as other "
            "code may compute other numbers with the same weights"
        )
    if settings != config.hash()[:16]:
        raise CheckpointError(
            f"{folder / 'config.toml'} is not the configuration of the checkpoint beside it; restore it"
        )
    if frozen != digests:
        raise CheckpointError(
            f"the frozen weights of a network changed since {folder} was written; restore the files that "
            "your network reads them from"
        )


class _Loader:
    """The content of a run directory."""

    def __init__(self, folder: Path, config: Config, about: Preprocessing) -> None:
        self.folder, self.config, self.about = folder, config, about
        self.algorithm: Algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        self.task: Task = configured_task(
            config, about.input_shape, about.num_classes, about.input_dtype, about.feature_columns
        )

    def model(self, client: ClientId | str | None, predictor: str | None, capacity: float | None) -> TrainedModel:
        if capacity is not None and not 0 < capacity <= 1:
            raise ConfigError(f"capacity: got {capacity}; expected a number above 0 and at most 1")
        number = None if client is None else self._number(client)
        whose: dict[str, Any] = {} if number is None else {"client": number}
        if number is not None and self.about.clients:
            whose["name"] = self.about.clients[number]
        if number is not None and len(self.task.capacities) > 1:
            whose["capacity"] = self.config.clients.capacity(number)
        with closing(SavedRun(self.folder, self.algorithm.states, "kept")) as saved:
            check_saved(self.folder, self.config, self.task, saved)
            if number is None and capacity is None:
                parts, models, whose["server_model"] = self._global(saved, predictor)
                predictor = None
            else:
                parts, models = self._of_client(saved, number, capacity)
        if capacity is not None:
            whose["capacity"] = capacity
        whose["round"] = saved.round
        own = self.task.architectures if number is None else (self.config.clients.model(number),)
        specs = input_networks(self.algorithm, own, server="server_model" in whose)
        return _made(
            self.folder, self.config, self.about, self.algorithm, models, parts, number, predictor, whose, specs
        )

    def _number(self, client: ClientId | str) -> ClientId:
        names = self.about.clients if isinstance(client, str) else ()  # a number is no name, though a name may be "2"
        return client_number(str(client), self.config.clients.count, names)

    def _global(self, saved: SavedRun, name: str | None) -> tuple[Parts, Mapping[str, SplitModel], str]:
        named = self.algorithm.global_nets(saved.server, self.task)
        if not named:
            raise ModelError(
                f"the server of {self.algorithm.name} has no model of its own; name a client, such as --client 0"
            )
        if name is not None and name not in named:
            raise ConfigError(f"predictor: got {name!r}{hint(name, named)} the server has {', '.join(named)}")
        chosen = name or max(named, key=lambda one: _size(named[one]))  # of equal sizes the first
        nets = named[chosen]
        models = {part: net.model for part, net in nets.items() if net.model is not None}
        return {part: net.params for part, net in nets.items()}, models, chosen

    def _of_client(
        self, saved: SavedRun, client: ClientId | None, capacity: float | None
    ) -> tuple[Parts, Mapping[str, SplitModel]]:
        info = configured_info(self.config, client or 0)
        message = self.algorithm.message_for(saved.server, info)
        if capacity is not None:
            info, message = self._resized(saved, info, capacity)
            if client is not None and type(self.algorithm).init_client is not Algorithm.init_client:
                raise ConfigError(
                    f"capacity: got {capacity} and client {client}, but what a client of {self.algorithm.name} keeps "
                    "for itself is of its own capacity; leave one of the two out"
                )
        whole = self.task.build(self.config.clients.model(info.id))
        models = self.algorithm.models_at(self.task, whole, info.capacity)
        private = None if client is None else saved.private(info.id)
        try:
            parts = without_data(self.algorithm, self.task, self.config, info, private, message, saved.round)
        except NeedsDataError as error:
            kept = AssembledParts(self.folder).get(info.id, saved.round, private, message)
            if kept is None:
                raise CheckpointError(
                    f"{self.algorithm.name} needs a client's data to predict ({error}), and {self.folder} has not kept "
                    f"what it made of them at its end: resume the run with `polyfed resume {self.folder}`"
                ) from error
            parts = kept
        return parts, models

    def _resized(self, saved: SavedRun, info: ClientInfo, capacity: float) -> tuple[ClientInfo, Message | None]:
        """Return the client with another capacity, and its message."""
        resized = replace(info, capacity=capacity)
        found = self.algorithm.message_for(saved.server, resized)
        alike = found is None
        if found is not None and type(self.algorithm).models_at is Algorithm.models_at:  # all have the same networks
            whole = self.algorithm.message_for(saved.server, replace(info, capacity=1.0))
            alike = whole is None or (capacity < 1 and size(found) == size(whole))
        if alike:
            raise ConfigError(
                f"capacity: got {capacity}, but {self.algorithm.name} has no submodels of one model; leave it out"
            )
        return resized, found


def _size(nets: Mapping[str, Net]) -> int:
    """The number of all numbers of some networks."""
    return sum(value.numel() for net in nets.values() for value in net.params.values())
