"""Hyper-parameters chosen by accuracy on validation rows, never on test rows.

A search begins with the grid of the study. If the best value of a key is the least or the greatest tried value, the
search continues beyond it, until the best point has a neighbour on both sides of every key or a limit is reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyfed.base.errors import ConfigError
from polyfed.comparison.specs import FINISHED, RunSpec
from polyfed.comparison.statistics import mean_over
from polyfed.config import algorithm_class, algorithm_fields
from polyfed.experiments.study import Study
from polyfed.metrics.catalogue import METRICS
from polyfed.report.tables import metric_of
from polyfed.rounds.federation import misfits

#: Values by dotted key.
Point = dict[str, Any]


def search(study: Study, root: Path) -> tuple[list[RunSpec], dict[str, dict[str, str]]]:
    """Return the cells that the tuning is known to need, and where it had to stop.

    Args:
        study: a study with a tuning.
        root: the folder that contains ``cells/``.

    Returns:
        The cells, those of the grid first; and by label and key why the best value stayed at the edge of the tried
        values. An algorithm with cells that are not done has no edges yet.
    """
    cells = study.tuning()
    edges: dict[str, dict[str, str]] = {}
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [cell for cell in cells if cell.label == label]
        while all(cell.state(root) in FINISHED for cell in own):
            more, edges[label] = _beyond(study, label, own, root)
            if not more:
                break
            own += more
            cells += more
        else:
            edges.pop(label, None)
    return cells, edges


def choose(cells: Sequence[RunSpec], root: Path) -> dict[str, Point]:
    """Return for each algorithm the point with the best mean over seeds; of equal points the first.

    Args:
        cells: cells of the tuning, all done. A point at which a run diverged is excluded.
        root: the folder that contains ``cells/``.

    Returns:
        Values by label and dotted key, for the keys that the algorithm has; no label whose points all diverged.
    """
    labels = dict.fromkeys(cell.label for cell in cells)
    best = {label: _best(_tried([cell for cell in cells if cell.label == label]), root) for label in labels}
    return {label: point for label, point in best.items() if point is not None}


def told(chosen: Mapping[str, Point], edges: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each algorithm with its chosen values, and the values that stayed at the edge."""

    def value(label: str, key: str) -> str:
        edge = edges.get(label, {}).get(key)
        return f"{key} = {chosen[label][key]}{f' (**at the edge**: {edge})' if edge else ''}"

    return [
        f"{label}: {', '.join(value(label, key) for key in values) or 'nothing to choose'}"
        for label, values in chosen.items()
    ]


def _tried(cells: Sequence[RunSpec]) -> list[tuple[Point, list[RunSpec]]]:
    """Return each point of one algorithm with its cells; a point has only keys of the algorithm."""
    points: dict[tuple[Any, ...], tuple[Point, list[RunSpec]]] = {}
    for cell in cells:
        fields = algorithm_fields(algorithm_class(cell.config.algorithm.name))
        own = {
            key: value
            for key, value in cell.setting.point.items()
            if not key.startswith("algorithm.") or key.removeprefix("algorithm.") in fields
        }
        points.setdefault(tuple(map(repr, own.values())), (own, []))[1].append(cell)
    return list(points.values())


def _best(tried: Sequence[tuple[Point, list[RunSpec]]], root: Path) -> Point | None:
    scores = [(score, point) for point, cells in tried if (score := _score(cells, root)) is not None]
    return max(scores, key=lambda found: found[0])[1] if scores else None


def _score(cells: Sequence[RunSpec], root: Path) -> float | None:
    """Return the mean headline metric over seeds, negated where a lower value is better."""
    metric = cells[0].config.metrics[0]
    means = (None if s is None else metric_of(s, metric)["mean"] for s in (cell.summary(root) for cell in cells))
    mean = mean_over([*means])
    return mean if mean is None or METRICS[metric].higher else -mean


def _beyond(study: Study, label: str, own: list[RunSpec], root: Path) -> tuple[list[RunSpec], dict[str, str]]:
    """Return the untried neighbours of the best point, and why a side has no neighbour."""
    assert study.tune is not None
    tried = _tried(own)
    points, best = [point for point, _ in tried], _best(tried, root)
    if best is None:
        return [], {}
    more: list[RunSpec] = []
    edges: dict[str, str] = {}
    for key in best:
        values = _ordered([point[key] for point in points])
        if len(values) < 2:
            continue
        for step in (-1, 1):
            value = _next(values, best[key], step)
            side = f"{'below' if step < 0 else 'above'} {best[key]}"
            new = {**best, key: value}
            if value is None:
                edges[key] = f"there is no value {side}"
            elif value not in values and sum(known not in study.tune.grid[key] for known in values) >= study.tune.widen:
                edges[key] = f"no value {side} was tried, as the search widens {study.tune.widen} times at most"
            elif new not in points:
                found, fault = _cells(study, label, new, root)
                more += found
                if fault:
                    edges[key] = f"no value {side} can be run: {fault}"
    return more, edges


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Return the different numbers in ascending order; empty if the values are no numbers."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return sorted(set(values)) if numbers else []


def _next(values: Sequence[Any], value: Any, step: int) -> Any:
    """Return the neighbour of a value: the next tried value, else a value as far beyond as the outer two are apart."""
    place = values.index(value) + step
    if 0 <= place < len(values):
        return values[place]
    outer, inner = (values[0], values[1]) if step < 0 else (values[-1], values[-2])
    if min(outer, inner) <= 0:  # 0 and negative numbers have no ratio
        return None
    beyond = outer * (outer / inner)
    further = round(beyond) if all(isinstance(known, int) for known in values) else float(f"{beyond:.4g}")
    return further if (further < outer if step < 0 else further > outer) else None


def _cells(study: Study, label: str, point: Point, root: Path) -> tuple[list[RunSpec], str]:
    """Return the cells of a point outside the grid, or no cells and the fault of the point."""
    try:
        cells = study.tuning_at(label, point)
    except ConfigError as error:
        return [], "; ".join(error.faults)
    faults = misfits([cell.config for cell in cells if cell.state(root) not in FINISHED])
    return ([], "; ".join(faults)) if faults else (cells, "")
