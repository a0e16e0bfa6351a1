"""A client's data and networks, made from its own settings and the server's description of the task."""

from __future__ import annotations

import json
import logging
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from polyfed.base.errors import ConfigError, DataError, ModelError
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.data.client import FederatedData
from polyfed.data.conform import schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.partition.partition import Partition
from polyfed.data.schema import Schema
from polyfed.data.sources import file_digests
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire.headers import Agreement, TaskFacts
from polyfed.models.catalogue import ModelSpec
from polyfed.models.split import SplitModel
from polyfed.models.weights import load_weights
from polyfed.rounds.federation import (
    check_axes,
    check_labelled,
    check_training,
    client_at_work,
    configured_info,
    deal,
    deal_own,
    label_faults,
    refuse_weights,
    unread_columns,
)
from polyfed.rounds.own_file import kind_of_file, options_of_file, read_own
from polyfed.trained.preprocessing import Preprocessing

log = logging.getLogger(__name__)

#: What a client builds whole although its algorithm slices: tried once, and in the log once.
_WHOLE: set[tuple[Any, ...]] = set()


def task_of(config: Config, facts: TaskFacts) -> Task:
    """Return the task that the server's facts describe; columns are known where their names are not private."""
    known = (Schema() if facts.agreed is None else facts.agreed.meaning).over(config.data.agreed)
    return Task(
        input_shape=facts.input_shape,
        num_classes=facts.num_classes,
        num_clients=config.clients.count,
        rounds=config.run.rounds,
        architectures=tuple(ModelSpec.parse(name) for name in facts.architectures),
        capacities=facts.capacities,
        kind=config.data.task,
        dtype=torch.int64 if facts.tokens else None,
        counts=config.clients.counts if facts.architectures else (),
        columns=known.feature_columns,
    )


class ApartError(DataError):
    """The data of a client mean something else than the others agreed on.

    Args:
        parts: the names of the parts that differ.
        text: what differs.
    """

    def __init__(self, parts: tuple[str, ...], text: str) -> None:
        super().__init__(text)
        self.parts = parts


@lru_cache(maxsize=1)  # a worker answers many messages of one run
def _shared(config: str) -> tuple[Dataset, Partition]:
    """Return the configured data set and its partition; ``config`` is the configuration as text."""
    return deal(Config.parse(tomllib.loads(config)))


@lru_cache(maxsize=1)
def _own(path: Path, digest: str, options: str, client: int, text: str) -> tuple[Dataset, Partition]:
    """Return a client's own file and its rows for training and testing; ``digest`` changes with the content."""
    config = Config.parse(tomllib.loads(text))
    dataset = read_own(config, path, json.loads(options))
    return dataset, deal_own(config, dataset, client)


@dataclass(frozen=True)
class LocalSetup:
    """A client's own data and networks.

    Args:
        settings: the client's settings.
        config: the server's configuration.
        dataset: the data set that contains the client's rows: its own file, or the configured data set.
        partition: which rows belong to the client.
        place: the number of the client in the partition.
        algorithm: the algorithm of the run.
    """

    settings: NodeSettings
    config: Config
    dataset: Dataset
    partition: Partition
    place: int
    algorithm: Algorithm

    @classmethod
    def of(cls, settings: NodeSettings, config: Config) -> LocalSetup:
        """Load the data of this client.

        Raises:
            PolyfedError: the data cannot be read, or the configuration has no client of this number.
        """
        if settings.client >= config.clients.count:
            raise ConfigError(
                f"node.toml: client: got {settings.client}; expected 0 to {config.clients.count - 1}, "
                f"as clients.count is {config.clients.count}"
            )
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        if settings.data is None:
            at_home = config if settings.path is None else config.replace("data", path=settings.path)
            return cls(settings, config, *_shared(at_home.to_toml()), settings.client, algorithm)
        path = Path(settings.data).expanduser()
        kind = kind_of_file(path)
        options = options_of_file(config, kind, settings.data_options)
        digest = "".join(file_digests(kind, path=path, options=options).values())
        own = _own(path, digest, json.dumps(options), settings.client, config.to_toml())
        return cls(settings, config, *own, 0, algorithm)

    @classmethod
    def agreeing(cls, settings: NodeSettings, config: Config, agreed: Agreement | None, salt: str) -> LocalSetup:
        """Load the data of this client, with the agreed numbers of classes and positions of columns.

        Args:
            settings: the client's settings.
            config: the server's configuration.
            agreed: what the clients that joined agreed on; None while there is nothing.
            salt: the name of the run, for the hashes of names.

        Raises:
            ApartError: the data mean something else than the others agreed on.
            PolyfedError: as for `of`.
        """
        if agreed is None:
            return cls.of(settings, config)
        try:
            found = cls.of(settings, config.replace("data", agreed=agreed.meaning.over(config.data.agreed)))
        except DataError as error:
            try:
                parts = cls.of(settings, config).agreement(salt).apart(agreed)
            except DataError:
                raise error from None
            text = f"client {settings.client} does not fit what the others agreed on: {error}"
            raise (ApartError(parts, text) if parts else error) from error
        if parts := found.agreement(salt).apart(agreed):
            raise ApartError(
                parts,
                f"client {settings.client}: its {', '.join(parts)} differ from those that the others agreed on, whose "
                "names are private; compare the tables, and give the names of all sites in [data.agreed]",
            )
        return found

    @classmethod
    def fitting(cls, settings: NodeSettings, config: Config, facts: TaskFacts, salt: str) -> LocalSetup:
        """Load the data of this client for the common task.

        Raises:
            DataError: the data have another shape than the task, or mean something else.
        """
        found = cls.agreeing(settings, config, facts.agreed, salt)
        have = found.dataset.input_shape, found.dataset.num_classes
        if have != (facts.input_shape, facts.num_classes):
            raise DataError(
                f"the data of client {settings.client} have shape {have[0]} in {have[1]} classes; expected "
                f"{facts.input_shape} in {facts.num_classes}, as the task says; correct the data, or start a new run "
                "with them"
            )
        return found

    @property
    def spec(self) -> ModelSpec:
        """The specification of the client's network: its own, or the configuration's."""
        own = self.settings.model
        return self.config.clients.model(self.settings.client) if own is None else ModelSpec.parse(own)

    @property
    def weights(self) -> str | None:
        """The file of the weights that the client's network starts with: its own, or the configuration's."""
        own = self.settings.weights
        at_server = self.settings.model is not None  # whose weights would be those of another network
        return own if own is not None or at_server else self.config.clients.weights(self.settings.client)

    def check(self, network: SplitModel) -> None:
        """Read the client's file of weights, if it has one, before the first round.

        Args:
            network: the client's network.

        Raises:
            PolyfedError: the algorithm would not use the weights, or they do not fit the network.
        """
        if self.weights is not None:
            refuse_weights(self.algorithm)
            load_weights(Path(self.weights), network)

    def check_columns(self) -> None:
        """Raise if a network reads a column of which the client has no value, where files may have unlike columns.

        Raises:
            ModelError: the text names network and columns.
        """
        options = self.config.data.options | self.settings.data_options
        rows = self.dataset.x[torch.tensor(self.partition.train(self.place))] if options.get("union") else None
        columns = self.dataset.feature_columns
        if rows is not None and (fault := unread_columns(self.algorithm, self.spec, rows, columns)):
            raise ModelError(fault)

    def check_labels(self) -> None:
        """Raise if rows lack labels that the algorithm, the configuration or a probe of this client reads.

        Raises:
            PolyfedError: the text says what reads them.
        """
        data = self.dataset
        if faults := label_faults(self.config, self.algorithm, data.num_unlabelled, len(data)):
            raise ConfigError(*faults)
        alone = () if self.settings.data is None else (str(self.settings.client),)
        check_labelled(data, self.partition, alone)

    @property
    def info(self) -> ClientInfo:
        """What the server knows of this client; the name of its own network is left out."""
        known, capacity = configured_info(self.config, self.settings.client), self.settings.capacity
        known = known if capacity is None else replace(known, capacity=capacity)
        return known if self.settings.model is None else replace(known, architecture="")

    def about(self, experiment: str) -> dict[str, Any]:
        """Return the content of client.json: which client of which run this is, with which network and data."""
        settings = self.settings
        return {
            "experiment": experiment,
            "client": settings.client,
            "algorithm": self.config.algorithm.name,
            "model": str(self.spec),
            "model_is_private": settings.model is not None,
            "capacity": self.info.capacity,
            "data": settings.data or settings.path or self.config.data.path or self.config.data.dataset,
            "data_options": settings.data_options,
            "begun": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "polyfed": version("polyfed"),
        }

    def agreement(self, salt: str) -> Agreement:
        """Return what this client's classes, columns, categories and pixels mean, without names that stay private."""
        own = schema_of(self.dataset)
        told = own if self.settings.tells_names else Schema(mean=own.mean, std=own.std)
        return Agreement(digests=own.digests(salt), meaning=told)

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns new rows of this client into inputs, and how its own file was read."""
        own, data = self.settings.data, self.config.data
        kind = data.dataset if own is None else kind_of_file(Path(own).expanduser())
        options = data.options if own is None else options_of_file(self.config, kind, self.settings.data_options)
        return Preprocessing.of(
            self.dataset, kind, options, image_size=data.image_size, clients=self.config.clients.names or ()
        )

    @property
    def data(self) -> FederatedData:
        """The examples of the data set; the client's are those at ``place``."""
        return FederatedData(self.dataset, self.partition, augment=self.config.data.augment)

    def networks(self, task: Task) -> tuple[SplitModel, Mapping[str, SplitModel]]:
        """Return the client's network and those of its parts.

        Where all parts are slices of the network, it is never in memory as a whole: it is built without values, and the
        server sends those of the slices. A network that cannot be built so is built as ever; the log says why, once.
        """
        about = (
            self.settings.client,
            self.info.capacity,
            self.spec,
            json.dumps(self.config.to_dict()["algorithm"]),
            task,
        )
        sliced = type(self.algorithm).models_at is not Algorithm.models_at and self.algorithm.shared_networks
        if sliced and about not in _WHOLE:
            try:
                own = task.build(self.spec, empty=True)
                models = self.algorithm.models_at(task, own, self.info.capacity)
                if not any(model.empty for model in models.values()):
                    return own, models
                why = f"{', '.join(name for name, model in models.items() if model.empty)} leaves nothing out"
            except Exception as error:  # also of the network's own code
                why = str(error)
            _WHOLE.add(about)
            if self.info.capacity < 1:
                log.warning("client %d makes its slice from the whole network: %s", self.settings.client, why)
        own = task.build(self.spec)
        return own, self.algorithm.models_at(task, own, self.info.capacity)

    def local(self, task: Task, round_: int) -> LocalClient:
        """Return the client at work in a round; round 0 is its creation."""
        own, models = self.networks(task)
        if self.weights is not None and round_ == 0:
            own = own.starting_with(load_weights(Path(self.weights), own))
            models = self.algorithm.models_at(task, own, self.info.capacity)
        data = self.data.train(self.place)
        check_training(self.config, self.algorithm, models, data)
        check_axes(self.algorithm, (self.spec,), self.dataset)
        return client_at_work(self.info, models, data, self.algorithm, self.config, round_)
