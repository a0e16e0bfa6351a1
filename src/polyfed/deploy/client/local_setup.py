"""A client's data and networks, made from its own settings and what the server says of the task."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.rng import Rng
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.data.client import ClientData, FederatedData
from polyfed.data.dataset import Dataset
from polyfed.data.partition.make import make_partition
from polyfed.data.partition.partition import Partition
from polyfed.data.sources import file_digests, load_dataset
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire.headers import TaskFacts
from polyfed.models.catalogue import ModelSpec
from polyfed.rounds.federation import client_at_work, configured_info, deal
from polyfed.rounds.identity import Content


def task_of(config: Config, facts: TaskFacts) -> Task:
    """The task that the server's facts describe."""
    return Task(
        input_shape=facts.input_shape,
        num_classes=facts.num_classes,
        num_clients=config.clients.count,
        rounds=config.run.rounds,
        architectures=tuple(ModelSpec.parse(name) for name in facts.architectures),
        capacities=facts.capacities,
    )


@lru_cache(maxsize=1)  # a worker answers many messages of one run
def _shared(config: str) -> tuple[Dataset, Partition]:
    """The configured data set, dealt as everywhere; the configuration as text."""
    return deal(Config.parse(tomllib.loads(config)))


@lru_cache(maxsize=1)
def _own(path: Path, digest: str, options: str, client: int, text: str) -> tuple[Dataset, Partition]:
    """A client's own file, all of whose rows are its own; ``digest`` changes with its content."""
    config = Config.parse(tomllib.loads(text))
    kind = path.suffix.removeprefix(".")
    side = config.data.image_size if kind == "npz" else None
    dataset = load_dataset(kind, path=path, image_size=side, **json.loads(options))
    seed = config.run.seed if config.partition.seed is None else config.partition.seed
    partition = make_partition(
        dataset,
        kind="iid",
        num_clients=1,
        rng=Rng((seed, "partition")),
        first_client=client,
        test_fraction=config.data.test_fraction,
        split="pooled" if dataset.test_rows is None else "official",
        min_samples=config.partition.min_samples,
    )
    return dataset, partition


@dataclass(frozen=True)
class LocalSetup:
    """A client's own data and networks.

    Args:
        settings: its own.
        config: the server's.
        dataset: where its rows lie: its own file, or the configured data set.
        partition: which rows are its own.
        place: its number in the partition.
        algorithm: the way to train together.
    """

    settings: NodeSettings
    config: Config
    dataset: Dataset
    partition: Partition
    place: int
    algorithm: Algorithm

    @classmethod
    def of(cls, settings: NodeSettings, config: Config) -> LocalSetup:
        """Load what this client holds.

        Raises:
            PolyfedError: data that cannot be read, or a client number that the configuration does not have.
        """
        if settings.client >= config.clients.count:
            raise ConfigError(
                f"this client is number {settings.client}; the configuration has {config.clients.count} clients, from 0"
            )
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        if settings.data is None:
            at_home = config if settings.path is None else config.replace("data", path=settings.path)
            dataset, partition = _shared(at_home.to_toml())
            return cls(settings, config, dataset, partition, settings.client, algorithm)
        path = Path(settings.data).expanduser()
        if path.suffix not in (".csv", ".npz"):
            raise DataError(f"{path}: expected a .csv or .npz file; see `polyfed list datasets`")
        digest = "".join(file_digests(path.suffix.removeprefix("."), path=path).values())
        dataset, partition = _own(path, digest, json.dumps(settings.data_options), settings.client, config.to_toml())
        return cls(settings, config, dataset, partition, 0, algorithm)

    @property
    def spec(self) -> ModelSpec:
        """The client's network: its own, or the configuration's."""
        own = self.settings.model
        return self.config.clients.model(self.settings.client) if own is None else ModelSpec.parse(own)

    @property
    def info(self) -> ClientInfo:
        """What the server knows of this client; not the name of a network of its own."""
        known, capacity = configured_info(self.config, self.settings.client), self.settings.capacity
        known = known if capacity is None else replace(known, capacity=capacity)
        return known if self.settings.model is None else replace(known, architecture="")

    @property
    def content(self) -> Content:
        """What this client's part in the run comes from; it stays with the client."""
        return Content.of(self.config, self.dataset.files, self.settings.model)

    def fitting(self, facts: TaskFacts) -> LocalSetup:
        """This client for the task of all: classes that no row here has are known all the same.

        Raises:
            DataError: the data have another shape, or more classes.
        """
        have, missing = self.dataset.input_shape, facts.num_classes - self.dataset.num_classes
        if have != facts.input_shape or missing < 0:
            raise DataError(
                f"the data here have examples of shape {have} in {self.dataset.num_classes} classes; all others have "
                f"{facts.input_shape} in {facts.num_classes}"
            )
        if not missing:
            return self
        more = tuple(f"class {k}" for k in range(self.dataset.num_classes, facts.num_classes))
        return replace(self, dataset=replace(self.dataset, classes=(*self.dataset.classes, *more)))

    @property
    def _data(self) -> FederatedData:
        return FederatedData(self.dataset, self.partition, augment=self.config.data.augment)

    def test(self) -> ClientData:
        """Its test examples."""
        return self._data.test(self.place)

    def local(self, task: Task, round_: int) -> LocalClient:
        """The client at work in a round; round 0 is its creation."""
        models = self.algorithm.models(task, task.build(self.spec))
        return client_at_work(self.info, models, self._data.train(self.place), self.algorithm, self.config, round_)
