"""``adapt``: a client that was never trained makes its private part from what a federation shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import GeneratorType
from typing import Any

import torch

from polyfed.base import files
from polyfed.base.errors import CheckpointError, ConfigError, DataError, RunDirError, StorageError
from polyfed.base.rng import Rng
from polyfed.base.types import Parts
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State, compact
from polyfed.core.requests import Exchange, drive
from polyfed.data.catalogue import TABLES
from polyfed.data.client import FederatedData
from polyfed.data.conform import tokens_of
from polyfed.data.readers.csv import open_csv
from polyfed.data.readers.parquet_table import open_parquet
from polyfed.data.readers.rules import Rules
from polyfed.data.schema import Feature, Schema
from polyfed.execute.drivers import Sequential
from polyfed.execute.local_training import bind, tree_to
from polyfed.execute.placement import Placement, threads
from polyfed.models.catalogue import ModelSpec
from polyfed.models.split import SplitModel
from polyfed.rounds.federation import (
    check_labelled,
    check_networks,
    check_training,
    client_at_work,
    configured_task,
    configured_training,
    deal_own,
    label_faults,
    plan_of,
)
from polyfed.rounds.own_file import kind_of_file, options_of_file, read_own
from polyfed.rounds.scoring import Scorer, majority
from polyfed.storage.run_dir import SavedRun
from polyfed.trained.assemble import first_state
from polyfed.trained.load import check_saved
from polyfed.trained.model import TrainedModel
from polyfed.trained.preprocessing import TOKENIZER, Preprocessing
from polyfed.trained.single import SingleClient

#: What `adapt` writes beside the model: the numbers of `Adapted`.
NAME = "adapted.json"

#: By predictor, the first being the headline: the value of each metric; None where it is not defined.
Scores = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Adapted:
    """A new client's scores on its own test rows: adapted, trained alone, and without any training.

    Args:
        algorithm: the algorithm of the run.
        model: the client's network.
        round: the round of the run whose shared part the client received.
        rounds: the rounds for which the client trained, adapted and alone.
        train_rows: number of its training rows.
        test_rows: number of its test rows.
        adapted: the scores with what the federation shares.
        alone: the scores of the same network, trained for as many rounds on the same rows, if they have labels, by
            ``standalone``.
        baseline: the scores of the most frequent training class, or of the mean training target.
        note: what a reader must know of this algorithm; None for nothing.
        folder: where the model lies; None if it was not kept.
    """

    algorithm: str
    model: str
    round: int
    rounds: int
    train_rows: int
    test_rows: int
    adapted: Scores
    alone: Scores
    baseline: Mapping[str, float | None]
    note: str | None = None
    folder: Path | None = None

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each way and predictor: ``way``, ``predictor``, and each metric."""
        ways: list[tuple[str, Scores]] = [("adapted", self.adapted), ("alone", self.alone)]
        ways.append(("baseline", {"": self.baseline}))
        return [{"way": way, "predictor": name, **found} for way, each in ways for name, found in each.items()]

    def trained_model(self, predictor: str | None = None) -> TrainedModel:
        """Return the adapted model as a module, as `polyfed.trained.load.trained_model` does.

        Raises:
            StorageError: the model was not kept.
        """
        from polyfed.trained.load import trained_model

        if self.folder is None:
            raise StorageError("the adapted model was not kept; give adapt a folder, out=")
        return trained_model(self.folder, predictor=predictor)


def adapt(
    run_dir: Path | str,
    data: Path | str,
    *,
    rounds: int | None = None,
    model: str | None = None,
    capacity: float | None = None,
    out: Path | str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Adapted:
    """Let a client that was never trained make its private part from what a run shares, with its own data.

    The client receives what the server would send it next, trains, and sends nothing back, so that nothing shared
    changes. It trains in the rounds after the kept round, but its learning rates begin their schedules anew.

    Args:
        run_dir: the run directory of a simulation or of a deployment's server, which no run is writing to.
        data: the client's rows: a .csv, .parquet or .npz file, or a folder of images by class.
        rounds: the rounds for which it trains; None takes the number in which a client of the run took part on average.
        model: the client's network; None takes that of the run's first client.
        capacity: the size of its submodel, in (0, 1]; None takes that of the run's first client.
        out: a folder, new or empty, for the model; None keeps no model.
        options: options of the reader of ``data``, before those of the run; None as a value removes the run's.
        device: as ``run.device``.

    Raises:
        RunDirError: the folder holds no run, or a run is in progress.
        CheckpointError: there is no checkpoint, it is damaged, or code or frozen weights changed since.
        DataError: the data cannot be read, or do not fit those of the run.
        ModelError: the algorithm cannot train this network together with the run's.
        ConfigError: an option, number or network that cannot be.
        StorageError: ``out`` is not empty, or cannot be written.
    """
    folder, path = Path(run_dir), Path(data)
    if not (folder / "config.toml").exists():
        raise RunDirError(f"{folder} holds no run: it has no config.toml; give the run directory of a run")
    config = Config.load(folder / "config.toml")
    if rounds is not None and rounds < 1:
        raise ConfigError(f"rounds: got {rounds}; expected at least 1")
    if capacity is not None and not 0 < capacity <= 1:
        raise ConfigError(f"capacity: got {capacity}; expected a number above 0 and at most 1")
    kept = None if out is None else Path(out)
    if kept is not None and kept.exists() and (not kept.is_dir() or any(kept.iterdir())):
        raise StorageError(f"{kept} exists already; remove it, or choose another --out")
    placement = Placement.of(device, config.run.precision)
    with threads(config.run.threads or torch.get_num_threads()), placement.defaults():
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        with closing(SavedRun(folder, algorithm.states, "kept")) as saved:
            shared = _Shared.of(folder, config, saved)
        site = _Site.of(shared, path, options or {}, model, capacity, placement)
        return site.adapted(algorithm, rounds, kept)


@dataclass(frozen=True)
class _Shared:
    """What a client gets of a run: its configuration, task and schema, and the server's state.

    Args:
        config: the configuration, without what belongs to single clients; ``data.agreed`` is the run's schema.
        task: the common knowledge of server and clients.
        server: the server's state at the end of ``round``.
        round: the kept round.
    """

    config: Config
    task: Task
    server: State
    round: int

    @classmethod
    def of(cls, folder: Path, config: Config, saved: SavedRun) -> _Shared:
        """Read a run directory."""
        if (facts := saved.progress.get("task")) is not None:  # a deployed server, which has no data
            schema = Schema() if facts["agreed"] is None else Schema.model_validate(facts["agreed"]["meaning"])
            shape, outputs = tuple(facts["input_shape"]), facts["num_classes"]
            dtype = torch.int64 if facts["tokens"] else None
            agreed = schema.over(config.data.agreed)
            if config.data.task == "classification" and not agreed.classes:
                raise CheckpointError(
                    f"{folder} does not name the classes and columns, as its sites kept them private: a new client's "
                    "could mean something else; put [data.agreed] into the configuration of the deployment"
                )
        else:
            about = Preprocessing.read(folder)
            shape, outputs, agreed = about.input_shape, about.num_classes, _schema(about)
            dtype = about.input_dtype
        task = configured_task(config, shape, outputs, dtype, agreed.feature_columns)
        if facts is None:
            check_saved(folder, config, task, saved)
            if agreed.form.startswith("tokens of "):  # new texts become tokens by what the run learnt
                given = {**config.data.options, "tokenizer": str((folder / TOKENIZER).absolute())}
                config = config.replace("data", options=given)
        else:
            task = replace(task, architectures=tuple(map(ModelSpec.parse, facts["architectures"])))
        config = config.replace("train", clients={}).replace("clients", names=None).replace("data", agreed=agreed)
        return cls(config, task, saved.server, saved.round)


def _schema(about: Preprocessing) -> Schema:
    """Return what the classes, columns and pixels of a run mean."""
    form: str = about.kind
    if about.kind == "image":
        form += " of bytes" if about.dtype == "uint8" else " of numbers"
    elif about.kind == "series":
        form += " NCT" if about.channels_first else " NTC"
    elif "text" in about.options:
        form = tokens_of(about.tokenizer)
    columns = tuple(Feature(name=column.name, categories=column.categories or ()) for column in about.columns)
    return Schema(classes=about.classes, columns=columns, mean=about.mean, std=about.std, form=form)


def _options(config: Config, path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the reader: the client's own, then the run's.

    A table of one client need not have the columns that the run's options name as group, test rows or to be ignored.
    """
    kind = kind_of_file(path)
    found = options_of_file(config, kind, {})
    if kind in TABLES and path.is_file() and found.get("header") is not False:
        how = {key: found[key] for key in ("delimiter", "encoding") if key in found} | {
            key: own[key] for key in ("delimiter", "encoding") if own.get(key) is not None
        }
        sheet = open_csv(path, header=True, rules=Rules(), **how) if kind == "csv" else open_parquet(path)
        for key in ("group", "test"):
            if isinstance(found.get(key), str) and found[key] not in sheet.names:
                del found[key]
        if "ignore" in found:
            found["ignore"] = [name for name in found["ignore"] if not isinstance(name, str) or name in sheet.names]
    return {key: value for key, value in {**found, **own}.items() if value is not None}


@dataclass(frozen=True)
class _Site:
    """The new client.

    Args:
        shared: what it gets of the run.
        data: its rows.
        about: what turns new rows of it into inputs.
        spec: its network.
        info: what the server would know of it.
        placement: where it computes.
    """

    shared: _Shared
    data: FederatedData
    about: Preprocessing
    spec: ModelSpec
    info: ClientInfo
    placement: Placement

    @classmethod
    def of(
        cls,
        shared: _Shared,
        path: Path,
        own: Mapping[str, Any],
        model: str | None,
        capacity: float | None,
        placement: Placement,
    ) -> _Site:
        """Read the client's rows, and split them as those of a client of this number."""
        config, task = shared.config, shared.task
        number = config.clients.count  # no client of the run has it, and so none has its draws
        options = _options(config, path, own)
        dataset = read_own(config, path, options)
        have = dataset.input_shape, dataset.num_classes, dataset.input_dtype
        if have != (task.input_shape, task.num_classes, task.dtype):
            raise DataError(
                f"{path}: examples of shape {have[0]} in {have[1]} classes; the run was trained on {task.input_shape} "
                f"in {task.num_classes}; correct the file, or the options of its reader"
            )
        data = FederatedData(dataset, deal_own(config, dataset, number), augment=config.data.augment)
        about = Preprocessing.of(dataset, kind_of_file(path), options, image_size=config.data.image_size)
        spec = config.clients.model(0) if model is None else ModelSpec.parse(model)
        size = config.clients.capacity(0) if capacity is None else capacity
        return cls(shared, data, about, spec, ClientInfo(number, size, str(spec)), placement)

    @cached_property
    def task(self) -> Task:
        """The task, this client's network included."""
        task = self.shared.task
        return replace(task, architectures=tuple(dict.fromkeys((*task.architectures, self.spec))))

    def adapted(self, algorithm: Algorithm, rounds: int | None, out: Path | None) -> Adapted:
        """Train the client with what the run shares, and alone, and test both."""
        shared, config = self.shared, self.shared.config
        dataset = self.data.dataset
        if faults := label_faults(config, algorithm, dataset.num_unlabelled, len(dataset)):
            raise ConfigError(*faults)
        check_labelled(dataset, self.data.partition, ("that adapts",))
        check_networks(algorithm, self.task, dataset)
        stateless = algorithm.shared_networks
        if stateless and self.spec not in shared.task.architectures:
            names = ", ".join(map(str, shared.task.architectures))
            raise ConfigError(
                f"model: got {self.spec}; {algorithm.name} gives every client the server's network, and the run has "
                f"{names}; leave --model out, or choose one of these"
            )
        count = self._rounds if rounds is None else rounds
        by = _Way(self, algorithm, config, self.task)
        check_training(config, algorithm, by.models, self.data.train(0))
        silent = False

        def received(round_: int) -> Message | None:
            nonlocal silent
            message = by.next_message(round_)
            silent = silent or message is None
            return message

        private = by.train(0 if stateless else count, received)
        last = shared.round + (0 if stateless else count)
        parts = by.parts(private, algorithm.message_for(shared.server, self.info), last)
        apart = config.with_algorithm("standalone")
        single = _Way(self, load_algorithm("standalone", apart.algorithm.keys), apart, self.task)
        alone = single.parts(single.train(count, lambda _: None), None, last)
        if stateless:
            note = f"{algorithm.name} has no private network: the adapted model is the server's, as it is"
        else:
            note = f"{algorithm.name} sends this client nothing: it trains alone" if silent else None
        partition = self.data.partition
        rows = partition.train(0), partition.evaluated(0, final=True)
        train, test = (dataset.y[torch.tensor(some)] for some in rows)
        found = Adapted(
            algorithm.name,
            str(self.spec),
            shared.round,
            count,
            len(train),
            len(test),
            by.scores(parts),
            single.scores(alone),
            majority(train, test, dataset.num_classes, config.metrics),
            note,
            out,
        )
        if out is not None:
            stats = self.data.stats(0) if dataset.is_standardised else None
            SingleClient.keep(
                out,
                config,
                self.task,
                self.about,
                stats,
                parts,
                client=self.info.id,
                round_=last,
                model=self.spec,
                capacity=self.info.capacity,
            )
            told = files.nulled({key: value for key, value in asdict(found).items() if key != "folder"})
            files.write(out / NAME, (json.dumps(told, indent=2) + "\n").encode(), mode=0o600)  # as what `keep` wrote
        return found

    @property
    def _rounds(self) -> int:
        """The number of rounds in which a client of the run took part on average, until the kept round."""
        clients = self.shared.config.clients
        return max(1, round(self.shared.round * clients.wanted / clients.count))


@dataclass(frozen=True)
class _Way:
    """One way to train the client.

    Args:
        site: the client.
        algorithm: the algorithm.
        config: the configuration for it.
        task: the common knowledge of server and clients.
    """

    site: _Site
    algorithm: Algorithm
    config: Config
    task: Task

    @cached_property
    def models(self) -> Mapping[str, SplitModel]:
        """The networks of the client's parts."""
        return self.algorithm.models_at(self.task, self.task.build(self.site.spec), self.site.info.capacity)

    @cached_property
    def driver(self) -> Sequential:
        """What carries out its requests."""
        return Sequential(self.site.placement)

    def at_work(self, round_: int) -> LocalClient:
        """Return the client in a round after the kept one, with the rates of one that begins; round 0 creates it."""
        data = self.site.data.train(0)
        data = data.labelled() if self.algorithm.reads_labels else data
        local = client_at_work(self.site.info, self.models, data, self.algorithm, self.config, round_)
        keys = configured_training(self.config, self.site.info)
        return replace(local, plan=plan_of(keys, max(0, round_ - self.site.shared.round), self.config.run.rounds))

    def next_message(self, round_: int) -> Message | None:
        """Return what the server would send if the client took part alone in a round after the kept one.

        Raises:
            ConfigError: the server would not ask it.
        """
        rng = Rng((self.config.run.seed,)).at("round", round_, "server")
        cohort = Cohort((self.site.info,), round_, self.config.run.rounds, rng)
        for request in _requests(self.algorithm.server_round(self.site.shared.server, cohort), self.driver.perform):
            if isinstance(request, Exchange) and self.site.info.id in request.down:
                return request.down[self.site.info.id]
        raise ConfigError(f"{self.algorithm.name}: the server asks a new client for nothing, so it cannot adapt")

    def train(self, rounds: int, received: Callable[[int], Message | None]) -> State:
        """Return the private state after some rounds; uploads are thrown away.

        Args:
            rounds: the number of rounds.
            received: returns the message of a round.
        """
        state, client = first_state(self.algorithm, self.at_work), self.site.info.id
        for round_ in range(self.site.shared.round + 1, self.site.shared.round + rounds + 1):
            call = self.algorithm.client_round(state, received(round_), self.at_work(round_))
            state = compact(self.driver.play({client: call})[client].private)
        return state

    @torch.no_grad()
    def parts(self, private: State, message: Message | None, round_: int) -> Parts:
        """Return the parts with which the client predicts after a round."""
        return drive(self.algorithm.predictor_parts(private, message, self.at_work(round_)), self.driver.perform)

    def scores(self, parts: Parts) -> Scores:
        """Return the scores of these parts on the client's test rows."""
        placement = self.site.placement
        scorer = Scorer(self.algorithm, placement, self.driver.costs, self.config)
        found = scorer.score(bind(self.models, tree_to(parts, placement)), self.site.data.evaluated(0, final=True))
        metrics = self.config.metrics
        return {name: {metric: found.value(metric, name) for metric in metrics} for name in found.predictors}


def _requests(steps: Any, perform: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield the requests of a coroutine until one cannot be answered here: an exchange, which is the last."""
    if not isinstance(steps, GeneratorType):
        return
    answer: Any = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration:
            return
        yield request
        if isinstance(request, Exchange):
            steps.close()
            return
        answer = perform(request)
