"""Objects that a program gives where a configuration has a name, such as a class of a notebook.

An object gets a name, ``python:Net``, which a configuration can hold. The name is known in this process and its forks
only; another object of the same class name gets another name, so that no cache confuses the two. An object that has a
name is kept until the process ends.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

#: The part before the colon, as ``data.dataset = "python"`` says that a program gives the data.
_PREFIX = "python:"


@dataclass(frozen=True)
class Given:
    """An object and what is known of it.

    Args:
        value: the object.
        token: a text that no other object has, in this process or another.
        note: a sentence for the person who starts a run with it; may be empty.
    """

    value: Any
    token: str
    note: str = ""


_objects: dict[str, Given] = {}


def give(value: Any, name: str, note: str = "") -> str:
    """Return the name of an object, ``python:NAME``; an object that has a name keeps it.

    Args:
        value: a class, a function or an instance.
        name: the wished name; characters that no identifier has are left out.
        note: as in `Given`.
    """
    for path, known in _objects.items():
        if known.value is value:
            return path
    plain = re.sub(r"\W|^\d+", "", name) or "Given"
    path, number = f"{_PREFIX}{plain}", 1
    while path in _objects:
        number += 1
        path = f"{_PREFIX}{plain}_{number}"
    _objects[path] = Given(value, uuid.uuid4().hex, note)
    return path


def is_given(path: str) -> bool:
    """Whether ``path`` is the name of a given object, of this process or of another."""
    return path.startswith(_PREFIX)


def find(path: str) -> Given | None:
    """Return the object that has this name; None if it was given in another process."""
    return _objects.get(path)
