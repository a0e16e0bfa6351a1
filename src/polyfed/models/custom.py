"""The user's own network, named as "package.module:attribute"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.imports import load_attribute
from polyfed.base.text import hint
from polyfed.models.catalogue import Option


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
    takes = _parameters(target)
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


@cache
def takes(name: str, argument: str) -> bool:
    """Return whether the class or function ``name`` has an argument of that name; False if it cannot be loaded."""
    try:
        target = load_attribute(name, f"model {name!r}", ModelError, callable)
    except ModelError:  # whoever builds the network reports it
        return False
    return callable(target) and argument in _parameters(target)


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function or class, with those that its ``**kwargs`` hand on to a base class."""
    try:
        found = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # builtins have no signature
        return {}
    bases = list(target.__mro__[1:]) if isinstance(target, type) else []
    for base in bases[: bases.index(nn.Module)] if nn.Module in bases else []:
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
            break
        own = {key: parameter for key, parameter in found.items() if parameter.kind is not parameter.VAR_KEYWORD}
        found = {**dict(inspect.signature(base).parameters), **own}
    return found


def _required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty
