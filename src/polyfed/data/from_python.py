"""A data set of objects in memory, one for each client: arrays, torch data sets or frames of pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.data.arrays import coded, ranked, read_rows
from polyfed.data.columns import Column
from polyfed.data.dataset import Dataset, Kind, check_digits
from polyfed.data.readers.pictures import channels_of
from polyfed.metrics.catalogue import TaskKind

#: One client's data; see `federated_data`.
ClientSource: TypeAlias = Any

_KEYS = ("x", "y", "unit", "time")
_MOST_CATEGORIES = 1000  # beyond this a column is an identifier or free text, not a category
_MOST_CLASSES = 100_000
_READ_TWICE = 8  # items of a torch data set that must be the same when they are read again


def federated_data(
    clients: Mapping[str, ClientSource] | Sequence[ClientSource],
    *,
    test: Mapping[str, ClientSource] | Sequence[ClientSource] | None = None,
    classes: Sequence[str] | None = None,
    kind: Kind | None = None,
    layout: str | None = None,
    image_size: int | None = None,
    flip: bool = False,
    label: str | None = None,
    unit: str | None = None,
    time: str | None = None,
    name: str = "data",
    task: TaskKind = "classification",
    unlabelled: bool = False,
) -> Dataset:
    """Make a data set whose groups are the given clients, for ``simulate(config, dataset=...)``.

    A client's data are one of: a pair ``(x, y)`` of arrays or tensors, one row for each example; a mapping with ``x``,
    ``y`` and perhaps ``unit`` and ``time``; a ``torch.utils.data.Dataset`` of pairs, without random transforms; a frame
    of pandas, with ``label``. Arrays are read as those of an .npz file; columns of a frame that are text become one
    column of zeros and ones for each category of all clients. Labels are class numbers from 0, or names; those of a
    regression are any finite numbers.

    Args:
        clients: each client's data, by its name or in order.
        test: each client's official test part, likewise, for ``split = "official"``; None if there is none.
        classes: the names of the classes; None takes the numbers, or the names in order of the alphabet.
        kind: what ``x`` holds, if type and shape leave it open.
        layout: the order of the axes of ``x``, likewise.
        image_size: side in pixels that images are resized to; None keeps them.
        flip: whether a mirrored image keeps its class.
        label: column of a frame with the class, or with the number to predict.
        unit: column of a frame with the unit, such as the patient, for ``split = "groups"``.
        time: column of a frame with the time, for ``split = "time"``.
        name: name of the data set.
        task: "regression" if ``y`` holds numbers to predict; ``data.task`` says the same.
        unlabelled: whether a row may have no label: -1, an empty text, None or NaN.

    Raises:
        DataError: data of another form, or that differ from client to client; the text names the client.
    """
    named = _named(clients)
    names = list(named)
    columns = {"label": label, "unit": unit, "time": time}
    parts = [_part(value, f"client {who!r}", columns) for who, value in named.items()]
    owner = list(range(len(names)))
    tests = _named(test) if test is not None else {}
    for who, value in tests.items():
        if who not in named:
            raise DataError(f"test: got client {who!r}; expected one of {', '.join(map(repr, names))}")
        parts.append(_part(value, f"the test part of client {who!r}", columns))
        owner.append(names.index(who))
    sizes = [len(part["y"]) for part in parts]
    rows, training = sum(sizes), sum(sizes[: len(names)])
    x, about = _joined(parts)
    if unlabelled and task == "classification":
        y, found = _some_labels([part["y"] for part in parts], classes, name)
    else:
        y, found = (_labels if task == "classification" else _targets)(_whole(parts, "y", name), classes, name)
    units, times = (
        _whole(parts, key, name) if any(key in part for part in parts) else None for key in ("unit", "time")
    )
    return read_rows(x, name, kind=kind, layout=layout).dataset(
        name,
        name,
        image_size=image_size,
        y=torch.from_numpy(y),
        classes=found,
        test_rows=np.arange(training, rows, dtype=np.int64) if tests else None,
        groups=np.repeat(owner, sizes).astype(np.int64),
        group_names=tuple(names),
        flip=flip,
        columns=about,
        units=None if units is None else coded(list(map(str, units)), units=True)[0],
        times=None if times is None else ranked(times, rows, f"{name}: time"),
        unlabelled=unlabelled,
    )


def _named(clients: Mapping[str, ClientSource] | Sequence[ClientSource]) -> dict[str, ClientSource]:
    if not isinstance(clients, Mapping | list | tuple) or not clients:
        raise DataError(
            f"clients: got {type(clients).__name__}; expected a list of each client's data, or a dictionary by name"
        )
    items = clients.items() if isinstance(clients, Mapping) else enumerate(clients)
    return {str(who): value for who, value in items}


def _is_frame(value: object) -> bool:
    return hasattr(value, "columns") and hasattr(value, "to_numpy")


def _part(value: ClientSource, who: str, columns: Mapping[str, str | None]) -> dict[str, Any]:
    """One client's x and y, and unit and time where there are any, as arrays; of a frame x has the cells by column."""
    if _is_frame(value):
        return _of_frame(value, who, columns)
    if any(columns.values()):
        raise DataError(
            f"{who}: got {type(value).__name__}; label, unit and time name columns of a frame; expected one"
        )
    if isinstance(value, Mapping):
        given = {str(key): content for key, content in cast(Mapping[Any, Any], value).items()}
        if not {"x", "y"} <= given.keys() <= set(_KEYS):
            raise DataError(
                f"{who}: has the keys {', '.join(given)}; expected x and y, and no others but unit and time"
            )
    elif isinstance(value, tuple) and len(cast(tuple[Any, ...], value)) == 2:
        given = dict(zip(("x", "y"), cast(tuple[Any, Any], value), strict=True))
    else:
        given = _of_items(value, who)
    frame = _cells(given["x"]) if _is_frame(given["x"]) else None  # columns are joined by name, never by position
    if frame is not None:
        given["x"] = next(iter(frame.values()), ())
    part: dict[str, Any] = {key: _array(content, f"{who}: {key}") for key, content in given.items()}
    lengths = {key: array.shape[:1] for key, array in part.items()}
    if part["y"].ndim != 1 or len(set(lengths.values())) != 1 or not len(part["y"]):
        shapes = ", ".join(f"{key} {array.shape}" for key, array in part.items())
        raise DataError(f"{who}: got shapes {shapes}; expected one row of x, and a single label, for each example")
    return part if frame is None else {**part, "x": frame}


def _array(value: Any, what: str) -> NDArray[Any]:
    try:
        return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except ValueError as error:
        raise DataError(f"{what}: rows of unequal shapes ({error}); expected rows of one shape") from error


def _of_items(data: Any, who: str) -> dict[str, Any]:
    """All items of a torch data set."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"{who}: got {type(data).__name__}; expected a pair (x, y), a mapping with x and y, a "
            "torch.utils.data.Dataset with a length, or a frame"
        )
    items = [_item(data[row], f"{who}, item {row}") for row in range(len(data))]
    for row, (x, y) in enumerate(items[:_READ_TWICE]):
        again = _item(data[row], f"{who}, item {row}")
        if y != again[1] or not np.array_equal(x, again[0], equal_nan=x.dtype.kind == "f"):
            raise DataError(
                f"{who}: item {row} differs when it is read again, as with a random transform; give the data without "
                "it, and polyfed augments images in every step (data.augment)"
            )
    if len({x.shape for x, _ in items}) > 1:
        row = next(row for row, (x, _) in enumerate(items) if x.shape != items[0][0].shape)
        raise DataError(
            f"{who}: item {row} has shape {items[row][0].shape}, and item 0 has {items[0][0].shape}; expected one shape"
        )
    return {"x": np.stack([x for x, _ in items]) if items else np.empty(0), "y": [y for _, y in items]}


def _item(item: Any, where: str) -> tuple[NDArray[Any], Any]:
    if not isinstance(item, tuple | list) or len(cast(Sequence[Any], item)) != 2:
        raise DataError(f"{where}: got {type(item).__name__}; expected a pair of input and label")
    x, y = cast(Sequence[Any], item)
    label = _array(y, f"{where}: label")
    if label.size != 1:
        raise DataError(f"{where}: has a label of shape {label.shape}; expected a single class or number")
    return channels_of(x, None, where) if hasattr(x, "getbands") else _array(x, f"{where}: input"), label.item()


def _of_frame(frame: Any, who: str, columns: Mapping[str, str | None]) -> dict[str, Any]:
    names = list(map(str, frame.columns))
    if columns["label"] is None:
        raise DataError(f"{who}: got a frame; expected label, the column of the class, one of {', '.join(names)}")
    for option, column in columns.items():
        if column is not None and names.count(column) != 1:
            raise DataError(f"{who}: no column {column!r} for {option!r}; the columns are {', '.join(names)}")
    taken = {column for column in columns.values() if column is not None}
    cells = _cells(frame)
    part = {"x": {name: cells[name] for name in names if name not in taken}, "y": cells[columns["label"]]}
    for option in ("unit", "time"):
        if (column := columns[option]) is not None:
            part[option] = cells[column]
    if not len(part["y"]) or not part["x"]:
        raise DataError(f"{who}: has {len(part['y'])} rows and {len(part['x'])} columns of features; expected some")
    return part


def _cells(frame: Any) -> dict[str, NDArray[Any]]:
    """The columns of a frame by name; those that are declared categories as texts, also where these are numbers."""
    found: dict[str, NDArray[Any]] = {}
    for column in frame.columns:
        if str(column) in found:
            raise DataError(f"a frame has two columns called {str(column)!r}; rename one")
        values = frame[column].to_numpy()
        if str(getattr(frame[column], "dtype", "")) == "category":
            values = np.array([None if _missing(value) else str(value) for value in values], dtype=object)
        found[str(column)] = values
    return found


def _joined(parts: Sequence[Mapping[str, Any]]) -> tuple[NDArray[Any], tuple[Column, ...]]:
    """The rows of all clients, and what the columns of frames were taken for."""
    given = [part["x"] for part in parts]
    frames = [isinstance(x, dict) for x in given]
    if not any(frames):
        bytes_ = {x.dtype == np.uint8 for x in given}
        if len({x.shape[1:] for x in given}) > 1 or len(bytes_) > 1:
            told = ", ".join(dict.fromkeys(f"{x.shape[1:]} {x.dtype}" for x in given))
            raise DataError(f"clients: rows have the shapes and types {told}; expected the same for every client")
        return np.concatenate(given), ()
    names = list(given[0]) if all(frames) else []
    for at, x in enumerate(given):
        if not frames[at] or set(x) != set(names):
            raise DataError(
                f"clients: number {at} has {', '.join(x) if frames[at] else 'arrays'}; expected frames with the "
                f"columns {', '.join(given[0]) if frames[0] else 'of all'}, as others have"
            )
    columns: list[Column] = []
    out: list[NDArray[np.float64]] = []
    for name in names:
        values = np.concatenate([np.asarray(x[name]) for x in given])
        column, encoded = _encoded(name, values)
        columns.append(column)
        out.append(encoded)
    return np.concatenate(out, axis=1), tuple(columns)


def _encoded(name: str, values: NDArray[Any]) -> tuple[Column, NDArray[np.float64]]:
    """A column as ``(N, 1)`` numbers, or ``(N, categories)`` zeros and ones; NaN where it is missing."""
    gone = np.array([_missing(value) for value in values]) if values.dtype == object else np.zeros(len(values), bool)
    there = values[~gone]
    if values.dtype.kind == "U" or (len(there) and all(isinstance(value, str) for value in there)):
        code, names = coded([str(value) for value in there])
        if len(names) > _MOST_CATEGORIES:
            raise DataError(
                f"column {name!r} has {len(names)} different texts; expected at most {_MOST_CATEGORIES} categories; "
                "drop the column, or merge categories"
            )
        encoded = np.full((len(values), len(names)), np.nan)
        encoded[~gone] = np.eye(len(names))[code]
        return Column(name, "category", names, int(gone.sum())), encoded
    numbers = np.full(len(values), np.nan)
    try:
        if values.dtype.kind not in "fiubO":
            raise TypeError
        check_digits(np.array(there.tolist()), f"column {name!r}")
        numbers[~gone] = [float(value) for value in there if not isinstance(value, str)]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {name!r} holds {values.dtype}, such as {there[0] if len(there) else None!r}; expected numbers or "
            "texts; convert or drop it"
        ) from error
    known = numbers[~np.isnan(numbers)]
    ends = (float(known.min()), float(known.max())) if len(known) else (None, None)
    return Column(name, "number", (), len(numbers) - len(known), *ends), numbers[:, None]


def _missing(value: Any) -> bool:
    """Whether a cell of a frame is None, NaN, or the NA or NaT of pandas."""
    return value is None or (not isinstance(value, str) and str(value) in ("nan", "<NA>", "NaT"))


def _whole(parts: Sequence[Mapping[str, Any]], key: str, name: str) -> NDArray[Any]:
    """A value for each row of all clients: whole numbers, other numbers, dates, or texts, and none of them missing."""
    lacking = [str(at) for at, part in enumerate(parts) if key not in part]
    if lacking:
        raise DataError(
            f"{name}: number {', '.join(lacking)} of the clients and their test parts has no {key}, which others have; "
            "give it for all, or for none"
        )
    found: list[NDArray[Any]] = []
    for part in parts:
        values = part[key]
        if values.dtype == object:
            gone = np.flatnonzero([_missing(value) for value in values])
            if len(gone):
                more = ", or give unlabelled=True if rows may have no label" * (key == "y")
                raise DataError(f"{name}: row {gone[0]} of a client has no {key}; fill it or drop the row{more}")
            values = np.array(values.tolist())
        found.append(values)
    if len({values.dtype.kind in "iufbM" for values in found}) > 1:
        raise DataError(f"{name}: {key} holds numbers at some clients and texts at others; expected the same for all")
    return np.concatenate(found)


def _targets(y: NDArray[Any], classes: Sequence[str] | None, name: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The numbers that a regression predicts; it has no classes."""
    if classes is not None:
        raise DataError(f"{name}: got classes for a regression; leave them out, or correct task")
    if y.dtype.kind not in "fiu":
        raise DataError(f"{name}: got labels such as {y[0]!r}; a regression expects numbers")
    bad = np.flatnonzero(~np.isfinite(y.astype(np.float64)))
    if len(bad):
        raise DataError(f"{name}: {len(bad)} labels are not finite, such as {y[bad[0]]}; fill them or drop the rows")
    return y.astype(np.float64), ()


def _some_labels(
    labels: Sequence[NDArray[Any]], classes: Sequence[str] | None, name: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The class of each row of all clients, -1 for a row without a label, and the names of the classes."""
    gone = [np.array([_missing(value) or value in (-1, "") for value in part.tolist()], dtype=bool) for part in labels]
    known = [np.array(part[~none].tolist()) for part, none in zip(labels, gone, strict=True) if not none.all()]
    if not known:
        raise DataError(f"{name}: no row has a label; expected some")
    # A frame has whole numbers beside gaps as fractions.
    known = [
        part.astype(np.int64) if part.dtype.kind == "f" and (part == part.round()).all() else part for part in known
    ]
    code, found = _labels(_whole([{"y": part} for part in known], "y", name), classes, name)
    every = np.concatenate(gone)
    y = np.full(len(every), -1, dtype=np.int64)
    y[~every] = code
    return y, found


def _labels(y: NDArray[Any], classes: Sequence[str] | None, name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    if y.dtype.kind in "iub":
        highest = int(y.max())
        if highest >= _MOST_CLASSES:
            raise DataError(f"{name}: labels run to {highest}; expected class numbers from 0, or names as texts")
        return y.astype(np.int64), tuple(classes or map(str, range(highest + 1)))
    if y.dtype.kind != "U":
        more = '; for numbers to predict give task = "regression"' if y.dtype.kind == "f" else ""
        raise DataError(f"{name}: got labels such as {y[0]!r}; expected class numbers from 0, or names as texts{more}")
    texts: list[str] = y.tolist()
    code, names = coded(texts)
    if classes is None:
        return code, names
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(f"{name}: got the label {unknown[0]!r}; expected one of the classes {', '.join(classes)}")
    return np.array([list(classes).index(text) for text in names])[code].astype(np.int64), tuple(classes)
