"""A user's own table with types: one parquet file, or a folder with one parquet file per client.

The types say what a column is: numbers are numbers; text, dictionaries, and true or false (as "True" and "False", as in
a csv file that pandas writes) are categories. A null is a missing value, and so is a text that `missing` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polyfed.base.errors import DataError
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cells import Sheet
from polyfed.data.readers.rules import Rules
from polyfed.data.readers.table import read_table
from polyfed.data.readers.tokenizer import Tokens

_ROWS = 16_384  # rows that are read at once


def load_parquet(path: Path, *, tokens: Tokens | None = None, **options: Any) -> Dataset:
    """The data set of a parquet table.

    Args:
        path: a file, or a folder of ``*.parquet`` files of the same columns, one per client (file name = group).
        tokens: how texts become tokens, if an option names their column.
        options: see `Rules`.

    Raises:
        DataError: a damaged file, a type that is no feature, or what `read_table` refuses.
        ConfigError: options that contradict each other.
    """
    rules = Rules(**options)
    return Dataset(**read_table(path, ".parquet", _Sheet, rules, tokens))


def open_parquet(path: Path) -> Sheet:
    """Open a parquet file of rows without a label.

    Raises:
        DataError: as `load_parquet`.
    """
    return _Sheet(path)


class _Sheet:
    """One parquet file."""

    guessed, typed = False, True

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        self.names = tuple(self._schema.names)
        # Parquet has no categories of numbers; a frame's metadata says which columns are.
        about: Any = (self._schema.pandas_metadata or {}).get("columns", ())
        self._categories = {column["name"] for column in about if column.get("pandas_type") == "categorical"}
        if len(set(self.names)) != len(self.names):
            raise DataError(f"{path}: column names repeat: {', '.join(self.names)}; rename them")
        if not self.names:
            raise DataError(f"{path}: no columns; expected a table with a label column")

    def batches(self, columns: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Yield some columns as arrow arrays, some rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [self.names[column] for column in columns]
        for name in names:
            kind = self._schema.field(name).type
            if not any(
                test(kind.value_type if pa.types.is_dictionary(kind) else kind)
                for test in (
                    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean),
                    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
                    *(pa.types.is_temporal, pa.types.is_null),
                )
            ):
                raise DataError(
                    f"{self.path}: column {name!r} has type {kind}; expected numbers, text, or true and false; leave "
                    f"it out with `ignore = [{name!r}]`, or save what you need of it as numbers or text"
                )
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_ROWS, columns=names):
                    cells = ((name, batch.column(name)) for name in names)
                    yield [
                        array.dictionary_encode()
                        if name in self._categories and not pa.types.is_dictionary(array.type)
                        else array
                        for name, array in cells
                    ]
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def place(self, row: int) -> str:
        """The file and a row, counted from 1."""
        return f"{self.path}, row {row + 1}"

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: cannot be read as parquet ({error}); the file is damaged, or of another format")
