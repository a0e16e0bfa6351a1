"""A data set as its site agreed with the others: classes, columns and categories at the agreed positions."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from pydantic import ValidationError

from polyfed.base.errors import DataError
from polyfed.data.dataset import Dataset
from polyfed.data.readers.leaf import UNKNOWN, of_leaf
from polyfed.data.schema import Feature, Schema, apart


def schema_of(dataset: Dataset) -> Schema:
    """Return the schema of a data set.

    Raises:
        DataError: a name is longer than 1,000 characters.
    """
    features = (column for column in dataset.columns if column.kind in ("number", "category"))
    form = dataset.kind
    if dataset.kind == "image":
        form += " of bytes" if dataset.x.dtype == torch.uint8 else " of numbers"
    elif dataset.kind == "series":
        form += " NCT" if dataset.channels_first else " NTC"
    elif dataset.tokenizer:
        form = tokens_of(dataset.tokenizer)
    try:
        return Schema(
            classes=dataset.classes,
            columns=tuple(Feature(name=column.name, categories=column.categories) for column in features),
            mean=dataset.mean,
            std=dataset.std,
            form=form,
        )
    except ValidationError as error:
        raise DataError(
            f"{dataset.name}: a name of a class, a column or a category cannot be agreed on: "
            f"{error.errors()[0]['msg']}; shorten it, or leave the column out"
        ) from error


def tokens_of(tokenizer: str) -> str:
    """Return the form of tokens of texts in a schema: the digest of their tokenizer tells which word a number is."""
    return f"tokens of {hashlib.sha256(tokenizer.encode()).hexdigest()[:12]}"


def conform(dataset: Dataset, agreed: Schema) -> Dataset:
    """Return the data set with the agreed numbers of classes, positions of columns and categories, and scale of pixels.

    A class or category that has no row here is fine; parts that the agreement leaves empty stay as they are.

    Raises:
        DataError: the data set has a class, column or category that is not agreed, or lacks a column.
    """
    own = schema_of(dataset)
    wanted = agreed.over(own)
    if faults := list(apart(own, wanted)):
        raise DataError(
            f"{dataset.name}: has {'; '.join(faults)}; correct the file, or give all sites' names in [data.agreed]"
        )
    if agreed.mean and len(agreed.mean) != len(dataset.mean):
        raise DataError(
            f"{dataset.name}: has {len(dataset.mean)} channels; the agreed mean and deviation are of {len(agreed.mean)}"
        )
    code = torch.tensor([wanted.classes.index(name) for name in own.classes])
    if of_leaf(dataset):
        if wanted.classes[0] != UNKNOWN:
            raise DataError(
                f"{dataset.name}: the agreed classes begin with {wanted.classes[0]!r}; expected {UNKNOWN!r}, as they "
                "are the vocabulary of LEAF's layout, too: put it first in [data.agreed]"
            )
        # Class c is token c + 1, and 0 is padding: so tokens get other numbers as classes do.
        dataset = replace(dataset, x=torch.cat([torch.zeros(1, dtype=torch.int64), code + 1])[dataset.x])
    y = torch.where(dataset.y < 0, -1, code[dataset.y]) if len(code) else dataset.y  # -1: without a label
    dataset = replace(dataset, y=y, classes=wanted.classes)
    if agreed.mean:
        dataset = replace(dataset, mean=agreed.mean, std=agreed.std)
    return _arranged(dataset, own, wanted) if own.columns != wanted.columns else dataset


def _arranged(dataset: Dataset, own: Schema, wanted: Schema) -> Dataset:
    """Return the data set with the features at the agreed positions."""
    widths = [len(column.categories) or 1 for column in own.columns]
    starts = dict(zip((column.name for column in own.columns), np.cumsum([0, *widths]).tolist(), strict=False))
    known = {column.name: column for column in own.columns}
    pieces: list[torch.Tensor] = []
    for column in wanted.columns:
        start, mine = starts[column.name], known[column.name].categories
        if not column.categories:
            pieces.append(dataset.x[:, start : start + 1])
            continue
        # A category that has no row here is 0, but NaN where the cell is missing, as the others are.
        gone = dataset.x[:, start : start + 1].isnan()
        empty = torch.zeros(len(dataset), 1, dtype=dataset.x.dtype).masked_fill(gone, float("nan"))
        pieces += [
            dataset.x[:, start + mine.index(name), None] if name in mine else empty for name in column.categories
        ]
    order = {column.name: column for column in wanted.columns}
    features = {column.name: column for column in dataset.columns if column.name in order}
    columns = [replace(features[name], categories=column.categories) for name, column in order.items()]
    others = [column for column in dataset.columns if column.name not in order]
    return replace(dataset, x=torch.cat(pieces, dim=1), columns=(*columns, *others))
