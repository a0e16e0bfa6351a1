"""Objects in place of names: an algorithm, a data set and networks that a program gives beside a configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from pydantic import ValidationError
from torch import nn

from polyfed.base import given
from polyfed.base.errors import ConfigError
from polyfed.base.imports import importable
from polyfed.config import Config, algorithm_class, algorithm_fields, algorithm_table
from polyfed.config.faults import facts
from polyfed.core.algorithm import Algorithm
from polyfed.data.dataset import Dataset
from polyfed.models.catalogue import ModelSpec

#: A configuration: read already, as tables, or as the path of its file.
ConfigSource: TypeAlias = Config | Mapping[str, Any] | Path | str

#: An algorithm: an instance, a class for its defaults, or a name.
AlgorithmSource: TypeAlias = Algorithm | type[Algorithm] | str

#: A network: a name, a table of a name and options, a class or function that builds a module, or a module. In a table
#: a class or function may stand as ``name``.
ModelSource: TypeAlias = ModelSpec | str | Mapping[str, Any] | Callable[..., nn.Module] | nn.Module


@dataclass(frozen=True)
class _Copies:
    """Builds copies of a module.

    Args:
        module: the module; nobody else may hold it.
    """

    module: nn.Module

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self.module)


def arranged(
    config: ConfigSource,
    *,
    algorithm: AlgorithmSource | None = None,
    dataset: Dataset | str | None = None,
    models: Sequence[ModelSource] | None = None,
) -> tuple[Config, Dataset | None]:
    """Return the configuration with the arguments in it, and the data set if it is an object.

    Relative paths that are no file's start at the working directory.
    A class or function gets the name by which a module file holds it; otherwise a name that holds in this process only
    (`polyfed.base.given`). A data set with named clients, for a configuration that names no data set and no kind of
    partition, is dealt by these.

    Args:
        config: the configuration, its tables, or the path of its file.
        algorithm: takes the place of ``[algorithm]``; a name keeps the keys of ``[algorithm]`` if it is the same.
        dataset: takes the place of ``data.dataset``.
        models: takes the place of ``clients.models``.

    Raises:
        ConfigError: all faults of the configuration at once, or an argument of a wrong kind.
    """
    if isinstance(config, str | Path):
        config = Config.load(config)
    if isinstance(config, Config):
        if algorithm is None and models is None and dataset is None:
            return config.anchored(Path().absolute()), None
        found: Mapping[str, Any] = config.model_dump(exclude_none=True, exclude_unset=True)
    elif isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        found = config
    else:
        raise ConfigError(
            f"config: got {type(config).__name__}; expected a Config, a dictionary of its tables, or the path of a file"
        )
    tables = dict(found)
    if isinstance(algorithm, str):
        tables["algorithm"] = _named(tables, algorithm)
    elif algorithm is not None:
        tables["algorithm"] = _algorithm(algorithm)
    if models is not None:
        if isinstance(models, str) or not isinstance(models, Sequence) or not models:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"models: got {models!r}; expected a list of networks, which clients have in turn")
        _put(tables, "clients", "models", [_model(one) for one in models])
    if isinstance(dataset, str):
        _put(tables, "data", "dataset", dataset)
    elif dataset is not None and not _has(tables, "data", "dataset"):
        _put(tables, "data", "dataset", "python")
        if isinstance(dataset, Dataset):  # pyright: ignore[reportUnnecessaryIsInstance]
            _follow(tables, dataset)
    return Config.parse(tables).anchored(Path().absolute()), None if isinstance(dataset, str) else dataset


def _follow(tables: dict[str, Any], dataset: Dataset) -> None:
    """Fill in what the tables leave open and the data set says: its task, and the clients that it has."""
    if not _has(tables, "data", "task"):
        _put(tables, "data", "task", dataset.task)
    if dataset.group_names and not _has(tables, "partition", "kind"):
        _put(tables, "partition", "kind", "natural")
        if not _has(tables, "clients", "count"):
            _put(tables, "clients", "count", len(dataset.group_names))


def _has(tables: Mapping[str, Any], section: str, key: str) -> bool:
    keys = tables.get(section)
    return isinstance(keys, Mapping) and key in keys


def _put(tables: dict[str, Any], section: str, key: str, value: object) -> None:
    """Change a key; a section that is no table stays, for the check of the configuration to report."""
    keys = tables.get(section, {})
    if isinstance(keys, Mapping):
        tables[section] = {**keys, key: value}


def algorithm_choice(algorithm: object) -> tuple[str, dict[str, Any]]:
    """Return the name of an instance or a class, and the keys whose values differ from the defaults.

    Raises:
        ConfigError: it is no algorithm, or no dataclass.
    """
    table = _algorithm(algorithm)
    fields = algorithm_fields(algorithm_class(table["name"]))
    name = table.pop("name")
    return name, {key: value for key, value in table.items() if value != facts(fields[key].default)}


def _named(tables: Mapping[str, Any], name: str) -> Any:
    """Return the table of an algorithm by name, with the keys that the tables have for it."""
    try:
        there = Config.model_validate({key: tables[key] for key in ("algorithm", "algorithms") if key in tables})
    except ValidationError:  # the check of the configuration reports them
        return tables.get("algorithm")
    return there.algorithm_table(name)


def _algorithm(algorithm: object) -> dict[str, Any]:
    """Return the table of an instance or a class."""
    cls = algorithm if isinstance(algorithm, type) else type(algorithm)
    if not issubclass(cls, Algorithm):
        raise ConfigError(
            f"algorithm: got {cls.__name__}; expected a name, or an instance of a subclass of polyfed.Algorithm"
        )
    if "__dataclass_params__" not in vars(cls):
        raise ConfigError(f"algorithm: {cls.__name__} is no dataclass; write @dataclass(frozen=True, kw_only=True)")
    return algorithm_table(cast("Algorithm | type[Algorithm]", algorithm))


def _model(model: object) -> Any:
    """Return a network as ``clients.models`` takes it."""
    if isinstance(model, Mapping):
        table = dict(cast("Mapping[str, Any]", model))
        return {**table, "name": _model(table["name"])} if callable(table.get("name")) else table
    if isinstance(model, nn.Module):
        name = type(model).__name__
        note = f"{name} was given as a module: clients that have it begin with its weights"
        return given.give(_Copies(copy.deepcopy(model)), name, note)
    if callable(model):
        return importable(model) or given.give(model, getattr(model, "__name__", type(model).__name__))
    return model


def only_here(config: Config) -> list[str]:
    """Return sentences on the objects of a run that a program gave: what that means for the run, before it starts."""
    names = dict.fromkeys((config.algorithm.name, *(spec.name for spec in config.clients.models)))
    objects = {name: found for name in names if (found := given.find(name)) is not None}
    if not objects:
        return []
    listed = ", ".join(name.partition(":")[2] for name in objects)
    return [
        f"only this Python process can resume the run, since no module file holds {listed} as given; to resume it "
        "anywhere, import the class or function from a file of your own",
        *(found.note for found in objects.values() if found.note),
    ]
