"""The text of a fault: the key, what was got, what was expected, and the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_LONG = 80  # characters of a value that a message repeats

#: pydantic's error type -> what was expected, filled from the error's context.
_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of {max_length}",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "string_too_short": "a string that is not empty",
}


def shown(value: object) -> str:
    """Return a value as a message quotes it: in TOML's notation, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(shown(item) for item in value)}]"  # pyright: ignore[reportUnknownVariableType]
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(f'{k} = {shown(v)}' for k, v in value.items())}}}"  # pyright: ignore[reportUnknownVariableType]
    else:
        text = repr(value)
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."


def told(error: ErrorDetails) -> str:
    """Return what was got and what was expected, for one pydantic error."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        last = error["loc"][-1] if error["loc"] else ""
        return f"got {shown(error['input'])}; expected a list of {last + 1}" if isinstance(last, int) else "missing"
    if kind == "value_error":  # polyfed's own validators: the message is a sentence already
        return str(context.get("error", error["msg"]))
    plain = error["msg"].removeprefix("Input should be ")
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else plain
    return f"got {shown(error['input'])}; expected {expected}"


def dotted(*parts: str | int) -> str:
    """``("clients", "models", 2)`` -> ``"clients.models[2]"``; a key that is no bare TOML key is quoted."""
    keys = [f"[{part}]" if isinstance(part, int) else f".{_quoted(part)}" for part in parts]
    return "".join(keys).removeprefix(".")


def _quoted(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() else f'"{key}"'


def by_key(error: ValidationError) -> dict[tuple[str | int, ...], list[ErrorDetails]]:
    """Return the errors of a validation, grouped by key.

    The alternatives of a union count as one key, and so does a list that is too short, for which pydantic names each
    missing item.
    """
    grouped: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        # pydantic appends the name of each alternative that it tried, such as int, str or tuple[...]
        where = tuple(
            part
            for part in detail["loc"]
            if part not in ("int", "float", "constrained-int", "constrained-float", "str", "bool", "none")
            and "[" not in str(part)
        )
        if detail["type"] == "too_short" and len(detail["input"]) >= detail.get("ctx", {})["min_length"]:
            continue  # the list is long enough, but items of it have faults of their own
        if detail["type"] == "missing" and where and isinstance(where[-1], int):
            grouped[where[:-1]] = [detail]
        else:
            grouped.setdefault(where, []).append(detail)
    return grouped


def sentence(details: list[ErrorDetails]) -> str:
    """Return one sentence for all errors of one key."""
    first, *others = (told(detail) for detail in details)
    tail = (text.partition("; expected ")[2] for text in others)
    return " or ".join([first, *(text for text in tail if text and text not in first)])


def facts(value: Any) -> Any:
    """Return the value with lists turned into tuples at every depth, as frozen values need it."""
    if isinstance(value, (list, tuple)):
        return tuple(facts(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Mapping):
        return {key: facts(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value
