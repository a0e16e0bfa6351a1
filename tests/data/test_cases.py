"""Small tables that went wrong in such software, each with its right reading; other pages have their whole kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.client import ClientData
from polyfed.data.dataset import Dataset
from polyfed.data.sources import load_dataset


def read(folder: Path, text: str, name: str = "t.csv", **options: Any) -> Dataset:
    """The data set of a table."""
    (folder / name).write_text(text)
    return load_dataset("csv", path=folder / name, **options)


def lines(head: str, *rows: str, times: int = 10) -> str:
    return "\n".join([head, *rows * times]) + "\n"


@pytest.mark.parametrize("first", [0, 1])
def test_a_nameless_column_that_counts_is_an_index_and_left_out(first: int, tmp_path: Path) -> None:
    rows = [f"{first + k},{20 + k % 7},{'fm'[k % 2]},{k % 2}" for k in range(20)]
    found = read(tmp_path, "\n".join([",age,sex,y", *rows]))
    assert [(column.name, column.kind) for column in found.columns] == [
        ("", "index"), ("age", "number"), ("sex", "category"), ("y", "label"),
    ]  # fmt: skip
    assert found.x.shape == (20, 3)


@pytest.mark.parametrize("change", [(5, "7"), (0, "3"), (19, "x")])
def test_a_nameless_column_that_does_not_count_is_an_error(change: tuple[int, str], tmp_path: Path) -> None:
    numbers = [str(k) for k in range(20)]
    numbers[change[0]] = change[1]
    for those in (numbers, [str(7 + k) for k in range(20)]):
        rows = [f"{n},{20 + k % 7},{k % 2}" for k, n in enumerate(those)]
        with pytest.raises(DataError, match=r"column 0 has no name and is no index.*`ignore = \[0\]`"):
            read(tmp_path, "\n".join([",age,y", *rows]))


def test_a_header_of_years_is_a_header(tmp_path: Path) -> None:
    found = read(tmp_path, lines("2019,2020,died", "3,2,0", "5,8,1", "8,8,0"))
    assert (len(found), found.classes, found.x.shape[1]) == (30, ("0", "1"), 2)


def test_a_first_line_that_may_be_names_or_data_is_asked_about(tmp_path: Path) -> None:
    text = lines("a,b,c", "b,a,c", "a,a,d", "b,b,d")
    with pytest.raises(ConfigError, match="header"):
        read(tmp_path, text)
    assert len(read(tmp_path, text, header=True)) == 30
    assert len(read(tmp_path, text, header=False)) == 31


@pytest.mark.parametrize("cell", ["NaN", "null", "-", "N/A", "None", ".", "?", "", "<NA>"])
def test_the_usual_spellings_of_missing_are_missing(cell: str, tmp_path: Path) -> None:
    found = read(tmp_path, lines("age,y", f"{cell},0", "42.5,1", "41.5,0"))
    assert [(column.kind, column.missing) for column in found.columns] == [("number", 10), ("label", 0)]


@pytest.mark.parametrize("cell", ["unknown", "n.b.", "4O"])
def test_a_text_among_numbers_is_an_error_that_names_the_cell(cell: str, tmp_path: Path) -> None:
    text = lines("age,y", "42.5,1", "41.5,0", times=20).replace("41.5", cell, 1)
    with pytest.raises(DataError, match=rf"t\.csv, line 3: got '{cell}' in column 'age'.*`missing`.*`categorical`"):
        read(tmp_path, text)
    assert read(tmp_path, text, categorical=["age"]).columns[0].kind == "category"
    assert read(tmp_path, text, missing=[cell]).columns[0].missing == 1


def test_a_decimal_comma_is_read_by_option_and_pointed_to_without(tmp_path: Path) -> None:
    text = lines("age;lab;y", "26;42,57;1", "25;41,46;0")
    found = read(tmp_path, text, delimiter=";", decimal=",")
    assert found.x[0].tolist() == [26, 42.57]
    with pytest.raises(DataError, match=r"line 2: got '42,57' in column 'lab'.*`decimal = \",\"`"):
        read(tmp_path, text, delimiter=";")
    with pytest.raises(DataError, match=r"t\.csv, line 2: 2 cells; expected 1 as in the first line"):
        read(tmp_path, text)


def test_a_table_of_one_column_is_pointed_to_its_delimiter(tmp_path: Path) -> None:
    """Catches a question about the header of a file whose cells were not even separated."""
    with pytest.raises(DataError, match=r"the only column is 'age;dose;y'.*delimiter"):
        read(tmp_path, lines("age;dose;y", "26;4;1", "25;5;0"))


def test_large_numbers_stay_apart(tmp_path: Path) -> None:
    found = read(tmp_path, lines("t,y", "1700000000,0", "1700000001,1"))
    x, _ = ClientData(found, torch.arange(20), augment=False).batch(torch.arange(2))
    assert x.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("01", "1"), ("01", "1")),
        (("1E2", "100"), ("100", "1E2")),
        (("9007199254740993", "9007199254740992"), ("9007199254740992", "9007199254740993")),
        (("10", "9"), ("9", "10")),
        (("1.0", "1"), ("1", "1.0")),
    ],
)
def test_labels_are_compared_as_text(labels: tuple[str, str], classes: tuple[str, ...], tmp_path: Path) -> None:
    found = read(tmp_path, lines("x,y", f"1,{labels[0]}", f"2,{labels[1]}"))
    assert found.classes == classes
    assert [found.classes[k] for k in found.y[:2]] == list(labels)


def test_a_number_with_as_many_values_as_rows_is_no_class(tmp_path: Path) -> None:
    text = "\n".join(["x,y", *(f"{k % 3},{k * 7}" for k in range(40))])
    with pytest.raises(DataError, match=r'40 different values in 40 rows.*task = "regression"'):
        read(tmp_path, text)
    assert read(tmp_path, text, task="regression").y[:3].tolist() == [0, 7, 14]


def test_labels_are_named_by_a_mapping(tmp_path: Path) -> None:
    text = lines("x,y", "1,0", "2,1", "3,2")
    found = read(tmp_path, text, classes={"0": "healthy", "1": "ill", "2": "ill"})
    assert (found.classes, found.y[:3].tolist()) == (("healthy", "ill"), [0, 1, 1])
    with pytest.raises(
        DataError, match=r"line 4: got '2' in the label 'y'; expected one of the texts of `classes`: 0, 1"
    ):
        read(tmp_path, text, classes={"0": "healthy", "1": "ill"})


def test_bytes_of_another_encoding_are_an_error_that_names_the_option(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(lines("größe,y", "1,a", "2,b").encode("latin-1"))
    with pytest.raises(DataError, match="encoding"):
        load_dataset("csv", path=path)
    assert load_dataset("csv", path=path, encoding="latin-1").columns[0].name == "größe"
    path.write_bytes(lines("größe,y", "1,a", "2,b").encode("utf-8-sig"))
    assert load_dataset("csv", path=path).columns[0].name == "größe"


def test_a_folder_has_files_with_columns_in_any_order_and_endings_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(lines("x,y", "1,0", "2,1"))
    (tmp_path / "b.CSV").write_text(lines("y,x", "0,3", "1,4"))
    found = load_dataset("csv", path=tmp_path, label="y")
    assert found.group_names == ("a", "b")
    assert found.x.flatten()[[0, 1, 20, 21]].tolist() == [1, 2, 3, 4]
