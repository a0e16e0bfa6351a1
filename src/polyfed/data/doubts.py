"""What in a data set may be meant otherwise than it was read."""

from __future__ import annotations

from polyfed.data.dataset import Dataset


def doubts(dataset: Dataset) -> list[str]:
    """Return what may be meant otherwise than it was read: numbers for missing values, and targets far from 0 and 1."""
    out = [
        f"column {column.name!r}: {column.doubt:g} may stand for a missing value; if so, name it in `also_missing`"
        for column in dataset.columns
        if column.doubt is not None
    ]
    if dataset.task == "regression":
        scaled = (dataset.y - dataset.target_offset) / dataset.target_scale
        if not (scaled.mean().abs() <= 3 and 0.1 <= scaled.std() <= 10):
            offset, scale = dataset.y.mean(), dataset.y.std()
            out.append(
                f"targets as they are trained have mean {scaled.mean():.3g} and deviation {scaled.std():.3g}, with "
                f"which training may diverge; data.target_offset = {offset:.2g} and data.target_scale = {scale:.2g} "
                "give 0 and 1"
            )
    return out
