"""A data set as its site agreed with the others; tests/deploy/test_agreement.py has the deployed sites' side of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from polyfed.base.errors import DataError
from polyfed.data.columns import Column
from polyfed.data.conform import conform, schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.schema import Feature, Schema
from polyfed.data.sources import load_dataset

NAN = math.nan
SEX = Feature(name="sex", categories=("m", "x", "f"))


def table() -> Dataset:
    """Columns sex (f, m), age, and the label; in the last row sex is missing."""
    return Dataset(
        name="a",
        x=torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 6.0], [NAN, NAN, 7.0]]),
        y=torch.tensor([0, 1, 0]),
        classes=("ill", "well"),
        mean=(),
        std=(),
        columns=(
            Column("sex", "category", ("f", "m")),
            Column("age", "number"),
            Column("dx", "label", ("ill", "well")),
        ),
    )


def test_categories_and_columns_go_to_the_agreed_positions() -> None:
    """Catches categories by position, and a missing cell that becomes a category of which nobody has a row here."""
    agreed = Schema(classes=("well", "dead", "ill"), columns=(Feature(name="age"), SEX), form="features")
    found = conform(table(), agreed)
    expected = torch.tensor([[5.0, 0, 0, 1], [6.0, 1, 0, 0], [7.0, NAN, NAN, NAN]])
    torch.testing.assert_close(found.x, expected, rtol=0, atol=0, equal_nan=True)
    assert found.y.tolist() == [2, 0, 2]
    assert schema_of(found) == agreed


def test_what_is_not_agreed_stays_as_it_is() -> None:
    data = table()
    assert schema_of(conform(data, Schema())) == schema_of(data)
    assert conform(data, Schema(classes=("well", "ill"))).y.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("agreed", "text"),
    [
        (Schema(classes=("ill", "dead")), "classes 'well', which are not among the agreed 'ill', 'dead'"),
        (Schema(columns=(SEX,)), "columns 'age', which are not among the agreed 'sex'"),
        (Schema(columns=(SEX, Feature(name="age"), Feature(name="bmi"))), "no columns 'bmi', which the others have"),
        (
            Schema(columns=(Feature(name="sex"), Feature(name="age"))),
            "categories in column 'sex', which the others read as numbers",
        ),
        (
            Schema(columns=(SEX, Feature(name="age", categories=("5",)))),
            "numbers in column 'age', which the others read as categories",
        ),
        (
            Schema(columns=(Feature(name="sex", categories=("m",)), Feature(name="age"))),
            "categories 'f' in column 'sex', which are not among the agreed 'm'",
        ),
        (Schema(mean=(0.5,), std=(0.5,)), "has 0 channels; the agreed mean and deviation are of 1"),
    ],
)
def test_what_a_site_alone_has_is_an_error_that_names_it(agreed: Schema, text: str) -> None:
    with pytest.raises(DataError, match=r"^a: ") as found:
        conform(table(), agreed)
    assert text in str(found.value)


def test_examples_of_another_form_are_no_match(tmp_path: Path) -> None:
    """Catches bytes at one site and the same pixels as numbers at another, and series whose axes are exchanged."""
    rng = np.random.default_rng(0)
    y = np.array([0, 1] * 4)
    pixels = rng.integers(0, 256, (8, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, y=y)
    np.savez(tmp_path / "b.npz", x=pixels.astype(np.float32), y=y)
    agreed = schema_of(load_dataset("npz", path=tmp_path / "a.npz", layout="NCHW"))
    with pytest.raises(DataError, match="form 'image of numbers', where the others have 'image of bytes'"):
        load_dataset("npz", path=tmp_path / "b.npz", layout="NCHW", agreed=agreed)
    np.savez(tmp_path / "c.npz", x=rng.normal(size=(8, 5, 5)), y=y)
    first, other = (schema_of(load_dataset("npz", path=tmp_path / "c.npz", layout=how)) for how in ("NTC", "NCT"))
    assert first.digests("s")["form"] != other.digests("s")["form"]
    with pytest.raises(DataError, match="form 'series NCT'"):
        load_dataset("npz", path=tmp_path / "c.npz", layout="NCT", agreed=first)


def test_mean_and_deviation_are_agreed_together() -> None:
    """Catches a deviation that is ignored as there is no mean."""
    for given in ({"std": (0.5,)}, {"mean": (0.5,)}, {"mean": (0.5,), "std": (1.0, 1.0)}):
        with pytest.raises(ValidationError, match="expected one of each for every channel"):
            Schema(**given)


def test_a_name_that_is_too_long_is_an_error_of_the_data() -> None:
    data = replace(table(), classes=("ill", "w" * 1001), columns=())
    with pytest.raises(DataError, match="cannot be agreed on"):
        schema_of(data)


def test_a_class_of_a_table_may_be_called_unknown() -> None:
    """Catches features that are taken for tokens of LEAF's layout because of the name of a class."""
    data = replace(table(), classes=("<unknown>", "well"))
    found = conform(data, Schema(classes=("well", "<unknown>")))
    assert torch.equal(found.x.nan_to_num(), data.x.nan_to_num())
    assert torch.equal(found.y, 1 - data.y)


def test_a_row_without_a_label_has_none_at_the_agreed_numbers_either() -> None:
    """Catches -1 read as the last class of the site."""
    data = replace(table(), y=torch.tensor([0, -1, 1]), unlabelled=True)
    assert conform(data, Schema(classes=("well", "dead", "ill"))).y.tolist() == [2, -1, 0]
