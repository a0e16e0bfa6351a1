"""The options of a table, and what is a number under them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polyfed.base.errors import ConfigError
from polyfed.data.columns import Column

#: Usual spellings of a missing value; compared exactly, as people and programs write them.
MISSING = (
    *("", "?", "-", "--", ".", "NA", "na", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "NAN", "-nan", "-NaN"),
    *("NaT", "null", "Null", "NULL", "None", "none", "NONE"),
)

#: Patterns of separators of thousands that have several forms: spaces that do not break, and a typographic apostrophe.
_FORMS = {" ": "[ \u00a0\u202f\u2009]", "'": "['\u2019]"}


@dataclass(frozen=True)
class Rules:
    """Options of a table.

    Args:
        label: column of the label, by name or by number from 0 (negative from the end).
        missing: cells that stand for a missing value.
        also_missing: further cells that stand for a missing value.
        categorical: columns to treat as categories although their cells are, or may be, numbers.
        numeric: columns to treat as numbers although their cells may be codes, such as 007.
        group: column of the natural group (who collected the row), by name or number; it is not a feature.
        unit: column of the unit, such as the patient, whose rows ``split = "groups"`` keeps together; no feature.
        time: column of the time, by which ``split = "time"`` splits; no feature.
        ignore: columns to leave out.
        test: a column that flags the official test rows, by name or number, or the file of the test rows.
        classes: names of classes by the label's texts, or the texts in the order of their classes. None: all texts that
            occur, whole numbers in their own order and anything else in alphabetical order.
        decimal: the decimal separator of numbers, "." or ",".
        thousands: the separator of thousands; None if there is none.
        task: "classification", or "regression" for a label of numbers.
        union: whether files may have unlike columns: what a file lacks of the others' columns, or of those that all
            sites agreed on, is missing there.
        unlabelled: whether a row may have no label, its cell missing.
        agreed: the columns that all sites agreed on: the features and the label are found by name, and categories and
            classes have the agreed numbers.
        text: column of the texts, by name or number, which alone are read, as tokens; no other column is a feature.
    """

    label: str | int = -1
    missing: Sequence[str] = MISSING
    also_missing: Sequence[str] = ()
    categorical: Sequence[str | int] = ()
    numeric: Sequence[str | int] = ()
    group: str | int | None = None
    unit: str | int | None = None
    time: str | int | None = None
    ignore: Sequence[str | int] = ()
    test: str | int | None = None
    classes: Mapping[str, str] | Sequence[str] | None = None
    decimal: str = "."
    thousands: str | None = None
    task: str = "classification"
    union: bool = False
    unlabelled: bool = False
    agreed: Sequence[Column] | None = None
    text: str | int | None = None

    def __post_init__(self) -> None:
        """Join the cells that stand for a missing value; refuse options that contradict each other."""
        object.__setattr__(self, "missing", tuple(dict.fromkeys((*self.missing, *self.also_missing))))
        if self.decimal == self.thousands:
            raise ConfigError(f"thousands: got {self.thousands!r}, which is the decimal separator too; change one")
        if self.task == "regression" and self.classes is not None:
            raise ConfigError("classes: a regression has no classes; leave the option out")

    @property
    def by_name(self) -> bool:
        """Whether an option or an agreement names a column."""
        one = (self.label, self.group, self.unit, self.time, self.text)
        named = (*one, *self.categorical, *self.numeric, *self.ignore)
        return self.union or self.agreed is not None or any(isinstance(column, str) for column in named)

    def number(self, cell: str) -> float | None:
        """Return the number in a cell; None if the cell is no number."""
        if self.thousands is not None and re.match(self.grouped, cell):
            cell = re.sub(self.separator, "", cell)
        if self.decimal == ",":
            cell = cell.replace(".", "_").replace(",", ".")
        if "_" in cell:  # float() accepts 1_000, but in a table this is text
            return None
        try:
            value = float(cell)
        except ValueError:
            return None
        return None if math.isnan(value) else value

    @property
    def separator(self) -> str:
        """The pattern of a separator of thousands."""
        return _FORMS.get(self.thousands or "", re.escape(self.thousands or ""))

    @property
    def grouped(self) -> str:
        """The pattern of a number with separators of thousands, each before three digits."""
        return rf"^[+-]?[0-9]{{1,3}}({self.separator}[0-9]{{3}})+({re.escape(self.decimal)}[0-9]*)?$"

    def hint(self, cell: str) -> str | None:
        """How a text would be read as a number; None if it is not written like one."""
        if not re.fullmatch(r"[+-]?[\d.,'\u2019\s]*\d[\d.,]*\s?%?", cell):
            return None
        if cell.endswith("%"):
            return "without the sign %"
        found = list[str]()
        for decimal in (self.decimal, ",", "."):
            for thousands in (None, ".", ",", " ", "'"):
                if (
                    decimal != thousands
                    and replace(self, decimal=decimal, thousands=thousands).number(cell) is not None
                ):
                    options = {"decimal": decimal} if decimal != self.decimal else {}
                    options |= {"thousands": thousands} if thousands else {}
                    found.append(" and ".join(f'`{option} = "{value}"`' for option, value in options.items()))
                    break
        return f"with {' or '.join(dict.fromkeys(filter(None, found)))}" if any(found) else None
