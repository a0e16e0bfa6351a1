"""What the clients of a federation must mean alike: the names and order of classes, columns and categories, and pixels.

A class is a number to a network, and a column a position. A site that numbers its own classes gives "ill" the number
that another site gives to "healthy", and nothing fails. So sites agree on a schema before round 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from polyfed.data.columns import Column

_Name = Annotated[str, Field(max_length=1000)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class Feature(BaseModel, frozen=True, extra="forbid"):
    """A feature column: a number, or a category with its levels in order.

    Args:
        name: the name of the column.
        categories: the levels; empty for a number.
    """

    name: _Name
    categories: tuple[_Name, ...] = ()


class Schema(BaseModel, frozen=True, extra="forbid"):
    """The meaning of numbers and positions in a data set; also ``[data.agreed]``, where any part may be left out.

    Args:
        classes: the name of each class, in order of its number.
        columns: the features of a table, in order of their positions; empty if the data are no table.
        mean: mean of each channel of images; empty for other data.
        std: standard deviation of each channel of images; empty for other data.
        form: kind, type and layout of an example, such as "image of bytes", "series NTC" and "tokens of"
            and a digest of the tokenizer.
    """

    classes: tuple[_Name, ...] = ()
    columns: tuple[Feature, ...] = ()
    mean: tuple[_Number, ...] = ()
    std: tuple[Annotated[_Number, Field(gt=0)], ...] = ()
    form: _Name = ""

    @model_validator(mode="after")
    def _mean_beside_std(self) -> Schema:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"got {len(self.mean)} numbers in mean and {len(self.std)} in std; expected one of each for every "
                "channel"
            )
        return self

    def features(self) -> tuple[Column, ...] | None:
        """Return the features as columns; None if there are none."""
        found = (Column(c.name, "category" if c.categories else "number", c.categories) for c in self.columns)
        return tuple(found) or None

    @property
    def feature_columns(self) -> tuple[tuple[str, int], ...]:
        """Name and number of features of each column."""
        return tuple((column.name, len(column.categories) or 1) for column in self.columns)

    def over(self, other: Schema | None) -> Schema:
        """Return this schema, with the parts of another that it leaves empty."""
        own = {part: value for part, value in self if value}
        return self if other is None else other.model_copy(update=own)

    def digests(self, salt: str) -> dict[str, str]:
        """Return a hash of each part, by its name; ``salt`` keeps hashes of different runs apart."""
        tables = self.model_dump(mode="json")
        parts = {
            "classes": tables["classes"],
            "columns": [column["name"] for column in tables["columns"]],
            "categories": [column["categories"] for column in tables["columns"]],
            "pixels": [tables["mean"], tables["std"]],
            "form": tables["form"],
        }
        return {
            part: hashlib.sha256(f"{salt}\n{json.dumps(value)}".encode()).hexdigest() for part, value in parts.items()
        }


def apart(own: Schema, agreed: Schema) -> Iterator[str]:
    """Yield in words what a site has that the others did not agree on."""
    if own.form != agreed.form:
        both = all(form.startswith("tokens of ") for form in (own.form, agreed.form))
        more = ", of another tokenizer: give all the same tokenizer.json by the option `tokenizer`" if both else ""
        yield f"examples of the form {own.form!r}, where the others have {agreed.form!r}{more}"
    for what, mine, theirs in (
        ("classes", own.classes, agreed.classes),
        ("columns", [c.name for c in own.columns], [c.name for c in agreed.columns]),
    ):
        if more := [name for name in mine if name not in theirs]:
            yield f"{what} {', '.join(map(repr, more))}, which are not among the agreed {', '.join(map(repr, theirs))}"
    known = {column.name: column for column in agreed.columns}
    for column in own.columns:
        other = known.get(column.name)
        if other is None:
            continue
        if bool(column.categories) != bool(other.categories):
            kinds = ("numbers", "categories")
            yield (
                f"{kinds[bool(column.categories)]} in column {column.name!r}, which the others read as "
                f"{kinds[bool(other.categories)]}"
            )
        elif more := [name for name in column.categories if name not in other.categories]:
            yield (
                f"categories {', '.join(map(repr, more))} in column {column.name!r}, which are not among the agreed "
                f"{', '.join(map(repr, other.categories))}"
            )
    names = [column.name for column in own.columns]
    if lacking := [column.name for column in agreed.columns if column.name not in names]:
        yield f"no columns {', '.join(map(repr, lacking))}, which the others have"
