"""The committed studies; importing this module is fast."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from polyfed.base.errors import ConfigError
from polyfed.base.text import hint
from polyfed.config.toml import read_toml

#: The scales of the committed studies.
SCALES = ("smoke", "cpu", "paper")

#: The folder of the committed studies.
FOLDER = Path(str(files("polyfed") / "experiments"))


def items() -> dict[str, str]:
    """Return the committed studies, such as ``fedmrl/table1``, with their titles."""
    # Beside the studies of a paper are common.toml and known.toml.
    paths = sorted(path for path in FOLDER.glob("*/*.toml") if path.stem not in ("common", "known"))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): str(read_toml(path)["title"]) for path in paths}


def find(item: str) -> Path:
    """Return the file of a committed study, or of your own.

    Raises:
        ConfigError: there is no such study.
    """
    if item.endswith(".toml"):
        if not Path(item).is_file():
            raise ConfigError(f"{item}: no such file; expected the .toml file of a study; correct the path")
        return Path(item)
    known = items()
    if item not in known:
        raise ConfigError(
            f"got {item!r}{hint(item, known)} expected one of the items {', '.join(known)}, or a .toml file"
        )
    return FOLDER / f"{item}.toml"
