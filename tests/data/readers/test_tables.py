"""Options of a table, the lines that messages name, and what sites agreed on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.conform import schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.doubts import doubts
from polyfed.data.sources import load_dataset
from polyfed.report.columns import summary

NUMBERS = "".join(f"{k}.5,{k % 2}\n" for k in range(20))


def read(folder: Path, text: str | bytes, name: str = "t.csv", **options: Any) -> Dataset:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_dataset("csv", path=folder / name, **options)


@pytest.mark.parametrize(
    ("cell", "options", "value"),
    [
        ("1.234,5", {"thousands": ".", "decimal": ","}, 1234.5),
        ("12.345.678", {"thousands": ".", "decimal": ","}, 12345678),
        ("1,234.5", {"thousands": ","}, 1234.5),
        ("-1 234.5", {"thousands": " "}, -1234.5),
        ("1\u00a0234", {"thousands": " "}, 1234),
        ("1\u2019234", {"thousands": "'"}, 1234),
        ("1e3", {"thousands": ","}, 1000),
    ],
)
def test_thousands_are_read_by_option(cell: str, options: dict[str, str], value: float, tmp_path: Path) -> None:
    found = read(tmp_path, f"a;y\n{cell};0\n2;1\n3;1\n", delimiter=";", **options)
    assert (found.columns[0].kind, found.x[0].tolist()) == ("number", [value])


@pytest.mark.parametrize("cell", ["1,23", "12,34,567", "1234,567", ",123"])
def test_thousands_stand_before_three_digits(cell: str, tmp_path: Path) -> None:
    """Catches 1,23 read as 123, where the comma is a decimal one."""
    with pytest.raises(DataError, match=rf"line 2: got '{cell}' in column 'a'; expected a number"):
        read(tmp_path, f"a;y\n{cell};0\n2;1\n3;1\n", delimiter=";", thousands=",")


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("1,5", '`decimal = ","`'),
        ("1.234,5", '`decimal = ","` and `thousands = "."`'),
        ("1 234", '`thousands = " "`'),
        ("1'234", '`thousands = "\'"`'),
        ("5%", "without the sign %"),
    ],
)
def test_the_option_that_explains_a_cell_is_named(cell: str, advice: str, tmp_path: Path) -> None:
    text = "a;y\n" + NUMBERS.replace(",", ";") + f"{cell};0\n"
    with pytest.raises(DataError) as caught:
        read(tmp_path, text, delimiter=";")
    assert f"t.csv, line 22: got {cell!r} in column 'a'" in str(caught.value)
    assert f"it would be a number with {advice}" in str(caught.value).replace("number without", "number with without")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('a,b,y\n1.5,"x\ny",0\n2.5,"x\n\ny",1\nbad,x,0\n' + NUMBERS.replace(",", ",x,"), 7),
        ("a,y\n\n1.5,0\n\n\nbad,1\n" + NUMBERS, 6),
        ("\n\na,y\nbad,1\n" + NUMBERS, 4),
        ("a,y\r\n1.5,0\r\nbad,1\r\n" + NUMBERS.replace("\n", "\r\n"), 3),
        ('a,"y\nz"\nbad,1\n' + NUMBERS, 3),
        ("\ufeffa,y\nbad,1\n" + NUMBERS, 2),
    ],
)
def test_a_message_names_the_line_in_the_file(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"t\.csv, line {line}: got 'bad' in column 'a'"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('a,b,y\n1,"x\ny",0\n2,x\n3,x,1\n', r"line 4: 2 cells; expected 3"),
        ("a,b,y\n" + "1,2,0\n2,3,1\n" * 1000 + "1,2\n", r"line 2002: 2 cells; expected 3"),
        ("a,y\n1,0\n2\0,1\n", r"line 3: a NUL character"),
        ("a,y\n" + "1,x\n2,y\n" * 200_000 + "3,\udce9\n", r"line 400002: byte 0xe9 at position 1600006 .*`encoding`"),
    ],
)
def test_a_late_fault_is_found_at_its_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read(tmp_path, text.encode(errors="surrogateescape"))


def test_numbers_that_float64_makes_equal_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9007199254740993 and 9007199254740992 would become equal"):
        read(tmp_path, "a,y\n9007199254740993,0\n9007199254740992,1\n")


def test_plus_and_minus_may_be_opposites(tmp_path: Path) -> None:
    text = "a,y\n+,0\n-,1\n+,1\n"
    with pytest.raises(DataError, match=r"'\+' and '-'.*`missing`"):
        read(tmp_path, text, header=True)
    assert read(tmp_path, text, header=True, missing=[""]).columns[0].categories == ("+", "-")


def test_a_column_flags_the_test_rows(tmp_path: Path) -> None:
    for yes, no in (("test", "Train"), ("True", "false"), ("1", "0")):
        found = read(tmp_path, f"a,t,y\n1,{no},0\n2,{yes},1\n3,{no},1\n4,{yes},0\n", test="t")
        assert found.test_rows is not None
        assert (found.test_rows.tolist(), found.x.flatten().tolist()) == ([1, 3], [1, 2, 3, 4])
    with pytest.raises(DataError, match=r"line 3: got 'valid' in the test column 't'"):
        read(tmp_path, "a,t,y\n1,train,0\n2,valid,1\n3,test,1\n", test="t")
    with pytest.raises(DataError, match="flags 0 of 2 rows"):
        read(tmp_path, "a,t,y\n1,0,0\n2,0,1\n", test="t")


def test_a_second_file_has_the_test_rows(tmp_path: Path) -> None:
    (tmp_path / "late.csv").write_text("y,c,a\n1,w,7\n")
    found = read(tmp_path, "a,c,y\n1,u,0\n2,v,1\n", test="late.csv", label="y")
    assert found.x.tolist() == [[1, 1, 0, 0], [2, 0, 1, 0], [7, 0, 0, 1]]
    assert (np.asarray(found.test_rows).tolist(), found.y.tolist()) == ([2], [0, 1, 1])
    for name in ("t.csv", "none.csv"):
        with pytest.raises(DataError, match=rf"{name}: no file of test rows apart from t\.csv"):
            read(tmp_path, "a,c,y\n1,u,0\n2,v,1\n", test=name, label="y")
    with pytest.raises(ConfigError, match="is a folder"):
        load_dataset("csv", path=tmp_path, test="late.csv", label="y")


def agreed_site(folder: Path, text: str, **options: Any) -> Dataset:
    here = read(folder, "age,sex,dx\n" + "1.5,f,0\n2,m,1\n3,f,2\n" * 4, "a.csv", label="dx")
    return read(folder, text, "b.csv", agreed=schema_of(here), label="dx", **options)


def test_a_site_of_one_class_and_another_order_has_the_agreed_numbers(tmp_path: Path) -> None:
    found = agreed_site(tmp_path, ",dx,sex,age\n0,2,m,9\n1,2,?,8\n")
    assert found.classes == ("0", "1", "2")
    assert found.y.tolist() == [2, 2]
    assert str(found.x.tolist()) == str([[9.0, 0.0, 1.0], [8.0, math.nan, math.nan]])


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ("dx,age,sex\n3,9,m\n", {}, DataError, r"line 2: got '3' in the label 'dx'.*0, 1, 2"),
        ("dx,age,sex\n02,9,m\n", {}, DataError, r"got '02' in the label"),
        ("dx,age,sex\n2,9,x\n", {}, DataError, r"line 2: got 'x' in column 'sex'; the sites agreed on .* f, m"),
        ("dx,age\n2,9\n", {}, DataError, "lacks sex and has none"),
        ("dx,age,sex,z\n2,9,m,1\n", {}, DataError, "lacks none and has z"),
        ("dx,age,sex\n2,old,m\n", {}, DataError, r"line 2: got 'old' in column 'age'; expected a number;"),
        ("dx,age,sex\n2,9,m\n", {"ignore": ["age"]}, ConfigError, "age: the ignored .* agreed on it as a feature"),
        ("dx,age,sex\n2,9,m\n", {"group": "sex"}, ConfigError, "sex: the group .* agreed on it as a feature"),
    ],
)
def test_what_is_not_agreed_is_refused(text: str, options: Any, error: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        agreed_site(tmp_path, text, **options)


def test_nameless_columns_are_read_each_by_itself(tmp_path: Path) -> None:
    """Catches the second nameless column read as the first, and a nameless label that becomes the row numbers."""
    with pytest.raises(DataError, match="column 1 has no name and is no index"):
        read(tmp_path, ",,age,dx\n0,a,5.5,u\n1,b,6.5,v\n2,a,7.5,u\n")
    found = read(tmp_path, ",age,\n0,5.5,1\n1,6.5,0\n2,7.5,0\n", label=2, header=True)
    assert (found.classes, found.y.tolist(), found.x.tolist()) == (("0", "1"), [1, 0, 0], [[5.5], [6.5], [7.5]])


def test_the_number_of_a_column_means_the_same_in_every_file(tmp_path: Path) -> None:
    """Catches the last column of the first file taken for the label of a file with another order."""
    (tmp_path / "b.csv").write_text("age,sex,dx\n1.5,f,ill\n2.5,m,well\n")
    (tmp_path / "a.csv").write_text("dx,age,sex\nill,1.5,f\nwell,2.5,m\n")
    with pytest.raises(ConfigError, match=r"label: column -1 is 'sex' in a.csv, but 'dx' in b.csv; give its name"):
        load_dataset("csv", path=tmp_path)
    with pytest.raises(ConfigError, match=r"ignore: column 1 is 'age' in a\.csv, but 'sex' in b.csv"):
        load_dataset("csv", path=tmp_path, label="dx", ignore=[1])
    assert load_dataset("csv", path=tmp_path, label="dx").classes == ("ill", "well")


@pytest.mark.parametrize("cells", [("01", "1", "10"), ("-007", "1", "10"), ("1E2", "100", "20")])
def test_what_may_be_a_code_is_asked_for(cells: tuple[str, ...], tmp_path: Path) -> None:
    """Catches codes that are merged because they are parsed as numbers."""
    text = "c,a,y\n" + "".join(f"{cell},{k}.5,{k % 2}\n" for k, cell in enumerate(cells * 2))
    with pytest.raises(DataError, match=rf"column 'c' holds '{cells[0]}', which may be a number or a code.*`numeric`"):
        read(tmp_path, text)
    assert read(tmp_path, text, categorical=["c"]).columns[0].categories == tuple(sorted(cells))
    assert read(tmp_path, text, numeric=["c"]).x[:3, 0].tolist() == list(map(float, cells))


def test_numeric_holds_numbers_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: got 'x' in column 'c'; expected a number"):
        read(tmp_path, "c,a,y\nx,1,0\ny,2,1\nz,3,0\n", numeric=["c"])
    with pytest.raises(ConfigError, match="numeric: column 'c' is the category too"):
        read(tmp_path, "c,a,y\n1,1,0\n2,2,1\n", numeric=["c"], categorical=["c"])
    found = read(tmp_path, "c,y\n01,05\n2,6.5\n", numeric=["y", "c"], task="regression")
    assert (found.y.tolist(), found.x.tolist()) == ([5, 6.5], [[1], [2]])


def test_a_text_in_the_label_of_a_regression_is_no_feature(tmp_path: Path) -> None:
    """Catches advice that is of a feature."""
    with pytest.raises(
        DataError, match=r"got 'ill' in column 'y'; expected a number.*another `label`.*classes"
    ) as said:
        read(tmp_path, "c,y\n1,5\n2,ill\n", task="regression")
    assert "ignore" not in str(said.value)
    with pytest.raises(DataError, match=r"holds '05'.*`numeric`, or choose another label"):
        read(tmp_path, "c,y\n1,05\n2,6\n", task="regression")


def test_numbers_that_hardly_repeat_are_no_classes(tmp_path: Path) -> None:
    """Catches a quantity with two rows of each value, which becomes a class for each."""
    text = "a,y\n" + "".join(f"{k},{10 + k % 12}\n" for k in range(24))
    with pytest.raises(DataError, match=r'12 different values in 24 rows.*task = "regression"'):
        read(tmp_path, text)


def test_a_number_for_each_row_is_no_class(tmp_path: Path) -> None:
    """Catches a small table whose targets become a class each."""
    text = "a,y\n" + "".join(f"{k},{1000 + 37 * k}\n" for k in range(8))
    with pytest.raises(DataError, match=r'8 different values in 8 rows.*`?task = "regression"'):
        read(tmp_path, text)


def test_spaces_around_cells_are_no_part_of_them(tmp_path: Path) -> None:
    """Catches a padded number or missing value taken for text."""
    found = read(tmp_path, "a, b ,y\n 1.5 , NA , u\n2,  3 ,u \n\t4,5,v\n")
    assert str(found.x.tolist()) == str([[1.5, math.nan], [2.0, 3.0], [4.0, 5.0]])
    assert ([column.name for column in found.columns], found.classes) == (["a", "b", "y"], ("u", "v"))


def test_a_row_longer_than_a_block_is_read(tmp_path: Path) -> None:
    """Catches a reader whose blocks are shorter than a row: two million characters."""
    width, digits = 2_000, "0" * 1_000
    header = ",".join(f"c{k}" for k in range(width))
    rows = [",".join([f"{number}.{digits}"] * width) for number in (7, 8)]
    found = read(tmp_path, f"{header},y\n{rows[0]},u\n{rows[1]},v\n")
    assert (found.x.shape, found.x.sum().item()) == ((2, width), 15 * width)


def test_further_spellings_of_missing_are_added_by_option(tmp_path: Path) -> None:
    """Catches an option that replaces the usual spellings without a word."""
    text = "a,b,y\n" + "".join(f"{k}.5,{k},{k % 2}\n" for k in range(9)) + "k.A.,,0\nNA,3,1\n"
    found = read(tmp_path, text, also_missing=["k.A."])
    assert [column.missing for column in found.columns[:2]] == [2, 1]
    with pytest.raises(DataError, match=r"got '' in column 'b'.*usual spellings.*which `missing` replaces"):
        read(tmp_path, text.replace("NA", "k.A."), missing=["k.A."])


def test_the_only_file_with_another_decimal_sign_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x;y\n" + "".join(f"{k}.5;{k % 2}\n" for k in range(9)))
    (tmp_path / "b.csv").write_text("x;y\n" + "".join(f"{k},5;{k % 2}\n" for k in range(5)))
    with pytest.raises(DataError, match=r"b\.csv, line 2: got '0,5'.*only b\.csv has such cells: convert this file"):
        load_dataset("csv", path=tmp_path, delimiter=";")


@pytest.mark.parametrize("form", ["2024-07-{:02d}", "{:02d}.07.2024", "{}/7/24", "2024-07-{:02d} 12:30:00"])
def test_dates_are_no_categories(form: str, tmp_path: Path) -> None:
    """Catches a date that becomes a feature for each day."""
    text = "t,a,y\n" + "".join(f"{form.format(1 + k % 9)},{k},{k % 2}\n" for k in range(60))
    with pytest.raises(DataError, match=r"column 't' holds 9 dates.*`time`"):
        read(tmp_path, text)
    assert len(read(tmp_path, text, categorical=["t"]).columns[0].categories) == 9


@pytest.mark.parametrize(
    ("cells", "doubt"),
    [
        ((-999, 104.3, 37, 40), -999),
        ((999, 1, 5, 2), 999),
        ((999, 500, 5, 2), None),
        ((-9, 0, 3, 2), -9),
        ((-9, -8, 3, 2), None),
    ],
)
def test_a_number_far_from_the_others_is_noted(cells: tuple[float, ...], doubt: float | None, tmp_path: Path) -> None:
    """Catches -999 that becomes a measurement without a word."""
    found = read(tmp_path, "a,y\n" + "".join(f"{cell},{k % 2}\n" for k, cell in enumerate(cells)))
    assert (found.columns[0].doubt, len(doubts(found))) == (doubt, doubt is not None)


def test_targets_that_are_far_from_the_size_of_one_are_noted(tmp_path: Path) -> None:
    """Catches a training that diverges without a word of the two keys that mend it."""
    text = "a,y\n" + "".join(f"{k},{3000 + 500 * k}\n" for k in range(9))
    found = read(tmp_path, text, task="regression")
    assert [note for note in doubts(found) if "data.target_offset = 5000 and data.target_scale = 1.3e+03" in note]
    assert not doubts(replace(found, target_offset=5000, target_scale=1000))
    narrow = read(tmp_path, "a,y\n" + "".join(f"{k},{1234 + k / 4}\n" for k in range(9)), task="regression")
    (note,) = doubts(narrow)
    assert "data.target_offset = 1235 and data.target_scale = 0.65" in note  # as exact as the scale needs
    assert not doubts(replace(narrow, target_offset=1235, target_scale=0.65))
    (note,) = doubts(read(tmp_path, "a,y\n1,7.5\n2,7.5\n", task="regression"))
    assert note.startswith("all targets are 7.5")


@pytest.mark.parametrize("cells", [("1", "x", "x", "x"), ("1", "1", "x", "y")])
def test_half_of_the_values_or_of_the_cells_are_enough_to_ask(cells: tuple[str, ...], tmp_path: Path) -> None:
    """Catches a column that becomes a category in silence where half of its values, or of its cells, are numbers."""
    text = "a,b,y\n" + "".join(f"{cell},{k},{k % 2}\n" for k, cell in enumerate(cells))
    with pytest.raises(DataError, match="got 'x' in column 'a'; expected a number"):
        read(tmp_path, text)
    assert read(tmp_path, text, categorical=["a"]).columns[0].categories == tuple(sorted({*cells}))


def test_files_may_have_unlike_columns(tmp_path: Path) -> None:
    """Catches cells under the name of another column, and an absent category that is one of its levels."""
    folder = tmp_path / "sites"
    folder.mkdir()
    (folder / "a.csv").write_text("age,ward,y\n1,x,0\n2,z,1\n")
    (folder / "b.csv").write_text("y,bmi,age\n1,20.5,3\n0,,4\n")
    with pytest.raises(DataError, match=r"columns y, bmi, age; expected those of a\.csv"):
        load_dataset("csv", path=folder, label="y")
    found = load_dataset("csv", path=folder, label="y", union=True)
    assert found.feature_columns == (("age", 1), ("ward", 2), ("bmi", 1))
    nan = math.nan
    rows = [[1, 1, 0, nan], [2, 0, 1, nan], [3, nan, nan, 20.5], [4, nan, nan, nan]]
    np.testing.assert_array_equal(found.x.numpy(), np.array(rows, dtype=found.x.numpy().dtype))
    assert found.y.tolist() == [0, 1, 1, 0]
    # A site alone, whose file lacks what the others have.
    alone = load_dataset("csv", path=folder / "b.csv", label="y", union=True, agreed=schema_of(found))
    assert alone.feature_columns == found.feature_columns
    np.testing.assert_array_equal(alone.x.numpy(), found.x[2:].numpy())
    with pytest.raises(ConfigError, match="label: got -1; expected a name, as the numbers of columns differ"):
        load_dataset("csv", path=folder, union=True)
    own = schema_of(load_dataset("csv", path=folder / "a.csv", label="y"))
    with pytest.raises(DataError, match="has bmi beside them"):
        load_dataset("csv", path=folder / "b.csv", label="y", union=True, agreed=own)


def test_what_to_do_where_a_file_of_unlike_columns_has_an_index_or_no_label(tmp_path: Path) -> None:
    """Catches an advice that is refused in its turn, and a missing cell that is spoken of where the column is."""
    (tmp_path / "a.csv").write_text(",age,y\n0,1,0\n1,2,1\n")
    (tmp_path / "b.csv").write_text("age,y\n3,0\n4,1\n")
    with pytest.raises(DataError, match=r"has no name and is no index.* in every file; .*`ignore = \[''\]`"):
        load_dataset("csv", path=tmp_path, label="y", union=True)
    assert load_dataset("csv", path=tmp_path, label="y", union=True, ignore=[""]).feature_columns == (("age", 1),)
    (tmp_path / "b.csv").write_text("age,bmi\n3,1\n4,2\n")
    (tmp_path / "a.csv").write_text("age,y\n1,0\n2,1\n")
    with pytest.raises(DataError, match=r"b\.csv: lacks the label's column 'y'"):
        load_dataset("csv", path=tmp_path, label="y", union=True)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_cell_of_the_label_may_be_empty_by_option(suffix: str, tmp_path: Path) -> None:
    """Catches an empty cell that becomes a class, or the last one, and doubts of a label that most rows lack."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = ["", "ill", "?", "well", "ill", "", "well"]
    if suffix == ".csv":
        (tmp_path / "t.csv").write_text("a,y\n" + "".join(f"{at},{cell}\n" for at, cell in enumerate(cells)))
    else:
        table = {"a": list(range(7)), "y": [None if cell == "" else cell for cell in cells]}
        pq.write_table(pa.table(table), tmp_path / "t.parquet")
    path = tmp_path / f"t{suffix}"
    found = load_dataset(suffix[1:], path=path, unlabelled=True)
    assert (found.y.tolist(), found.classes) == ([-1, 0, -1, 1, 0, -1, 1], ("ill", "well"))
    assert (found.num_unlabelled, found.columns[1].missing, len(found)) == (3, 3, 7)
    assert (
        summary(found)
        == "7 rows, 1 number, label 'y' with 2 classes (ill, well), 3 rows without a label, 0 missing cells"
    )
    named = load_dataset(suffix[1:], path=path, unlabelled=True, classes=["well", "ill", "dead"])
    assert (named.y.tolist(), named.num_classes) == ([-1, 1, -1, 0, 1, -1, 0], 3)
    with pytest.raises(DataError, match=r"the label 'y' is missing .*, or set `unlabelled = true` if rows may have no"):
        load_dataset(suffix[1:], path=path)
    (tmp_path / "none.csv").write_text("a,y\n1,\n2,\n")
    with pytest.raises(DataError, match="none of its 2 rows has a label"):
        load_dataset("csv", path=tmp_path / "none.csv", unlabelled=True, header=True)
