"""Each metric as a function of a tally; docs/metrics.md has the equations, and what happens with absent classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyfed.metrics.tallies import (
    BinnedScores,
    Calibration,
    Confusion,
    Errors,
    Floats,
    Predictions,
    Scores,
    SquaredScores,
    Sums,
    Tally,
)

#: A value by class; None where it is not defined.
ByClass = list[float | None]


@dataclass(frozen=True)
class Metric:
    """A metric: its tally, and its value by the sums.

    Args:
        tally: what it adds up.
        value: returns the value of a tally; None where it is not defined.
        by_class: returns the value of each class; None if it is none of classes.
    """

    tally: type[Tally]
    value: Callable[[Any], float | None]
    by_class: Callable[[Any], ByClass] | None = None


def _ratios(above: Floats, below: Floats) -> ByClass:
    return [float(a / b) if b else None for a, b in zip(above, below, strict=True)]


def _parts(tally: Confusion) -> tuple[Floats, Floats, Floats]:
    """Return by class the examples that were tally, all its examples, and all examples taken for it."""
    counts = tally.array.astype(np.float64)
    return counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)


def _accuracy(tally: Confusion) -> float | None:
    total = int(tally.array.sum())
    return float(tally.array.trace() / total) if total else None


def _sensitivity(tally: Confusion) -> ByClass:
    right, held, _ = _parts(tally)
    return _ratios(right, held)


def _specificity(tally: Confusion) -> ByClass:
    right, held, taken = _parts(tally)
    others = held.sum() - held
    return _ratios(others - (taken - right), others)


def _f1(tally: Confusion) -> ByClass:
    right, held, taken = _parts(tally)
    return _ratios(2 * right, held + taken)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _headline(values: ByClass) -> float | None:
    """Return the value of the second of two classes, or else the mean over the classes that have a value."""
    return values[1] if len(values) == 2 else _mean(values)


def _levels(tally: Scores | BinnedScores) -> Iterator[tuple[Floats, Floats]]:
    return ((inside.astype(np.float64), outside.astype(np.float64)) for inside, outside in tally.levels)


def _auroc(tally: Scores | BinnedScores) -> ByClass:
    """The share of pairs, one example in the class and one outside, whose order is right; a tie counts half."""
    values: ByClass = []
    for inside, outside in _levels(tally):
        below = np.cumsum(outside) - outside
        pairs = inside.sum() * outside.sum()
        values.append(float((inside * (below + outside / 2)).sum() / pairs) if pairs else None)
    return values


def _auprc(tally: Scores | BinnedScores) -> ByClass:
    """The precision at each score, weighted by the share of the class that has this score."""
    values: ByClass = []
    for inside, outside in _levels(tally):
        hit, all_ = np.cumsum(inside[::-1]), np.cumsum((inside + outside)[::-1])
        precision = np.divide(hit, all_, out=np.zeros_like(hit), where=all_ > 0)
        values.append(float((inside[::-1] * precision).sum() / hit[-1]) if len(hit) and hit[-1] else None)
    return values


def _ece(tally: Calibration) -> float | None:
    count, confidence, right = tally.array.T
    return float(np.abs(confidence - right).sum() / count.sum()) if count.sum() else None


def _per_row(place: int, finish: Callable[[float], float] = float) -> Callable[[Sums], float | None]:
    """Return the function that divides a sum by the number of rows, which is the first sum."""
    return lambda tally: finish(float(tally.array[place] / tally.array[0])) if tally.array[0] else None


def _r2(tally: Errors) -> float | None:
    squares, deviations = float(tally.array[2]), float(tally.array[4])
    return 1 - squares / deviations if deviations else None


def _of_classes(kind: type[Tally], by_class: Callable[[Any], ByClass]) -> Metric:
    return Metric(kind, lambda tally: _headline(by_class(tally)), by_class)


#: Name of a metric -> how it is computed.
COMPUTED: Mapping[str, Metric] = {
    "accuracy": Metric(Confusion, _accuracy),
    "balanced_accuracy": Metric(Confusion, lambda tally: _mean(_sensitivity(tally))),
    "macro_f1": Metric(Confusion, lambda tally: _mean(_f1(tally))),
    "sensitivity": _of_classes(Confusion, _sensitivity),
    "specificity": _of_classes(Confusion, _specificity),
    "auroc": _of_classes(Scores, _auroc),
    "auprc": _of_classes(Scores, _auprc),
    "brier": Metric(SquaredScores, _per_row(1)),
    "ece": Metric(Calibration, _ece),
    "rmse": Metric(Errors, _per_row(2, lambda square: square**0.5)),
    "mae": Metric(Errors, _per_row(1)),
    "r2": Metric(Errors, _r2),
}

#: Tallies by the name of their class.
Tallies = Mapping[str, Tally]


def tallies(metrics: Sequence[str], predictions: Predictions) -> dict[str, Tally]:
    """Return the tallies that some metrics need, of some test rows."""
    return {kind.__name__: kind.of(predictions) for kind in dict.fromkeys(COMPUTED[name].tally for name in metrics)}


def plus(*parts: Tallies) -> dict[str, Tally]:
    """Return the tallies of one or more sets of rows together."""
    return {kind: type(tally).total([part[kind] for part in parts]) for kind, tally in parts[0].items()}


def value(metric: str, tallies: Tallies) -> float | None:
    """Return a metric of tallies; None where it is not defined."""
    computed = COMPUTED[metric]
    return computed.value(tallies[computed.tally.__name__])


def by_class(metric: str, tallies: Tallies, classes: Sequence[str]) -> dict[str, float | None]:
    """Return a metric for each class by its name; empty for a metric that has no value by class."""
    computed = COMPUTED[metric]
    if computed.by_class is None:
        return {}
    values = computed.by_class(tallies[computed.tally.__name__])
    return dict(zip((*classes, *map(str, range(len(classes), len(values)))), values, strict=True))


def sent_sums(tallies: Tallies) -> dict[str, list[float]]:
    """Return what may leave a client: sums without single rows, as plain numbers, by the name of the tally's class."""
    return {kind: tally.sums().array.ravel().tolist() for kind, tally in tallies.items()}


def read_sums(kind: str, numbers: Sequence[float], outputs: int) -> Tally:
    """Return the sums of a tally that a client sent.

    Args:
        kind: the name of the tally's class.
        numbers: the sums, flat.
        outputs: number of classes, or 1 of a regression.

    Raises:
        ValueError: no such tally, or another number of sums than it has, or a sum that is impossible.
    """
    kinds = {metric.tally.__name__: metric.tally for metric in COMPUTED.values()}
    found = BinnedScores if kinds.get(kind) is Scores else kinds.get(kind)
    if found is None or not issubclass(found, Sums):
        raise ValueError(f"got sums of {kind!r}; expected one of {', '.join(kinds)}")
    array = np.asarray(numbers, dtype=np.float64)
    shape = found.shape(outputs)
    if array.size != np.prod(shape) or not np.isfinite(array).all() or (kind != "Errors" and (array < 0).any()):
        raise ValueError(f"got {array.size} sums of {kind!r}; expected {np.prod(shape)} finite numbers, none below 0")
    return found(array.reshape(shape))
