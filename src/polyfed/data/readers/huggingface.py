"""A folder that ``save_to_disk`` of Hugging Face's package ``datasets`` wrote, read without that package.

Such a folder holds ``state.json``, ``dataset_info.json`` and ``*.arrow``; that of a ``DatasetDict`` holds a folder for
each split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.arrays import Rows, coded, ranked, read_rows
from polyfed.data.dataset import Dataset, Kind, check_digits
from polyfed.data.readers.cache import fingerprint
from polyfed.data.readers.pictures import read_pictures


def load_huggingface(
    path: Path,
    *,
    cache: Path,
    digest: str,
    image_size: int | None = None,
    input: str | None = None,
    label: str | None = None,
    ignore: Sequence[str] = (),
    group: str | None = None,
    unit: str | None = None,
    time: str | None = None,
    kind: Kind | None = None,
    layout: str | None = None,
    channels: int | None = None,
    flip: bool = False,
    known: Sequence[str] = (),
) -> Dataset:
    """The data set of a folder of Hugging Face's ``datasets``.

    Args:
        path: the folder.
        cache: folder of decoded pixels.
        digest: changes with the content of the folder.
        image_size: side to which images are resized; None if all are of one size.
        input: column of the input; None takes the only column of images, or else all columns of numbers.
        label: column of the class; None takes the only ``ClassLabel``.
        ignore: columns of numbers that are left out.
        group: column of the client.
        unit: column of the unit, such as the patient.
        time: column of the time.
        kind: what a column of lists holds, as for `read_rows`.
        layout: the order of its axes, likewise.
        channels: 1 or 3, to which images are converted.
        flip: whether a mirrored image keeps its class.
        known: classes that other sites have, where the label is no ``ClassLabel``.

    Raises:
        DataError: the folder is damaged or holds what cannot be read.
        ConfigError: a column that does not exist, or that must be named.
    """
    parts = _parts(path)
    tables, types = [_table(part) for part in parts], _types(parts[0])
    for part, table in zip(parts[1:], tables[1:], strict=True):
        if table.schema.names != tables[0].schema.names or _types(part) != types:
            raise DataError(f"{part}: its columns or class names differ from those of {parts[0]}; expected the same")
    sizes = [table.num_rows for table in tables]
    rows = sum(sizes)
    for option, column in (("input", input), ("label", label), ("group", group), ("unit", unit), ("time", time)):
        _check(types, column, option, path)
    for column in ignore:
        _check(types, column, "ignore", path)
    target: str = label or _only(types, "ClassLabel", "label", path)
    image = input or _only(types, "Image", "input", path, none=True)

    def cells(column: str) -> list[Any]:
        return [value for table in tables for value in table.column(column).to_pylist()]

    def texts(column: str) -> list[str]:
        values = cells(column)
        if None in values:
            raise DataError(f"{path}: row {values.index(None)} has no {column!r}; fill it or remove the row")
        return list(map(str, values))

    y, classes = _labels(texts(target), types[target], path, target, known)
    groups, group_names = (None, ()) if group is None else coded(texts(group))
    taken = {target, group, unit, time, *ignore}
    if image is not None and types[image].get("_type") == "Image":
        pixels = read_pictures(
            _pictures(tables, image, path),
            rows,
            channels=channels,
            side=image_size,
            cache=cache / f"images-{fingerprint(1, digest, image, image_size, channels)}.npz",
        )
        found, image_size = Rows(torch.from_numpy(pixels), "image"), None
    elif image is not None:
        found = read_rows(_stacked(cells(image), path, image), f"{path}: column {image!r}", kind=kind, layout=layout)
    else:
        columns = [column for column in types if column not in taken]
        found = read_rows(_numbers(tables, types, columns, path), path, kind=kind)
    return found.dataset(
        path.name,
        path,
        image_size=image_size,
        y=torch.from_numpy(y),
        classes=classes,
        test_rows=np.arange(sizes[0], rows, dtype=np.int64) if len(sizes) > 1 else None,
        groups=groups,
        group_names=group_names,
        flip=flip,
        units=None if unit is None else coded(texts(unit), units=True)[0],
        times=None if time is None else ranked(np.array(texts(time)), rows, f"{path}: column {time!r}"),
    )


def _parts(path: Path) -> list[Path]:
    """The folder itself, or its folders of the training and test part."""
    if (path / "state.json").is_file():
        return [path]
    found = sorted(state.parent.name for state in path.glob("*/state.json"))
    if found == ["test", "train"]:
        return [path / "train", path / "test"]
    raise DataError(
        f"{path}: "
        + (f"holds the splits {', '.join(found)}" if found else "has no state.json")
        + "; expected a folder written by save_to_disk, of one Dataset, or of a DatasetDict of train and test; correct "
        "the path, or give that of one split"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); save the data set again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}; expected an object; save the data set again")
    return found  # pyright: ignore[reportUnknownVariableType]


def _types(part: Path) -> dict[str, dict[str, Any]]:
    """Type of each column, as ``datasets`` describes it."""
    features = _json(part / "dataset_info.json").get("features") or {}
    return {name: kind if isinstance(kind, dict) else {"_type": "list"} for name, kind in features.items()}


def _table(part: Path) -> Any:
    """The rows of one split, as an Arrow table."""
    pa, state = import_module("pyarrow"), _json(part / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{part}: holds a selection of its rows; save it again after .flatten_indices()")
    try:
        tables = [
            pa.ipc.open_stream(pa.memory_map(str(part / str(file["filename"])))).read_all()
            for file in state["_data_files"]
        ]
        table = pa.concat_tables(tables)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{part}: cannot be read ({error}); a file is missing or damaged, save it again") from error
    if table.num_rows == 0 or set(table.schema.names) != _types(part).keys():
        raise DataError(
            f"{part}: holds {table.num_rows} rows of the columns {', '.join(table.schema.names)}; expected rows of "
            f"those that dataset_info.json names, {', '.join(_types(part)) or 'none'}; save it again"
        )
    return table


def _check(types: dict[str, dict[str, Any]], column: str | None, option: str, path: Path) -> None:
    if column is not None and column not in types:
        raise ConfigError(f"{option}: {path} has no column {column!r}; it has {', '.join(types)}")


def _only(types: dict[str, dict[str, Any]], kind: str, option: str, path: Path, *, none: bool = False) -> Any:
    """The only column of a type; None if there is none and that is fine."""
    found = [name for name, about in types.items() if about.get("_type") == kind]
    if len(found) == 1 or (none and not found):
        return found[0] if found else None
    raise ConfigError(
        f"{option}: missing; {path} has {len(found)} columns of type {kind}: {', '.join(found or types)}; name one"
    )


def _labels(
    texts: list[str], about: dict[str, Any], path: Path, label: str, known: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    if about.get("_type") != "ClassLabel":
        if str(about.get("dtype", "")).startswith("float"):
            raise DataError(f"{path}: the label {label!r} holds {about['dtype']} numbers; expected classes")
        return coded(texts, known)
    y, classes = np.array(texts, dtype=np.int64), tuple(map(str, about.get("names") or ()))
    wrong = np.flatnonzero((y < 0) | (y >= len(classes)))
    if len(wrong):
        raise DataError(
            f"{path}: row {wrong[0]} has the label {y[wrong[0]]}; expected 0 to {len(classes) - 1}, for "
            f"{', '.join(classes)}; remove rows without a label"
        )
    return y, classes


def _pictures(tables: Sequence[Any], column: str, path: Path) -> Iterator[tuple[str, bytes]]:
    row = 0
    for table in tables:
        for batch in table.select([column]).to_batches(max_chunksize=256):
            for cell in batch.column(0).to_pylist():
                content = cell.get("bytes") if isinstance(cell, dict) else None
                if not isinstance(content, bytes):
                    raise DataError(
                        f"{path}: row {row} of {column!r} holds no image, only {cell}; save the data set with "
                        "its images"
                    )
                yield f"{path}: row {row} of {column!r}", content
                row += 1


def _stacked(cells: list[Any], path: Path, column: str) -> NDArray[Any]:
    try:
        found = np.array(cells)
    except ValueError:  # lists of different lengths
        found = np.empty(0, dtype=object)
    if found.dtype.kind not in "fiub":
        raise DataError(
            f"{path}: column {column!r} holds text, empty cells, or lists of different lengths; expected numbers in "
            "lists of one length; pad them, or name another column as input"
        )
    return found


def _numbers(
    tables: Sequence[Any], types: dict[str, dict[str, Any]], columns: Sequence[str], path: Path
) -> NDArray[Any]:
    """Columns of numbers as ``(N, F)``; an empty cell is NaN."""
    for column in columns:
        dtype = str(types[column].get("dtype", types[column].get("_type")))
        if types[column].get("_type") != "Value" or not dtype.startswith(("int", "uint", "float", "bool")):
            raise DataError(
                f"{path}: column {column!r} holds {dtype}; expected numbers; leave it out with the option ignore, or "
                "name the column of the input with the option input"
            )
    if not columns:
        raise DataError(f"{path}: no column beside the label; the columns are {', '.join(types)}")
    out: list[NDArray[Any]] = []
    for column in columns:
        values = np.concatenate([table.column(column).to_numpy(zero_copy_only=False) for table in tables])
        if values.dtype == object:  # truth values, some of them missing
            values = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        check_digits(values, f"{path}: column {column!r}")
        out.append(values)
    return np.stack(out, axis=1)
