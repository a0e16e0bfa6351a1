"""The federation of a configuration: data, partition, networks and clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.base.errors import ConfigError, DataError, ModelError
from polyfed.base.memory import give_back
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.config import Config, canonical_name, load_algorithm
from polyfed.config.faults import dotted
from polyfed.config.profiles import load_profiles
from polyfed.config.sections import TrainKeys
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.message import Nothing
from polyfed.core.plan import LocalSGD, PartRate
from polyfed.data.catalogue import DATASET_OPTIONS
from polyfed.data.client import ClientData, FederatedData
from polyfed.data.dataset import Dataset
from polyfed.data.partition.make import make_partition, splitter
from polyfed.data.partition.partition import Partition
from polyfed.data.sources import load_dataset
from polyfed.execute.choice import forward_flops
from polyfed.models.catalogue import SIGNAL_MODELS, ModelSpec
from polyfed.models.split import SplitModel
from polyfed.models.weights import load_weights
from polyfed.rounds.availability import Availability
from polyfed.rounds.sampling import Strata, Weighted, capacity_draw


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
        return configured_task(self.config, data.input_shape, data.num_classes, data.input_dtype, data.feature_columns)

    def keys(self, client: ClientId) -> TrainKeys:
        """Return the keys of ``[train]`` that hold for a client."""
        return configured_training(self.config, self.info(client))

    def kind(self, client: ClientId) -> object:
        """Return a key that is equal for clients of one architecture and capacity that train alike."""
        info = self.info(client)
        return info.architecture, info.capacity, _differing(self.config, info)

    @cached_property
    def availability(self) -> Availability | None:
        """The clients' devices; None without ``[devices]``."""
        devices = self.config.devices
        if devices is None:
            return None
        return Availability(load_profiles(devices.profiles), self.rng.at("devices"), devices.deal, devices.start_hour)

    @cached_property
    def draw(self) -> Weighted | Strata | None:
        """The draw of clients by their sizes or capacities; None where neither matters."""
        clients = self.config.clients
        if clients.selection == "by-size":
            return Weighted(np.diff(self.partition.train_offsets))
        return capacity_draw(clients.selection, np.resize(clients.capacities, clients.count))

    def info(self, client: ClientId) -> ClientInfo:
        """What the server knows of a client."""
        return configured_info(self.config, client)

    def own(self, client: ClientId, round_: int = 1) -> SplitModel:
        """Return a client's network; in round 0, its creation, it starts with its file of weights if it has one."""
        model = self.task.build(self.config.clients.model(client))
        weights = self.config.clients.weights(client)
        return model if weights is None or round_ else model.starting_with(load_weights(Path(weights), model))

    def local(self, client: ClientId, round_: int) -> LocalClient:
        """Return a client at work in a round; round 0 is its creation, before its first round."""
        return client_at_work(
            self.info(client),
            self.algorithm.models_at(self.task, self.own(client, round_), self.info(client).capacity),
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
    keys = configured_training(config, info)
    plan = plan_of(keys, round_, config.run.rounds)
    weights = None if keys.class_weights is None else partial(class_weights, keys.class_weights, train)
    return LocalClient(info, models, train, plan, rng, round_, held_out, weights)


def _differing(config: Config, info: ClientInfo) -> tuple[str, ...]:
    names = config.clients.names
    return config.train.differing(info.id, names[info.id] if names else None, info.architecture or None)


def configured_training(config: Config, info: ClientInfo) -> TrainKeys:
    """Return the keys of ``[train]`` that hold for a client, whose ``architecture`` is "" if its network is its own."""
    return config.train.of(_differing(config, info))


def plan_of(keys: TrainKeys, round_: int, rounds: int) -> LocalSGD:
    """Return the plan of one round: a pure function of the settings and the number of the round.

    Args:
        keys: the client's keys of ``[train]``.
        round_: number of the round.
        rounds: ``run.rounds``, the horizon of a schedule that names none.
    """
    common = 1.0 if keys.schedule is None else keys.schedule.factor(round_, rounds)
    parts = tuple(
        PartRate(name, part.lr, common if part.schedule is None else part.schedule.factor(round_, rounds))
        for name, part in keys.parts.items()
    )
    values = {key: getattr(keys, key) for key in TrainKeys.model_fields}
    others = {key: value for key, value in values.items() if key not in ("schedule", "parts", "class_weights")}
    return LocalSGD(**others, factor=common, parts=parts)


def class_weights(asked: Any, train: ClientData) -> Tensor:
    """Return the weight of each class at a client, (L,) float64.

    "balanced" gives class c the weight n / (m n_c): n training rows, n_c of class c, m classes that the client has. So
    each of these classes has the same total weight, and the mean weight of the rows is 1. A class that the client lacks
    has weight 1, which counts in smoothed labels only.

    Args:
        asked: ``train.class_weights``, which is given.
        train: the client's training examples, without those that are held out.

    Raises:
        ConfigError: the weights do not fit the classes.
    """
    names, classes = train.dataset.classes, train.dataset.num_classes
    if asked == "balanced":
        counts = train.labels.bincount(minlength=classes).double()
        has = counts > 0
        return torch.where(has, counts.sum() / (has.sum() * counts.clamp(min=1)), 1.0)
    if isinstance(asked, Mapping):
        known = {name: number for number, name in enumerate(names or map(str, range(classes)))}
        if strangers := [name for name in asked if name not in known]:
            raise ConfigError(
                f"train.class_weights: unknown class{'es' * (len(strangers) > 1)} {', '.join(map(repr, strangers))}; "
                f"the data have {', '.join(known)}"
            )
        weights = torch.ones(classes, dtype=torch.float64)
        for name, weight in asked.items():
            weights[known[name]] = weight
        return weights
    if len(asked) != classes:
        raise ConfigError(
            f"train.class_weights: got {len(asked)} numbers; expected {classes}, one for each class: "
            f"{', '.join(names) or f'0 to {classes - 1}'}"
        )
    return torch.tensor(asked, dtype=torch.float64)


def check_training(config: Config, algorithm: Algorithm, networks: Iterable[str], train: ClientData) -> None:
    """Check the parts and the classes that ``[train]`` names against the algorithm and the data.

    Args:
        config: the configuration of the run.
        algorithm: the algorithm of the run.
        networks: the parts of a client that have a network.
        train: training examples of a client.

    Raises:
        ConfigError: all faults at once.
    """
    faults: list[str] = []
    parts = dict.fromkeys((*networks, *algorithm.trains))
    for where, keys in _training_tables(config).items():
        if strangers := [name for name in keys.parts if name not in parts]:
            faults.append(
                f"{where}parts: {algorithm.name} has no part{'s' * (len(strangers) > 1)} {', '.join(strangers)}; it "
                f"trains {', '.join(parts)}"
            )
        try:
            if keys.class_weights is not None:
                class_weights(keys.class_weights, train)
        except ConfigError as error:
            faults += [fault.replace("train.", where, 1) for fault in error.faults]
    if faults:
        raise ConfigError(*faults)


def _training_tables(config: Config) -> dict[str, TrainKeys]:
    """Return the keys of ``[train]`` and of its tables for some clients, by what comes before a key."""
    tables: dict[str, TrainKeys] = {"train.": config.train}
    for section in ("models", "clients"):
        tables |= {f"train.{section}.{dotted(name)}.": keys for name, keys in getattr(config.train, section).items()}
    return tables


def check_weights(config: Config, algorithm: Algorithm, task: Task) -> None:
    """Read every file of weights and compare it with its network.

    Raises:
        ConfigError: the algorithm has no private networks.
        ModelError: a file does not fit its network; the text has all faults of all files.
    """
    specs = dict.fromkeys(spec for spec in config.clients.models[: config.clients.count] if spec.weights)
    faults: list[str] = []
    for spec in specs:
        refuse_weights(algorithm)
        try:
            load_weights(Path(str(spec.weights)), task.build(spec))
        except ModelError as error:
            faults.append(str(error))
    if faults:
        raise ModelError("\n".join(faults))


def refuse_weights(algorithm: Algorithm) -> None:
    """Raise ConfigError if a client of this algorithm has no network of its own to start with weights of its own.

    Its network is the one that the server sends from round 1 on, so weights of one client would never be used.
    """
    if algorithm.shared_networks:
        raise ConfigError(
            f"weights: {algorithm.name} gives every client the server's network in every round, so a client's own "
            "weights would never be used; remove weights, or choose an algorithm with private networks"
        )


def unread(config: Config, algorithm: Algorithm) -> list[str]:
    """Return a sentence for each key of other sections that is given and that the algorithm or the draw does not read.

    Of capacities it is about polyfed's algorithms alone: one of your own may read the capacity anywhere.
    """
    named = {"class_weights": config.train.class_weights, "label_smoothing": config.train.label_smoothing}
    idle = " and ".join(f"train.{key}" for key, value in named.items() if value and not algorithm.reads_labels)
    notes = [f"{algorithm.name} reads no labels in training, so nothing comes of {idle}"] if idle else []
    capacities = set(config.clients.capacities[: config.clients.count])
    if config.clients.selection == "stratified" and len(capacities) == 1:
        notes.append('clients.selection = "stratified" draws as "uniform" does: all clients have one capacity')
    given = capacities != {1.0}
    reads = algorithm.masks or type(algorithm).models_at is not Algorithm.models_at
    if (
        reads or not given or config.clients.selection in ("by-capacity", "stratified", "largest")
    ):  # the draw reads them
        return notes
    if canonical_name(config.algorithm.name) not in ALGORITHMS:
        return notes
    return [
        *notes,
        f"{algorithm.name} reads no capacities: every client holds its whole network; see clients.capacities",
    ]


def sizes(algorithm: Algorithm, task: Task) -> list[tuple[str, float, int, float | None]]:
    """Return what clients of each architecture and capacity hold, where the algorithm cuts networks to capacities.

    Returns:
        The architecture, the capacity, the parameters of all parts, and the multiply-accumulates of one example, None
        if they cannot be counted; empty for an algorithm whose networks are alike at all capacities.
    """
    if len(task.capacities) == 1 or type(algorithm).models_at is Algorithm.models_at:
        return []
    found: list[tuple[str, float, int, float | None]] = []
    for name, model in task.family().items():
        for capacity in task.capacities:
            parts = algorithm.models_at(task, model, capacity)
            count = sum(part.shapes[key].numel() for part in parts.values() for key in part.parameter_names)
            flops = forward_flops(parts, task.input_shape)
            found.append((name, capacity, count, None if flops is None else flops / 2))
    return found


def configured_task(
    config: Config,
    input_shape: tuple[int, ...],
    num_classes: int,
    dtype: torch.dtype | None = None,
    columns: tuple[tuple[str, int], ...] = (),
) -> Task:
    """Return the task of a configuration whose data have these shapes, classes, type and columns."""
    clients = config.clients
    return Task(
        input_shape=input_shape,
        num_classes=num_classes,
        num_clients=clients.count,
        rounds=config.run.rounds,
        architectures=clients.architectures,
        capacities=tuple(sorted(set(clients.capacities[: clients.count]), reverse=True)),
        kind=config.data.task,
        dtype=dtype,
        counts=clients.counts,
        columns=columns,
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
    if dataset is not None:
        check_axes(algorithm, task.architectures, dataset)
    algorithm.check(task)
    for model in task.family().values():
        for capacity in task.capacities:
            for part in algorithm.models_at(task, model, capacity).values():
                if dataset is not None and part.dtype is not None:
                    part.check_tokens(dataset.extremes)


def check_axes(algorithm: Algorithm, specs: Sequence[ModelSpec], dataset: Dataset) -> None:
    """Raise ModelError if a network for signals (C, T) would read the steps of series (T, C) as channels."""
    if dataset.kind == "series" and not dataset.channels_first:
        for spec in input_networks(algorithm, specs):
            if spec.name in SIGNAL_MODELS:
                raise ModelError(
                    f"network {str(spec)!r} takes signals (C, T), and the data are (T, C) {dataset.input_shape}: it "
                    'would take steps for channels; transpose x and set data.options.layout = "NCT", or choose another'
                )


def misfits(configs: Sequence[Config], given: Dataset | None = None) -> list[str]:
    """Return a fault for each configuration whose networks or labels do not fit its data or its algorithm.

    Args:
        configs: the configurations.
        given: the data of all of them, if a program gives them.

    Raises:
        PolyfedError: the data cannot be loaded.
    """
    shapes: dict[object, tuple[tuple[int, ...], int, torch.dtype | None, tuple[tuple[str, int], ...]]] = {}
    rows: dict[object, tuple[int, int]] = {}
    faults: list[str] = []
    for config in configs:
        data = config.data.model_dump_json()
        if data not in shapes:
            dataset = _load(config) if given is None else given
            shapes[data] = (dataset.input_shape, dataset.num_classes, dataset.input_dtype, dataset.feature_columns)
            rows[data] = dataset.num_unlabelled, len(dataset)
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        faults += label_faults(config, algorithm, *rows[data])
        try:
            check_networks(algorithm, configured_task(config, *shapes[data]))
        except ModelError as error:
            faults.append(str(error))
    return list(dict.fromkeys(faults))


def deal(config: Config, dataset: Dataset | None = None) -> tuple[Dataset, Partition]:
    """Load the data, or take ``dataset``, and deal the rows to clients.

    Args:
        config: the configuration of the run.
        dataset: the data, if a program gives them, for ``data.dataset = "python"``; their digest stands for their
            files.

    Raises:
        PolyfedError: the data cannot be loaded or dealt; the text says why.
    """
    dataset = _given(config, dataset)
    return dataset, _dealt(config, dataset)


def deal_to(algorithm: Algorithm, config: Config, dataset: Dataset | None = None) -> tuple[Dataset, Partition]:
    """Return what `deal` returns, if it has the labels that the algorithm, and the clients' predictions, need.

    Args:
        algorithm: the algorithm of the run.
        config: as for `deal`.
        dataset: as for `deal`.

    Raises:
        ConfigError: rows lack labels that are needed; with the faults of the partition.
        PolyfedError: as `deal`; or a client has no labelled training row.
    """
    dataset = _given(config, dataset)
    faults = label_faults(config, algorithm, dataset.num_unlabelled, len(dataset))
    try:
        partition = _dealt(config, dataset)
        check_labelled(dataset, partition, configured_names(config, partition))
    except (ConfigError, DataError) as error:
        if not faults:
            raise
        raise ConfigError(*faults, *(error.faults if isinstance(error, ConfigError) else ())) from error
    if faults:
        raise ConfigError(*faults)
    return dataset, partition


def label_faults(config: Config, algorithm: Algorithm, unlabelled: int, rows: int) -> list[str]:
    """Return a fault for each part of a configuration that reads labels in training where rows have none.

    Args:
        config: the configuration of the run.
        algorithm: the algorithm of the run.
        unlabelled: number of rows without a label.
        rows: number of all rows.
    """
    if not unlabelled:
        return []
    count = f"{unlabelled:,} of {rows:,} rows have no label (unlabelled = true)"
    faults: list[str] = []
    if algorithm.reads_labels:
        faults.append(
            f"algorithm.name: got {algorithm.name!r}, which learns from labels, but {count}; choose fedmrl-ssl, or "
            "remove those rows"
        )
    faults += [
        f"{where}class_weights: weighs rows by their labels, but {count}; remove the key"
        for where, keys in _training_tables(config).items()
        if keys.class_weights is not None
    ]
    return faults


def check_labelled(dataset: Dataset, partition: Partition, names: Sequence[str] = ()) -> None:
    """Raise if a client has no labelled training row, to which a probe could be fitted.

    Args:
        dataset: the data set.
        partition: the rows of the clients.
        names: names of the clients; empty for their numbers.

    Raises:
        DataError: the text names a client.
    """
    if not dataset.num_unlabelled:
        return
    bad = np.flatnonzero(partition.counts(dataset.strata, dataset.num_classes).sum(axis=1) == 0)
    if len(bad):
        k = int(bad[0])
        raise DataError(
            f"client {names[k] if names else k}: none of its {len(partition.train(k))} training rows has a label "
            f"({len(bad)} of {partition.num_clients} clients lack them); expected at least one, as a probe of its own "
            "labelled rows predicts; label some of its rows, lower data.test_fraction or data.validation_fraction, or "
            "leave the client out"
        )


def _given(config: Config, dataset: Dataset | None) -> Dataset:
    if dataset is None:
        return _load(config)
    if config.data.dataset != "python" or not isinstance(dataset, Dataset):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"dataset: got {type(dataset).__name__} for data.dataset = {config.data.dataset!r}; expected a Dataset, "
            'such as polyfed.federated_data(...), and data.dataset = "python" or no data.dataset, so that the run is '
            "known to depend on it"
        )
    if dataset.task != config.data.task:
        raise ConfigError(
            f"dataset: got a {dataset.task} for data.task = {config.data.task!r}; set data.task = {dataset.task!r}"
        )
    return with_units(replace(dataset, files={dataset.name: dataset.digest}), config)


def _dealt(config: Config, dataset: Dataset) -> Partition:
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
    return validating(config, dataset, partition)


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
    return validating(config, alone, partition, "natural", client)


def _partition_rng(config: Config) -> Rng:
    return Rng((config.run.seed if config.partition.seed is None else config.partition.seed, "partition"))


def validating(
    config: Config, dataset: Dataset, partition: Partition, kind: str | None = None, first: ClientId = 0
) -> Partition:
    """Return the partition with the configured part of each client's training rows for validation.

    Args:
        config: the configuration of the run.
        dataset: the data set of the partition.
        partition: the rows of the clients.
        kind: the kind of the partition; None is the configured kind.
        first: number of the first client of the partition.

    Raises:
        DataError: a client has too few training rows.
    """
    if not config.data.validation_fraction:
        return partition
    whole = config.data.split in ("groups", "time")  # what the split keeps whole stays whole
    return partition.validating(
        config.data.validation_fraction,
        dataset.strata,
        _partition_rng(config).at("validation"),
        splitter(dataset, config.data.split, kind or config.partition.kind, first=first) if whole else None,
        first=first,
        keep_test=config.run.selects,
    )


def prepare(config: Config, dataset: Dataset | None = None) -> Federation:
    """Load the data, deal the rows, and check that the algorithm can train these networks.

    Args:
        config: the configuration of the run.
        dataset: as for `deal`.

    Raises:
        PolyfedError: the data cannot be loaded or dealt, or the networks not trained; the text says why.
    """
    algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
    dataset, partition = deal_to(algorithm, config, dataset)
    federation = Federation(config, dataset, partition, algorithm)
    if algorithm.deadline is not None and config.devices is None:
        raise ConfigError(
            f"algorithm.deadline: got {algorithm.deadline:g} s, but without [devices] a simulation has no clock that "
            "clients could be late by; add [devices], or remove the key"
        )
    check_networks(algorithm, federation.task, dataset)
    check_columns(federation)
    first = algorithm.models_at(federation.task, federation.own(0), federation.info(0).capacity)
    check_training(config, algorithm, first, federation.data.train(0))
    check_weights(config, algorithm, federation.task)
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


def check_columns(federation: Federation) -> None:
    """Raise if a network reads a column of which its client has no value, where files may have unlike columns.

    Raises:
        ModelError: the text names clients, networks and columns.
    """
    if not federation.config.data.options.get("union"):
        return
    faults: list[str] = []
    for client in range(federation.config.clients.count):
        rows = federation.dataset.x[torch.tensor(federation.partition.train(client))]
        spec = federation.config.clients.model(client)
        if fault := unread_columns(federation.algorithm, spec, rows, federation.task.columns):
            name = federation.client_names[client] if federation.client_names else client
            faults.append(f"client {name}: {fault}")
    if faults:
        raise ModelError("\n".join(faults[:5]))


def unread_columns(
    algorithm: Algorithm, spec: ModelSpec, rows: Tensor, columns: tuple[tuple[str, int], ...]
) -> str | None:
    """Return which network of a client reads a column of which the client has no value; None if none does.

    Classes and functions of the user's own are left out: what these read is not known.

    Args:
        algorithm: the algorithm of the run, whose key ``auxiliary``, if it has one, names a network that all share.
        spec: the client's network.
        rows: ``(n, F)`` training rows.
        columns: name and number of features of each column.
    """
    names = [name for name, width in columns for _ in range(width)]
    empty = {name for name, gone in zip(names, rows.isnan().all(dim=0).tolist(), strict=True) if gone}
    for own in input_networks(algorithm, (spec,)):
        read = [] if own.own else columns_read(own, columns)  # the author of an own network chooses what it reads
        if lacking := [name for name in read if name in empty]:
            return (
                f"network {str(own)!r} reads {', '.join(map(repr, lacking))}, of which its training rows have no "
                "value; give the network's option columns the names that it is to read; where clients share the "
                "network, those that all of them have"
            )
    return None


def input_networks(algorithm: Algorithm, specs: Sequence[ModelSpec], *, server: bool = False) -> tuple[ModelSpec, ...]:
    """Return the networks that read a client's rows: its own, and the ``auxiliary`` that all share, if there is one.

    Args:
        algorithm: the algorithm of the run.
        specs: the own networks.
        server: whether the server's networks are asked for, which are the shared one alone where there is one.
    """
    shared = getattr(algorithm, "auxiliary", None)
    if shared is None:
        return tuple(specs)
    return (ModelSpec.parse(shared),) if server else (*specs, ModelSpec.parse(shared))


def columns_read(spec: ModelSpec, columns: tuple[tuple[str, int], ...]) -> list[str]:
    """Return the names of the columns that a network reads; ``columns`` are those of the data, as in `Task`."""
    read = dict(spec.reading(columns).options).get("columns") if not spec.own else None
    names = [name for name, width in columns for _ in range(width)]
    places = range(len(names)) if read is None else cast("tuple[int, ...]", read)
    return list(dict.fromkeys(names[at] for at in places))


def check_single_examples(federation: Federation) -> None:
    """Raise if a client whose batches have a single example has a network, or a loss, that cannot be trained on one.

    Raises:
        ModelError: the text names the clients, and the network or the algorithm.
    """
    counts, algorithm, config = np.diff(federation.partition.train_offsets), federation.algorithm, federation.config
    if algorithm.holdout:
        counts = counts - np.clip(np.round(algorithm.holdout * counts), 1, np.maximum(counts - 1, 0))
    same = not (config.train.clients or config.train.models)
    each = [config.train.batch_size] if same else [federation.keys(k).batch_size for k in range(len(counts))]
    clients = np.flatnonzero((counts == 1) | ((np.array(each) == 1) & (counts > 0)))
    if len(clients) and algorithm.compares:
        raise ModelError(
            f"{algorithm.name} compares the examples of a batch, so that a batch of one teaches nothing, and "
            f"{_listed(clients.tolist())} would have such batches; set train.batch_size above 1 and "
            "partition.min_samples to 2 or more"
        )
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
    try:
        dataset = load_dataset(
            data.dataset,
            path=Path(data.path) if data.path else None,
            image_size=data.image_size,
            task=data.task,
            agreed=data.agreed,
            **data.options,
        )
    except ConfigError as error:  # a reader names its option, a configuration the whole key
        options = DATASET_OPTIONS[data.dataset]
        raise ConfigError(
            *(f"data.options.{text}" if text.partition(":")[0] in options else text for text in error.faults)
        ) from error
    return with_units(dataset, config)


def with_units(dataset: Dataset, config: Config) -> Dataset:
    """Return the data set with the configured offset and scale of a regression's targets."""
    return replace(dataset, target_offset=config.data.target_offset, target_scale=config.data.target_scale)
