"""Algorithms by name and by dotted path, and the check of their keys.

These functions load torch when called, because an algorithm's keys are the fields of its class.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from polyfed.algorithms.catalogue import ALGORITHMS, ALIASES
from polyfed.base.errors import ConfigError, PolyfedError
from polyfed.base.given import find, give, is_given
from polyfed.base.imports import importable, load_attribute
from polyfed.base.text import hint
from polyfed.config.faults import by_key, dotted, facts, sentence
from polyfed.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from polyfed.core.algorithm import Algorithm

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


@dataclasses.dataclass(frozen=True)
class AlgorithmField:
    """One key of an algorithm.

    Args:
        annotation: its type.
        default: its default value; `dataclasses.MISSING` if the key is required.
    """

    annotation: Any
    default: Any


def canonical_name(name: str) -> str:
    """Return the catalogue's spelling of ``name``: aliases are resolved, case and underscores do not matter."""
    if ":" in name:
        return name
    plain = name.lower().replace("_", "-")
    return ALIASES.get(plain, plain if plain in ALGORITHMS else name)


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the class of an algorithm; a dotted path is also searched in the working directory.

    A name of `polyfed.base.given` may belong to an instance; its class is returned.

    Raises:
        ConfigError: the name is unknown, or the path does not name an algorithm; the text says which.
    """
    name = canonical_name(name)
    if ":" not in name and name not in ALGORITHMS:
        raise ConfigError(
            f"unknown algorithm {name!r}{hint(name, (*ALGORITHMS, *ALIASES))} known: "
            f"{', '.join(ALGORITHMS)}; give your own algorithm as my_package.my_file:MyAlgorithm"
        )
    from polyfed.core.algorithm import Algorithm

    path = name if ":" in name else ALGORITHMS[name][0]
    fault = f"algorithm {path!r}"
    cls = load_attribute(
        path, fault, ConfigError, lambda value: isinstance(value, type) and issubclass(value, Algorithm)
    )
    if isinstance(cls, Algorithm) and is_given(path):
        cls = type(cls)
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        kind = f"the class {cls.__name__}" if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise ConfigError(f"{fault} is {kind}; expected a subclass of polyfed.core.algorithm.Algorithm")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ConfigError(f"{fault} does not define {missing}; expected every abstract method to be defined")
    if "__dataclass_params__" not in vars(cls) or not vars(cls)["__dataclass_params__"].frozen:
        raise ConfigError(f"{fault} is no frozen dataclass; write @dataclass(frozen=True, kw_only=True) above it")
    return cls


@cache
def algorithm_fields(cls: type[Algorithm]) -> Mapping[str, AlgorithmField]:
    """The keys of an algorithm: its dataclass fields, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        field.name: AlgorithmField(
            hints[field.name],
            field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
        )
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  # algorithm_class saw to it
        if field.init
    }


def takes_none(name: object, key: str) -> bool:
    """Return whether a key of an algorithm has the text "none" among its values, such as FedIN's ``align``."""
    try:
        fields = algorithm_fields(algorithm_class(str(name)))
    except PolyfedError:
        return False  # an error of its own says so
    return key in fields and "none" in get_args(fields[key].annotation)


@cache
def _adapter(cls: type[Algorithm], key: str) -> TypeAdapter[Any]:
    """Return the checker of a key; making it takes milliseconds, and studies have hundreds of configurations."""
    return TypeAdapter(algorithm_fields(cls)[key].annotation, config=_STRICT)


def load_algorithm(name: str, keys: Mapping[str, Any] | None = None) -> Algorithm:
    """Return an algorithm with its hyper-parameters.

    Args:
        name: a name of `polyfed list algorithms`, an alias, or "package.module:Class".
        keys: hyper-parameters, as in the ``[algorithm]`` table; the others have their defaults.

    Raises:
        ConfigError: no such algorithm, or keys that it does not take; all faults at once.
    """
    algorithm, faults = try_algorithm(name, keys or {})
    if algorithm is None:
        raise ConfigError(*(f"algorithm.{key}: {text}" for key, text in faults))
    return algorithm


def try_algorithm(name: str, keys: Mapping[str, Any]) -> tuple[Algorithm | None, list[tuple[str, str]]]:
    """Return the algorithm, or None and (key, fault) for each fault."""
    try:
        cls = algorithm_class(name)
    except ConfigError as error:
        return None, [("name", text) for text in error.faults]
    fields, full_name = algorithm_fields(cls), canonical_name(name)
    good: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    for key, value in keys.items():
        if key not in fields:
            text = f"unknown key of algorithm {full_name!r}{hint(key, fields)} it takes: {', '.join(fields) or 'none'}"
            faults.append((dotted(key), text))
            continue
        try:
            good[key] = _adapter(cls, key).validate_python(facts(value))
        except ValidationError as error:
            text = _network_text(value) if fields[key].annotation is str else ""
            faults += [(dotted(key, *where), sentence(details) + text) for where, details in by_key(error).items()]
    instance = _instance(full_name)
    missing = [
        key
        for key, field in fields.items()
        if field.default is dataclasses.MISSING and key not in keys and instance is None
    ]
    faults += [(key, f"missing; algorithm {full_name!r} needs it") for key in missing]
    if faults:
        return None, faults
    try:
        return (cls(**good) if instance is None else dataclasses.replace(instance, **good)), []  # pyright: ignore[reportArgumentType]
    except (PolyfedError, TypeError, ValueError) as error:  # raised by the class's own __post_init__
        texts = error.faults if isinstance(error, ConfigError) else [str(error)]
        return None, [_refused(name, fields, text) for text in texts]


def _network_text(value: object) -> str:
    """Return how a network's table is written where a key takes a text, as ``auxiliary`` does."""
    try:
        return f', such as "{ModelSpec.parse(value)}"' if isinstance(value, Mapping) else ""  # pyright: ignore[reportUnknownArgumentType]
    except PolyfedError:
        return ""  # a table of something else


def _refused(name: str, keys: Iterable[str], text: str) -> tuple[str, str]:
    """Return (key, fault) of what ``__post_init__`` says, which may begin with a key: ``"key: got ..."``."""
    key, colon, rest = text.partition(": ")
    return (key, rest) if colon and key in keys else ("name", f"{name} refused its keys: {text}")


def _instance(name: str) -> Algorithm | None:
    """Return the instance that a program gave under this name; its fields are the defaults of the keys."""
    from polyfed.core.algorithm import Algorithm

    found = find(name)
    return found.value if found is not None and isinstance(found.value, Algorithm) else None


def all_keys(name: str, algorithm: Algorithm) -> dict[str, Any]:
    """Return the keys of an algorithm for config.toml; None, which TOML cannot write, is left out.

    An instance that a program gave holds what TOML cannot write itself.
    """
    values = {key: facts(getattr(algorithm, key)) for key in algorithm_fields(type(algorithm))}
    given = _instance(name) is not None
    return {key: value for key, value in values.items() if value is not None and (not given or _is_plain(value))}


def _is_plain(value: Any) -> bool:
    """Whether TOML can write a value."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, str | int | float)


def algorithm_table(algorithm: Algorithm | type[Algorithm]) -> dict[str, Any]:
    """Return the ``[algorithm]`` table of an algorithm that a program gives.

    The table has the name of the catalogue, or ``module:Class`` if a module file holds the class, and the fields as
    keys. A class that no module file holds, or fields that TOML cannot write, get a name of `polyfed.base.given`, which
    holds in this process only.

    Args:
        algorithm: an instance, or a class for its defaults.
    """
    cls = algorithm if isinstance(algorithm, type) else type(algorithm)
    path = importable(cls)
    name = next((name for name, (known, _) in ALGORITHMS.items() if known == path), path)
    if isinstance(algorithm, type):
        return {"name": name or give(cls, cls.__name__)}
    values = {key: facts(getattr(algorithm, key)) for key in algorithm_fields(cls)}
    keys = {key: value for key, value in values.items() if _is_plain(value)}
    fields = algorithm_fields(cls)
    if any(key not in keys and values[key] is not fields[key].default for key in values):  # a tensor has no plain ==
        return {"name": give(algorithm, cls.__name__), **keys}
    return {"name": name or give(cls, cls.__name__), **keys}
