"""Hyper-parameters chosen by accuracy on validation rows, never on test rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyfed.compare.specs import RunSpec
from polyfed.config import algorithm_class, algorithm_fields


def choose(cells: Sequence[RunSpec], root: Path) -> dict[str, dict[str, Any]]:
    """For each algorithm the point of the grid with the best mean over seeds; of equal ones the first.

    Args:
        cells: of the tuning; all done. A point at which a run diverged is out.
        root: where they lie.

    Returns:
        Values by label and dotted key, of those keys that the algorithm has; none where every point diverged.
    """
    points: dict[str, dict[str, list[RunSpec]]] = {}
    for cell in cells:
        points.setdefault(cell.label, {}).setdefault(cell.setting.title, []).append(cell)
    chosen: dict[str, dict[str, Any]] = {}
    for label, groups in points.items():
        scores = {title: score for title, group in groups.items() if (score := _score(group, root)) is not None}
        if scores:
            first = groups[max(scores, key=lambda title: scores[title])][0]
            chosen[label] = _own(first)
    return chosen


def _score(cells: Sequence[RunSpec], root: Path) -> float | None:
    found = [cell.summary(root) for cell in cells]
    done = [summary["accuracy"]["mean"] for summary in found if summary is not None]
    return statistics.fmean(done) if len(done) == len(found) else None


def _own(cell: RunSpec) -> dict[str, Any]:
    fields = algorithm_fields(algorithm_class(cell.config.algorithm.name))
    return {
        key: value
        for key, value in cell.setting.point.items()
        if not key.startswith("algorithm.") or key.removeprefix("algorithm.") in fields
    }


def told(chosen: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was chosen, a line for each algorithm."""
    return [
        f"{label}: {', '.join(f'{key} = {value}' for key, value in values.items()) or 'nothing to choose'}"
        for label, values in chosen.items()
    ]
