"""The pictures of the views, in the colours of Okabe and Ito, which the colour-blind can distinguish, and markers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from polyfed.base.errors import StorageError
from polyfed.comparison.render import aim_text
from polyfed.data.readers.cache import replacing
from polyfed.experiments.sizes import size_text
from polyfed.experiments.views import View
from polyfed.metrics.catalogue import METRICS
from polyfed.report.curves import COLOURS, MARKERS

_LINES = ("-", "--", ":", "-.")
_MAIN, _PLAIN = COLOURS[0], "#666666"


def draw(view: View, path: Path, title: str) -> bool:
    """Write the picture of a view; return False if the view has no picture or no data.

    Raises:
        StorageError: the file cannot be written.
    """
    if view.name not in _DRAW or not view.rows:
        return False
    from matplotlib.figure import Figure

    # Figure instead of pyplot: no window system, no global list of figures; savefig draws PNG with Agg.
    figure = Figure(layout="constrained")
    _DRAW[view.name](figure, view)
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    try:
        with replacing(path) as handle:
            figure.savefig(handle, format="png", dpi=130)
    except OSError as error:
        raise StorageError(f"{path}: the picture could not be written ({error})") from error
    return True


def _by_algorithm(
    view: View, here: Sequence[tuple[Any, ...]]
) -> list[tuple[str, dict[str, Any], list[tuple[Any, ...]]]]:
    """Return label, colour with marker and dashes, and rows of each algorithm that has rows ``here``.

    A variant has the colour of its algorithm and dashes of its own: "HeteroFL, equal MACs" is one of "HeteroFL".
    """
    labels = list(dict.fromkeys([*view.algorithms, *_unique(view, 1)]))
    main = {label: min((m for m in labels if label.startswith(f"{m}, ")), key=len, default=label) for label in labels}
    methods = list(dict.fromkeys(main.values()))
    looks: dict[str, dict[str, Any]] = {}
    for i, label in enumerate(labels):
        place, variant = methods.index(main[label]), [m for m in labels if main[m] == main[label]].index(label)
        looks[label] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": _LINES[(place // len(COLOURS) + variant) % len(_LINES)],
        }
    return [(label, look, rows) for label, look in looks.items() if (rows := [row for row in here if row[1] == label])]


def _unique(view: View, column: int) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in view.rows))


def _panels(
    figure: Any, view: View, *, width: float, height: float, legend: float = 0.0, most: int = 3
) -> list[tuple[Any, list[tuple[Any, ...]]]]:
    """Return axes and rows for each setting, at most ``most`` settings in a row."""
    groups = {setting: [row for row in view.rows if row[0] == setting] for setting in _unique(view, 0)}
    columns = min(most, len(groups))
    lines = -(-len(groups) // columns)
    figure.set_size_inches(width * columns + legend, height * lines + 0.4)
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for one in axes[len(groups) :]:
        one.set_visible(False)
    for one, setting in zip(axes, groups, strict=False):
        one.set_title(setting, fontsize=10)
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return list(zip(axes, groups.values(), strict=False))


def _legend(figure: Any, title: str = "") -> None:
    """Draw one legend for all panels, at their right; algorithms in the order of the study."""
    found: dict[str, Any] = {}
    for one in figure.axes:
        handles, labels = one.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=9, title=title)


def _axis(view: View) -> tuple[int, str]:
    """Return the factor and the label of an axis of the view's metric."""
    return (100, f"{view.metric} [%]") if METRICS[view.metric].percent else (1, view.metric)


def _dots(figure: Any, view: View) -> None:
    """Draw the mean of each algorithm, or of each of its predictors; bars are deviations, ticks are seeds.

    Of the view "whole", ticks are the networks of the mean.
    """
    networks = view.name == "whole"
    named, legend = (3, 2.0) if view.name == "predictors" else (2, 1.4)  # columns of a line's name
    names, (by, label) = list(dict.fromkeys(row[1:named] for row in view.rows)), _axis(view)
    ticks = [": ".join(name) for name in names]
    panels = _panels(figure, view, width=3.6, height=0.26 * len(names) + 0.9, legend=legend)
    for panel, (one, rows) in enumerate(panels):
        for row in rows:
            place, colour = names.index(row[1:named]), _MAIN if row[1] == names[0][0] else _PLAIN
            mean, sd, *rest = row[named + networks :]
            if not networks or row[2] == "mean":
                one.errorbar(by * mean, place, xerr=by * (sd or 0), fmt="o", color=colour, capsize=3, markersize=6)
            parts = [] if networks and row[2] == "mean" else [mean] if networks else rest[1:]
            parts = [by * part for part in parts if part is not None]
            one.plot(parts, [place] * len(parts), "|", color=colour, markersize=9, alpha=0.6)
        one.set_yticks(range(len(names)), ticks if panel % 3 == 0 else [""] * len(names))
        one.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)


def _curves(figure: Any, view: View) -> None:
    by, axis = _axis(view)
    for one, here in _panels(figure, view, width=3.8, height=3.2, legend=1.8):
        for label, look, rows in _by_algorithm(view, here):
            x, mean = [row[2] for row in rows], [by * row[3] for row in rows]
            one.plot(x, mean, label=label, markersize=4, markevery=max(1, len(x) // 8), **look)
            if all(row[4] is not None for row in rows):
                low, high = ([by * (row[3] + sign * row[4]) for row in rows] for sign in (-1, 1))
                one.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
        one.set(xlabel="round", ylabel=axis)
    _legend(figure)


def _clients(figure: Any, view: View) -> None:
    by, _ = _axis(view)
    unit = "percentage points" if by == 100 else view.metric
    for one, rows in _panels(figure, view, width=4.4, height=3.2):
        found = sorted(by * row[-1] for row in rows)
        colours = [COLOURS[0] if value > 0 else COLOURS[1] for value in found]
        one.bar(range(len(found)), found, color=colours, width=1.0)
        one.axhline(0, color="black", linewidth=0.8)
        one.set(xlabel="client, sorted", ylabel=f"{view.headings[3]} minus {view.headings[4]}\n[{unit}]")


def _targets(figure: Any, view: View) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator

    pairs = list(dict.fromkeys((row[0], row[2]) for row in view.rows))
    labels = _unique(view, 1)
    what = (
        (5, "rounds"),
        (6, "parameters, one client"),
        (7, "FLOPs, one forward pass"),
        (8, "training FLOPs, one client"),
    )
    figure.set_size_inches(2.9 * len(what) + 1.2, (0.24 * len(labels) + 0.9) * len(pairs) + 0.4)
    axes = figure.subplots(len(pairs), len(what), squeeze=False)
    for line, (setting, target) in zip(axes, pairs, strict=True):
        rows = {row[1]: row for row in view.rows if (row[0], row[2]) == (setting, target)}
        for place, (one, (column, name)) in enumerate(zip(line, what, strict=True)):
            for i, label in enumerate(labels):
                value = rows[label][column] if label in rows else None
                if value:
                    one.barh(i, value, color=_MAIN if i == 0 else _PLAIN)
                else:
                    told = "not reached by all" if value is None else "0"
                    one.text(0.02, i, told, transform=one.get_yaxis_transform(), va="center", fontsize=8)
            one.set_yticks(range(len(labels)), labels if place == 0 else [""] * len(labels))
            one.set(ylim=(len(labels) - 0.5, -0.5), xlim=(0, None))
            one.xaxis.set_major_formatter(EngFormatter(sep=" "))
            one.xaxis.set_major_locator(
                MaxNLocator(4) if any(row[column] for row in rows.values()) else FixedLocator([0])
            )
            one.set_xlabel(f"{name}, to {aim_text(target)}", fontsize=9)
            one.spines[["top", "right"]].set_visible(False)
        line[0].set_title(setting, fontsize=10, loc="left")


def _grid(figure: Any, view: View) -> None:
    labels, (by, axis) = _unique(view, 1), _axis(view)
    for one, here in _panels(figure, view, width=3.8, height=3.2, legend=1.8):
        numeric = all(isinstance(row[3], (int, float)) and not isinstance(row[3], bool) for row in here)
        values = list(dict.fromkeys(row[3] if numeric else str(row[3]) for row in here))
        places: Sequence[Any] = sorted(values) if numeric else range(len(values))
        # Bars at the same place are shifted, so that they do not hide each other.
        apart = 0.05 * min((after - before for before, after in pairwise(places)), default=0)
        for label, look, rows in _by_algorithm(view, here):
            shift = apart * (labels.index(label) - (len(labels) - 1) / 2)
            x = [(row[3] if numeric else values.index(str(row[3]))) + shift for row in rows]
            mean, sd = [by * row[4] for row in rows], [by * (row[5] or 0) for row in rows]
            one.errorbar(x, mean, yerr=sd, label=label, capsize=3, markersize=5, **look)
        one.set_xticks(values if numeric else range(len(values)), [str(value) for value in values])
        one.set(xlabel=here[0][2], ylabel=axis)
    _legend(figure)


def _logarithmic(one: Any, axes: str) -> None:
    """Make the axes of what is drawn logarithmic, "x", "y" or "xy", with plain numbers, more in a short range."""
    from matplotlib.ticker import LogLocator

    for name in axes:
        getattr(one, f"set_{name}scale")("log")
        axis = getattr(one, f"{name}axis")
        low, high = axis.get_view_interval()
        axis.set_minor_locator(LogLocator(subs=(2, 5) if high > 10 * low else (1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")


def _gradient(figure: Any, view: View) -> None:
    for one, here in _panels(figure, view, width=4.6, height=3.4, legend=1.8):
        for label, look, rows in _by_algorithm(view, here):
            x = [row[2] for row in rows]
            one.plot(x, [row[3] for row in rows], color=look["color"], linestyle="-", linewidth=0.8, alpha=0.6)
            look = {**look, "linewidth": 2.2, "markersize": 5, "markevery": max(1, len(x) // 6)}
            one.plot(x, [row[5] for row in rows], label=label, **look)
        one.set(xlabel="round", ylabel="squared norm of the gradient")
        _logarithmic(one, "y")
    _legend(figure)


def _differences(figure: Any, view: View) -> None:
    by, axis = _axis(view)
    labels = _unique(view, 1)
    for panel, (one, rows) in enumerate(_panels(figure, view, width=3.6, height=0.26 * len(labels) + 0.9, legend=1.4)):
        for row in rows:
            mean, place = by * row[4], labels.index(row[1])
            ends = None if row[5] is None else [[mean - by * row[5]], [by * row[6] - mean]]
            one.errorbar(mean, place, xerr=ends, fmt="o", color=_PLAIN, capsize=3, markersize=6)
        one.axvline(0, color=_MAIN, linewidth=0.8)
        one.set_yticks(range(len(labels)), labels if panel % 3 == 0 else [""] * len(labels))
        one.set(ylim=(len(labels) - 0.5, -0.5), xlabel=f"{axis.replace('%', 'points')} minus {rows[0][2]}")


def _by_stage(figure: Any, view: View) -> None:
    """Draw a number of each stage, in a panel for each setting and kept round."""
    column = view.headings.index("cka" if view.name == "cka" else "share_negative")
    at = view.headings.index("stage")
    shown = [row for row in view.rows if view.name != "cka" or row[3] == "clients"]
    rows = [(", ".join(filter(None, (row[0], f"round {row[2]}"))), *row[1:]) for row in shown]
    stages = list(dict.fromkeys(row[at] for row in rows))
    for one, here in _panels(figure, replace(view, rows=rows), width=4.2, height=3.2, legend=1.8):
        for label, look, some in _by_algorithm(view, here):
            x, y = [stages.index(row[at]) for row in some], [row[column] for row in some]
            one.plot(x, y, label=label, markersize=5, **look)
        one.set_xticks(range(len(stages)), stages)
        one.set(ylabel="linear CKA" if view.name == "cka" else "share of b < 0", ylim=(0, 1.02), xlabel="stage")
    _legend(figure)


def _planes(figure: Any, view: View) -> None:
    """Draw a plane of points for each setting, algorithm and round, coloured by client."""
    keys = list(dict.fromkeys(row[:3] for row in view.rows))
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure.set_size_inches(3.2 * columns + 1.8, 3.2 * lines + 0.4)
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for one in axes[len(keys) :]:
        one.set_visible(False)
    names = _unique(view, 4)
    for one, key in zip(axes, keys, strict=False):
        for name in names:
            some = [row for row in view.rows if row[:3] == key and row[4] == name]
            look = {"color": COLOURS[names.index(name) % len(COLOURS)], "marker": MARKERS[names.index(name) % 8]}
            one.scatter([row[5] for row in some], [row[6] for row in some], s=10, label=name, alpha=0.7, **look)
        one.set_title(textwrap.fill(", ".join(filter(None, [*key[:2], f"round {key[2]}"])), 34), fontsize=9)
        one.set(xticks=[], yticks=[])
    _legend(figure)


def _reconstructions(figure: Any, view: View) -> None:
    """Draw for each algorithm the images of a client, what attacks found, and how far that is from guessing."""
    figure.set_size_inches(13, 0.5 * len(view.pictures) + 1.3)
    lines = figure.subplots(len(view.pictures), 5, squeeze=False, width_ratios=(3, 3, 3, 2, 2))
    last = {row[:2]: dict(zip(view.headings, row, strict=True)) for row in view.rows}  # of the last round
    guesses = {  # by column: the guess, what was found without it, and the axis
        3: ("blind_psnr", {"decoder": "decoder_psnr", "search": "search_psnr"}, "PSNR [dB]"),
        4: ("label_majority", {"labels": "label_accuracy"}, "labels found [share]"),
    }
    looks = {what: (MARKERS[i], COLOURS[i]) for i, what in enumerate(("decoder", "search", "labels"))}
    for line, (name, groups), row in zip(lines, view.pictures.items(), last.values(), strict=True):
        for one, images in zip(line, groups, strict=False):
            strip = np.concatenate([np.pad(image, ((0, 0), (0, 0), (0, 1)), constant_values=1) for image in images], 2)
            one.imshow(strip[0] if len(strip) == 1 else strip.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
        told = "\n".join(textwrap.fill(part, 32) for part in name.splitlines())
        line[0].set_ylabel(told, rotation=0, ha="right", va="center", fontsize=8)
        for at, (guess, found, _) in guesses.items():
            line[at].axvline(row[guess], color="black", linestyle="--", linewidth=1, label="no better than guessing")
            for what, column in found.items():
                marker, colour = looks[what]
                line[at].plot(row[column], 0, marker, color=colour, markersize=5, label=what)
            most = max(one[column] for one in last.values() for column in (guess, *found.values()))
            line[at].set(xlim=(-0.05 * most, 1.05 * most), yticks=[])
            line[at].spines[["top", "right", "left"]].set_visible(False)
            line[at].tick_params(labelbottom=name == list(view.pictures)[-1], labelsize=8)
    titles = ("the client's images", "found by the decoder", "found by the search", *(x for *_, x in guesses.values()))
    for one, title in zip(lines[0], titles, strict=True):
        one.set_title(title, fontsize=9)
    _legend(figure)


def _histogram(figure: Any, view: View) -> None:
    """Draw a panel for each setting and algorithm, with the clients of each size on top of the others'."""
    by, axis = _axis(view)
    sizes, most = sorted({row[2] for row in view.rows}), 0
    panelled = replace(view, rows=[(": ".join(filter(None, row[:2])), *row[1:]) for row in view.rows])
    for one, rows in _panels(figure, panelled, width=3.6, height=2.6, legend=1.0):
        lows = sorted({row[3] for row in rows})
        below = dict.fromkeys(lows, 0)
        for size in sizes:
            counts = {row[3]: row[5] for row in rows if row[2] == size}
            width = by * (rows[0][4] - rows[0][3])
            x, heights = [by * low for low in counts], list(counts.values())
            look = {"color": COLOURS[sizes.index(size) % len(COLOURS)], "edgecolor": "white", "linewidth": 0.4}
            bottom = [below[low] for low in counts]
            one.bar(x, heights, width, bottom, align="edge", label=size_text(size), **look)
            below |= {low: below[low] + count for low, count in counts.items()}
        most = max(most, *below.values())
        one.yaxis.get_major_locator().set_params(integer=True)
        one.set(xlabel=axis, ylabel="clients")
    for one in figure.axes:
        one.set_ylim(0, 1.08 * most)
    _legend(figure, "size")


def _spent(figure: Any, view: View) -> None:
    """Draw two panels: against local steps and against bytes; colours are settings, dashes algorithms."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    by, axis = _axis(view)
    steps = all(row[3] is not None for row in view.rows)
    settings, labels = _unique(view, 0), _unique(view, 1)
    figure.set_size_inches(9.4, 3.6)
    left, right = figure.subplots(1, 2)
    for one, column, name in ((left, 3 if steps else 2, "local steps" if steps else "round"), (right, 5, "bytes")):
        for setting, label in dict.fromkeys(row[:2] for row in view.rows):
            # Before the first round nothing was sent, which a logarithm cannot show.
            rows = [row for row in view.rows if row[:2] == (setting, label) and (row[5] or one is left)]
            place = settings.index(setting)
            look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            x, mean = [row[column] for row in rows], [by * row[6] for row in rows]
            line = _LINES[labels.index(label) % len(_LINES)]
            told = f"{label}, {setting}" if setting else label
            one.plot(x, mean, label=told, markersize=4, markevery=max(1, len(x) // 8), linestyle=line, **look)
            if all(row[7] is not None for row in rows):
                low, high = ([by * (row[6] + sign * row[7]) for row in rows] for sign in (-1, 1))
                one.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
        one.set(xlabel=name, ylabel=axis)
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    left.xaxis.set_major_formatter(EngFormatter())
    if any(row[5] for row in view.rows):
        right.set_xscale("log")  # else settings that send little lie on top of one another
        low, high = right.get_xlim()
        right.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 10 * low else (1, 1.5, 2, 3, 5, 7), numticks=99))
        right.xaxis.set_minor_locator(NullLocator())
        right.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
    _legend(figure)


def _exploration(figure: Any, view: View) -> None:
    """Draw for each setting and algorithm the two quantities over rounds, a line for each size."""
    keys = list(dict.fromkeys(row[:2] for row in view.rows))
    sizes = sorted({row[2] for row in view.rows})
    figure.set_size_inches(9.0, 3.2 * len(keys) + 0.4)
    for line, key in zip(figure.subplots(len(keys), 2, squeeze=False), keys, strict=True):
        for one, (column, name) in zip(line, ((4, "exploration rate [%]"), (5, "model difference [%]")), strict=True):
            for place, size in enumerate(sizes):
                rows = [row for row in view.rows if row[:3] == (*key, size) and row[column] is not None]
                look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
                x, y = [row[3] for row in rows], [100 * row[column] for row in rows]
                if rows:
                    one.plot(x, y, label=size_text(size), markersize=4, markevery=max(1, len(x) // 8), **look)
            one.set(xlabel="round", ylabel=name)
            one.xaxis.get_major_locator().set_params(integer=True)
            if column == 4:  # small sizes explore little of all weights, but much of what they hold
                _logarithmic(one, "y")
            else:
                one.set_ylim(0, None)
            one.set_title(", ".join(filter(None, key)), fontsize=10)
            one.grid(alpha=0.3)
            one.spines[["top", "right"]].set_visible(False)
    _legend(figure, "size")


def _convergence(figure: Any, view: View) -> None:
    """Draw the least squared gradient so far, and the largest squared mask error, over rounds in logarithms."""
    keys = list(dict.fromkeys(row[:2] for row in view.rows))
    figure.set_size_inches(10.4, 3.8)
    left, right = figure.subplots(1, 2)
    for place, key in enumerate(keys):
        rows = {row[2]: row for row in view.rows if row[:2] == key and row[2]}
        worst = {row: max(r[7] for r in view.rows if r[:3] == (*key, row)) for row in rows}
        look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        look["markersize"], look["zorder"] = 4, 3 - 0.01 * len(rows)  # a run of few rounds is not hidden by longer ones
        name = ", ".join(filter(None, key))
        left.plot([*rows], [row[3] for row in rows.values()], **{**look, "marker": ""}, linewidth=0.7, alpha=0.6)
        left.plot([*rows], [row[4] for row in rows.values()], label=name, **look)
        right.plot([*worst], [*worst.values()], label=name, **look)
    rounds = sorted({row[2] for row in view.rows if row[2]})
    if rounds:
        top = max(row[4] for row in view.rows if row[2] == rounds[0])
        guide = [top * (round_ / rounds[0]) ** -0.5 for round_ in rounds]
        left.plot(rounds, guide, ":", color="black", label="slope -1/2, for the eye")
    left.set(ylabel="squared gradient of the full objective\n(thick: the least so far)")
    right.set(ylabel="largest squared mask error")
    for one in (left, right):
        one.set(xlabel="round")
        # Without a mask, where all clients hold the whole model, there is no error.
        _logarithmic(one, "xy" if one is left or any(row[7] for row in view.rows) else "x")
        one.set_xticks(rounds, [str(round_) for round_ in rounds])
        one.set_xticks([], minor=True)
        one.grid(alpha=0.3, which="both")
        one.spines[["top", "right"]].set_visible(False)
    _legend(figure)


def _sizes(figure: Any, view: View) -> None:
    """Draw a panel for each setting and kind of test data, with accuracy over size; a network for all is a line.

    Sizes that no client has are hollow. The view "unseen_sizes" has panels of all test data alone.
    """
    by, axis = _axis(view)
    labels, least = _unique(view, 1), 0.0 if METRICS[view.metric].fraction else -np.inf
    own = {row[3] for row in view.rows if row[2] == "Local"}
    shown = [row for row in view.rows if view.name == "sizes" or row[2] == "Global"]
    panelled = replace(view, rows=[(f"{row[0]}, {row[2]}".removeprefix(", "), *row[1:]) for row in shown])
    hollow = False
    for one, here in _panels(figure, panelled, width=4.4, height=3.2, legend=1.8, most=2):
        deviations = any(row[5] for row in here)
        for label, look, rows in _by_algorithm(panelled, here):
            some = sorted(row for row in rows if row[3] is not None)
            # Bars at the same size are shifted, so that they do not hide each other.
            shift = 1.03 ** (labels.index(label) - (len(labels) - 1) / 2)
            if some:
                x, y = [shift * row[3] for row in some], [by * row[4] for row in some]
                ends = [[by * min(row[5] or 0, row[4] - least) for row in some], [by * (row[5] or 0) for row in some]]
                one.errorbar(x, y, yerr=ends if deviations else None, label=label, capsize=3, markersize=5, **look)
                unseen = [place for place, row in enumerate(some) if row[3] not in own]
                empty = {**look, "linestyle": "", "markersize": 5, "markerfacecolor": "white", "zorder": 4}
                one.plot([x[place] for place in unseen], [y[place] for place in unseen], **empty)
                hollow |= bool(unseen)
            else:
                mean, sd = rows[0][4], rows[0][5] or 0
                one.axhline(by * mean, label=label, **{**look, "marker": ""})
                one.axhspan(by * max(mean - sd, least), by * (mean + sd), color=look["color"], alpha=0.1, linewidth=0)
        ticks: list[float] = []
        for tick in sorted({row[3] for row in here if row[3] is not None}, key=lambda tick: (tick not in own, tick)):
            ticks += [tick] if all(not 0.7 < tick / other < 1.4 for other in ticks) else []  # labels would overlap
        one.set(xscale="log", xlabel="size", ylabel=f"{axis}, bars: one deviation" if deviations else axis)
        one.set_xticks(ticks, [size_text(tick) for tick in ticks], fontsize=8)
        one.minorticks_off()
    if hollow:
        figure.axes[0].plot([], [], "o", color=_PLAIN, markerfacecolor="white", label="a size of no client")
    _legend(figure)


def _size_curves(figure: Any, view: View) -> None:
    """Draw a panel for each size and kind of test data, a line of panels for each setting and kind."""
    by, axis = _axis(view)
    lines = list(dict.fromkeys((row[0], row[2]) for row in view.rows))
    columns = {setting: sorted({row[3] for row in view.rows if row[0] == setting}) for setting, _ in lines}
    many = max(map(len, columns.values()))
    figure.set_size_inches(2.7 * many + 1.8, 2.5 * len(lines) + 0.4)
    axes = figure.subplots(len(lines), many, squeeze=False)
    for place, (setting, where) in enumerate(lines):
        rows = [row for row in view.rows if (row[0], row[2]) == (setting, where)]
        for one in axes[place][len(columns[setting]) :]:
            one.set_visible(False)
        for number, (one, capacity) in enumerate(zip(axes[place], columns[setting], strict=False)):
            for label, look, some in _by_algorithm(view, [row for row in rows if row[3] == capacity]):
                x, mean = [row[4] for row in some], [by * row[5] for row in some]
                one.plot(x, mean, label=label, markersize=4, markevery=max(1, len(x) // 5), **look)
                if all(row[6] is not None for row in some):
                    low, high = ([by * (row[5] + sign * row[6]) for row in some] for sign in (-1, 1))
                    one.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
            told = f"{where}, size {size_text(capacity)}"
            one.set_title(textwrap.fill(f"{setting}: {told}" if setting else told, 30), fontsize=9)
            one.set(xlabel="round", ylabel=axis if number == 0 else "")
            one.grid(alpha=0.3)
            one.spines[["top", "right"]].set_visible(False)
    _legend(figure)


_DRAW: dict[str, Callable[[Any, View], None]] = {
    "accuracy": _dots,
    "curves": _curves,
    "clients": _clients,
    "targets": _targets,
    "grid": _grid,
    "predictors": _dots,
    "gradient": _gradient,
    "whole": _dots,
    "differences": _differences,
    "cka": _by_stage,
    "conflict": _by_stage,
    "tsne": _planes,
    "leakage": _reconstructions,
    "histogram": _histogram,
    "spent": _spent,
    "exploration": _exploration,
    "convergence": _convergence,
    "sizes": _sizes,
    "unseen_sizes": _sizes,
    "size_curves": _size_curves,
}
