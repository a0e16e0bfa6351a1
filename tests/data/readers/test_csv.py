"""Tables of the user's own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from polyfed.base.errors import ConfigError, DataError, PolyfedError
from polyfed.data.client import ClientData
from polyfed.data.dataset import Dataset
from polyfed.data.sources import load_dataset


def read(tmp_path: Path, text: str, **options) -> Dataset:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return load_dataset("csv", path=path, **options)


def test_numbers_with_header_and_label_last(tmp_path: Path) -> None:
    dataset = read(tmp_path, "a,b,label\n1,2.5,7\n-3,1e2,10\n\n0,0,7\n")
    assert dataset.x.tolist() == [[1, 2.5], [-3, 100], [0, 0]]
    assert dataset.y.tolist() == [0, 1, 0]
    assert dataset.classes == ("7", "10")  # sorted as numbers, not as text
    assert (dataset.name, dataset.groups, dataset.test_rows) == ("table", None, None)


def test_no_header_is_noticed(tmp_path: Path) -> None:
    assert read(tmp_path, "1,2,a\n3,4,b\n").x.tolist() == [[1, 2], [3, 4]]


def test_header_that_cannot_be_known_must_be_said(tmp_path: Path) -> None:
    text = "x,y\nx,z\nw,y\n"
    with pytest.raises(ConfigError, match="header"):
        read(tmp_path, text)
    assert len(read(tmp_path, text, header=True)) == 2
    assert len(read(tmp_path, text, header=False)) == 3


@pytest.mark.parametrize("label", ["kind", 0, -3])
def test_label_by_name_or_number(tmp_path: Path, label: str | int) -> None:
    dataset = read(tmp_path, "kind,a,b\nyes,1,2\nno,3,4\n", label=label)
    assert dataset.classes == ("no", "yes")
    assert dataset.y.tolist() == [1, 0]
    assert dataset.x.tolist() == [[1, 2], [3, 4]]


def test_labels_are_compared_as_text_and_sorted_as_numbers(tmp_path: Path) -> None:
    dataset = read(tmp_path, "a,y\n1,1.0\n2,10\n3,1\n4,2\n")
    assert (dataset.y.tolist(), dataset.classes) == ([1, 3, 0, 2], ("1", "1.0", "2", "10"))
    with pytest.raises(DataError, match="fractions"):
        read(tmp_path, "a,y\n1,1.5\n2,2\n")


def test_missing_values_are_nan_and_categories_are_columns(tmp_path: Path) -> None:
    dataset = read(tmp_path, "colour,size,y\nred,1,0\n?,NA,1\nblue,,0\n red ,nan,1\n")
    expected = [[0, 1, 1], [math.nan, math.nan, math.nan], [1, 0, math.nan], [0, 1, math.nan]]
    assert str(dataset.x.tolist()) == str([[float(v) for v in row] for row in expected])


def test_own_missing_tokens(tmp_path: Path) -> None:
    dataset = read(tmp_path, "a,y\n-,0\n1,1\n", missing=("-",))
    assert math.isnan(dataset.x[0, 0])
    dataset = read(tmp_path, "a,y\n-,0\n1,1\nx,1\n", missing=("NA",))
    assert dataset.x.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]  # otherwise a category
    with pytest.raises(DataError, match="got '-' in column 'a'; expected a number, as in 1 of its 2 cells"):
        read(tmp_path, "a,y\n-,0\n1,1\n", missing=("NA",))  # as many numbers as texts


def test_categorical_numbers(tmp_path: Path) -> None:
    text = "code,a,y\n7,1,0\n3,2,1\n7,3,0\n"
    assert read(tmp_path, text, categorical=("code",)).x.tolist() == [[0, 1, 1], [1, 0, 2], [0, 1, 3]]
    assert read(tmp_path, text, categorical=(0,)).input_shape == (3,)


def test_group_column_is_no_feature(tmp_path: Path) -> None:
    dataset = read(tmp_path, "site,a,y\n10,1,0\n9,2,1\n10,3,1\n", group="site")
    assert dataset.x.tolist() == [[1], [2], [3]]
    assert dataset.group_names == ("9", "10")
    assert dataset.groups is not None
    assert dataset.groups.tolist() == [1, 0, 1]


def test_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "sites"
    folder.mkdir()
    (folder / "rome.csv").write_text("a,c,y\n1,u,0\n2,v,1\n")
    (folder / "oslo.csv").write_text("a,c,y\n3,w,1\n")
    dataset = load_dataset("csv", path=folder)
    assert dataset.group_names == ("oslo", "rome")
    assert dataset.groups is not None
    assert dataset.groups.tolist() == [0, 1, 1]
    assert dataset.x.tolist() == [[3, 0, 0, 1], [1, 1, 0, 0], [2, 0, 1, 0]]  # one-hot over all files
    with pytest.raises(ConfigError, match="files are the groups"):
        load_dataset("csv", path=folder, group="a")
    (folder / "bern.csv").write_text("a,d,y\n3,1,1\n")
    with pytest.raises(DataError, match=r"oslo.csv: columns a, c, y; expected those of bern.csv: a, d, y; .* `union`"):
        load_dataset("csv", path=folder)


def test_a_column_of_texts_is_told_of_tokens(tmp_path: Path) -> None:
    table = "t,y\n" + "".join(f"row {k} of a text,{k % 2}\n" for k in range(30))
    with pytest.raises(DataError, match=r"column 't' has 30 different texts .*; .* name its column in `text`"):
        read(tmp_path, table, label="y")
    with pytest.raises(DataError, match=r"or name it in `categorical`$"):
        read(tmp_path, table.replace(" ", "-"), label="y")


def test_delimiter_quotes_and_mark(tmp_path: Path) -> None:
    dataset = read(tmp_path, '\ufeffa;y\n"1";"x;y"\n2;z\n', delimiter=";", label="y")
    assert dataset.classes == ("x;y", "z")
    assert dataset.x.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ("a,b\n1,2\n", {"label": "z"}, DataError, r"no column 'z' .* the columns are a, b"),
        ("a,b\n1,2\n", {"label": 2}, DataError, r"no column 2 .* 0 to 1"),
        ("a,b\n1,0\n2,1\n3\n", {}, DataError, r"table.csv, line 4: 1 cells; expected 2"),
        ("", {}, DataError, "no rows"),
        ("a,b\n", {"header": True}, DataError, "no rows below the header"),
        ("a,y\n1,5\n2,5\n", {}, DataError, "got one class, '5'"),
        ("a,y\n1,0\n2,?\n", {}, DataError, r"line 3: the label 'y' is missing"),
        ("a,y\n1,0\ninf,1\n", {}, DataError, r"line 3: 'inf' in 'a' is not a finite number"),
        ("a,y\n1,0\n1e39,1\n", {}, DataError, "not a finite"),
        ("a,a,y\n1,2,0\n1,2,1\n", {}, DataError, "repeat"),
        ("y\n0\n1\n", {"header": True}, DataError, "no feature columns"),
        ("g,a,y\n1,1,0\n?,2,1\n", {"group": "g"}, DataError, r"line 3: the group 'g' is missing"),
        ("a,y\n1,0\n2,1\n", {"group": "y"}, ConfigError, "is the label too"),
        ("a,y\n1,0\n2,1\n", {"label": "y", "header": False}, ConfigError, "by name"),
        ("a,y\n1,0\n2,1\n", {"missing": "NA"}, ConfigError, "list"),
        ("a,y\n1,0\n2,1\n", {"delimiter": ";;"}, ConfigError, "one character"),
        ('a,y\n"1,0\n', {}, DataError, "cannot be read as csv"),
        ("a,y\n" + "".join(f"name{i},{i % 2}\n" for i in range(1001)), {"header": True}, DataError, "1001 different"),
    ],
)
def test_faults(tmp_path: Path, text: str, options: dict, error: type[PolyfedError], says: str) -> None:
    with pytest.raises(error, match=says):
        read(tmp_path, text, **options)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_dataset("csv", path=tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"no \*.csv file"):
        load_dataset("csv", path=tmp_path)
    (tmp_path / "latin.csv").write_bytes("a,y\n1,\xe9\n2,b\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        load_dataset("csv", path=tmp_path / "latin.csv")


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_large_numbers_keep_their_differences(tmp_path: Path, kind: str) -> None:
    """Catches times in seconds that float32 rounds to one before they are centred."""
    times, y = np.tile([1_700_000_000, 1_700_000_001], 20), np.tile([0, 1], 20)
    path = tmp_path / f"times.{kind}"
    if kind == "csv":
        path.write_text("t,y\n" + "".join(f"{t},{c}\n" for t, c in zip(times, y, strict=True)))
    else:
        np.savez(path, x=times[:, None], y=y)
    x, labels = ClientData(load_dataset(kind, path=path), np.arange(40), augment=False).batch(torch.arange(40))
    assert x.dtype == torch.float32
    assert x[:, 0].tolist() == pytest.approx((2 * labels - 1).tolist())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["0", "1700000000", "1700000001"], r"1700000000\.0 and 1700000001\.0 would become equal, .* 1 of 3 distinct"),
        (["1.5", "999999999999", "2.5", "3.5"], r"1\.5 and 2\.5 would become equal, as would 2 of 4"),
        ([str(10**12 + k * 40_000) for k in range(2000)] + [str(10**12 + 1)], "1 of 2001 distinct values"),
        ([f"{1 + k / 7:.15f}" for k in range(2000)], None),  # fractions have digits that nobody needs
        ([f"{k * k * 1e-17:.20f}" for k in range(9)] + ["1"], "distinct values"),
        (["1e-30", "2e-30", "?"], None),
    ],
)
def test_distinct_values_that_become_one_are_refused(tmp_path: Path, values: list[str], says: str | None) -> None:
    text = "t,y\n" + "".join(f"{value},{k % 2}\n" for k, value in enumerate(values))
    if says is None:
        assert len(read(tmp_path, text)) == len(values)
    else:
        with pytest.raises(DataError, match=rf"table\.csv: column 't': .*{says}"):
            read(tmp_path, text)


def test_only_wide_types_of_an_npz_are_kept_wide(tmp_path: Path) -> None:
    for kind, wanted in (("f4", torch.float32), ("i2", torch.float32), ("i4", torch.float64), ("f8", torch.float64)):
        np.savez(tmp_path / "a.npz", x=np.arange(6).reshape(3, 2).astype(kind), y=np.array([0, 1, 0]))
        assert load_dataset("npz", path=tmp_path / "a.npz").x.dtype == wanted
    x = np.array([[2**60], [2**60 + 1], [0]])
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1, 0]))
    with pytest.raises(
        DataError, match="column 0 of x: 1152921504606846976 and 1152921504606846977 would become equal"
    ):
        load_dataset("npz", path=tmp_path / "a.npz")


def test_underscored_digits_are_text(tmp_path: Path) -> None:
    assert read(tmp_path, "a,b,y\n1_0,1,0\n2,2,1\n1_1,3,0\n").input_shape == (4,)
