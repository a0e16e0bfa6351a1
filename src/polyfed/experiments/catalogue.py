"""The committed studies; imports nothing heavy."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from polyfed.base.errors import ConfigError
from polyfed.base.text import hint
from polyfed.config.toml import read_toml

#: The scales of the committed studies.
SCALES = ("smoke", "cpu", "paper")

_SHARED = ("common", "known")  # files beside the studies of a paper


def folder() -> Path:
    """Where the committed studies lie."""
    return Path(str(files("polyfed") / "experiments"))


def items() -> dict[str, str]:
    """The committed studies, such as ``fedmrl/table1``, with their titles."""
    paths = sorted(path for path in folder().glob("*/*.toml") if path.stem not in _SHARED)
    return {path.relative_to(folder()).with_suffix("").as_posix(): str(read_toml(path)["title"]) for path in paths}


def find(item: str) -> Path:
    """The file of a committed study, or of your own.

    Raises:
        ConfigError: there is none.
    """
    if item.endswith(".toml"):
        if not Path(item).is_file():
            raise ConfigError(f"{item}: no such file")
        return Path(item)
    known = items()
    if item not in known:
        raise ConfigError(f"{item!r} is no item{hint(item, known)} there are {', '.join(known)}; or name a .toml file")
    return folder() / f"{item}.toml"
