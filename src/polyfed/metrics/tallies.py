"""What a test of a model leaves behind: sums that add over batches and clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: Of one class, the examples in it and outside it at each level of a score.
Levels = tuple[NDArray[Any], NDArray[Any]]

#: Bins of confidence of the expected calibration error.
CALIBRATION_BINS = 15
#: Bins of log-odds, 0.1 wide from -10 to 10, and one below and above, of scores that are pooled as counts.
EDGES: Floats = np.linspace(-10, 10, 201)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The truth and the predictions of some test rows.

    Args:
        y: ``(n,)`` class numbers, or targets of a regression as float64.
        scores: ``(n, L)`` float64 probabilities, or ``(n, 1)`` predictions of a regression.
        predicted: ``(n,)`` predicted class numbers; the most probable class if it is not given.
    """

    y: NDArray[Any]
    scores: Floats
    predicted: Ints | None = None

    @property
    def guess(self) -> Ints:
        """The predicted classes, ``(n,)``."""
        return self.scores.argmax(axis=1) if self.predicted is None else self.predicted


class Tally(ABC):
    """Sums over test rows: ``Tally.total([Tally.of(a), Tally.of(b)])`` is ``Tally.of`` of both together."""

    @classmethod
    @abstractmethod
    def of(cls, predictions: Predictions) -> Self:
        """Return the tally of some rows."""

    @classmethod
    @abstractmethod
    def total(cls, tallies: Sequence[Any]) -> Self:
        """Return the tally of all rows of one or more tallies, in time that grows with the rows."""

    @abstractmethod
    def sums(self) -> Sums:
        """Return what may leave a client: sums without single rows."""


class Sums(Tally):
    """A tally that is one array of sums.

    Args:
        array: the sums; the shape depends on the number of outputs alone.
    """

    #: The shape of the array for L outputs, with "L" in its place.
    form: ClassVar[tuple[int | str, ...]]

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __add__(self, other: Any) -> Self:
        return type(self)(self.array + other.array)

    @classmethod
    def total(cls, tallies: Sequence[Any]) -> Self:
        """One after the other."""
        return reduce(add, tallies)

    def sums(self) -> Sums:
        """Itself."""
        return self

    @classmethod
    def shape(cls, outputs: int) -> tuple[int, ...]:
        """Return the shape of the array for a network with so many outputs."""
        return tuple(outputs if size == "L" else int(size) for size in cls.form)


class Confusion(Sums):
    """Counts of examples by class and predicted class, ``(L, L)``."""

    form = ("L", "L")

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """Count the examples of each class that are taken for each class, ``(L, L)``."""
        size = predictions.scores.shape[1]
        return cls(np.bincount(predictions.y * size + predictions.guess, minlength=size**2).reshape(size, size))


class SquaredScores(Sums):
    """The number of examples and the sum of their squared differences of probabilities; see ``brier``."""

    form = (2,)

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """With two classes the difference is that of the second class."""
        truth = np.eye(predictions.scores.shape[1])[predictions.y]
        gap = ((predictions.scores - truth) ** 2)[:, 1:] if truth.shape[1] == 2 else (predictions.scores - truth) ** 2
        return cls(np.array([len(gap), gap.sum()]))


class Calibration(Sums):
    """By bin of confidence: examples, sum of confidences, right answers; (15, 3). Bin b is (b/15, (b+1)/15]."""

    form = (CALIBRATION_BINS, 3)

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """Confidence is the probability of the predicted class."""
        confidence = np.take_along_axis(predictions.scores, predictions.guess[:, None], axis=1)[:, 0]
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
        place, size = np.searchsorted(edges, confidence, side="left"), CALIBRATION_BINS
        weights = (None, confidence, (predictions.guess == predictions.y).astype(np.float64))
        return cls(np.stack([np.bincount(place, weight, minlength=size) for weight in weights], axis=1))


class Errors(Sums):
    """Of a regression: n, sum of |error|, sum of error^2, the mean target, and the squared deviations from it; (5,)."""

    form = (5,)

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """Errors are predictions minus targets."""
        error, y = predictions.scores[:, 0] - predictions.y, predictions.y
        mean = y.mean() if len(y) else 0.0
        return cls(np.array([len(y), np.abs(error).sum(), (error**2).sum(), mean, ((y - mean) ** 2).sum()]))

    def __add__(self, other: Any) -> Self:
        """Deviations are moved to the common mean, so that large targets lose no digits."""
        (n, mean), (m, their) = self.array[[0, 3]], other.array[[0, 3]]
        total, gap = max(1.0, n + m), their - mean
        both = self.array + other.array
        both[3], both[4] = mean + gap * m / total, both[4] + gap**2 * n * m / total
        return type(self)(both)


class Scores(Tally):
    """Every score and label, for metrics of the order of scores.

    Args:
        y: ``(n,)`` class numbers.
        scores: ``(n, L)`` probabilities.
    """

    def __init__(self, y: Ints, scores: Floats) -> None:
        self.y, self.scores = y, scores

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """Keep the rows."""
        return cls(predictions.y, predictions.scores)

    @classmethod
    def total(cls, tallies: Sequence[Any]) -> Self:
        """All rows."""
        return cls(np.concatenate([one.y for one in tallies]), np.concatenate([one.scores for one in tallies]))

    def __getstate__(self) -> dict[str, Any]:
        return {"y": self.y, "scores": self.scores}  # without levels, which would double what travels

    @cached_property
    def levels(self) -> list[Levels]:
        """For each class the examples in and outside it at each different score, ascending.

        They are kept, as several metrics need them and sorting takes most of the time: as much memory as the scores.
        """
        found: list[Levels] = []
        for k, column in enumerate(self.scores.T):
            values, place = np.unique(column, return_inverse=True)
            both = (np.bincount(place[part], minlength=len(values)) for part in (self.y == k, self.y != k))
            found.append((next(both).astype(np.int32), next(both).astype(np.int32)))
        return found

    def sums(self) -> Sums:
        """Counts by bin of log-odds."""
        with np.errstate(divide="ignore"):
            odds = np.log(self.scores) - np.log1p(-self.scores)
        place = np.searchsorted(EDGES, odds, side="left")  # (n, L)
        counts = np.zeros(BinnedScores.shape(self.scores.shape[1]), dtype=np.int64)
        for k in range(len(counts)):
            np.add.at(counts[k], ((self.y != k).astype(np.int64), place[:, k]), 1)
        return BinnedScores(counts)


class BinnedScores(Sums):
    """Counts by class, in or outside it, and bin of log-odds, ``(L, 2, 202)``: `Scores` where counts alone are sent."""

    form = ("L", 2, len(EDGES) + 1)

    @classmethod
    def of(cls, predictions: Predictions) -> Self:
        """Count by class, in or outside it, and bin: ``(L, 2, 202)``."""
        return cls(Scores.of(predictions).sums().array)

    @property
    def levels(self) -> list[Levels]:
        """As those of `Scores`; the scores of a bin are taken as equal."""
        return [(inside, outside) for inside, outside in self.array]
