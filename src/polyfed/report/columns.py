"""How data were read: a line for a data set, a row for each column of a table. This module does not import torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyfed.data.columns import Column

if TYPE_CHECKING:
    from polyfed.data.dataset import Dataset

HEADINGS = ("column", "taken for", "levels", "missing", "range")
_SHOWN = 8  # levels, or columns of a kind, that a line names

_WORDS = {
    "index": "index, left out",
    "ignored": "left out, as asked",
    "text": "text, as tokens",
    "unused": "left out, beside the text",
    "test": "flag of the official test rows",
}


def rows(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """Return the cells of the table of columns, below `HEADINGS`."""
    return [
        (
            column.name or "(no name)",
            _WORDS.get(column.kind, column.kind),
            f"{len(column.categories)}: {_some(column.categories)}" if column.categories else "",
            f"{column.missing:,}" if column.missing else "",
            "" if column.low is None or column.high is None else f"{column.low:.12g} to {column.high:.12g}",
        )
        for column in columns
    ]


def summary(dataset: Dataset) -> str:
    """Return in one line what was read."""
    shape = "x".join(map(str, dataset.input_shape))
    channels, steps = (
        dataset.input_shape[:: 1 if dataset.channels_first else -1] if dataset.kind == "series" else (0, 0)
    )
    kinds = {
        "image": f"images of {shape}",
        "series": f"series of {steps} steps of {channels} channels",
        "tokens": f"{shape} tokens each",
    }
    parts = [f"{len(dataset):,} rows", kinds.get(dataset.kind, "")]
    if not dataset.columns:
        parts[1] = parts[1] or f"{shape} features"
        parts.append(f"{len(dataset.classes)} classes: {_some(dataset.classes)}" if dataset.classes else "a regression")
        if dataset.num_unlabelled:
            parts.append(f"{dataset.num_unlabelled:,} rows without a label")
        if dataset.x.is_floating_point() and (gone := int(dataset.x.isnan().sum())):
            parts.append(f"{gone:,} missing values")
        return ", ".join(parts)
    counts = Counter(column.kind for column in dataset.columns)
    levels = [f"{c.name} {len(c.categories)}" for c in dataset.columns if c.kind == "category"]
    if counts["number"]:
        parts.append(f"{counts['number']} number{'s' * (counts['number'] > 1)}")
    if levels:
        parts.append(f"{len(levels)} categor{'ies' if len(levels) > 1 else 'y'} ({_some(levels)})")
    for column in dataset.columns:
        if column.kind == "text":
            parts.append(f"text {column.name!r}")
        elif column.kind == "label":
            of = (
                f"with {len(column.categories)} classes ({_some(column.categories)})"
                if column.categories
                else "a number"
            )
            parts.append(f"label {column.name!r} {of}")
        elif column.kind == "group":
            parts.append(f"group {column.name!r} with {len(dataset.group_names)} names")
    beside = ("index", "ignored", "unused")
    left = [column.name or "(no name)" for column in dataset.columns if column.kind in beside]
    if left:
        parts.append(f"left out: {_some(left)}")
    if dataset.num_unlabelled:
        parts.append(f"{dataset.num_unlabelled:,} rows without a label")
    missing = sum(column.missing for column in dataset.columns if column.kind != "label")
    return ", ".join([part for part in (*parts, f"{missing:,} missing cell{'s' * (missing != 1)}") if part])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
