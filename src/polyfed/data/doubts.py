"""What in a data set may be meant otherwise than it was read."""

from __future__ import annotations

import math

from torch import Tensor

from polyfed.data.dataset import Dataset
from polyfed.data.readers.leaf import of_leaf


def _of_padding(x: Tensor) -> list[str]:
    """Return where padding may be another token than 0, or 0 another than padding; ``x`` is (N, T)."""
    inside = int(((x[:, :-1] == 0) & (x[:, 1:] != 0)).any(dim=1).sum())
    if inside:
        return [
            f"{inside} of {len(x)} rows have a 0 before other tokens; 0 is padding, which the catalogue's networks "
            "pass over; if it is a token, number the tokens from 1"
        ]
    twice = x[:, -1][x[:, -1] == x[:, -2]] if x.shape[1] > 1 and bool(x.all()) else x[:0, 0]
    last = int(twice.mode().values) if len(twice) else 0
    often = int((twice == last).sum())
    if 2 * often <= len(x):
        return []
    return [
        f"{often} of {len(x)} rows end in {last}, twice or more, and none has a 0; if {last} is padding, put 0 in its "
        "place, which the catalogue's networks pass over"
    ]


def doubts(dataset: Dataset) -> list[str]:
    """Return what may be meant otherwise than it was read: missing values, padding, labels, targets far from 1."""
    out = [
        f"column {column.name!r}: {column.doubt:g} may stand for a missing value; if so, name it in `also_missing`"
        for column in dataset.columns
        if column.doubt is not None
    ]
    occur = len(dataset.y.unique()) if of_leaf(dataset) else dataset.num_classes
    if 2 * occur < dataset.num_classes:
        out.append(
            f"{dataset.num_classes - occur} of {dataset.num_classes} classes never occur as y, as every character or "
            "word of x is a class; if y is a label of the text, put the texts into a csv or parquet file, and name "
            "their column by its option `text`"
        )
    if dataset.kind == "tokens":
        out += _of_padding(dataset.x)
    if dataset.task == "regression":
        offset, scale = float(dataset.y.mean()), float(dataset.y.std(correction=0))
        mean, spread = (offset - dataset.target_offset) / dataset.target_scale, scale / dataset.target_scale
        if scale == 0:
            out.append(f"all targets are {offset:.12g}, so there is nothing to predict; check the column of the label")
        elif not (abs(mean) <= 3 and 0.1 <= spread <= 10):
            about = round(offset, 1 - math.floor(math.log10(scale)))
            out.append(
                f"targets as they are trained have mean {mean:.3g} and deviation {spread:.3g}, with which training may "
                f"diverge; data.target_offset = {about:.12g} and data.target_scale = {scale:.2g} give 0 and 1"
            )
    return out
