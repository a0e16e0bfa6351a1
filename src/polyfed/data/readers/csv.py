"""A user's own table as text: one csv file, or a folder with one csv file per client."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cells import Sheet
from polyfed.data.readers.rules import Rules
from polyfed.data.readers.table import read_table, unclear_header
from polyfed.data.readers.tokenizer import Tokens

_BLOCK = 1 << 20  # bytes that are read at once; more where rows are long, as each block has a cost per column
_LOOK = 1000  # rows that are looked at to tell whether the first line names the columns; fewer of long rows


def load_csv(
    path: Path,
    *,
    header: bool | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
    tokens: Tokens | None = None,
    **options: Any,
) -> Dataset:
    """The data set of a table in text.

    Args:
        path: a file, or a folder of ``*.csv`` files of the same columns, one per client (file name = group).
        header: whether the first line names the columns; None infers it from the cells where they leave no doubt.
        delimiter: the character between cells.
        encoding: the name of a codec; a byte order mark is left out.
        tokens: how texts become tokens, if an option names their column.
        options: see `Rules`.

    Raises:
        DataError: bytes of another encoding, a ragged row, or what `read_table` refuses.
        ConfigError: options that contradict each other, or a first line that may be names or data.
    """
    rules = Rules(**options)
    if header is False and rules.by_name and rules.agreed is None:
        raise ConfigError("header: got false, but columns are given by name; give their numbers instead")
    known = True if rules.by_name and header is None else header
    fields = read_table(path, ".csv", lambda file: _Sheet(file, known, delimiter, encoding, rules), rules, tokens)
    return Dataset(**fields)


def open_csv(path: Path, *, header: bool, delimiter: str = ",", encoding: str = "utf-8", rules: Rules) -> Sheet:
    """Open a csv file of rows without a label, which may have a single column.

    Args:
        path: the file.
        header: whether the first line names the columns.
        delimiter: as for `load_csv`.
        encoding: as for `load_csv`.
        rules: the options.

    Raises:
        DataError: as `load_csv`.
    """
    return _Sheet(path, header, delimiter, encoding, rules, narrow=True)


class _Sheet:
    """One csv file."""

    typed = False

    def __init__(
        self, path: Path, header: bool | None, delimiter: str, encoding: str, rules: Rules, *, narrow: bool = False
    ) -> None:
        self.path, self._delimiter = path, delimiter
        codec = codecs.lookup(encoding).name
        self._codec = "utf-8-sig" if codec == "utf-8" else codec
        quoted = self._scan()
        self._first = next((row for _, row in self._rows()), [])
        if not self._first:
            raise DataError(f"{path}: no rows; expected a table with a label column")
        look = max(10, min(_LOOK, 100_000 // len(self._first)))
        rows = [[cell.strip() for cell in row] for _, row in islice(self._rows(), look)]
        length = 2 * max(sum(map(len, row)) + len(row) for row in rows)
        self._block = max(_BLOCK, min(200 * length, 1 << 26), 4 * length)
        if quoted or any(len(row) != len(self._first) for row in rows):
            self._check()
        if len(self._first) == 1 and not narrow:
            raise DataError(
                f"{path}: no feature columns beside the label; the only column is {rows[0][0]!r}{self._hint()}"
            )
        self.guessed = header is None
        self._header = self._names_columns(rows, rules) if header is None else header
        self.names = tuple(rows[0] if self._header else (f"column {i}" for i in range(len(rows[0]))))
        twice = [name for name, count in Counter(self.names).items() if count > 1 and name]
        if twice:
            raise DataError(f"{path}: column names repeat: {', '.join(twice)}; rename them")
        if len(rows) == 1 and self._header:
            raise DataError(f"{path}: no rows below the header; expected at least one")

    def batches(self, columns: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Yield the cells of some columns as arrow strings, some rows at a time."""
        import pyarrow as pa
        import pyarrow.csv as arrow

        names = [str(number) for number in range(len(self.names))]
        wanted = [names[column] for column in columns]
        first = self._header
        try:
            with arrow.open_csv(
                self.path,
                read_options=arrow.ReadOptions(
                    column_names=names,
                    block_size=self._block,
                    use_threads=False,
                    encoding="utf8" if self._codec == "utf-8-sig" else self._codec,
                ),
                parse_options=arrow.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                convert_options=arrow.ConvertOptions(
                    column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, strings_can_be_null=False
                ),
            ) as reader:
                for batch in reader:
                    part = batch.slice(1) if first and len(batch) else batch
                    first = first and not len(batch)
                    if len(part):
                        yield part.columns
        except pa.ArrowInvalid as error:
            self._check()
            raise self._unreadable(error) from error

    def place(self, row: int) -> str:
        """The file and the line in which a row begins."""
        line = next(islice(self._rows(), row + self._header, None), (0, []))[0]
        return f"{self.path}, line {line}"

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: cannot be read as csv ({error}); correct or convert the file")

    def _rows(self, *, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
        """Yield each row that is not blank, and the number of its first line."""
        with self.path.open(newline="", encoding=self._codec) as handle:
            reader, line = csv.reader(handle, delimiter=self._delimiter, strict=strict), 1
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1

    def _check(self) -> None:
        """Refuse ragged rows and quotes that do not match, at a fifth of the speed of arrow."""
        line, count = 0, len(self._first)
        try:
            for line, row in self._rows(strict=True):
                if len(row) != count:
                    raise DataError(
                        f"{self.path}, line {line}: {len(row)} cells; expected {count} as in the first line; correct "
                        f"the line or the delimiter{self._hint()}"
                    )
        except csv.Error as error:
            raise DataError(
                f"{self.path}: cannot be read as csv ({error}, after line {line}); correct the quotes"
            ) from error

    def _hint(self) -> str:
        others = [mark for mark in ";\t|,:" if mark != self._delimiter and any(mark in cell for cell in self._first)]
        return f"; did you mean delimiter = {others[0]!r}?" if others and len(self._first) == 1 else ""

    def _scan(self) -> bool:
        """Check that the bytes are text of the encoding; return whether it has quotes, about which arrow is lenient."""
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(self._codec)(), translate=True)
        quoted, lines, done, piece = False, 1, 0, b"-"
        try:
            with self.path.open("rb") as handle:
                while piece:
                    piece = handle.read(_BLOCK)
                    done += len(piece)
                    text = decoder.decode(piece, final=not piece)
                    if "\0" in text:
                        lines += text[: text.index("\0")].count("\n")
                        raise DataError(
                            f"{self.path}, line {lines}: a NUL character; expected text; is it another format, or in "
                            'an encoding such as "utf-16", to be named by the option `encoding`?'
                        )
                    quoted = quoted or '"' in text
                    lines += text.count("\n")
        except UnicodeError as error:
            if not isinstance(error, UnicodeDecodeError):
                raise DataError(
                    f"{self.path}: is not {self._codec} ({error}); correct the option `encoding`"
                ) from error
            before = error.object[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines += before.count(b"\n")
            line = "" if self._codec.startswith(("utf-16", "utf-32")) else f", line {lines}"
            raise DataError(
                f"{self.path}{line}: byte 0x{error.object[error.start]:02x} at position "
                f"{done - len(error.object) + error.start} (from 0) is not {self._codec.removesuffix('-sig').upper()}; "
                f'name the encoding of the file by the option `encoding`, such as "latin-1", '
                '"cp1252" or "utf-16", or convert the file'
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror or error}); correct its permissions"
            ) from error
        return quoted

    def _names_columns(self, rows: Sequence[Sequence[str]], rules: Rules) -> bool:
        """Return whether the first line names the columns.

        It does if a cell of it is a text above numbers, or if its label is no class while all others occur again.
        """
        first, rest = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
        numbers = [rules.number(cell) is not None for cell in first]
        if len(rows) == 1:
            return not any(numbers)
        columns = [[cell for cell in column if cell not in rules.missing] for column in zip(*rest, strict=True)]
        numeric = [bool(column) and all(rules.number(cell) is not None for cell in column) for column in columns]
        label = rules.label if isinstance(rules.label, int) and -len(first) <= rules.label < len(first) else -1
        labels = Counter(row[label] for row in rest)
        names = any(
            there and not number and cell not in rules.missing
            for there, number, cell in zip(numeric, numbers, first, strict=True)
        )
        known = first[label] in labels
        if names:
            if known:
                raise unclear_header(self.path, f"it does not fit the lines below, but {first[label]!r} is a class")
            return True
        if not any(numeric):
            raise unclear_header(self.path, "the table has no column of numbers")
        if rules.task == "regression":
            raise unclear_header(self.path, "it looks like the lines below")
        if known or len(rest) == 1:
            return False
        if min(labels.values(), default=0) > 1:
            return True
        raise unclear_header(self.path, f"{first[label]!r} is no class that occurs again, nor are all others")
