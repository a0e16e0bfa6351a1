"""Tables that are on disk as far as they go, whenever the program that fills them is stopped."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


class Table:
    """A CSV file that is written anew at each row: a row of the same key takes the place of the one before.

    Args:
        path: of the file.
        columns: its header.
        key: how many of the first columns tell rows apart.
    """

    def __init__(self, path: Path, columns: list[str], key: int = 1) -> None:
        self.path, self.columns, self.key = path, columns, key
        self.rows: dict[tuple[Any, ...], list[Any]] = {}

    def put(self, *values: Any) -> None:
        """Add or replace a row, and print it."""
        row = [f"{value:.4g}" if isinstance(value, float) else value for value in values]
        self.rows[tuple(row[: self.key])] = row
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows.values()])
        print(", ".join(f"{name} {value}" for name, value in zip(self.columns, row, strict=True)), flush=True)
