"""The views of what clients of each size have and hold: accuracies, costs, and at kept rounds FIARSE's masks.

The paper's formulas for its views of masks could not be read, so the definitions are polyfed's; each page states them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.types import Params
from polyfed.blocks.submodel import Mask
from polyfed.blocks.weightwise import Global, WeightWise
from polyfed.comparison.specs import RunSpec
from polyfed.config import algorithm_class
from polyfed.core.requests import Fit
from polyfed.experiments.inside import Inside
from polyfed.experiments.sizes import nominal, size_text
from polyfed.experiments.views import Results, View
from polyfed.metrics.catalogue import METRICS
from polyfed.report.tables import metric_of
from polyfed.report.units import flops, measured, percent, size, spread_text
from polyfed.rounds.gradient import first_request, full_gradient
from polyfed.trained.kept import KeptRound, kept_round

#: Bins of the view histogram.
BINS = 20
#: Clients of each size whose mask error is measured.
EACH = 1


def histogram(results: Results) -> View:
    """How many clients of each size have which value on their own test data."""
    values: dict[tuple[str, str, float], list[float]] = {}
    for key, cells in results.groups().items():
        for cell in cells:
            names = nominal(results, cell)
            for client, value in results.clients(cell).items():
                capacity = cell.config.clients.capacity(client)
                values.setdefault((*key, names.get(f"{capacity:g}", capacity)), []).append(value)
    everything = [0.0, 1.0] if METRICS[results.metric].percent else [v for some in values.values() for v in some]
    edges = np.histogram_bin_edges(everything, BINS) if everything else np.zeros(0)
    values = dict(sorted(values.items(), key=lambda item: -item[0][2]))
    rows = [
        (*key, float(low), float(high), int(count))
        for group in results.groups()
        for key, some in values.items()
        if key[:2] == group
        for count, low, high in zip(np.histogram(some, edges)[0], edges, edges[1:], strict=False)
    ]
    told = [
        (setting or "-", label, size_text(size), str(len(some)), *(measured(results.metric, v) for v in _summary(some)))
        for group in results.groups()
        for (setting, label, size), some in values.items()
        if (setting, label) == group
    ]
    return View(
        "histogram",
        f"Clients by the {results.metric} that they have with the submodel of their own size on their own test data "
        "after the last round, clients of all seeds together; a bin has its lower end, the last also its upper.",
        ("setting", "algorithm", "size", "low", "high", "clients"),
        rows,
        (("setting", "algorithm", "size", "clients", "lowest", "median", "mean", "highest"), told),
        metric=results.metric,
    )


def spent(results: Results) -> View:
    """Accuracies against what training has cost so far."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        costs = {
            name: {at: mean for at, mean, _ in results.by_round(cells, lambda row, n=name: row["totals"][n])}
            for name in ("flops", "bytes_up", "bytes_down")
        }
        for at, mean, sd in results.by_round(cells, lambda row: metric_of(row, results.metric).get("mean")):
            steps = cells[0].config.train.steps
            sent = costs["bytes_up"][at] + costs["bytes_down"][at]
            rows.append((setting, label, at, steps and at * steps, costs["flops"].get(at), sent, mean, sd))
    last = {row[:2]: row[3:] for row in rows}.items()
    told = [
        (*(key[0] or "-", key[1], str(steps or "-"), flops(work), size(sent)), spread_text(results.metric, mean, sd))
        for key, (steps, work, sent, mean, sd) in last
    ]
    return View(
        "spent",
        f"Test {results.metric} against what was spent so far: local steps of a client that takes part in every round "
        "(rounds where steps are not given), and bytes of all clients, both ways. Settings of one number of steps in "
        "all did equal work in the mean: where a size has FLOPs of its own, work depends on the sizes that were drawn. "
        "The table has the last evaluated round. Mean over seeds; bands are one standard deviation, where there are "
        "several seeds.",
        ("setting", "algorithm", "round", "local_steps", "training_flops", "bytes", "mean", "sd"),
        rows,
        (("setting", "algorithm", "local steps", "training FLOPs", "bytes", results.metric), told),
        metric=results.metric,
    )


@dataclass
class Followed:
    """The masks of one size, round by round.

    Args:
        ever: the weights that any mask has held so far, (d,) bool.
        last: the mask before, (d,) bool.
    """

    ever: Tensor | None = None
    last: Tensor | None = None

    def see(self, mask: Mask) -> tuple[float, float | None]:
        """The next mask A: the share of all d weights that it or one before holds; and 1 - |A and B| / |A|, B before.

        The second is None at the first mask.
        """
        now = torch.cat([held.reshape(-1) for held in mask.values()])
        changed = None if self.last is None else 1 - int((now & self.last).sum()) / int(now.sum())
        self.ever = now if self.ever is None else self.ever | now
        self.last = now
        return int(self.ever.sum()) / len(now), changed


def exploration(results: Results) -> View:
    """What share of the weights the masks of a size have held so far, and how much of a mask is new."""
    rows: list[tuple[Any, ...]] = []
    told: list[tuple[str, ...]] = []
    for key, cells in _weightwise(results):
        found: dict[tuple[float, int], list[tuple[float, float | None]]] = {}
        for cell in cells:
            sizes: dict[float, Followed] = {}
            for kept, algorithm in _kept(results, cell):
                cut = algorithm.extract(kept.server)  # pyright: ignore[reportArgumentType]
                for capacity in kept.task.capacities:
                    seen = sizes.setdefault(capacity, Followed()).see(cut(capacity)[0])
                    found.setdefault((capacity, kept.round), []).append(seen)
        for (capacity, round_), seen in sorted(found.items(), key=lambda item: (-item[0][0], item[0][1])):
            changes = [changed for _, changed in seen if changed is not None]
            rate, change = statistics.fmean(share for share, _ in seen), statistics.fmean(changes) if changes else None
            rows.append((*key, capacity, round_, rate, change))
            if round_ == cells[0].config.run.keep_rounds[-1]:
                told.append((key[0] or "-", key[1], size_text(capacity), str(round_), percent(rate), percent(change)))
    return View(
        "exploration",
        "Of the masks of each size, at the rounds that the run kept: the exploration rate is the share of all weights "
        "that compete which the mask of one of these rounds, up to this one, holds; the model difference is the share "
        "of the mask that the mask at the kept round before did not hold, 1 - |A and B| / |A|. The definitions are "
        "polyfed's: the paper's formulas were not at hand. A mask is what the server would send to a client of that "
        "size after the round, whether or not one was drawn. Rounds that were not kept are not looked at, so the rate "
        "is a lower bound, and the difference is between kept rounds, not between successive ones. Mean over seeds.",
        ("setting", "algorithm", "size", "round", "exploration_rate", "model_difference"),
        rows,
        (("setting", "algorithm", "size", "round", "exploration rate", "model difference"), told),
    )


def convergence(results: Results) -> View:
    """The gradient of the full objective over rounds, and the mask error that the theorem allows for."""
    rows: list[tuple[Any, ...]] = []
    told: list[tuple[str, ...]] = []
    ends: dict[str, list[tuple[int, float]]] = {}
    for key, cells in _weightwise(results):
        looks = [[_look(results, cell, round_) for cell in cells] for round_ in cells[0].config.run.keep_rounds]
        least, at, floor, mine = math.inf, 0, list[float](), list[tuple[Any, ...]]()
        for round_, seeds in zip(cells[0].config.run.keep_rounds, looks, strict=True):
            gradient, norm = (statistics.fmean(getattr(one, name) for one in seeds) for name in ("gradient", "norm"))
            errors = {size: statistics.fmean(one.errors[size] for one in seeds) for size in seeds[0].errors}
            if gradient < least or at == 0:  # round 0 is the same in all runs, and no result of any
                least, at = gradient, round_
            floor.append(max(errors.values()))
            mine += [(*key, round_, gradient, least, norm, size, e, e / norm) for size, e in errors.items()]
        rows += mine
        run, train = cells[0].config.run, cells[0].config.train
        gaps = np.diff([0, *run.keep_rounds[1:], run.rounds])  # a kept round stands for those up to the next
        bound = 32 * cells[0].config.clients.count * np.average(floor, weights=gaps)
        ends.setdefault(key[1], []).append((run.rounds, least))
        shares = [row[8] for row in mine if row[2] == mine[-1][2]]
        told.append(
            (
                key[0] or "-",
                key[1],
                f"{train.lr:.3g}",
                str(run.rounds),
                f"{least:.3g}",
                str(at),
                f"{max(floor):.3g}",
                f"{max(shares):.2g}",
                f"{bound:.3g}",
            )
        )
    heads = ("setting", "algorithm", "lr", "T", "least squared gradient", "at round")
    heads = (*heads, "slope over T", "largest mask error", "delta^2 at the end", "32 N mean error before T")
    return View(
        "convergence",
        "At kept rounds: the squared norm of the gradient of the full objective, the mean over all clients of their "
        "loss at the whole unmasked model, over all training examples, and the least so far, of rounds from 1 on. "
        "Beside it the mask error of assumption 5.3, the squared distance between a client's gradient at the whole "
        "model, where its mask holds, and its gradient at the capacity that it declared; of each size for the first "
        f"{EACH} of its clients, and the largest of them. delta^2, which the assumption wants below 1, is that error "
        "over the squared norm of the model. The slope is that of the least gradient over the runs of an algorithm "
        "with different T, in logarithms; the first term of the theorem's bound has -1/2 where lr = 1/(K sqrt T). "
        "The last column is the second term, 32 N / T times the sum of the error over the rounds before T, as a "
        "step function: a kept round stands for all up to the next. BatchNorm, where a network has it, normalises "
        "by batches of 500. Mean over seeds.",
        (
            *("setting", "algorithm", "round", "gradient_squared", "least_so_far", "model_squared"),
            *("size", "mask_error_squared", "delta_squared"),
        ),
        rows,
        (heads, [(*row[:6], slope_text(ends[row[1]]), *row[6:]) for row in told]),
    )


def slope_text(ends: list[tuple[int, float]]) -> str:
    """The slope of log value over log T, of pairs of T and value; "-" for fewer than two T."""
    points = [(math.log(rounds), math.log(value)) for rounds, value in ends if value]
    xs = [x for x, _ in points]
    if len({*xs}) < 2:
        return "-"
    return f"{np.polyfit(xs, [y for _, y in points], 1)[0]:+.2f}"


@dataclass(frozen=True)
class Look:
    """What a kept round shows of the theorem's terms.

    Args:
        gradient: the squared norm of the gradient of the full objective.
        norm: that of the model, without buffers.
        errors: by size, descending, the largest squared mask error of the clients that were looked at.
    """

    gradient: float
    norm: float
    errors: dict[float, float]


def look(inside: Inside, algorithm: WeightWise) -> Look:
    """Measure a kept round; it costs a gradient for each client, and another for those whose mask error is measured."""
    server = inside.kept.server
    assert isinstance(server, Global)
    server = replace(server, paces={})  # else a client's pace would narrow the whole model, and what its size holds
    total: dict[str, Tensor] = {}
    errors: dict[float, float] = {}
    some, count = inside.some(EACH), inside.kept.config.clients.count
    for client in range(count):
        own, mask = whole, _ = gradient_at(inside, algorithm, server, client, 1.0)
        total = {name: g / count + total[name] if name in total else g / count for name, g in whole.items()}
        if client in some:
            capacity = inside.federation.info(client).capacity
            if capacity < 1:
                own, mask = gradient_at(inside, algorithm, server, client, capacity)
            error = squared(tree.sub(masked(whole, mask), masked(own, mask)))
            errors[capacity] = max(error, errors.get(capacity, 0.0))
    sizes = sorted(errors, reverse=True)
    return Look(squared(total), squared(tree.pick(server.model, total)), {size: errors[size] for size in sizes})


def gradient_at(
    inside: Inside, algorithm: WeightWise, server: Global, client: int, capacity: float
) -> tuple[Params, Mask]:
    """The gradient with which a client of some capacity would begin the next round, at full shape; and its mask.

    At capacity 1 the mask holds everything and nothing is scaled: it is that of the client's loss at the whole model.
    """
    local = inside.federation.local(client, inside.kept.round + 1)
    message: Any = algorithm.message_for(server, replace(local.info, capacity=capacity))
    steps = algorithm.client_round(inside.federation.private(client, None), message, local)
    with inside.placement.defaults():
        fit = first_request(steps, Fit, inside.driver.perform)
        with inside.federation.rng.at("inside", client).fork():
            found = full_gradient(replace(fit, within={}), inside.placement)
    mask = message.submodel.mask(local.models["model"].shapes)
    return {name: g for (_, name), g in found.items() if name in local.models["model"].parameter_names}, mask


def masked(values: Params, mask: Mask) -> Params:
    """Zero where the mask does not hold a weight."""
    return {name: value * mask[name] if name in mask else value for name, value in values.items()}


def squared(values: Params) -> float:
    """The squared norm of all values together, in float64."""
    return float(sum(value.double().square().sum() for value in values.values()))


def _look(results: Results, cell: RunSpec, round_: int) -> Look:
    inside = Inside(cell.run_dir(results.root), round_)
    assert isinstance(inside.kept.algorithm, WeightWise)
    return look(inside, inside.kept.algorithm)


def _kept(results: Results, cell: RunSpec) -> Iterator[tuple[KeptRound, WeightWise]]:
    for round_ in cell.config.run.keep_rounds:
        kept = kept_round(cell.run_dir(results.root), round_)
        assert isinstance(kept.algorithm, WeightWise)
        yield kept, kept.algorithm


def _weightwise(results: Results) -> Iterator[tuple[tuple[str, str], list[RunSpec]]]:
    """The finished cells by setting and algorithm, of algorithms whose clients hold single weights."""
    for key, cells in results.groups().items():
        if issubclass(algorithm_class(cells[0].config.algorithm.name), WeightWise):
            yield key, cells


def _summary(values: list[float]) -> tuple[float, float, float, float]:
    return min(values), statistics.median(values), statistics.fmean(values), max(values)


SUBMODELS: dict[str, Callable[[Results], View]] = {
    "histogram": histogram,
    "spent": spent,
    "exploration": exploration,
    "convergence": convergence,
}
