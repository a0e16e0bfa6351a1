"""The cells of a table, column by column, as numbers or as texts, without holding the text of all cells at once."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.data.columns import ColumnKind
from polyfed.data.readers.rules import Rules

_EXACT = 2**53  # float64 tells all whole numbers apart up to here
_CODE = r"^[+-]?(0[0-9]|[0-9]+E[0-9]+$)"  # programs write neither leading zeros nor such exponents
_CODES = "name the column in `categorical` if its cells are codes, or leave it out with `ignore`"


class Sheet(Protocol):
    """One file of a table."""

    path: Path
    names: tuple[str, ...]
    guessed: bool  # whether nothing but the cells says that the first line names the columns
    typed: bool  # whether strings are text, whatever they look like

    def batches(self, columns: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Yield the cells of some columns as arrow arrays, some rows at a time: strings are cells yet to be read."""
        ...

    def place(self, row: int) -> str:
        """The file and line of a row, counted from 0."""
        ...


class Padded:
    """A file with columns that it lacks, whose cells are all missing.

    Args:
        sheet: the file.
        names: its columns and the further ones, in the order that is wanted.
    """

    def __init__(self, sheet: Sheet, names: tuple[str, ...]) -> None:
        self.path, self.guessed, self.typed = sheet.path, sheet.guessed, sheet.typed
        self.names, self.given, self.place, self._sheet = names, sheet.names, sheet.place, sheet

    def batches(self, columns: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Yield the cells of some columns, some rows at a time."""
        import pyarrow as pa

        own = self.given
        here = [at for at in columns if self.names[at] in own]
        for batch in self._sheet.batches([own.index(self.names[at]) for at in here]):
            cells = dict(zip(here, batch, strict=True))
            yield [cells[at] if at in cells else pa.nulls(len(batch[0])) for at in columns]


@dataclass
class Cells:
    """The cells of one column of all files.

    Args:
        what: file and name, for messages.
        name: of the column.
        text: whether the parts hold the numbers of texts, and not numbers.
        parts: arrays of some rows each.
        texts: number of each text, in the order in which the texts occur.
        declared: whether the type of the file, and not the cells, says that this is a category.
        types: which of "number" and "text" the files of types say.
        wide: the exact value of each number beyond 53 bits.
        code: the first cell that is a number but may be a code, such as 007 or 1E2.
    """

    what: str
    name: str
    text: bool
    parts: list[NDArray[Any]] = field(default_factory=list[NDArray[Any]])
    texts: dict[str, int] = field(default_factory=dict[str, int])
    declared: bool = False
    types: set[str] = field(default_factory=set[str])
    wide: dict[float, Decimal] = field(default_factory=dict[float, Decimal])
    code: str | None = None

    def joined(self) -> NDArray[Any]:
        """All cells: ``(N,)`` float64 with NaN where missing, or int32 with -1 where a typed file has none."""
        return np.concatenate(self.parts).astype(np.int32 if self.text else np.float64, copy=False)


@dataclass(frozen=True)
class Table:
    """The cells of a table.

    Args:
        sheets: its files.
        starts: the first row of each file, and the number of all rows.
        cells: the columns that were read, by their number in the first file.
        rules: the options.
        path: the file or folder.
    """

    sheets: Sequence[Sheet]
    starts: Sequence[int]
    cells: Mapping[int, Cells]
    rules: Rules
    path: Path

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self.sheets[0].names

    def place(self, row: int) -> str:
        """The file and line of a row of all files."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sheets[number].place(row - self.starts[number])

    def first(self, codes: NDArray[np.int32], code: int) -> str:
        """The file and line of the first cell with a text."""
        return self.place(int(np.argmax(codes == code)))

    def given(self, at: int, role: str, missing: Iterable[str]) -> tuple[NDArray[np.int32], list[str]]:
        """The cells of a column of texts: ``(N,)`` numbers of texts, and the texts.

        None may be missing but labels by the option `unlabelled`; these have -1.
        """
        codes, texts = self.cells[at].joined(), list(self.cells[at].texts)
        gone = [code for code, text in enumerate(texts) if text in missing]
        bad = np.flatnonzero(np.isin(codes, [-1, *gone]))
        if role == "label" and self.rules.unlabelled:
            there = [code for code in range(len(texts)) if code not in gone]
            number = np.full(len(texts) + 1, -1, dtype=np.int32)  # the last is that of -1
            number[there] = np.arange(len(there))
            return number[codes], [texts[code] for code in there]
        if len(bad):
            text = texts[codes[bad[0]]] if codes[bad[0]] >= 0 else "null"
            without = ", or give `missing` without this text" if self.rules.text is None else ""
            more = ", or set `unlabelled = true` if rows may have no label" * (role == "label")
            raise DataError(
                f"{self.place(int(bad[0]))}: the {role} {self.names[at]!r} is missing ({text!r}); fill it or drop the "
                f"row{without}{more}"
            )
        return codes, texts


def read_cells(sheets: Sequence[Sheet], roles: Mapping[int, ColumnKind], rules: Rules, path: Path) -> Table:
    """Read the cells; where a column turns out to be text, begin anew, so that numbers never wait as text."""
    roles_of_text = {"label", "group", "test", "unit", "time", "category", "text"} - (
        {"label"} if rules.task == "regression" else set()
    )
    text = {at for at, role in roles.items() if role in roles_of_text}
    used = [at for at in range(len(sheets[0].names)) if roles.get(at) not in ("ignored", "unused")]
    orders = [_order(sheet.names, sheets[0].names) for sheet in sheets]
    while True:
        before, starts = len(text), [0]
        cells = {at: Cells(f"{path}: column {sheets[0].names[at]!r}", sheets[0].names[at], at in text) for at in used}
        for sheet, order in zip(sheets, orders, strict=True):
            starts.append(starts[-1])
            for batch in sheet.batches([order[at] for at in used]):
                text |= {
                    at for at, array in zip(used, batch, strict=True) if not _add(cells[at], array, rules, sheet.typed)
                }
                starts[-1] += len(batch[0])
                if len(text) > before:
                    break
            if len(text) > before:
                break
            if starts[-1] == starts[-2]:
                below = "" if sheet.typed else " below the header"
                raise DataError(f"{sheet.path}: no rows{below}; expected at least one")
        else:
            for column in cells.values():
                if len(column.types) > 1:
                    raise DataError(
                        f"{column.what} holds numbers in some files and text in others; save it in one type, or leave "
                        "it out with `ignore`"
                    )
            return Table(sheets, starts, cells, rules, path)


def _order(names: Sequence[str], first: Sequence[str]) -> list[int]:
    """The place of each column of the first file in another file; nameless columns by their order."""
    places: defaultdict[str, deque[int]] = defaultdict(deque)
    for at, name in enumerate(names):
        places[name].append(at)
    return [places[name].popleft() for name in first]


def _add(cells: Cells, array: Any, rules: Rules, typed: bool) -> bool:
    """Add an arrow array to the cells of a column; return False if it is text, but the column was taken for numbers."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # it makes its functions when it is imported
    kind = array.type
    if typed and not pa.types.is_null(kind):
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        numeric = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_decimal(plain)
        cells.types.add("number" if numeric else "text")
    if pa.types.is_temporal(kind):
        if not cells.text:
            raise DataError(
                f"{cells.what} has type {kind}; expected numbers or text for a feature; leave it out with "
                f"`ignore = [{cells.name!r}]`, name it in `time`, `unit` or `group`, or save what you need as numbers"
            )
        # Moments with a time zone are stored, and so compared, in universal time.
        array = pc.cast(array.cast(pa.timestamp(kind.unit)) if pa.types.is_timestamp(kind) else array, pa.string())
    elif pa.types.is_string_view(kind):
        array = array.cast(pa.string())
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array = pc.utf8_trim_whitespace(array)
        if typed and not cells.text:
            return False
        if not cells.text:
            values = _numbers(array, rules, cells)
            if values is not None:
                cells.parts.append(_narrow(values))
            return values is not None
    elif pa.types.is_dictionary(kind) or pa.types.is_boolean(kind):
        cells.declared = True
        if not cells.text:
            return False
    elif not cells.text:
        try:
            values = pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise DataError(f"{cells.what}: {error}; {_CODES}") from error
        if pa.types.is_decimal(kind):
            _keep_apart(values, array, cells)
        cells.parts.append(_narrow(values))
        return True
    coded = array if pa.types.is_dictionary(kind) else array.dictionary_encode()
    texts = [_text(value) for value in coded.dictionary.to_pylist()]
    codes = np.asarray([*(cells.texts.setdefault(t, len(cells.texts)) for t in texts), -1], dtype=np.int32)
    cells.parts.append(codes[pc.fill_null(coded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)])
    return True


def _text(value: Any) -> str:
    """A cell as text: pandas makes 1 to 1.0 where a cell is missing, which is the same code all the same."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()


def _numbers(array: Any, rules: Rules, column: Cells) -> NDArray[np.float64] | None:
    """The numbers in an arrow array of strings, NaN where missing; None if a string is no number."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # it makes its functions when it is imported
    cells = pc.if_else(pc.is_in(array, value_set=pa.array(rules.missing, array.type)), None, array)
    plain = cells
    if rules.thousands is not None:
        joined = pc.replace_substring_regex(plain, pattern=rules.separator, replacement="")
        plain = pc.if_else(pc.match_substring_regex(plain, pattern=rules.grouped), joined, plain)
    if rules.decimal == ",":
        plain = pc.replace_substring(pc.replace_substring(plain, ".", "_"), ",", ".")
    try:
        values: NDArray[np.float64] = pc.cast(plain, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        values = np.full(len(array), math.nan)  # arrow knows fewer numbers than Python, such as those in other scripts
    if np.isnan(values).sum() != cells.null_count:
        coded = cells.dictionary_encode()
        known = [rules.number(text) for text in coded.dictionary.to_pylist()]
        if None in known:
            return None
        values = np.asarray([*known, math.nan], dtype=np.float64)[pc.fill_null(coded.indices, -1).to_numpy()]
    _keep_apart(values, plain, column)
    if column.code is None and pc.any(codes := pc.match_substring_regex(cells, pattern=_CODE)).as_py():
        column.code = cells.filter(codes)[0].as_py()
    return values


def _keep_apart(values: NDArray[np.float64], exactly: Any, column: Cells) -> None:
    """Refuse numbers that float64 makes equal, given the same numbers as an arrow array of strings or decimals."""
    for at in np.flatnonzero((np.abs(values) >= _EXACT) & np.isfinite(values)):
        exact = Decimal(exactly[int(at)].as_py())
        if column.wide.setdefault(float(values[at]), exact) != exact:
            raise DataError(
                f"{column.what}: {column.wide[float(values[at])]} and {exact} would become equal, as a number has 53 "
                f"bits; {_CODES}"
            )


def _narrow(values: NDArray[np.float64]) -> NDArray[Any]:
    """The same values in the smallest floating type that holds them exactly."""
    with np.errstate(over="ignore"):
        for kind in (np.float16, np.float32):
            if np.array_equal(small := values.astype(kind), values, equal_nan=True):
                return small
    return values
