"""A data set as its site agreed with the others; tests/deploy/test_agreement.py has the deployed sites' side of it."""

from __future__ import annotations

import math

import pytest
import torch

from polyfed.base.errors import DataError
from polyfed.data.columns import Column
from polyfed.data.conform import conform, schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.schema import Feature, Schema

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
    agreed = Schema(classes=("well", "dead", "ill"), columns=(Feature(name="age"), SEX))
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
