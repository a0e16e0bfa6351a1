"""The arguments that the user's own class or function takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.imports import load_attribute


@cache
def takes(name: str, argument: str) -> bool:
    """Return whether the class or function ``name`` has an argument of that name; False if it cannot be loaded."""
    try:
        target = load_attribute(name, f"model {name!r}", ModelError, callable)
    except ModelError:  # whoever builds the network reports it
        return False
    return callable(target) and argument in parameters(target)


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
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
