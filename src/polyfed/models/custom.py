"""The user's own network, named as "package.module:attribute"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.imports import load_attribute
from polyfed.base.text import hint
from polyfed.models.catalogue import Option
from polyfed.models.signature import parameters


def load(
    name: str, options: dict[str, Option], *, input_shape: tuple[int, ...], num_classes: int
) -> Callable[[], nn.Module]:
    """Return a factory for the network that ``name`` names.

    Args:
        name: "package.module:attribute", a class or a function that builds a ``nn.Module``.
        options: keyword arguments of the class or function.
        input_shape: passed on if the class or function has an argument of this name.
        num_classes: likewise.

    Raises:
        ModelError: the module or attribute cannot be loaded, or does not take the options.
    """
    target: Callable[..., Any] = load_attribute(name, f"model {name!r}", ModelError, callable)
    if not callable(target):
        raise ModelError(  # pyright: ignore[reportUnreachable]  # a user's module may hold anything
            f"model {name!r} is a {type(target).__name__}, expected a class or function that builds a module"
        )
    takes = parameters(target)
    ours = {"input_shape": input_shape, "num_classes": num_classes}
    arguments = {key: value for key, value in ours.items() if key in takes} | options
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    for key in options:
        if takes and not anything and key not in takes:
            raise ModelError(
                f"model {name!r} has no option {key!r}{hint(key, takes)} It takes: {', '.join(takes)} (and "
                "classifier and extractor, which name the cuts)"
            )
    needed = [key for key, parameter in takes.items() if key not in arguments and _required(parameter)]
    if needed:
        raise ModelError(
            f"model {name!r} needs {', '.join(map(repr, needed))}, which clients.models does not give; write "
            f'{{ name = "{name}", {needed[0]} = ... }}, or give the argument a default'
        )
    return partial(target, **arguments)


def _required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty
