"""Data sets of objects in memory: arrays, torch data sets and frames, and what is refused with the client's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from polyfed import federated_data
from polyfed.base.errors import DataError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 3)), np.array([0, 1, 2, 0, 1, 2])


class Column_:  # noqa: N801
    """A stand-in for a column of pandas."""

    def __init__(self, values: list[Any]) -> None:
        kind = {float: np.float64, int: np.int64, bool: np.bool_}.get(type(values[0]) if values else int)
        same = kind is not None and len({type(value) for value in values}) == 1
        self.values = np.array(values, kind if same else object)

    def to_numpy(self) -> np.ndarray:
        return self.values


class Frame:
    """A stand-in for a frame of pandas, which is no dependency: columns, and to_numpy."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = list(columns)
        self._cells = {name: Column_(cells) for name, cells in columns.items()}

    def __getitem__(self, name: str) -> Column_:
        return self._cells[name]

    def to_numpy(self) -> np.ndarray:
        raise AssertionError("a table of mixed types is no array")


class NA:
    """Stands for the NA of pandas, whose truth is an error."""

    def __repr__(self) -> str:
        return "<NA>"

    def __bool__(self) -> bool:
        raise TypeError


def test_arrays_become_groups_in_order_of_the_clients() -> None:
    found = federated_data({"north": (X[:4], Y[:4]), "south": (torch.tensor(X[4:]), torch.tensor(Y[4:]))})
    assert (found.group_names, found.groups.tolist()) == (("north", "south"), [0, 0, 0, 0, 1, 1])
    assert np.array_equal(found.x.numpy(), X)
    assert (found.y.tolist(), found.classes, found.kind, found.test_rows) == (
        Y.tolist(),
        ("0", "1", "2"),
        "features",
        None,
    )
    assert federated_data([(X, Y), (X, Y)]).group_names == ("0", "1")


def test_test_parts_units_times_and_names_of_classes() -> None:
    mapping = {"x": X, "y": ["b", "a", "b", "a", "b", "a"], "unit": [5, 5, 4, 4, 3, 3], "time": [9, 8, 7, 6, 5, 4]}
    tested = {"x": X[:1], "y": ["a"], "unit": [9], "time": [1]}
    found = federated_data([mapping, mapping], test={"1": tested}, classes=("c", "b", "a"))
    assert (found.y[:2].tolist(), found.classes) == ([1, 2], ("c", "b", "a"))
    assert (found.test_rows.tolist(), found.groups.tolist()) == ([12], [0] * 6 + [1] * 7)
    assert (found.units[:6].tolist(), found.units[12]) == ([2, 2, 1, 1, 0, 0], 3)
    assert found.times.tolist() == [*[6, 5, 4, 3, 2, 1] * 2, 0]
    assert federated_data([mapping]).classes == ("a", "b")


def test_torch_data_sets() -> None:
    pixels = torch.rand(6, 3, 8, 8)
    data = TensorDataset(pixels, torch.tensor(Y))
    found = federated_data([data, torch.utils.data.Subset(data, [5, 0])], flip=True)
    assert (found.kind, found.input_shape, found.flip) == ("image", (3, 8, 8), True)
    assert found.x.equal(torch.cat([pixels, pixels[[5, 0]]]))
    assert found.y.tolist() == [*Y.tolist(), 2, 0]
    image = pytest.importorskip("PIL.Image")
    files = [(image.fromarray(np.full((6, 8, 3), k, np.uint8)), k) for k in (0, 1)]
    assert federated_data([files]).input_shape == (3, 6, 8)
    tokens = federated_data([TensorDataset(torch.tensor([[1, 0], [2, 3]]), torch.tensor([0, 1]))], kind="tokens")
    assert (tokens.kind, tokens.x.dtype) == ("tokens", torch.int64)
    series = federated_data([(RNG.normal(size=(6, 5, 2)), Y)], layout="NTC")
    assert (series.kind, series.input_shape) == ("series", (5, 2))


def test_frames_with_gaps_and_categories_of_all_clients() -> None:
    """Catches a category that one client lacks, a gap that is a category, and columns in another order."""
    north = Frame(age=[1.0, 2.0], ward=["a", None], smokes=[True, NA()], dx=["ill", "well"], who=[1, 2])
    south = Frame(ward=["10", "9"], age=[3, 4], smokes=[False, False], dx=["well", "ill"], who=[1, 1])
    found = federated_data({"n": north, "s": south}, label="dx", unit="who")
    nan = np.nan
    expected = [[1, 0, 0, 1, 1], [2, nan, nan, nan, nan], [3, 1, 0, 0, 0], [4, 0, 1, 0, 0]]
    assert np.array_equal(found.x.numpy(), expected, equal_nan=True)
    assert (found.classes, found.y.tolist(), found.units.tolist()) == (("ill", "well"), [0, 1, 1, 0], [0, 1, 0, 0])
    age, ward, smokes = found.columns
    assert (age.kind, age.low, age.high) == ("number", 1, 4)
    assert (ward.kind, ward.categories, ward.missing) == ("category", ("10", "9", "a"), 1)
    assert (smokes.kind, smokes.missing) == ("number", 1)


def shaky() -> list[Any]:
    """A data set with a random transform."""

    class Shaky(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            return torch.rand(1, 8, 8), row % 2

    return Shaky()


@pytest.mark.parametrize(
    ("clients", "options", "says"),
    [
        ({}, {}, "expected a list of each client's data"),
        (X, {}, "got ndarray; expected a list"),
        ([3], {}, "client '0': got int; expected a pair"),
        ({"a": (X, Y), "b": (X, Y[:3])}, {}, r"client 'b': got shapes x \(6, 3\), y \(3,\)"),
        ([(X, np.eye(6))], {}, "a single label"),
        ([{"x": X}], {}, "client '0': has the keys x; expected x and y"),
        ([(X, Y / 2)], {}, r"got labels such as .*0.0.*; expected class numbers"),
        ([(X, Y), (X, list("abcabc"))], {}, "y holds numbers at some clients and texts at others"),
        ([(X, [0, 1, None, 0, 1, 2])], {}, "row 2 of a client has no y"),
        ([(X, Y * 10**8)], {}, "labels run to 200000000"),
        ([(X, list("abcabc"))], {"classes": ("a", "b")}, "got the label 'c'; expected one of the classes a, b"),
        ([(X, Y), (X[:, :2], Y)], {}, r"shapes and types \(3,\) float64, \(2,\) float64"),
        ([(np.zeros((6, 1, 8, 8)), Y), (np.zeros((6, 1, 8, 8), np.uint8), Y)], {}, "the same for every client"),
        ([(X, Y)], {"test": {"9": (X, Y)}}, "test: got client '9'; expected one of '0'"),
        ([(X, Y)], {"label": "dx"}, "name columns of a frame"),
        ([[(X[0], 0, 1)]], {}, "client '0', item 0: got tuple; expected a pair"),
        ([[(X[0], 0), (X[0][:2], 1)]], {}, r"item 1 has shape \(2,\), and item 0 has \(3,\)"),
        ([shaky()], {}, "item 0 differs when it is read again"),
        ([Frame(a=[1.0], dx=["x"])], {}, "expected label, the column of the class, one of a, dx"),
        ([Frame(a=[1.0], dx=["x"])], {"label": "y"}, "no column 'y' for 'label'; the columns are a, dx"),
        ([Frame(dx=["x"])], {"label": "dx"}, "0 columns of features"),
        ([Frame(a=[1.0], dx=["x"]), Frame(b=[1.0], dx=["y"])], {"label": "dx"}, "number 1 has b; expected frames with"),
        ([Frame(a=[1.0, "old"], dx=["x", "y"])], {"label": "dx"}, "column 'a' holds object, such as 1.0"),
        ([Frame(a=[{}], dx=["x"])], {"label": "dx"}, "column 'a' holds object"),
        ([Frame(a=[f"{k}" for k in range(1001)], dx=["x"] * 1001)], {"label": "dx"}, "1001 different texts"),
    ],
)
def test_faults_name_the_client(clients: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        federated_data(clients, **options)


def test_numbers_to_predict() -> None:
    """Catches a regression whose targets are cut to whole numbers, or that takes classes."""
    found = federated_data({"a": (X[:3], [0.5, 2, -1.25]), "b": (X[3:], np.array([1, 2, 3]))}, task="regression")
    assert (found.task, found.classes, found.y.tolist()) == ("regression", (), [0.5, 2, -1.25, 1, 2, 3])
    for values, classes, match in (
        ([0.5, np.nan, 1], None, "1 labels are not finite"),
        (["p", "q", "p"], None, "a regression expects numbers"),
        ([0.5, 1, 2], ["a"], "got classes for a regression"),
    ):
        with pytest.raises(DataError, match=match):
            federated_data([(X[:3], values)], task="regression", classes=classes)
    with pytest.raises(DataError, match='give task = "regression"'):
        federated_data([(X[:3], [0.5, 1, 2])])


def test_the_task_of_the_configuration_is_that_of_the_data() -> None:
    """Catches targets that are taken for classes, and an offset that is left out."""
    import polyfed
    from polyfed.base.errors import ConfigError
    from polyfed.rounds.federation import deal

    data = federated_data([(X, X[:, 0]), (X, X[:, 1])], task="regression")
    given = {"dataset": "python", "task": "regression", "target_offset": 3.0}
    config = {"data": given, "clients": {"count": 2}, "partition": {"kind": "natural"}}
    assert deal(polyfed.Config.parse(config), data)[0].target_offset == 3.0
    with pytest.raises(ConfigError, match=r"got a regression for data.task = 'classification'"):
        deal(polyfed.Config.parse({**config, "data": {"dataset": "python"}}), data)


def test_frames_in_a_pair_are_joined_by_name() -> None:
    """Catches columns in another order at another client, joined by their positions."""
    a, b = Frame(bp=[1.0, 2.0], age=[100.0, 200.0]), Frame(age=[300.0, 400.0], bp=[3.0, 4.0])
    for pack in (lambda frame: (frame, [0, 1]), lambda frame: {"x": frame, "y": [0, 1]}):
        found = federated_data([pack(a), pack(b)])
        assert found.x.tolist() == [[1, 100], [2, 200], [3, 300], [4, 400]]
        assert [column.name for column in found.columns] == ["bp", "age"]
    with pytest.raises(DataError, match="expected one row of x"):
        federated_data([(a, [0, 1, 1])])


def test_codes_that_a_frame_declares_as_categories_are_categories() -> None:
    frame = Frame(code=[3, 1, 3], y=["p", "q", "p"])
    frame["code"].dtype = "category"
    (column, *_) = federated_data([frame], label="y").columns
    assert (column.kind, column.categories) == ("category", ("1", "3"))


def test_a_time_is_given_for_all_rows_or_for_none() -> None:
    """Catches times that are dropped for all because one client has none."""
    timed = {"x": X[:3], "y": Y[:3], "time": [3, 1, 2]}
    for key in ("time", "unit"):
        given = {**timed, key: timed["time"]}
        with pytest.raises(DataError, match=f"number 1 of the clients and their test parts has no {key}"):
            federated_data([given, {"x": X[3:], "y": Y[3:], **({"time": [1, 2, 3]} if key == "unit" else {})}])


def test_rows_of_unequal_shape_and_labels_of_several_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="client '0': x: rows of unequal shapes"):
        federated_data([([[1, 2], [3]], [0, 1])])
    with pytest.raises(DataError, match=r"item 0: has a label of shape \(2,\)"):
        federated_data([TensorDataset(torch.zeros(3, 2), torch.zeros(3, 2))])


def test_large_whole_numbers_stay_apart(tmp_path: Path) -> None:
    """Catches identifiers beyond 2**53 that become one value as their range is small."""
    x = 2**60 + np.arange(6)[:, None]
    with pytest.raises(DataError, match="would become equal"):
        federated_data([(x, Y)])
    with pytest.raises(DataError, match="would become equal"):
        federated_data([Frame(x=x[:, 0].tolist(), y=["p", "q"] * 3)], label="y")


@pytest.mark.parametrize(
    ("north", "south", "classes"),
    [
        (np.array([0, -1, 2, -1]), [-1, 1], ("0", "1", "2")),
        (np.array([0.0, np.nan, 2.0, np.nan]), np.array([np.nan, 1.0]), ("0", "1", "2")),
        (["a", "", "c", ""], ["", "b"], ("a", "b", "c")),
        (np.array(["a", None, "c", NA()], dtype=object), np.array([None, "b"], dtype=object), ("a", "b", "c")),
    ],
)
def test_a_row_may_have_no_label_if_that_is_said(north: Any, south: Any, classes: tuple[str, ...]) -> None:
    """Catches a gap read as a class, and whole numbers beside gaps, which a frame has as fractions, refused."""
    clients = {"north": (X[:4], north), "south": (X[4:], south)}
    found = federated_data(clients, unlabelled=True)
    assert (found.y.tolist(), found.classes) == ([0, -1, 2, -1, -1, 1], classes)
    assert federated_data({**clients, "west": (X[:2], [-1, -1])}, unlabelled=True).num_unlabelled == 5
    with pytest.raises(DataError, match="unlabelled"):
        federated_data({"north": (X[:2], np.array([None, "b"], dtype=object))})
    with pytest.raises(DataError, match="no row has a label"):
        federated_data({"north": (X[:2], [-1, -1])}, unlabelled=True)
