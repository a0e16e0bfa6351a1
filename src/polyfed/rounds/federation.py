"""The federation of a configuration: data, partition, networks and clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from polyfed.base.errors import ConfigError, ModelError
from polyfed.base.memory import give_back
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.config import Config, load_algorithm
from polyfed.config.profiles import load_profiles
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.message import Nothing
from polyfed.core.plan import LocalSGD
from polyfed.data.client import ClientData, FederatedData
from polyfed.data.dataset import Dataset
from polyfed.data.partition.make import make_partition, splitter
from polyfed.data.partition.partition import Partition
from polyfed.data.sources import load_dataset
from polyfed.models.split import SplitModel
from polyfed.rounds.availability import Availability
from polyfed.rounds.sampling import Weighted


class ServerView(ABC):
    """The server's knowledge of a federation, simulated or deployed: all that a round needs.

    Attributes:
        config: what was asked for.
        algorithm: the way to train together.
    """

    config: Config
    algorithm: Algorithm

    @cached_property
    @abstractmethod
    def task(self) -> Task:
        """What the server and all clients know."""

    @abstractmethod
    def info(self, client: ClientId) -> ClientInfo:
        """What the server knows of a client."""

    @cached_property
    def rng(self) -> Rng:
        """The root of all randomness except the partition's."""
        return Rng((self.config.run.seed,))


@dataclass(frozen=True)
class Federation(ServerView):
    """The constants of a run. A formula describes each client; there is no list of clients.

    Args:
        config: what was asked for.
        dataset: all examples.
        partition: the rows of each client.
        algorithm: the way to train together.
    """

    config: Config
    dataset: Dataset
    partition: Partition
    algorithm: Algorithm

    @cached_property
    def data(self) -> FederatedData:
        """Each client's examples, by index."""
        return FederatedData(self.dataset, self.partition, augment=self.config.data.augment)

    @cached_property
    def task(self) -> Task:
        """What the server and all clients know."""
        return configured_task(self.config, self.dataset.input_shape, self.dataset.num_classes)

    @cached_property
    def plan(self) -> LocalSGD:
        """How clients train."""
        return LocalSGD(**self.config.train.model_dump())

    @cached_property
    def availability(self) -> Availability | None:
        """The clients' devices; None without ``[devices]``."""
        devices = self.config.devices
        if devices is None:
            return None
        return Availability(load_profiles(devices.profiles), self.rng.at("devices"), devices.deal, devices.start_hour)

    @cached_property
    def weighted(self) -> Weighted | None:
        """The weighted draw of clients; None where all are equally likely."""
        clients = self.config.clients
        if clients.selection == "by-size":
            return Weighted(np.diff(self.partition.train_offsets))
        return Weighted(np.resize(clients.capacities, clients.count)) if clients.selection == "by-capacity" else None

    def info(self, client: ClientId) -> ClientInfo:
        """What the server knows of a client."""
        return configured_info(self.config, client)

    def own(self, client: ClientId) -> SplitModel:
        """Return a client's network."""
        return self.task.build(self.config.clients.model(client))

    def local(self, client: ClientId, round_: int) -> LocalClient:
        """Return a client at work in a round; round 0 is its creation, before its first round."""
        return client_at_work(
            self.info(client),
            self.algorithm.models(self.task, self.own(client)),
            self.data.train(client),
            self.algorithm,
            self.config,
            round_,
        )

    def private(self, client: ClientId, stored: Any) -> Any:
        """Return the private state of a client: the stored state, or without it (None) the state before it trains."""
        if stored is not None:
            return stored
        # `Nothing` at once avoids loading the client's rows, which takes a tenth of a small round.
        stateless = type(self.algorithm).init_client is Algorithm.init_client
        return Nothing() if stateless else self.algorithm.init_client(self.local(client, 0))


def configured_info(config: Config, client: ClientId) -> ClientInfo:
    """Return the configuration's description of a client."""
    return ClientInfo(client, config.clients.capacity(client), str(config.clients.model(client)))


def client_at_work(
    info: ClientInfo,
    models: Mapping[str, SplitModel],
    data: ClientData,
    algorithm: Algorithm,
    config: Config,
    round_: int,
) -> LocalClient:
    """Return a client at work in a round, in a simulation or a deployment; round 0 is its creation.

    Args:
        info: the server's knowledge of the client.
        models: the networks of the client's parts.
        data: the client's training examples.
        algorithm: the algorithm of the run.
        config: the configuration of the run.
        round_: number of the round.
    """
    root = Rng((config.run.seed,))
    rng = root.at("client", info.id) if round_ == 0 else root.at("round", round_, "client", info.id)
    train, held_out = data.hold_out(algorithm.holdout, root.at("client", info.id, "held"))
    return LocalClient(info, models, train, LocalSGD(**config.train.model_dump()), rng, round_, held_out)


def configured_task(config: Config, input_shape: tuple[int, ...], num_classes: int) -> Task:
    """Return the task of a configuration whose data have these shapes and classes."""
    clients = config.clients
    return Task(
        input_shape=input_shape,
        num_classes=num_classes,
        num_clients=clients.count,
        rounds=config.run.rounds,
        architectures=tuple(dict.fromkeys(clients.models[: clients.count])),
        capacities=tuple(sorted(set(clients.capacities[: clients.count]), reverse=True)),
    )


def check_networks(algorithm: Algorithm, task: Task, dataset: Dataset | None = None) -> None:
    """Build all networks, and have the algorithm check that it can train them.

    Args:
        algorithm: the algorithm of the run.
        task: the common knowledge of server and clients.
        dataset: the data, if they are read: networks must take its numbers, or its tokens.

    Raises:
        ModelError: a network cannot be built, or the algorithm cannot train it, or it does not take the data.
    """
    algorithm.check(task)
    for model in task.family().values():
        for part in algorithm.models(task, model).values():
            # Of a client's networks, those built for this input and these classes take the data; a projector does not.
            built = part.signature[2:] if isinstance(part.signature, tuple) else ()
            if dataset is not None and built == (task.input_shape, task.num_classes):
                part.check_input(dataset.extremes)


def misfits(configs: Sequence[Config]) -> list[str]:
    """Return a fault for each configuration whose networks do not fit its data or its algorithm.

    Raises:
        PolyfedError: the data cannot be loaded.
    """
    shapes: dict[object, tuple[tuple[int, ...], int]] = {}
    faults: list[str] = []
    for config in configs:
        data = config.data.model_dump_json()
        if data not in shapes:
            dataset = _load(config)
            shapes[data] = (dataset.input_shape, dataset.num_classes)
        try:
            check_networks(
                load_algorithm(config.algorithm.name, config.algorithm.keys), configured_task(config, *shapes[data])
            )
        except ModelError as error:
            faults.append(str(error))
    return list(dict.fromkeys(faults))


def deal(config: Config, data: Dataset | None = None) -> tuple[Dataset, Partition]:
    """Load the data, or take ``data``, and deal the rows to clients.

    Args:
        config: the configuration of the run.
        data: the data set, if a program gives it, for ``data.dataset = "python"``; its digest stands for its files.

    Raises:
        PolyfedError: the data cannot be loaded or dealt; the text says why.
    """
    if data is None:
        dataset = _load(config)
    elif config.data.dataset != "python" or not isinstance(data, Dataset):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"data: got {type(data).__name__} for data.dataset = {config.data.dataset!r}; expected a Dataset, such as "
            'polyfed.federated_data(...), and data.dataset = "python", so that the run is known to depend on it'
        )
    else:
        dataset = replace(data, files={data.name: data.digest})
    seed = config.run.seed if config.partition.seed is None else config.partition.seed
    partition = make_partition(
        dataset,
        kind=config.partition.kind,
        num_clients=config.clients.count,
        rng=Rng((seed, "partition")),
        test_fraction=config.data.test_fraction,
        split=config.data.split,
        **config.partition.model_dump(exclude_none=True, exclude={"kind", "seed"}),
    )
    if config.data.validation_fraction:
        whole = config.data.split in ("groups", "time")  # what the split keeps whole stays whole
        partition = partition.validating(
            config.data.validation_fraction,
            dataset.y.cpu().numpy(),
            Rng((seed, "partition", "validation")),
            splitter(dataset, config.data.split, config.partition.kind) if whole else None,
        )
    return dataset, partition


def prepare(config: Config, data: Dataset | None = None) -> Federation:
    """Load the data, deal the rows, and check that the algorithm can train these networks.

    Args:
        config: the configuration of the run.
        data: as for `deal`.

    Raises:
        PolyfedError: the data cannot be loaded or dealt, or the networks not trained; the text says why.
    """
    dataset, partition = deal(config, data)
    algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
    federation = Federation(config, dataset, partition, algorithm)
    check_networks(algorithm, federation.task, dataset)
    if algorithm.holdout:
        federation.local(partition.smallest, 0)  # reports a client with too few examples before the run
    give_back()
    return federation


def _load(config: Config) -> Dataset:
    return load_dataset(
        config.data.dataset,
        path=Path(config.data.path) if config.data.path else None,
        image_size=config.data.image_size,
        **config.data.options,
    )
