"""The sections of a configuration: their keys, defaults and ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic.functional_serializers import model_serializer
from pydantic_core import core_schema

from polyfed.base.errors import ModelError
from polyfed.base.ranges import Count, NonNegative, Portion, Portions, Positive, Rate
from polyfed.base.text import hint
from polyfed.config.faults import dotted, facts, shown
from polyfed.config.profiles import TABLES, read_profiles
from polyfed.core.schedule import SCHEDULE_KEYS, OptimizerName, Schedule, ScheduleKind
from polyfed.data.catalogue import (
    DATASET_OPTIONS,
    DATASETS,
    IMAGELESS,
    INSIDE,
    NUMERIC,
    PARTITION_OPTIONS,
    PARTITIONS,
    SIZES,
    option_fault,
    option_misfits,
)
from polyfed.data.catalogue import TABLES as OWN_TABLES
from polyfed.data.schema import Schema
from polyfed.metrics.catalogue import DEFAULTS, METRICS, TaskKind, aim, of_task
from polyfed.models.catalogue import ModelSpec


def _spec(value: object) -> ModelSpec:
    try:
        spec = ModelSpec.parse(value)  # pyright: ignore[reportArgumentType]
        spec.check()
    except ModelError as error:
        raise ValueError(str(error)) from error
    return spec


def _one_of(known: Mapping[str, Any], what: str, own: tuple[str, ...] = (), advice: str = "") -> Any:
    """Check for a name in ``known``, or the path of a file of the user's own with an ending in ``own``."""

    def check(value: object) -> object:
        if isinstance(value, str) and value not in known and not value.endswith(own):
            raise ValueError(f"unknown {what} {value!r}{hint(value, known)} known: {', '.join(known)}{advice}")
        return value

    return BeforeValidator(check)


def _device(value: object) -> object:
    head, _, number = value.partition(":") if isinstance(value, str) else ("cpu", "", "")
    if head not in ("auto", "cpu", "cuda") or (number and (head != "cuda" or not number.isdecimal())):
        raise ValueError(f"got {value!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:1'")
    return value


def _plain_name(value: object) -> object:
    if isinstance(value, str) and (not value or value.startswith(".") or set(value) & set("/\\\0\n")):
        raise ValueError(f"got {value!r}; expected a name that can be a folder: no slash, no leading dot")
    return value


def _aim(value: str) -> str:
    aim(value)
    return value


class _AsSpec:
    """Reads and writes a ModelSpec as its text; pydantic cannot handle the recursive type of its options."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        text = core_schema.plain_serializer_function_ser_schema(str)
        return core_schema.no_info_plain_validator_function(_spec, serialization=text)


Model = Annotated[ModelSpec, _AsSpec]


class Section(BaseModel):
    """Base of the sections: frozen, without unknown keys, without silent conversion of values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return facts(value)


class RunSection(Section):
    """Section ``[run]``: the length, place and precision of the run.

    Args:
        name: name of the run; part of the default run directory.
        seed: seed of all randomness, except of the partition if ``partition.seed`` is given.
        rounds: number of rounds.
        eval_every: rounds between two evaluations; the last round is always evaluated.
        eval_clients: evaluate a sample of this many clients instead of all.
        gradient_clients: at each evaluation, measure the gradient of the whole local model at a sample of this many
            clients; None measures none.
        driver: how client work is executed; "auto" chooses by a rule on the kind of network and the size of a step.
        device: "auto", "cpu", "cuda" or "cuda:1".
        precision: precision of the arithmetic in training.
        threads: threads of torch for each client; None divides the machine's cores by the size of the cohort, at least
            one. The resolved configuration records the number, as the last bit of a result depends on it.
        server_threads: threads of torch for the server's own work.
        workers: processes that train clients at the same time, with ``threads`` (or one GPU) each; None takes as many
            as there are cores for under "auto", and 1 for other drivers. No result depends on it.
        memory: GB that a stack of clients may take.
        checkpoint_every: rounds between two checkpoints.
        metrics: names of `polyfed list metrics`, the headline first; None takes the accuracy, or for a regression rmse,
            mae and r2.
        targets: accuracies as fractions, or texts such as "auroc=0.9"; the summary reports the first round, bytes and
            FLOPs that reach each.
        keep: "best" keeps, beside the last round's model, that of the evaluated round whose ``monitor`` is best on
            validation rows, private states included; needs ``data.validation_fraction``.
        keep_rounds: rounds, from 0, at whose end the server's state is kept beside the checkpoints, to look into later.
        monitor: the metric that chooses a round; None takes the headline. Its mean over clients counts.
        patience: evaluations without improvement after which the run ends; None plays all rounds.
        min_delta: the least improvement that ``patience`` counts, in the unit of the metric.
        predictions: whether the last evaluation stores every test row's scores in ``predictions.parquet``.
        store: where the clients' private states are kept.
        controls: after the run, also run the ``[controls]`` on the same splits.
    """

    name: Annotated[str, BeforeValidator(_plain_name)] = "run"
    seed: Count = 0
    rounds: Positive = 100
    eval_every: Positive = 10
    eval_clients: Positive | None = None
    gradient_clients: Positive | None = None
    driver: Literal["auto", "sequential", "batched"] = "auto"
    device: Annotated[str, BeforeValidator(_device)] = "cpu"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    threads: Positive | None = None
    server_threads: Positive = 1
    workers: Positive | None = None
    memory: Rate = 2.0
    checkpoint_every: Positive = 10
    metrics: tuple[Annotated[str, _one_of(METRICS, "metric")], ...] | None = None
    targets: tuple[Portion | Annotated[str, AfterValidator(_aim)], ...] = ()
    keep: Literal["last", "best"] = "last"
    keep_rounds: tuple[Count, ...] = ()
    monitor: Annotated[str, _one_of(METRICS, "metric")] | None = None
    patience: Positive | None = None
    min_delta: NonNegative = 0.0
    predictions: bool = False
    store: Literal["memory", "disk"] = "memory"
    controls: bool = False

    @property
    def selects(self) -> bool:
        """Whether validation rows choose a round, so that test rows are kept for the end of the run."""
        return self.keep == "best" or self.patience is not None

    def measured(self, task: TaskKind) -> tuple[str, ...]:
        """Return the metrics of a run with this task, and the accuracy, which every classification has."""
        always = ("accuracy",) if task == "classification" else ()
        return tuple(dict.fromkeys((*always, *(DEFAULTS[task] if self.metrics is None else self.metrics))))

    def selection_misfits(self, task: TaskKind, validation_fraction: float) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together in the choice of a round."""
        if self.selects and not validation_fraction:
            key, value = ("keep", '"best"') if self.keep == "best" else ("patience", self.patience)
            yield (
                key,
                f"got {value} without data.validation_fraction; test rows choose no round: set a fraction of the "
                "training rows to choose by, such as 0.2",
            )
        if self.selects and self.rounds % self.eval_every:
            yield (
                "rounds",
                f"got {self.rounds} with run.eval_every = {self.eval_every}; expected a multiple of it, so that the "
                "round that is chosen does not depend on where the run ends",
            )
        for key, value in (("monitor", self.monitor), ("min_delta", self.min_delta or None)):
            if value is not None and (self.patience is None if key == "min_delta" else not self.selects):
                belongs = "run.patience" if key == "min_delta" else 'run.keep = "best" or run.patience'
                yield key, f"got {shown(value)}; it belongs to {belongs}; set that, or remove the key"
        if self.monitor is not None and self.monitor not in self.measured(task):
            known = self.monitor in of_task(task)
            advice = f"add {self.monitor!r} to run.metrics" if known else f"a {task} has no {self.monitor!r}"
            yield (
                "monitor",
                f"got {self.monitor!r}; the run measures {', '.join(self.measured(task))}; {advice}",
            )

    def misfits(self, task: TaskKind) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for metrics and targets that do not fit the task or one another."""
        known = of_task(task)
        if beyond := [round_ for round_ in self.keep_rounds if round_ > self.rounds]:
            yield "keep_rounds", f"got {beyond[0]}; expected rounds from 0 to run.rounds, {self.rounds}"
        if list(self.keep_rounds) != sorted(set(self.keep_rounds)):
            yield "keep_rounds", f"got {shown(self.keep_rounds)}; expected rounds in ascending order, each once"
        if self.metrics is not None and (not self.metrics or len(set(self.metrics)) < len(self.metrics)):
            yield "metrics", f"got {shown(self.metrics)}; expected different names, at least one"
        for place, name in enumerate(self.metrics or ()):
            if name not in known:
                yield f"metrics[{place}]", f"got {name!r}; a {task} has the metrics {', '.join(known)} (data.task)"
        measured = self.measured(task)
        for place, target in enumerate(self.targets):
            name, value = aim(target)
            if name not in measured:
                advice = f"add {name!r} to run.metrics" if name in known else f"a {task} has no {name!r}"
                yield (
                    f"targets[{place}]",
                    f"got {shown(target)}, which is of the metric {name!r}; the run measures {', '.join(measured)}; "
                    f"{advice}",
                )
            elif METRICS[name].fraction and not 0 <= value <= 1:
                yield f"targets[{place}]", f"got {shown(target)}; {name!r} lies between 0 and 1"


class DataSection(Section):
    """Section ``[data]``: the data set and how a client's examples are split.

    Args:
        dataset: a name of `polyfed list datasets`.
        path: file or folder; None looks in $POLYFED_DATA, then downloads. Relative to the configuration file.
        test_fraction: fraction of a client's examples that are test examples, above 0 and below 1.
        validation_fraction: above 0, this fraction of a client's training examples takes the place of its test
            examples, which are then unused: for choosing hyper-parameters. With ``run.keep = "best"`` or
            ``run.patience`` these rows choose the round, and the test examples are scored at the end of the run.
        split: "pooled" divides each client's examples; "official" deals the official test rows; "groups" keeps all
            rows of a unit, such as a patient, on one side; "time" tests on the later rows.
        augment: whether training uses random crops and flips, for data sets that permit them.
        image_size: side of the images in pixels; None leaves the choice to the data set.
        task: whether labels are classes or numbers to predict.
        target_offset: for a regression, what is taken off every target before training; predictions get it back.
        target_scale: for a regression, what targets are then divided by, so that they are of the size of 1.
        options: options of the reader, such as ``label`` and ``header`` of a CSV file.
        agreed: the classes, columns and categories of all sites, in order, and the mean and deviation of pixels; any
            part may be left out. `polyfed data CONFIG --agreed` prints them.
    """

    dataset: Annotated[str, _one_of(DATASETS, "data set")] = "digits"
    path: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    split: Literal["pooled", "official", "groups", "time"] = "pooled"
    augment: bool = True
    image_size: Positive | None = None
    task: TaskKind = "classification"
    target_offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    target_scale: Rate = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    agreed: Schema | None = None

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together."""
        takes = DATASET_OPTIONS[self.dataset]
        for key, value in self.options.items():
            if key not in takes:
                yield (
                    f"options.{key}",
                    f"unknown option of data set {self.dataset!r}{hint(key, takes)} it has "
                    f"{', '.join(takes) or 'none'}",
                )
            elif fault := option_fault(self.dataset, key, value):
                yield f"options.{key}", fault
        yield from ((f"options.{key}", text) for key, text in option_misfits(self.dataset, self.options))
        if self.dataset not in (*SIZES, "python") and self.path is None:
            yield "path", f"missing; data set {self.dataset!r} needs the path of your file"
        if self.dataset in INSIDE and self.path is not None:
            yield "path", f"got {self.path!r}; data set {self.dataset!r} comes with polyfed and takes no path"
        if self.dataset == "python" and (self.path or self.image_size):
            yield "path" if self.path else "image_size", "data set 'python' is given by a program; leave it out"
        if self.dataset in (*OWN_TABLES, *IMAGELESS) and self.image_size is not None:
            yield "image_size", f"got {self.image_size}; data set {self.dataset!r} has no images"
        if self.task == "regression" and self.dataset not in NUMERIC:
            yield "task", f"got 'regression'; the labels of data set {self.dataset!r} are classes"
        elif self.task == "regression" and self.options.get("unlabelled"):
            yield "options.unlabelled", "got true; a regression needs the target of every row: remove the key"
        if self.task != "regression":
            given = {"target_offset": self.target_offset, "target_scale": self.target_scale - 1}
            yield from ((key, 'belongs to task = "regression"; remove the key') for key, by in given.items() if by)


#: Defaults of the keys that belong to a single kind of partition.
_PARTITION_DEFAULTS: Mapping[str, Any] = {"classes_per_client": 2, "alpha": 0.5}


class PartitionSection(Section):
    """Section ``[partition]``: how examples are dealt to clients.

    Args:
        kind: a name of `polyfed list partitions`.
        seed: None takes ``run.seed``.
        min_samples: fewest training examples of a client.
        samples_per_client: most training and test examples of a client together.
        classes_per_client: for kind "classes": number of classes of a client; 2 if not given.
        alpha: for the Dirichlet kinds and "resampled": concentration, 0.5 if not given; a small value is uneven.
        groups: for kind "natural": "largest" permits fewer clients than groups.
        tests: for kind "balanced-dirichlet" with official test rows: "independent" deals these by class mixes of
            their own, so that a client is tested on other classes than it trains on.
    """

    kind: Annotated[str, _one_of(PARTITIONS, "partition")] = "classes"
    seed: Count | None = None
    min_samples: Positive = 2
    samples_per_client: Positive | None = None
    classes_per_client: Positive | None = None
    alpha: Rate | None = None
    groups: Literal["largest"] | None = None
    tests: Literal["independent"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kind = value.get("kind", "classes")  # pyright: ignore[reportUnknownVariableType,reportUnknownMemberType]
        takes = PARTITION_OPTIONS.get(kind, ()) if isinstance(kind, str) else ()
        return {key: _PARTITION_DEFAULTS[key] for key in takes if key in _PARTITION_DEFAULTS} | dict(value)  # pyright: ignore[reportUnknownArgumentType]

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for keys of another kind."""
        takes = PARTITION_OPTIONS[self.kind]
        for key in sorted({key for keys in PARTITION_OPTIONS.values() for key in keys}):
            if key not in takes and getattr(self, key, None) is not None:
                *others, last = (repr(kind) for kind, keys in PARTITION_OPTIONS.items() if key in keys)
                kinds = f"{', '.join(others)} and {last}" if others else last
                yield key, f"got {shown(getattr(self, key))}; it belongs to kind {kinds}, not to {self.kind!r}"
        if self.kind == "resampled" and self.samples_per_client is None:
            yield (
                "samples_per_client",
                "missing; kind 'resampled' draws this number of training and test examples for each client",
            )


class ClientsSection(Section):
    """Section ``[clients]``. Client i has ``models[i % len]`` and ``capacities[i % len]``.

    Args:
        count: number of clients.
        participation: fraction of the clients that train in a round.
        selection: how these are drawn, without replacement: all equally; in proportion to their training examples; in
            proportion to their capacities; equally, and of each capacity as many as its share of the clients; equally
            among the clients of the largest capacity, while no other client trains; equally among the clients whose
            device is available.
        models: names of `polyfed list models`, tables of a name and options, or "package.module:attribute".
        capacities: fractions of a full-size model that clients can hold.
        names: a name for each client, for tables, pictures and results; without names, groups of the data name them.
    """

    count: Positive = 10
    participation: Portion = 1.0
    selection: Literal["uniform", "by-size", "by-capacity", "stratified", "largest", "available"] = "uniform"
    models: Annotated[tuple[Model, ...], Field(min_length=1)] = (ModelSpec("cnn5"),)
    capacities: Portions = (1.0,)
    names: tuple[Annotated[str, Field(min_length=1)], ...] | None = None

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for names that do not fit the clients."""
        names = self.names or ()
        if self.names is not None and len(names) != self.count:
            yield "names", f"got {len(names)} names; expected {self.count}, one for each client (clients.count)"
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            yield "names", f"got {twice[0]!r} twice; expected different names"

    @property
    def wanted(self) -> int:
        """The number of clients that a round wants: max(1, round(C N))."""
        return max(1, round(self.participation * self.count))

    def model(self, client: int) -> ModelSpec:
        """Return the architecture of a client's network."""
        return self.models[client % len(self.models)].architecture

    def weights(self, client: int) -> str | None:
        """Return the file of the weights that a client's network starts with; None if it starts with a draw."""
        return self.models[client % len(self.models)].weights

    @property
    def architectures(self) -> tuple[ModelSpec, ...]:
        """The different architectures of the clients, in order of the clients."""
        return tuple(dict.fromkeys(spec.architecture for spec in self.models[: self.count]))

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of clients that have each of the architectures."""
        found = dict.fromkeys(self.architectures, 0)
        for place, spec in enumerate(self.models[: self.count]):  # its clients are place, place + len(models), ...
            found[spec.architecture] += len(range(place, self.count, len(self.models)))
        return tuple(found.values())

    def capacity(self, client: int) -> float:
        """Return the fraction of a full-size model that a client can hold."""
        return self.capacities[client % len(self.capacities)]


_TABLE = _one_of(TABLES, "table of devices", (".csv",), "; give your own table as the path of a .csv file")


class DevicesSection(Section):
    """Section ``[devices]``: the clients' devices, for the simulated clock; docs/clocks.md defines every term.

    ``deadline``, ``oversample`` and ``min_replies`` mean the same as in a deployment's ``[rounds]``.

    Args:
        profiles: a table that comes with polyfed, or a .csv file of your own, relative to the configuration file.
        deal: how devices are dealt: drawn by the shares of the table, or row i mod length for client i.
        start_hour: hour of the day at which the run begins.
        dropout: probability that a client of the cohort vanishes without an answer.
        deadline: simulated seconds after which a round ends with the replies that came; None waits for all replies.
        oversample: share of further clients asked in a round, which ends when enough have answered.
        min_replies: with fewer replies a round is void: the server's state stays what it was.
    """

    profiles: Annotated[str, _TABLE] = "cross-device"
    deal: Literal["random", "in-turn"] = "random"
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    deadline: Rate | None = None
    oversample: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    min_replies: Positive = 1

    def misfits(self, wanted: int | None) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together, with ``wanted`` clients in a round if that is known."""
        yield from (("profiles", text) for text in read_profiles(self.profiles)[1])
        if self.dropout and self.deadline is None:
            yield (
                "dropout",
                f"got {self.dropout} without devices.deadline; a round with a vanished client would never end; set a "
                "deadline",
            )
        if wanted is not None and self.min_replies > wanted:
            yield "min_replies", f"got {self.min_replies}; expected at most {wanted}, the clients that a round wants"

    def asked(self, clients: ClientsSection) -> int:
        """Return how many clients a round asks."""
        return min(clients.count, oversampled(clients.wanted, self.oversample))


def oversampled(wanted: int, share: float) -> int:
    """Return ``wanted`` plus a share of it, rounded up: 10 and 0.1 give 11, in exact decimal arithmetic."""
    return math.ceil(round(wanted * (1 + share), 9))


class ScheduleSection(Section):
    """A learning-rate schedule over rounds; `polyfed.core.schedule.Schedule` describes the fields.

    ``rounds`` of None takes ``run.rounds``; the resolved configuration has the number.
    """

    kind: ScheduleKind = "constant"
    rounds: Positive | None = None
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup: Count = 0
    every: Positive | None = None
    milestones: tuple[Positive, ...] = ()
    gamma: Portion = 0.1

    @model_validator(mode="before")
    @classmethod
    def _a_kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def misfits(self, rounds: int | None) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together, with ``rounds`` of the run if they are known."""
        takes = SCHEDULE_KEYS[self.kind]
        for key in sorted(self.model_fields_set - {"kind", *takes}):
            of = " and ".join(repr(kind) for kind, keys in SCHEDULE_KEYS.items() if key in keys)
            if getattr(self, key) != type(self).model_fields[key].default:
                yield key, f"got {shown(getattr(self, key))}; it belongs to kind {of}, not to {self.kind!r}"
        if self.kind == "step" and (self.every is None) == (not self.milestones):
            yield "every", 'kind "step" needs one of every = 30 and milestones = [60, 80]'
        if self.kind == "warmup" and not self.warmup:
            yield "warmup", 'missing; kind "warmup" needs the number of rounds, such as 5'
        horizon = self.rounds if self.rounds is not None else rounds
        if self.kind == "cosine" and horizon is not None and self.warmup >= horizon:
            yield "warmup", f"got {self.warmup}; expected fewer than the schedule's {horizon} rounds"

    def resolved(self, rounds: int) -> ScheduleSection:
        """Return the schedule with its horizon; ``rounds`` is that of the run."""
        return self.model_copy(update={"rounds": rounds}) if self.kind == "cosine" and self.rounds is None else self

    def factor(self, round_: int, rounds: int) -> float:
        """Return the factor of a round of a run of ``rounds``."""
        return Schedule(**self.resolved(rounds).model_dump(exclude_none=True)).factor(round_)


class PartSection(Section):
    """Section ``[train.parts.NAME]``: the rate of one part of the model.

    Args:
        lr: its learning rate; None takes the algorithm's for this part, or ``train.lr``.
        schedule: its schedule; None takes ``train.schedule``.
    """

    lr: Rate | None = None
    schedule: ScheduleSection | None = None


def _classes(value: object) -> object:
    """Check class weights: "balanced", a list by number, or a table by name."""
    if value == "balanced":
        return value
    given = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, str) or not isinstance(given, Iterable) or not (numbers := list(given)):
        raise ValueError(f"got {shown(value)}; expected 'balanced', a list of a number for each class, or a table")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"got {shown(value)}; expected numbers above 0: a batch of no weight has no mean")
    if isinstance(value, Mapping):
        return {str(key): float(number) for key, number in value.items()}
    return tuple(map(float, numbers))


#: "balanced", the weight of each class in order of their numbers, or weights by the name of a class.
ClassWeights = Annotated[Any, BeforeValidator(_classes)]


class TrainKeys(Section):
    """How a client trains; `polyfed.core.plan.LocalSGD` describes most fields.

    Args:
        schedule: how the learning rate changes over rounds; None is constant.
        parts: rates and schedules of single parts of the model, by name.
        class_weights: weights of classes in supervised cross-entropy; "balanced" weighs by the client's own rows.
    """

    epochs: Positive | None = None
    steps: Positive | None = None
    batch_size: Positive = 64
    optimizer: OptimizerName = "sgd"
    lr: Rate = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    clip: NonNegative = 0.0
    schedule: ScheduleSection | None = None
    parts: dict[str, PartSection] = Field(default_factory=dict)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: ClassWeights | None = None

    def clashes(self, rounds: int | None, task: str | None) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together, with ``run.rounds`` and ``data.task`` if known."""
        if self.epochs is not None and self.steps is not None:
            yield "steps", f"got {self.steps} beside epochs = {self.epochs}; expected one of the two"
        if self.optimizer != "sgd" and self.momentum:
            yield "momentum", f'got {self.momentum}; it belongs to optimizer = "sgd", not to "{self.optimizer}"'
        for place, schedule in self.schedules():
            yield from ((f"{place}.{key}", text) for key, text in schedule.misfits(rounds))
        if task == "regression":
            needs_classes = {"label_smoothing": self.label_smoothing, "class_weights": self.class_weights}
            for key, value in needs_classes.items():
                if value:
                    yield key, f"got {shown(value)}; a regression has no classes (data.task): remove the key"

    def schedules(self) -> Iterator[tuple[str, ScheduleSection]]:
        """Yield the key and the value of each schedule."""
        if self.schedule is not None:
            yield "schedule", self.schedule
        for name, part in self.parts.items():
            if part.schedule is not None:
                yield f"parts.{name}.schedule", part.schedule

    def with_horizons(self, rounds: int) -> Self:
        """Return these keys with the horizon of every schedule; ``rounds`` is that of the run."""
        changed: dict[str, Any] = {}
        if self.schedule is not None:
            changed["schedule"] = self.schedule.resolved(rounds)
        if any(part.schedule is not None for part in self.parts.values()):
            changed["parts"] = {
                name: part
                if part.schedule is None
                else part.model_copy(update={"schedule": part.schedule.resolved(rounds)})
                for name, part in self.parts.items()
            }
        return self.model_copy(update=changed) if changed else self


class TrainOverride(TrainKeys):
    """Section ``[train.clients.NAME]`` or ``[train.models.NAME]``: the keys of ``[train]`` that differ there."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_taken_away(cls, value: Any) -> Any:
        given = facts(value) if isinstance(value, Mapping) else {}
        empty = [key for key, found in given.items() if found is None or (key == "parts" and not found)]
        if empty:  # config.toml could not say so
            raise ValueError(
                f"got nothing for {', '.join(empty)}; a table of some clients takes no key away: give the value that "
                'holds there, such as schedule = "constant"'
            )
        return value  # pyright: ignore[reportUnknownVariableType]

    @property
    def given(self) -> dict[str, Any]:
        """The keys that were given, with their values."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}

    @model_serializer
    def _given_alone(self) -> dict[str, Any]:
        # All that is given counts, defaults too: [train] may have another value, and the hash must tell the two apart.
        return {key: _plain(value) for key, value in self.given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    return value.model_dump(exclude_none=True) if isinstance(value, Section) else value


class TrainSection(TrainKeys):
    """Section ``[train]``: how clients train, and which clients train otherwise.

    Args:
        models: keys that differ for clients with a network, by the network's name, with or without its options.
        clients: keys that differ for one client, by its name in ``clients.names`` or its number.
    """

    models: dict[str, TrainOverride] = Field(default_factory=dict)
    clients: dict[str, TrainOverride] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_unless_told(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("epochs") is None and value.get("steps") is None:  # pyright: ignore[reportUnknownMemberType]
            return {**value, "epochs": 1}
        return value  # pyright: ignore[reportUnknownVariableType]

    def differing(self, client: int, name: str | None, model: str | None) -> tuple[str, ...]:
        """Return the tables that hold for a client, as keys of this section, in the order in which they are laid over.

        Args:
            client: its number.
            name: its name in ``clients.names``; None if it has none.
            model: its network, with its options; None if the network is the client's own.
        """
        if not self.models and not self.clients:
            return ()
        by_model = [] if model is None else dict.fromkeys((ModelSpec.parse(model).name, model))
        return (
            *(f"models.{key}" for key in by_model if key in self.models),
            *(f"clients.{key}" for key in dict.fromkeys((str(client), name)) if key in self.clients),
        )

    def of(self, tables: Iterable[str]) -> TrainKeys:
        """Return these keys with those of the tables that `differing` names laid over, each later one over the earlier.

        A key that is given again replaces the whole value; ``steps`` takes the place of ``epochs``, and the reverse.
        """
        if not (tables := tuple(tables)):
            return self
        keys = {key: getattr(self, key) for key in TrainKeys.model_fields}
        for table in tables:
            section, _, key = table.partition(".")
            given = (self.models if section == "models" else self.clients)[key].given
            if given.keys() & {"epochs", "steps"}:
                keys |= {"epochs": None, "steps": None}
            keys |= given
        return TrainKeys.model_construct(**keys)

    def misfits(self, rounds: int | None, task: str | None) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together, with ``run.rounds`` and ``data.task`` if known."""
        yield from self.clashes(rounds, task)
        for section in ("models", "clients"):
            for name in getattr(self, section):
                known = dict(self.clashes(rounds, task))
                faults = self.of([f"{section}.{name}"]).clashes(rounds, task)
                yield from ((f"{section}.{dotted(name)}.{key}", text) for key, text in faults if known.get(key) != text)

    def combined(self, clients: ClientsSection, rounds: int | None, task: str | None) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for what does not go together only at a client with a table beside that of its network."""
        names = clients.names or ()
        for key in self.clients:
            client = names.index(key) if key in names else int(key) if key.isdecimal() else clients.count
            if client >= clients.count:
                continue
            tables = self.differing(client, names[client] if names else None, str(clients.model(client).architecture))
            known = {text for table in tables for _, text in self.of([table]).clashes(rounds, task)}
            for fault, text in self.of(tables).clashes(rounds, task) if len(tables) > 1 else ():
                if text not in known:
                    beside = ", ".join(f"train.{table}" for table in tables[:-1])
                    yield f"clients.{dotted(key)}.{fault}", f"{text} (with {beside})"

    def strangers(self, clients: ClientsSection) -> Iterator[tuple[str, str]]:
        """Yield (key, fault) for tables of clients and networks that there are not."""
        numbers = [str(client) for client in range(clients.count)]
        names = clients.names or ()
        for name in self.clients:
            if name in names or name in numbers:
                continue
            known = f"numbers from 0 to {clients.count - 1}" + (f", and {', '.join(names)}" if names else "")
            more = "" if names else "; a name counts if clients.names has it"
            yield f"clients.{dotted(name)}", f"unknown client{hint(name, (*names, *numbers))} known: {known}{more}"
        for place, name in enumerate(names):
            if {name, str(place)} <= self.clients.keys() and name != str(place):
                yield f"clients.{dotted(name)}", f"client {place} has two tables, {place} and {name!r}; expected one"
        specs = dict.fromkeys(key for spec in clients.models for key in (spec.name, str(spec.architecture)))
        for name in self.models.keys() - specs.keys():
            yield f"models.{dotted(name)}", f"unknown network{hint(name, specs)} clients.models has {', '.join(specs)}"


class AlgorithmSection(Section):
    """Section ``[algorithm]``: an algorithm by name, with its own keys, which `load_algorithm` checks.

    Args:
        name: a name of `polyfed list algorithms`, or "package.module:Class".
        keys: hyper-parameters. In TOML they stand beside the name.
    """

    name: Annotated[str, Field(min_length=1)] = "fedmrl"
    keys: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keys_stand_beside_the_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        rest = facts(value)
        if isinstance(rest.get("keys"), Mapping) and rest.keys() <= {"name", "keys"}:  # from Python
            return rest
        return {"keys": rest} if "name" not in rest else {"name": rest.pop("name"), "keys": rest}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"name": self.name, **self.keys}
