"""Your own network, asked for as "package.module:attribute"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from polyfed.base.errors import ModelError
from polyfed.models.catalogue import Option


def load(
    name: str, options: dict[str, Option], *, input_shape: tuple[int, ...], num_classes: int
) -> Callable[[], nn.Module]:
    """A factory for the network that ``name`` stands for.

    Args:
        name: "package.module:attribute", a class or a function that builds a ``nn.Module``.
        options: its keyword arguments.
        input_shape: passed on if it has an argument of this name.
        num_classes: likewise.

    Raises:
        ModelError: the module or attribute cannot be had, or does not take the options.
    """
    target = _find(name)
    try:
        takes = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # builtins have none
        takes = dict[str, inspect.Parameter]()
    ours = {"input_shape": input_shape, "num_classes": num_classes}
    arguments = {key: value for key, value in ours.items() if key in takes} | options
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if takes and not anything:
        for key in options:
            if key not in takes:
                near = get_close_matches(key, takes, n=1)
                raise ModelError(
                    f"model {name!r} has no option {key!r}"
                    + (f"; did you mean {near[0]!r}?" if near else ";")
                    + f" It takes: {', '.join(takes)} (and classifier and extractor, which name the cuts)"
                )
    return partial(target, **arguments)


def _find(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    try:
        value: Any = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            raise ModelError(
                f"model {name!r}: module {error.name!r} was not found; is its folder on PYTHONPATH, or its "
                "package installed?"
            ) from error
        raise ModelError(f"model {name!r}: its module {path!r} needs {error.name!r}, which is not installed") from error
    except Exception as error:  # user code
        raise ModelError(f"model {name!r}: importing {path!r} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [key for key in dir(value) if not key.startswith("_")]
            near = get_close_matches(part, public, n=3, cutoff=0.4) or public[:8]
            raise ModelError(
                f"model {name!r}: {path!r} was found but has no {part!r}; nearest: "
                f"{', '.join(map(repr, near)) or 'nothing'}"
            )
        value = getattr(value, part)
    if not callable(value):
        raise ModelError(
            f"model {name!r} is a {type(value).__name__}, expected a class or function that builds a module"
        )
    return value
