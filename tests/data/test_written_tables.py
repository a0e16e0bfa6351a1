"""Tables that hypothesis makes up: what is read is what was written, by one reader and by two sites that agree."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyfed.data.conform import schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.readers.rules import MISSING
from polyfed.data.sources import load_dataset

#: Texts as people write them: separators, quotes, line breaks, umlauts, and what looks like numbers.
TEXTS = st.one_of(
    st.sampled_from(["1", "01", "1.0", "1E2", "100", "9007199254740993", "-0", "1,5", "1_0", "true", 'a "b"', "x\ny"]),
    st.text("abcäöß;,\t'\" .-%/", min_size=1, max_size=6),
).map(str.strip).filter(lambda text: text not in MISSING)  # fmt: skip
NUMBERS = st.integers(-4000, 4000).map(lambda quarters: quarters / 4)
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tables(draw: Any) -> dict[str, Any]:
    """Rows of a number, a category whose levels may look like numbers, and a label; some cells are missing."""
    levels = draw(st.lists(TEXTS, min_size=1, max_size=4, unique=True))
    classes = draw(st.lists(TEXTS, min_size=2, max_size=3, unique=True))
    count = draw(st.integers(6, 14))
    rows = [
        (
            draw(st.one_of(NUMBERS, st.none())),
            draw(st.one_of(st.sampled_from(levels), st.none())),
            classes[k] if k < len(classes) else draw(st.sampled_from(classes)),
        )
        for k in range(count)
    ]
    rows[0] = (draw(NUMBERS), levels[0], classes[0])
    return {
        "rows": rows,
        "levels": levels,
        "classes": classes,
        "delimiter": draw(st.sampled_from([",", ";", "\t", "|"])),
        "encoding": draw(st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16"])),
        "missing": draw(st.sampled_from([text for text in MISSING if text])),
        "order": draw(st.permutations([0, 1, 2])),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    }


NAMES = ("dose", "kind", "label")


def written(path: Path, table: dict[str, Any], rows: list[Any], order: list[int]) -> None:
    with path.open("w", newline="", encoding=table["encoding"]) as file:
        sheet = csv.writer(file, delimiter=table["delimiter"], quoting=table["quoting"])
        sheet.writerow([NAMES[k] for k in order])
        for row in rows:
            cells = [table["missing"] if cell is None else str(cell) for cell in row]
            sheet.writerow([cells[k] for k in order])


def read(path: Path, table: dict[str, Any], **more: Any) -> Dataset:
    encoding = "utf-8" if table["encoding"] == "utf-8-sig" else table["encoding"]
    options = {"label": "label", "categorical": ["kind"], "delimiter": table["delimiter"], "encoding": encoding}
    return load_dataset("csv", path=path, **options, **more)


def told(dataset: Dataset) -> list[tuple[float | None, str | None, str]]:
    """The rows that a data set has, by its own account of its columns."""
    starts, at = dict[str, int](), 0
    for column in dataset.columns:
        if column.kind in ("number", "category"):
            starts[column.name] = at
            at += len(column.categories) or 1
    assert dataset.x.shape[1] == at
    levels = next(column.categories for column in dataset.columns if column.name == "kind")
    found: list[tuple[float | None, str | None, str]] = []
    for x, y in zip(dataset.x.tolist(), dataset.y.tolist(), strict=True):
        dose, flags = x[starts["dose"]], x[starts["kind"] : starts["kind"] + len(levels)]
        gone = any(map(math.isnan, flags))
        assert all(map(math.isnan, flags)) if gone else sorted(flags) == [0] * (len(levels) - 1) + [1]
        kind = None if gone else levels[flags.index(1)]
        found.append((None if math.isnan(dose) else dose, kind, dataset.classes[y]))
    return found


@SLOW
@given(table=tables())
def test_a_table_is_read_as_it_was_written(table: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "t.csv", table, table["rows"], table["order"])
    found = read(tmp_path / "t.csv", table, classes=table["classes"])
    assert found.classes == tuple(table["classes"])
    assert told(found) == table["rows"]
    missing = sum(cell is None for row in table["rows"] for cell in row)
    assert sum(column.missing for column in found.columns) == missing


@SLOW
@given(table=tables(), order=st.permutations([0, 1, 2]))
def test_two_sites_that_agree_mean_the_same(table: dict[str, Any], order: list[int], tmp_path: Path) -> None:
    """The second site has one row, so one class, at most one category, and its columns in another order."""
    first, second = table["rows"], [table["rows"][-1]] * 6
    written(tmp_path / "a.csv", table, first, table["order"])
    written(tmp_path / "b.csv", table, second, order)
    here = read(tmp_path / "a.csv", table, classes=table["classes"])
    there = read(tmp_path / "b.csv", table, agreed=schema_of(here))
    assert schema_of(there) == schema_of(here)
    assert told(there) == second
    assert there.x.shape[1] == here.x.shape[1]
