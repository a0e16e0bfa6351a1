"""Curves of a metric over rounds and over bytes, in the colours of Okabe and Ito, for the colour-blind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from polyfed.metrics.catalogue import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_MB = 1e6


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, or the means over the runs of one algorithm.

    Args:
        rounds: the evaluated rounds.
        sent: bytes up and down of all clients' training, up to each of these rounds.
        values: the metric after each of these rounds; a fraction, or in the unit of the data.
    """

    rounds: Sequence[int]
    sent: Sequence[float]
    values: Sequence[float]


def drawn(curves: Mapping[str, Curve], metric: str) -> Figure:
    """Return a picture of two panels: the metric over rounds, and over megabytes.

    A notebook shows the picture where it ends a cell; elsewhere call its ``savefig``.

    Args:
        curves: the curves by label.
        metric: the name of the metric, of `polyfed list metrics`.
    """
    # A figure of pyplot teaches a notebook how to show figures. Closed at once, it is shown a single time, and does not
    # stay in pyplot's list.
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    plt.close(figure)
    times = 100 if METRICS[metric].percent else 1
    for place, (label, curve) in enumerate(curves.items()):
        look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "label": label}
        shown = [times * value for value in curve.values]
        axes[0].plot(list(curve.rounds), shown, **look)
        axes[1].plot([sent / _MB for sent in curve.sent], shown, **look)
    axes[0].set_xlabel("round")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_xlabel("MB up and down, all clients")
    name = metric.replace("_", " ")
    axes[0].set_ylabel(f"{name}, %" if METRICS[metric].percent else name)
    for one in axes:
        one.grid(alpha=0.3)
    if len(curves) > 1:
        axes[1].legend()
    return figure


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of several curves, over the rounds that all have."""
    common = [round_ for round_ in curves[0].rounds if all(round_ in curve.rounds for curve in curves)]
    places = [[list(curve.rounds).index(round_) for curve in curves] for round_ in common]

    def mean(of: Callable[[Curve], Sequence[float]]) -> list[float]:
        return [fmean(of(curve)[at] for curve, at in zip(curves, place, strict=True)) for place in places]

    return Curve(common, mean(lambda curve: curve.sent), mean(lambda curve: curve.values))
