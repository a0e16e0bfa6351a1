"""`Config`: all sections together; reading reports all faults at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.base.errors import ConfigError, ModelError
from polyfed.base.text import hint
from polyfed.config.algorithms import (
    algorithm_class,
    algorithm_fields,
    all_keys,
    canonical_name,
    load_algorithm,
    try_algorithm,
)
from polyfed.config.faults import by_key, dotted, facts, sentence
from polyfed.config.profiles import read_profiles
from polyfed.config.sections import (
    AlgorithmSection,
    ClientsSection,
    DataSection,
    DevicesSection,
    PartitionSection,
    RunSection,
    Section,
    TrainSection,
)
from polyfed.config.toml import Table, apply, parse_override, read_toml, to_toml
from polyfed.data.catalogue import CLASSLESS, DATASETS, SIZES, TEXTS, VOCABULARY
from polyfed.metrics.catalogue import DEFAULTS, METRICS
from polyfed.models.catalogue import OPTIONS, ModelSpec

#: Keys of ``run`` that change neither the computation nor its report; threads change the rounding only.
_INCIDENTAL = ("name", "threads", "server_threads", "workers", "memory", "checkpoint_every", "store", "controls")

#: Sections that describe other runs.
_SEVERAL = ("algorithms", "controls")

#: Keys on which the valid values of other keys in their section depend.
_DECISIVE = ("kind", "dataset", "optimizer", "count", "name")


class Config(Section):
    """The configuration of a run. `Config.load` and `Config.parse` read it and report all faults at once.

    Args:
        run: the length, place and precision of the run.
        data: the data set.
        partition: how examples are dealt to clients.
        clients: the clients and their networks.
        train: how a client trains.
        devices: the clients' devices, for the simulated clock; None runs without the clock.
        algorithm: the algorithm and its keys.
        algorithms: for `polyfed compare`: keys that differ for one algorithm, by its name or a label of your own.
        controls: runs that follow the main one on the same splits, by label.
    """

    run: RunSection = Field(default_factory=RunSection)
    data: DataSection = Field(default_factory=DataSection)
    partition: PartitionSection = Field(default_factory=PartitionSection)
    clients: ClientsSection = Field(default_factory=ClientsSection)
    train: TrainSection = Field(default_factory=TrainSection)
    devices: DevicesSection | None = None
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    algorithms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    controls: dict[str, AlgorithmSection] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
        """Read a TOML file, apply the overrides, and check everything that needs no data.

        Args:
            path: path of the file; None takes the default configuration of polyfed, ``defaults/digits.toml``.
            overrides: such as ``"run.rounds=5"`` or ``'clients.models=["cnn1", "mlp"]'``; the value ``none``
                removes the key.

        Raises:
            ConfigError: all faults at once, each naming file, key, what was got and what was expected.
        """
        source = Path(str(files("polyfed") / "defaults" / "digits.toml")) if path is None else Path(path)
        if str(source) in DATASETS and not source.exists():
            raise ConfigError(
                f"{source}: got the name of a data set; expected a TOML file, in which [data] has dataset = "
                f'"{source}"; write one and give its name'
            )
        tables = read_toml(source)
        _anchor(tables, source.parent)
        faults: list[str] = []
        overridden: list[str] = []
        for override in overrides:
            try:
                key, value = parse_override(override)
                apply(tables, key, value)
                overridden.append(dotted(*key))
            except ConfigError as error:
                faults += error.faults
        _anchor(tables, Path().absolute())
        return cls._parsed(tables, str(source), faults, overridden)

    @classmethod
    def stored(cls, path: Path) -> Config:
        """Read the config.toml of a run directory without the user's own code or torch, to look at it.

        Raises:
            ConfigError: the file cannot be read as a configuration.
        """
        try:
            return cls.model_validate(read_toml(path))
        except ValidationError as error:
            faults = (f"{path}: {_told(cls, where, details)}" for where, details in by_key(error).items())
            raise ConfigError(*faults) from error

    @classmethod
    def parse(cls, tables: Mapping[str, Any], *, source: str = "config") -> Config:
        """Check tables of the form that a TOML file has.

        Raises:
            ConfigError: all faults at once.
        """
        return cls._parsed(tables, source, [], [])

    @classmethod
    def _parsed(cls, tables: Mapping[str, Any], source: str, faults: list[str], overridden: list[str]) -> Config:
        config, found = _read(cls, tables)
        if config is not None and not found:
            found = config.check()
        ours = tuple(f"{key}{end}" for key in overridden for end in (":", ".", "["))
        everything = [*faults, *(f"{'--set' if text.startswith(ours) else source}: {text}" for text in found)]
        if config is None or everything:
            raise ConfigError(*everything)
        return config

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the run, the headline first."""
        return DEFAULTS[self.data.task] if self.run.metrics is None else self.run.metrics

    @property
    def monitor(self) -> str:
        """The metric that chooses a round."""
        return self.run.monitor or self.metrics[0]

    def check(self) -> list[str]:
        """Return the faults of the values together, keys of algorithms included; empty if none. Loads torch."""
        return list(_misfits(dict(self)))

    def replace(self, section: str, **keys: Any) -> Config:
        """Return this configuration with keys of one section changed.

        Raises:
            ConfigError: the result has faults.
        """
        tables = self.to_dict()
        tables[section] = {**tables.get(section, {}), **keys}
        return Config.parse(tables)

    def anchored(self, folder: Path) -> Config:
        """Return this configuration with relative paths that start at ``folder``.

        A run keeps it so: its directory is another place than that where it was started, and so may be the one where it
        is resumed.
        """
        tables = self.model_dump(exclude_none=True, exclude_unset=True)
        before = json.dumps(tables, default=str)
        _anchor(tables, folder)
        return self if json.dumps(tables, default=str) == before else type(self).model_validate(tables)

    def with_algorithm(self, name: str, keys: Mapping[str, Any] | None = None) -> Config:
        """Return this configuration for another algorithm.

        The keys of ``[algorithm]`` stay if the algorithm is the same; those of ``[algorithms.NAME]`` override
        them, then ``keys``. The result has no ``[algorithms]`` and no ``[controls]``.

        Args:
            name: name of an algorithm, or a label of ``[algorithms]`` that has a ``name`` of its own.
            keys: hyper-parameters.
        """
        tables = self.to_dict() | {"algorithm": self.algorithm_table(name, keys)}
        tables["run"] = {**tables["run"], "controls": False}
        return Config.parse({key: tables[key] for key in tables if key not in _SEVERAL})

    def algorithm_table(self, name: str, keys: Mapping[str, Any] | None = None) -> Table:
        """Return the ``[algorithm]`` of `with_algorithm`, without a check."""
        special = self.algorithms_entry(name)
        name = canonical_name(special.pop("name", name))
        base = self.algorithm.keys if canonical_name(self.algorithm.name) == name else {}
        return {"name": name, **base, **special, **(keys or {})}

    def algorithms_entry(self, name: str) -> Table:
        """Return the keys of ``[algorithms.NAME]``, in any spelling of the name; empty without such a table."""
        spelt = {canonical_name(label): keys for label, keys in self.algorithms.items()}
        return dict(self.algorithms.get(name, spelt.get(canonical_name(name), {})))

    def resolved(self) -> Config:
        """Return this configuration with every default filled in that depends on the machine or on another key.

        These are ``run.threads`` (the machine's cores divided among the cohort), ``partition.seed``, the horizons of
        schedules and of every algorithm that has one (``run.rounds``), the algorithm's name in full and all its keys.
        """
        name = canonical_name(self.algorithm.name)
        algorithm = load_algorithm(name, self.algorithm.keys)
        full = all_keys(name, algorithm) | self._horizon(self.algorithm)
        seed = self.run.seed if self.partition.seed is None else self.partition.seed
        rounds = self.run.rounds
        tables = {
            section: {key: keys.with_horizons(rounds) for key, keys in getattr(self.train, section).items()}
            for section in ("models", "clients")
        }
        return self.model_copy(
            update={
                "train": self.train.with_horizons(rounds).model_copy(update=tables),
                "run": self.run.model_copy(
                    update={"threads": self.run.threads or max(1, cores() // self.clients.wanted)}
                ),
                "partition": self.partition.model_copy(update={"seed": seed}),
                "algorithm": AlgorithmSection(name=name, keys=full),
                "controls": {
                    label: AlgorithmSection(name=control.name, keys={**control.keys, **self._horizon(control)})
                    for label, control in self.controls.items()
                },
            }
        )

    def _horizon(self, section: AlgorithmSection) -> dict[str, Any]:
        """Return the horizon of an algorithm that has one and does not name it; else nothing."""
        field = algorithm_fields(algorithm_class(section.name)).get("horizon")
        same = canonical_name(section.name) == canonical_name(self.algorithm.name)
        named = section.keys.get("horizon", self.algorithm.keys.get("horizon") if same else None)
        return {"horizon": self.run.rounds} if field is not None and field.default is None and named is None else {}

    def lasting(self, rounds: int) -> Config:
        """Return this configuration with another number of rounds, without a check."""
        return self.model_copy(update={"run": self.run.model_copy(update={"rounds": rounds})})

    def extended(self, rounds: int) -> Config:
        """Return the configuration of this run when it goes on to ``rounds`` rounds; horizons stay what they were.

        Raises:
            ConfigError: it has more rounds already, or its numbers depend on the number of rounds.
        """
        config = self.resolved()
        if rounds < config.run.rounds:
            raise ConfigError(
                f"--rounds: got {rounds}; the run has {config.run.rounds} rounds; expected more, as no round is undone"
            )
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        if rounds > config.run.rounds and algorithm.uses_rounds and algorithm.horizon is None:
            raise ConfigError(
                f"--rounds: got {rounds}; the numbers of algorithm {algorithm.name!r} depend on run.rounds = "
                f"{config.run.rounds}, so the rounds so far are not those of a longer run; begin a new run, with "
                "algorithm.horizon if the algorithm has that key"
            )
        return config.replace("run", rounds=rounds)

    def to_dict(self) -> Table:
        """Return the tables that a TOML file would have; `parse` reads them back."""
        return {
            name: table for name, table in self.model_dump(exclude_none=True).items() if table or name not in _SEVERAL
        }

    def to_toml(self) -> str:
        """Return TOML text; `load` reads it back."""
        return to_toml(self.to_dict())

    def hash(self) -> str:
        """Return the SHA-256, in hexadecimal, of all values that determine the numbers of this run.

        It is the same for a configuration and its resolved form, and for any path of public data. Defaults are left
        out, so a key that a later version adds changes no hash. Loads torch.
        """
        resolved = self.resolved()
        left_out: dict[str, Any] = {"run": set(_INCIDENTAL), **dict.fromkeys(("algorithm", *_SEVERAL), True)}
        tables = resolved.model_dump(exclude_none=True, exclude_defaults=True, exclude=left_out)
        if self.data.dataset in SIZES:  # a file of the user's own is known by its path alone
            tables.get("data", {}).pop("path", None)
        name, keys = resolved.algorithm.name, resolved.algorithm.keys
        usual = {key: facts(field.default) for key, field in algorithm_fields(algorithm_class(name)).items()}
        if usual.get("horizon", 0) is None:
            usual["horizon"] = self.run.rounds
        differing = {key: value for key, value in keys.items() if key not in usual or value != usual[key]}
        tables["algorithm"] = {"name": name, **differing}
        if self.devices is not None:  # the content of the table counts, not its path
            tables["devices"] = {**tables["devices"], "profiles": read_profiles(self.devices.profiles)[0]}
        told = {section: keys for section, keys in tables.items() if keys}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _anchor(tables: Table, folder: Path) -> None:
    """Make relative paths start at ``folder``. Changes ``tables``."""
    for section, key in (("data", "path"), ("devices", "profiles")):
        keys = tables.get(section)
        value: object = keys.get(key) if isinstance(keys, dict) else None
        if isinstance(value, str) and (key == "path" or value.endswith(".csv")):
            tables[section][key] = str(folder / Path(value).expanduser())
    options: Any = data.get("options") if isinstance(data := tables.get("data"), dict) else None
    if isinstance(options, dict) and isinstance(place := options.get("tokenizer"), str):
        tables["data"]["options"] = {**options, "tokenizer": str(folder / Path(place).expanduser())}
    clients = tables.get("clients")
    models: object = clients.get("models") if isinstance(clients, dict) else None
    if isinstance(models, list | tuple):
        tables["clients"]["models"] = [_anchored(model, folder) for model in models]


def _anchored(model: Any, folder: Path) -> Any:
    """Return an entry of ``clients.models`` whose file of weights starts at ``folder``; others as they are."""
    try:
        spec = ModelSpec.parse(model)
    except ModelError:  # reading the section reports it
        return model
    if spec.weights is None:
        return model
    path = str(folder / Path(spec.weights).expanduser())
    return {**model, "weights": path} if isinstance(model, Mapping) else str(spec.having(weights=path))


def cores() -> int:
    """Return the number of CPU threads to use: ``OMP_NUM_THREADS``, or else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(cls: type[Config], tables: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Return the configuration if every section can be read, and all faults, also those of the other sections."""
    try:
        return cls.model_validate(dict(tables)), []
    except ValidationError as error:
        errors = by_key(error)
    rest: Table = dict(tables)
    unfit: set[str] = set()  # sections that cannot be checked further
    for section, *keys in errors:
        if keys and isinstance(rest.get(str(section)), Mapping):
            rest[str(section)] = {key: value for key, value in rest[str(section)].items() if key != keys[0]}
        else:
            rest.pop(str(section), None)
        if section not in rest or keys[0] in _DECISIVE:
            unfit.add(str(section))
    readable = {name: value for name, value in cls.model_validate(rest) if name not in unfit}
    faults = [_told(cls, where, details) for where, details in errors.items()]
    return None, [*faults, *_misfits(readable)]


def _told(cls: type[Config], where: tuple[str | int, ...], details: Any) -> str:
    """Return the fault of one key; for an unknown key it names the nearest valid key."""
    if details[0]["type"] != "extra_forbidden":
        return f"{dotted(*where)}: {sentence(details)}"
    *section, key = (str(part) for part in where)
    sections = _below(cls)
    holder: type[Section] | None = cls
    for name in section:  # a name in a table of sections, such as a client's, is not a key of its own
        holder = _below(holder).get(name, holder) if holder is not None else None
    known = list((holder or cls).model_fields)
    elsewhere = [
        f"{name}.{key}"
        for name, there in sections.items()
        if there is not AlgorithmSection and key in there.model_fields
    ]
    what = "key" if section or not isinstance(details[0]["input"], Mapping) else "section"
    near = f"; did you mean {elsewhere[0]!r}?" if elsewhere else hint(key, known)
    place = f"[{dotted(*section)}] has the keys" if section else "a configuration has the sections"
    return f"{dotted(*where)}: unknown {what}{near} {place} {', '.join(known)}"


def _below(section: type[Section]) -> dict[str, type[Section]]:
    """Return the sections in a section, by key: also optional ones, and those of a table of sections."""
    return {
        name: kind
        for name, field in section.model_fields.items()
        for kind in (field.annotation, *get_args(field.annotation))
        if isinstance(kind, type) and issubclass(kind, Section)
    }


def _refusal(spec: ModelSpec) -> str:
    """Return why the user's own network cannot be loaded: its module, its name or its options; "" if it can."""
    from polyfed.models.custom import load

    options = {key: value for key, value in spec.architecture.options if key not in ("classifier", "extractor")}
    try:  # this builds no network; the shapes are arbitrary
        load(spec.name, options, input_shape=(3, 32, 32), num_classes=10)
    except ModelError as error:
        return str(error)
    return ""


def _misfits(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield the faults that concern more than one key, in the sections that are given."""
    alone = [name for name in ("data", "partition", "clients") if name in sections]
    yield from (f"{name}.{key}: {text}" for name in alone for key, text in sections[name].misfits())
    run, clients, data = sections.get("run"), sections.get("clients"), sections.get("data")
    train: TrainSection | None = sections.get("train")
    if train is not None:
        found = train.misfits(run.rounds if run else None, data.task if data else None)
        yield from (f"train.{key}: {text}" for key, text in found)
        if clients:
            both = train.combined(clients, run.rounds if run else None, data.task if data else None)
            yield from (f"train.{key}: {text}" for key, text in (*train.strangers(clients), *both))
    if run and data:
        yield from (f"run.{key}: {text}" for key, text in run.misfits(data.task))
        chosen = run.selection_misfits(data.task, data.validation_fraction)
        yield from (f"run.{key}: {text}" for key, text in chosen)
    if run and clients:
        samples = {"eval_clients": run.eval_clients, "gradient_clients": run.gradient_clients}
        many = {key: count for key, count in samples.items() if count is not None and count > clients.count}
        yield from (f"run.{key}: got {n}; expected at most clients.count, {clients.count}" for key, n in many.items())
    devices: DevicesSection | None = sections.get("devices")
    if devices is not None:
        wanted = clients.wanted if clients else None
        yield from (f"devices.{key}: {text}" for key, text in devices.misfits(wanted))
    elif "devices" in sections and clients and clients.selection == "available":
        yield (
            'clients.selection: got "available" without [devices], which says when clients are available; '
            "add the section, or choose another selection"
        )
    partition: PartitionSection | None = sections.get("partition")
    if partition and clients and partition.kind == "resampled" and clients.selection == "by-size":
        text = 'got "by-size"; clients of partition kind "resampled" are of one size, so "uniform" is the same'
        yield f"clients.selection: {text}"
    if partition and data and partition.tests and data.split != "official":
        yield 'partition.tests: got "independent"; it deals official test rows, so set data.split = "official"'
    if partition and data and data.task == "regression" and partition.kind not in CLASSLESS:
        kinds = " or ".join(map(repr, CLASSLESS))
        yield f"partition.kind: got {partition.kind!r}, which deals classes; a regression has none: choose {kinds}"
    for place, spec in enumerate(clients.models if clients else ()):
        if spec.own and (text := _refusal(spec)):
            yield f"clients.models[{place}]: {text}"
    texts = data and (data.dataset in TEXTS or data.options.get("text") is not None)
    if data and clients and texts and data.options.get("tokenizer") is None:
        here = data.options.get("vocabulary", VOCABULARY)
        for place, spec in enumerate(clients.models):
            size = dict(spec.options).get("vocabulary", OPTIONS["roberta"]["vocabulary"])
            if spec.name == "roberta" and spec.weights and size != here:
                yield (
                    f"clients.models[{place}]: weights for {size} tokens, but the tokenizer that is learnt here has "
                    f"{here}, which mean other words; set data.options.tokenizer to the tokenizer.json of the weights"
                )
    main: AlgorithmSection | None = sections.get("algorithm")
    if main is not None:
        yield from (f"algorithm.{key}: {text}" for key, text in try_algorithm(main.name, main.keys)[1])
    if data:
        named = {"algorithm": main, **{dotted("controls", k): v for k, v in sections.get("controls", {}).items()}}
        for place, section in named.items():
            made = None if section is None else try_algorithm(section.name, section.keys)[0]
            if section is None or made is None:
                continue
            if data.task not in made.tasks:
                known = ", ".join(name for name in ALGORITHMS if data.task in algorithm_class(name).tasks)
                yield (
                    f"{place}.name: {section.name} cannot train a {data.task} (data.task): its equations need classes; "
                    f"algorithms that can: {known}"
                )
            for name in (run.metrics or ()) if run and not made.probabilities else ():
                if METRICS[name].probabilities:
                    yield f"run.metrics: got {name!r}; scores of {made.name} are no probabilities; remove it"
    others = [
        ("controls", label, control.name, control.keys) for label, control in sections.get("controls", {}).items()
    ]
    for label, keys in sections.get("algorithms", {}).items():
        rest = {key: value for key, value in keys.items() if key != "name"}
        others.append(("algorithms", label, keys.get("name", label), rest))
    for section, label, name, keys in others:
        yield from (
            f"{dotted(section, label, key)}: {text}"
            for key, text in try_algorithm(name, keys)[1]
            if not text.startswith("missing")  # a key that is missing here may be given in [algorithm]
        )
