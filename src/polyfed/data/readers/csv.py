"""A user's own table: one csv file, or a folder with one csv file per client.

Cells are stripped. A cell equal to one of the ``missing`` tokens becomes NaN; a column with any other cell
that is not a number is categorical and becomes one column per category (all NaN where the category is
missing, so that imputation gives the category's frequency).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.dataset import Dataset, check_digits
from polyfed.metrics.catalogue import TaskKind

MISSING = ("", "NA", "?", "nan")

_MAX_CATEGORIES = 1000  # beyond this a column is an identifier or free text, not a category


@dataclass(frozen=True)
class _Table:
    """Cells as read: ``cells[row][column]`` and, for messages, where each row came from."""

    columns: tuple[str, ...]
    cells: list[list[str]]
    where: list[str]


def load_csv(
    path: Path,
    *,
    header: bool | None = None,
    label: str | int = -1,
    missing: Sequence[str] = MISSING,
    categorical: Sequence[str | int] = (),
    group: str | int | None = None,
    delimiter: str = ",",
    task: TaskKind = "classification",
) -> Dataset:
    """The data set of a table.

    Args:
        path: a file, or a folder of ``*.csv`` files of the same columns, one per client (file name = group).
        header: whether the first line names the columns; None infers it from the cells.
        label: column of the class, by name or by number from 0 (negative from the end). Whole numbers are
            sorted as numbers, anything else as text, and numbered from 0.
        missing: cells that stand for a missing value.
        categorical: columns to treat as categories although their cells are numbers; text columns always are.
        group: column of the natural group (who collected the row), by name or number; it is not a feature.
        delimiter: the character between cells.
        task: with "regression" the label is a number to predict.

    Raises:
        DataError: no rows, a ragged row, a missing label, one class only, or a cell that is not finite.
        ConfigError: a column that does not exist, or options that contradict each other.
    """
    by_name = any(isinstance(c, str) for c in (label, group, *categorical))
    if header is False and by_name:
        raise ConfigError("header: got false, but columns are given by name; give their numbers instead")
    gone = frozenset(missing)
    files = _files(path, group)
    tables = [_read_table(file, True if by_name else header, gone, delimiter) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.columns != tables[0].columns:
            raise DataError(
                f"{file}: columns {', '.join(table.columns)}; expected those of {files[0].name}: "
                f"{', '.join(tables[0].columns)}"
            )
    table = _Table(
        tables[0].columns,
        [row for t in tables for row in t.cells],
        [place for t in tables for place in t.where],
    )
    label_at = _column(table, label, "label", path)
    group_at = None if group is None else _column(table, group, "group", path)
    if group_at == label_at:
        raise ConfigError(f"group: column {table.columns[label_at]!r} is the label too; choose another")
    forced = {_column(table, c, "categorical", path) for c in categorical}
    read = _labels if task == "classification" else _targets
    y, classes = read(table, label_at, gone, path)
    features = [
        _feature(table, at, gone, at in forced, path)
        for at in range(len(table.columns))
        if at not in (label_at, group_at)
    ]
    if not features:
        raise DataError(f"{path}: no feature columns beside the label; columns are {', '.join(table.columns)}")
    groups, names = (None, ()) if group_at is None else _groups(table, group_at, gone)
    if path.is_dir():
        names = tuple(file.stem for file in files)
        groups = np.repeat(np.arange(len(files)), [len(t.cells) for t in tables]).astype(np.int64)
    return Dataset(
        name=path.stem,
        x=torch.from_numpy(np.concatenate(features, axis=1)),
        y=torch.from_numpy(y),
        classes=classes,
        mean=(),
        std=(),
        groups=groups,
        group_names=names,
    )


def _files(path: Path, group: str | int | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected a .csv file or a folder of them; correct the path")
    if group is not None:
        raise ConfigError(f"group: {path} is a folder, whose files are the groups; leave the option out")
    files = sorted(path.glob("*.csv"))
    if not files:
        raise DataError(f"{path}: no *.csv file in this folder; expected one per client; correct the path")
    return files


def _read_table(path: Path, header: bool | None, missing: frozenset[str], delimiter: str) -> _Table:
    """One file as cells of text, every row as long as the first."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, delimiter=delimiter, strict=True)
            # A blank line is not a row.
            rows = [([cell.strip() for cell in row], f"{path}, line {reader.line_num}") for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as csv in UTF-8 ({error}); correct or convert the file") from error
    if not rows:
        raise DataError(f"{path}: no rows; expected a table with a label column")
    cells = [row for row, _ in rows]
    for row, where in rows:
        if len(row) != len(cells[0]):
            raise DataError(
                f"{where}: {len(row)} cells; expected {len(cells[0])} as in the first line; "
                "correct the line or the delimiter"
            )
    first = int(_is_header(path, cells, missing) if header is None else header)
    columns = tuple(cells[0] if first else (f"column {i}" for i in range(len(cells[0]))))
    if len(set(columns)) != len(columns):
        raise DataError(f"{path}: column names repeat: {', '.join(columns)}; rename them")
    if len(cells) == first:
        raise DataError(f"{path}: no rows below the header; expected at least one")
    return _Table(columns, cells[first:], [where for _, where in rows[first:]])


def _is_header(path: Path, cells: list[list[str]], missing: frozenset[str]) -> bool:
    """Return whether the first line names columns: none of its cells is a number or missing, but cells below are."""
    if any(_number(cell) is not None or cell in missing for cell in cells[0]):
        return False
    if any(_number(cell) is not None for row in cells[1:] for cell in row):
        return True
    raise ConfigError(
        f"header: {path} has no numbers, so its first line may be names or data; set header to true or false"
    )


def _column(table: _Table, column: str | int, option: str, path: Path) -> int:
    """The position of a column given by name or number."""
    count = len(table.columns)
    if isinstance(column, int) and not isinstance(column, bool) and -count <= column < count:
        return column % count
    if isinstance(column, str) and column in table.columns:
        return table.columns.index(column)
    raise DataError(
        f"{path}: no column {column!r} for option {option!r}; the columns are {', '.join(table.columns)} "
        f"(numbers 0 to {count - 1})"
    )


def _labels(table: _Table, at: int, missing: frozenset[str], path: Path) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Class numbers and class names of the label column."""
    texts = [row[at] for row in table.cells]
    for text, where in zip(texts, table.where, strict=True):
        if text in missing:
            raise DataError(f"{where}: the label {table.columns[at]!r} is missing ({text!r}); fill it or drop the row")
    numbers = [_number(text) for text in texts]
    if all(number is not None for number in numbers):
        wholes = [round(number) for number in numbers if number is not None and number.is_integer()]
        if len(wholes) != len(numbers):
            raise DataError(
                f"{path}: the label {table.columns[at]!r} holds fractions; expected classes (whole numbers "
                "or names); choose another label column or bin the values"
            )
        texts = [str(whole) for whole in wholes]
        classes = tuple(str(whole) for whole in sorted(set(wholes)))
    else:
        classes = tuple(sorted(set(texts)))
    if len(set(texts)) < 2:
        raise DataError(f"{path}: got one class, {texts[0]!r}, in {table.columns[at]!r}; expected at least 2")
    code = {name: number for number, name in enumerate(classes)}
    return np.asarray([code[text] for text in texts], dtype=np.int64), classes


def _targets(
    table: _Table, at: int, missing: frozenset[str], path: Path
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The numbers of the label column, and no classes."""
    numbers = [None if row[at] in missing else _number(row[at]) for row in table.cells]
    for value, row, where in zip(numbers, table.cells, table.where, strict=True):
        if value is None or math.isinf(value):
            raise DataError(
                f"{where}: the target in {table.columns[at]!r} is {row[at]!r}; expected a finite number; correct it or "
                f'drop the row, or, if the labels of {path.name} are classes, set data.task = "classification"'
            )
    return np.asarray(numbers, dtype=np.float64), ()


def _feature(table: _Table, at: int, missing: frozenset[str], categorical: bool, path: Path) -> NDArray[np.float64]:
    """One column as ``(N, 1)`` numbers, or ``(N, categories)`` zeros and ones."""
    texts = [row[at] for row in table.cells]
    numbers = [math.nan if text in missing else _number(text) for text in texts]
    if not categorical and None not in numbers:
        values = np.asarray(numbers, dtype=np.float64)
        bad = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
        if len(bad):
            raise DataError(f"{table.where[bad[0]]}: {texts[bad[0]]!r} in {table.columns[at]!r} is not a finite number")
        check_digits(values, f"{path}: column {table.columns[at]!r}")
        return values[:, None]
    names = sorted(set(texts) - missing)
    if len(names) > _MAX_CATEGORIES:
        raise DataError(
            f"{path}: column {table.columns[at]!r} has {len(names)} different texts; expected at most "
            f"{_MAX_CATEGORIES} categories; drop the column (is it an identifier?) or merge categories"
        )
    code = {name: number for number, name in enumerate(names)}
    rows = np.vstack([np.eye(len(names)), np.full((1, len(names)), math.nan)])  # the last one is of a missing cell
    return rows[[code.get(text, -1) for text in texts]]


def _groups(table: _Table, at: int, missing: frozenset[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    texts = [row[at] for row in table.cells]
    for text, where in zip(texts, table.where, strict=True):
        if text in missing:
            raise DataError(f"{where}: the group {table.columns[at]!r} is missing ({text!r}); fill it or drop the row")
    # Whole numbers in their own order (9 before 10), names in alphabetical order.
    whole = all(text.isascii() and text.isdigit() for text in texts)
    names = sorted(set(texts), key=lambda text: (int(text), text) if whole else (0, text))
    code = {name: number for number, name in enumerate(names)}
    return np.asarray([code[text] for text in texts], dtype=np.int64), tuple(names)


def _number(text: str) -> float | None:
    """Return the number in a cell; None if the cell is no number."""
    if "_" in text:  # float() accepts 1_000, but in a table this is text
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value
