"""Tables with types."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.conform import schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.sources import load_dataset

Y = ["a", "b"] * 3


def read(folder: Path, columns: dict[str, Any], **options: Any) -> Dataset:
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return load_dataset("parquet", path=folder / "t.parquet", **options)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, 1, None, 4, 1, 5], pa.int8()),
        pa.array([3, 1, math.nan, 4, 1, 5], pa.float32()),
        pa.array(np.array([3, 1, math.nan, 4, 1, 5], np.float16)),
        pa.array([Decimal(3), Decimal(1), None, Decimal(4), Decimal(1), Decimal(5)]),
        pa.array([3, 1, None, 4, 1, 5]).dictionary_encode(),
    ],
)
def test_numbers_are_numbers(values: Any, tmp_path: Path) -> None:
    found = read(tmp_path, {"x": values, "y": Y})
    assert str(found.x.flatten().tolist()) == str([3.0, 1.0, math.nan, 4.0, 1.0, 5.0])
    assert (found.columns[0].kind, found.columns[0].missing) == ("number", 1)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (pa.array(["v", "u", None, "v", "u", "v"]), ("u", "v")),
        (pa.array(["v", "u", "NA", "v", "u", "v"], pa.large_string()), ("u", "v")),
        (pa.array(["v", "u", None, "v", "u", "v"]).dictionary_encode(), ("u", "v")),
        (pa.array([True, False, None, True, False, True]), ("False", "True")),
    ],
)
def test_text_and_truth_are_categories(values: Any, levels: tuple[str, ...], tmp_path: Path) -> None:
    found = read(tmp_path, {"x": values, "y": Y})
    rows = [[0.0, 1.0], [1.0, 0.0], [math.nan, math.nan], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert str(found.x.tolist()) == str(rows)
    assert (found.columns[0].categories, found.columns[0].missing) == (levels, 1)


@pytest.mark.parametrize("value", [datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1), [1], b"x"])
def test_other_types_are_to_be_ignored(value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 't' has type .*`ignore = \['t'\]`"):
        read(tmp_path, {"t": [value] * 6, "x": range(6), "y": Y})
    assert read(tmp_path, {"t": [value] * 6, "x": range(6), "y": Y}, ignore=["t"]).x.shape == (6, 1)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({"x": [1, 2, 3], "y": ["a", None, "b"]}, {}, "row 2: the label 'y' is missing"),
        ({"x": [1, 2, 3], "y": [0.5, None, 1]}, {"task": "regression"}, "row 2: the label 'y' is missing"),
        ({"x": [1.0, math.inf, 2], "y": [0, 1, 1]}, {}, "row 2: 'inf' in 'x'"),
        ({"x": [2**53, 2**53 + 1], "y": [0, 1]}, {}, "column 'x': .*not in range.*`categorical`"),
        ({"x": [Decimal(2**53), Decimal(2**53 + 1)], "y": [0, 1]}, {}, "would become equal"),
        ({"x": pa.array([], pa.int8()), "y": pa.array([], pa.int8())}, {}, "no rows"),
    ],
)
def test_faults(columns: dict[str, Any], options: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read(tmp_path, columns, **options)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_numbers_saved_as_text_are_not_pointed_to_options_of_csv(task: str, tmp_path: Path) -> None:
    at, other = ("x", "y") if task == "classification" else ("y", "x")
    with pytest.raises(DataError, match=rf"row 1: got '1' in column '{at}'.*if the column were saved as nu") as caught:
        read(tmp_path, {"x": [0, 1], "y": [0, 1], at: ["1", "01"], other: [0, 1]}, task=task)
    assert "decimal" not in str(caught.value)


def test_an_index_of_pandas_is_left_out_and_no_label(tmp_path: Path) -> None:
    columns = {"x": range(6), "y": Y, "__index_level_0__": [0, 1, 2] * 2}
    found = read(tmp_path, columns, label="y")
    assert [column.kind for column in found.columns] == ["number", "label", "index"]
    with pytest.raises(ConfigError, match=r"label: the last column .* is the index '__index_level_0__'"):
        read(tmp_path, columns)


def sites(folder: Path, values: dict[str, Any]) -> Path:
    for name, column in values.items():
        pq.write_table(pa.table({"x": column, "z": [1.0, 2.0], "y": ["a", "b"]}), folder / f"{name}.parquet")
    return folder


def test_a_column_of_numbers_here_and_text_there_is_refused(tmp_path: Path) -> None:
    """Catches two sites whose numbers become categories because a third site wrote text."""
    sites(tmp_path, {"a": pa.array([1.0, 2.0]), "b": pa.array(["1", "2"])})
    with pytest.raises(DataError, match="'x' holds numbers in some files and text in others"):
        load_dataset("parquet", path=tmp_path)


def test_a_code_is_the_same_code_where_a_missing_cell_made_it_a_fraction(tmp_path: Path) -> None:
    """Catches 1 and 1.0 as two categories: pandas writes the second where a cell of the column is missing."""
    sites(tmp_path, {"a": pa.array([1, 2]), "b": pa.array([1.0, None])})
    found = load_dataset("parquet", path=tmp_path, categorical=["x"])
    assert (found.columns[0].categories, found.columns[0].missing) == (("1", "2"), 1)


@pytest.mark.parametrize("zone", [None, "Europe/Paris"])
def test_moments_order_the_rows_for_a_split_by_time(zone: str | None, tmp_path: Path) -> None:
    moments = [datetime.datetime(2024, 1, day, tzinfo=None if zone is None else datetime.UTC) for day in (3, 1, 2)]
    table = {"x": [1.0, 2.0, 3.0], "t": pa.array(moments, pa.timestamp("us", zone)), "y": ["a", "b", "a"]}
    found = read(tmp_path, table, time="t")
    assert found.times is not None
    assert found.times.tolist() == [2, 0, 1]
    with pytest.raises(DataError, match=r"'t' has type timestamp.*name it in `time`"):
        read(tmp_path, table)


def test_views_of_strings_are_text_and_no_rows_are_an_error(tmp_path: Path) -> None:
    assert read(tmp_path, {"x": pa.array(["v", "u", "v"], pa.string_view()), "y": ["a", "b", "a"]}).input_shape == (2,)
    with pytest.raises(DataError, match="no rows; expected at least one"):
        read(tmp_path, {"x": pa.array([], pa.float64()), "y": pa.array([], pa.string())})


def test_categories_of_numbers_are_those_that_a_frame_declared(tmp_path: Path) -> None:
    """Catches codes that become quantities, as parquet keeps the numbers of a pandas.Categorical alone."""
    about = {"columns": [{"name": "x", "pandas_type": "categorical", "numpy_type": "int8"}]}
    table = pa.table({"x": [3, 1, None, 3], "y": ["a", "b", "a", "b"]}).replace_schema_metadata(
        {b"pandas": json.dumps(about)}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    (column, _) = load_dataset("parquet", path=tmp_path / "t.parquet").columns
    assert (column.kind, column.categories, column.missing) == ("category", ("1", "3"), 1)


def test_a_column_of_text_without_any_is_numbers_that_are_missing(tmp_path: Path) -> None:
    """Catches a category without levels, which has no place in the input."""
    found = read(tmp_path, {"x": pa.array([None] * 6, pa.string()), "z": [1.0, 2, 3, 4, 5, 6], "y": Y})
    assert (found.columns[0].kind, found.columns[0].missing, found.input_shape) == ("number", 6, (2,))
    again = load_dataset("parquet", path=tmp_path / "t.parquet", agreed=schema_of(found))
    assert str(again.x.tolist()) == str(found.x.tolist())
