"""What in a data set may be meant otherwise than it was read."""

from __future__ import annotations

import math

from polyfed.data.dataset import Dataset
from polyfed.data.readers.leaf import UNKNOWN


def doubts(dataset: Dataset) -> list[str]:
    """Return what may be meant otherwise than it was read: missing values, labels, and targets far from 0 and 1."""
    out = [
        f"column {column.name!r}: {column.doubt:g} may stand for a missing value; if so, name it in `also_missing`"
        for column in dataset.columns
        if column.doubt is not None
    ]
    occur = len(dataset.y.unique()) if dataset.classes[:1] == (UNKNOWN,) else dataset.num_classes
    if 2 * occur < dataset.num_classes:
        out.append(
            f"{dataset.num_classes - occur} of {dataset.num_classes} classes never occur as y, as every character or "
            "word of x is a class; if y is a label of the text, save the texts as tokens in an npz file, with "
            'kind = "tokens"'
        )
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
