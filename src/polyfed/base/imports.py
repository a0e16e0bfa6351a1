"""Imports the user's own code, named as ``package.module:attribute``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from polyfed.base import given
from polyfed.base.errors import PolyfedError
from polyfed.base.text import alternatives, hint


def search_working_directory() -> None:
    """Add the working directory to the end of the import path, as an installed command does not do that by itself."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def load_attribute(path: str, what: str, error: type[PolyfedError], suits: Callable[[Any], bool]) -> Any:
    """Return the object that ``path`` names; the working directory is searched, too.

    Args:
        path: ``"package.module:attribute"``; the attribute may have dots. ``"python:NAME"`` is an object that a program
            gave (`polyfed.base.given`).
        what: the beginning of the messages, such as ``"model 'my_nets:Net'"``.
        error: the class to raise.
        suits: which values of the module to suggest if it lacks the attribute.

    Raises:
        PolyfedError: an ``error``: the path is malformed, or the module or the attribute cannot be loaded.
    """
    if given.is_given(path):
        if (found := given.find(path)) is None:
            raise error(
                f"{what}: a program gave this object, whose name only the Python process of that program knows; "
                "define it in a module file of your own, and start a new run with it"
            )
        return found.value
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise error(f"{what}: got {path!r}; expected package.module:attribute")
    search_working_directory()
    try:
        value: Any = import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and f"{module_name}.".startswith(f"{missing.name}."):
            raise error(
                f"{what}: no module {missing.name!r} in the working directory ({os.getcwd()}), on PYTHONPATH or "
                "installed"
            ) from missing
        raise error(f"{what}: module {module_name!r} imports {missing.name!r}, which is not installed") from missing
    except Exception as fault:  # any exception of the user's file
        raise error(f"{what}: importing {module_name!r} raised {type(fault).__name__}: {fault}") from fault
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [key for key, found in vars(value).items() if not key.startswith("_") and suits(found)]
            there = alternatives(part, public) or "none"
            raise error(f"{what}: {module_name} has no {part!r}{hint(part, public)} it has {there}")
        value = getattr(value, part)
    return value


def importable(value: Any) -> str:
    """Return ``module:attribute`` of a class or function that another process can import; "" if there is no such path.

    A script and a notebook are no modules that another process imports.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found = sys.modules.get(module or "")
    if found is None or module == "__main__" or getattr(found, "__spec__", None) is None:
        return ""
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is value else ""
