"""Reads TOML, applies overrides, writes TOML, whatever the keys mean."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from polyfed.base.errors import ConfigError

Table = dict[str, Any]

#: Option -> what it takes, where that is not the usual.
_FORMS = {"--rule": "section.key=value, such as rounds.deadline=60", "--data-option": "key=value, such as label=ill"}

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def read_toml(path: Path) -> Table:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: the file cannot be read, or is not TOML; the text names line and column.
    """
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; expected a TOML file; correct the path") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: got a folder; expected a TOML file; correct the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected a TOML file; convert it") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}{_unquoted(path, str(error))}") from error


def _unquoted(path: Path, error: str) -> str:
    """Return what to write for a value that is a text without quotes; "" for another error of syntax."""
    place = re.fullmatch(r"Invalid value \(at line (\d+), column (\d+)\)", error)
    if place is None:
        return ""
    line, column = map(int, place.groups())
    word = re.match(
        r"[^\W\d][^\s,#\]}\"']*|[./~][^\s,#\]}\"']+", path.read_text("utf-8").splitlines()[line - 1][column - 1 :]
    )
    if word is None:
        return ""
    given = word[0]
    if given.lower() in ("true", "false"):
        return f"; got {given}; expected {given.lower()}"
    return f"; got {given} without quotes; a text needs quotes: {_text(given)}"


def parse_override(text: str, option: str = "--set") -> tuple[tuple[str, ...], Any]:
    """``"run.rounds=5"`` -> ``(("run", "rounds"), 5)``.

    The value is TOML; text that is not TOML is a string, also inside a list; ``none`` means "not given".

    Args:
        text: the override.
        option: the option of the command line that an error names.

    Raises:
        ConfigError: the text has no equals sign, or the key is no dotted key.
    """
    path, value = _halves(text, option)
    return path, _value(value)


def parse_values(text: str, option: str) -> tuple[tuple[str, ...], list[Any]]:
    """``"train.lr=0.1,0.2"`` -> ``(("train", "lr"), [0.1, 0.2])``, each value as `parse_override` reads it.

    Raises:
        ConfigError: as for `parse_override`.
    """
    path, values = _halves(text, option)
    return path, [_value(item) for item in items(values)]


def _halves(text: str, option: str) -> tuple[tuple[str, ...], str]:
    """Return the dotted key, and the value as text."""
    key, equals, value = (part.strip() for part in text.partition("="))
    fault = f"{option} {text!r}: expected {_FORMS.get(option, 'section.key=value, such as run.rounds=5')}"
    if not equals:
        raise ConfigError(fault)
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(fault) from error
    path: list[str] = []
    while isinstance(node, dict):
        (name, node), *others = cast("dict[str, Any]", node).items()
        if others:  # the key has a line break
            raise ConfigError(fault)
        path.append(name)
    return tuple(path), value


def _value(text: str) -> Any:
    if text == "none":
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text.startswith("[") and text.endswith("]"):  # the shell removes the quotes of ["cnn1", "mlp"]
            return [_value(item) for item in items(text[1:-1])]
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def items(text: str) -> list[str]:
    """Split the text at the commas that are outside brackets and quotes."""
    items, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += char
    return [item.strip() for item in items if item.strip()]


def apply(tables: Table, path: Sequence[str], value: Any, option: str = "--set") -> None:
    """Put ``value`` at ``path``; None removes the key, unless it is an algorithm's that has a value "none".

    Changes ``tables``. An error names ``option``.

    Raises:
        ConfigError: a key on the path is not a table.
    """
    *way, last = path
    node = tables
    for part in way:
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{option} {'.'.join(path)}: {part} is not a table")
        node = cast(Table, below)
    if value is None and "name" in node:  # an algorithm's table, or one that no algorithm's key is in
        from polyfed.config.algorithms import takes_none  # it takes long, and most values are not none

        value = "none" if takes_none(node["name"], last) else None
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value


def to_toml(tables: Mapping[str, Any]) -> str:
    """Return TOML text that reads back as ``tables``; values of None are left out."""
    lines = (line for name, table in tables.items() for line in _table((name,), table))
    return "\n".join(lines).removeprefix("\n") + "\n"


def _table(path: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table and of the tables in it, each after an empty line."""
    below = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in table.items() if key not in below and value is not None}
    if plain or not below:
        yield from ("", f"[{'.'.join(map(_key, path))}]")
        yield from (f"{_key(key)} = {_text(value)}" for key, value in plain.items())
    for key, value in below.items():
        if value:
            yield from _table((*path, key), value)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item) for item in cast('Sequence[Any]', value))}]"
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, Any]", value).items()
        return f"{{ {', '.join(f'{_key(key)} = {_text(item)}' for key, item in pairs)} }}"
    return str(value)  # numbers, and TOML's dates and times
