"""The federation of a configuration: data, partition, networks and clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

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
from polyfed.execute.choice import forward_flops
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

    @property
    def client_names(self) -> Sequence[str]:
        """The clients' names; empty if they have none."""
        return self.config.clients.names or ()

    @property
    def class_names(self) -> Sequence[str]:
        """The classes' names, as far as they are known."""
        return ()

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

    @property
    def client_names(self) -> Sequence[str]:
        """The configured names, or those of the groups whose rows the clients have."""
        return configured_names(self.config, self.partition)

    @property
    def class_names(self) -> Sequence[str]:
        """The data set's."""
        return self.dataset.classes

    @cached_property
    def task(self) -> Task:
        """What the server and all clients know."""
        data = self.dataset
        return configured_task(self.config, data.input_shape, data.num_classes, data.input_dtype)

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


def configured_names(config: Config, partition: Partition) -> Sequence[str]:
    """Return the configured names of the clients, or those of the groups whose rows they have; empty without both."""
    return config.clients.names or cast("Sequence[str]", partition.about.get("group_names", ()))


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


def configured_task(
    config: Config, input_shape: tuple[int, ...], num_classes: int, dtype: torch.dtype | None = None
) -> Task:
    """Return the task of a configuration whose data have these shapes, classes and type."""
    clients = config.clients
    return Task(
        input_shape=input_shape,
        num_classes=num_classes,
        num_clients=clients.count,
        rounds=config.run.rounds,
        architectures=tuple(dict.fromkeys(clients.models[: clients.count])),
        capacities=tuple(sorted(set(clients.capacities[: clients.count]), reverse=True)),
        kind=config.data.task,
        dtype=dtype,
    )


def check_networks(algorithm: Algorithm, task: Task, dataset: Dataset | None = None) -> None:
    """Build all networks, and have the algorithm check that it can train them.

    Args:
        algorithm: the algorithm of the run.
        task: the common knowledge of server and clients.
        dataset: the data, if they are read: networks of tokens must take its smallest and largest.

    Raises:
        ModelError: a network cannot be built, or the algorithm cannot train it, or it does not take the data.
    """
    algorithm.check(task)
    for model in task.family().values():
        for part in algorithm.models(task, model).values():
            if dataset is not None and part.dtype is not None:
                part.check_tokens(dataset.extremes)


def misfits(configs: Sequence[Config]) -> list[str]:
    """Return a fault for each configuration whose networks do not fit its data or its algorithm.

    Raises:
        PolyfedError: the data cannot be loaded.
    """
    shapes: dict[object, tuple[tuple[int, ...], int, torch.dtype | None]] = {}
    faults: list[str] = []
    for config in configs:
        data = config.data.model_dump_json()
        if data not in shapes:
            dataset = _load(config)
            shapes[data] = (dataset.input_shape, dataset.num_classes, dataset.input_dtype)
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
    partition = make_partition(
        dataset,
        kind=config.partition.kind,
        num_clients=config.clients.count,
        rng=_partition_rng(config),
        test_fraction=config.data.test_fraction,
        split=config.data.split,
        **config.partition.model_dump(exclude_none=True, exclude={"kind", "seed"}),
    )
    names, groups = config.clients.names or (), cast("Sequence[str]", partition.about.get("group_names", ()))
    if sorted(names) == sorted(groups) and list(names) != list(groups):
        raise ConfigError(
            f"clients.names: got {', '.join(names)}; the groups of the data, in the order of their clients, are "
            f"{', '.join(groups)}; give the names in this order, or leave them out"
        )
    return dataset, _validating(config, dataset, partition, config.partition.kind)


def deal_own(config: Config, dataset: Dataset, client: ClientId) -> Partition:
    """Return the partition of a client that has its own rows alone.

    Its training and test rows are those that `deal` draws for client ``client`` of a "natural" partition, in which each
    client has the rows of one file.

    Args:
        config: the configuration of the run.
        dataset: the rows of this client, and no others.
        client: the number of the client.

    Raises:
        DataError: the client has too few rows, or the split needs what the data set lacks.
    """
    alone = replace(dataset, groups=np.zeros(len(dataset), dtype=np.int64), group_names=())
    partition = make_partition(
        alone,
        kind="natural",
        num_clients=1,
        rng=_partition_rng(config),
        first_client=client,
        test_fraction=config.data.test_fraction,
        split=config.data.split,
        min_samples=config.partition.min_samples,
        samples_per_client=config.partition.samples_per_client,
    )
    return _validating(config, alone, partition, "natural", first=client)


def _partition_rng(config: Config) -> Rng:
    return Rng((config.run.seed if config.partition.seed is None else config.partition.seed, "partition"))


def _validating(config: Config, dataset: Dataset, partition: Partition, kind: str, *, first: int = 0) -> Partition:
    """Return the partition with ``data.validation_fraction`` of the training rows in place of the test rows."""
    fraction, split = config.data.validation_fraction, config.data.split
    if not fraction:
        return partition
    whole = split in ("groups", "time")  # what the split keeps whole stays whole
    return partition.validating(
        fraction,
        dataset.strata,
        _partition_rng(config).at("validation"),
        splitter(dataset, split, kind, first=first) if whole else None,
        first=first,
    )


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
    check_single_examples(federation)
    if config.devices is not None:
        for name, model in federation.task.family().items():
            if forward_flops({name: model}, model.input_shape) is None:
                raise ModelError(
                    f"the FLOPs of model {name!r} cannot be counted, by which [devices] tells how long a client "
                    "computes; replace the layer that polyfed cannot count (docs/models.md), or remove [devices]"
                )
    give_back()
    return federation


def check_single_examples(federation: Federation) -> None:
    """Raise if a client whose batches have a single example has a network that cannot be trained on one.

    Raises:
        ModelError: the text names the clients and the network.
    """
    counts, algorithm = np.diff(federation.partition.train_offsets), federation.algorithm
    if algorithm.holdout:
        counts = counts - np.clip(np.round(algorithm.holdout * counts), 1, np.maximum(counts - 1, 0))
    clients = np.flatnonzero(counts == 1 if federation.plan.batch_size > 1 else counts > 0)
    for spec in federation.task.architectures if len(clients) else ():
        for model in algorithm.models(federation.task, federation.task.build(spec)).values():
            named = [k for k in clients.tolist() if federation.config.clients.model(k) == spec] * bool(
                model.single_fault
            )
            if named:
                raise ModelError(
                    f"model {model.name!r} cannot train on a batch of one example ({model.single_fault}), and "
                    f"{_listed(named)} would have such batches; set train.batch_size above 1 and partition.min_samples "
                    "to 2 or more, or use a normalisation such as GroupNorm instead of BatchNorm"
                )


def _listed(clients: Sequence[ClientId]) -> str:
    more = f" and {len(clients) - 5} more" if len(clients) > 5 else ""
    return f"client{'s' * (len(clients) > 1)} {', '.join(map(str, clients[:5]))}{more}"


def _load(config: Config) -> Dataset:
    data = config.data
    dataset = load_dataset(
        data.dataset,
        path=Path(data.path) if data.path else None,
        image_size=data.image_size,
        task=data.task,
        agreed=data.agreed,
        **data.options,
    )
    return with_units(dataset, config)


def with_units(dataset: Dataset, config: Config) -> Dataset:
    """Return the data set with the configured offset and scale of a regression's targets."""
    return replace(dataset, target_offset=config.data.target_offset, target_scale=config.data.target_scale)
