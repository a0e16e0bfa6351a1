"""What each column of a table was taken for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

#: "number" and "category" are features; "text" becomes tokens, and then the columns that no option names are "unused";
#: "index" is a nameless column of row numbers, which is left out; "ignored" was left out on request; "test" flags the
#: official test rows; "unit" and "time" are for splits.
ColumnKind: TypeAlias = Literal[
    "number", "category", "text", "unused", "index", "ignored", "label", "group", "test", "unit", "time"
]


@dataclass(frozen=True)
class Column:
    """A column of a table as it was read.

    Args:
        name: its name, or "column 3" without a header.
        kind: what it was taken for.
        categories: the categories of a "category", in order of their columns of zeros and ones; the class names of the
            label of a classification; empty for other kinds.
        missing: number of missing cells.
        low: smallest number; None for anything but a "number" or the label of a regression, or if all are missing.
        high: largest number, likewise.
        doubt: a number, such as -999, that may stand for a missing value, as all others are far from it.
    """

    name: str
    kind: ColumnKind
    categories: tuple[str, ...] = ()
    missing: int = 0
    low: float | None = None
    high: float | None = None
    doubt: float | None = None

    @property
    def width(self) -> int:
        """Number of features that it becomes: 1, or one for each category."""
        return len(self.categories) if self.kind == "category" else 1
