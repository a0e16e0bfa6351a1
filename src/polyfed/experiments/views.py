"""The views of a study beside the tables of accuracy and costs: a view is rows for a CSV, and a picture of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfed.comparison.render import aim_text, gap
from polyfed.comparison.specs import RunSpec
from polyfed.comparison.statistics import deviation, mean_over, participations, scaled
from polyfed.core.algorithm import Task
from polyfed.data.catalogue import SHAPES, row_shape
from polyfed.experiments.study import Study
from polyfed.metrics.catalogue import METRICS, headline
from polyfed.models.catalogue import ModelSpec
from polyfed.report.tables import Summary, metric_of, tested_clients
from polyfed.report.units import flops, percent, size, spread_text


@dataclass(frozen=True)
class View:
    """A view of the results.

    Args:
        name: name of its files.
        caption: a sentence or two: the content and its units.
        headings: headings of ``rows``.
        rows: plain numbers and names; None for a value that was not measured or not reached.
        cells: headings and rows as text for the page; None leaves the numbers to the CSV.
        metric: the metric of the rows.
        pictures: images in [0, 1] by name, (rows, n, C, H, W); the view "leakage" has some.
        algorithms: labels of which some may have no rows; the place here gives a label its colour.
    """

    name: str
    caption: str
    headings: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    cells: tuple[tuple[str, ...], list[tuple[str, ...]]] | None = None
    metric: str = "accuracy"
    pictures: Mapping[str, NDArray[np.float32]] = field(default_factory=dict[str, Any])
    algorithms: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Results:
    """The cells of a study and their results so far.

    Args:
        study: the study.
        cells: all cells of the study.
        root: the folder that contains ``cells/``.
    """

    study: Study
    cells: Sequence[RunSpec]
    root: Path

    @cached_property
    def done(self) -> dict[RunSpec, Summary]:
        """The cells with results."""
        return {cell: summary for cell in self.cells if (summary := cell.summary(self.root)) is not None}

    @property
    def metric(self) -> str:
        """The headline metric of the cells."""
        return self.cells[0].config.metrics[0]

    def mean(self, cell: RunSpec) -> float | None:
        """The mean of the headline metric over clients at the end of a finished cell."""
        return metric_of(self.done[cell], self.metric)["mean"]

    def groups(self) -> dict[tuple[str, str], list[RunSpec]]:
        """The finished cells by setting and algorithm; they differ by seed."""
        keys = {cell: (cell.setting.title, cell.label) for cell in self.done}
        return {key: [cell for cell in keys if keys[cell] == key] for key in dict.fromkeys(keys.values())}

    def by_round(
        self, cells: Sequence[RunSpec], value: Callable[[dict[str, Any]], float | None]
    ) -> list[tuple[int, float, float | None]]:
        """The mean and deviation, over cells, of a value of the evaluated rounds; without rounds that have None."""
        found: dict[int, list[float]] = {}
        for row in chain.from_iterable(self.rows(cell, "rounds.jsonl") for cell in cells):
            if headline(row)[1] and (number := value(row)) is not None:
                found.setdefault(row["round"], []).append(number)
        return [(round_, *_spread(numbers)) for round_, numbers in sorted(found.items())]

    def clients(self, cell: RunSpec) -> dict[int, float]:
        """The headline metric of each client at the end, where it is defined."""
        rows = tested_clients(cell.run_dir(self.root), self.done[cell])
        found = {client: row.get("metrics", row).get(self.metric) for client, row in rows.items()}
        return {client: value for client, value in found.items() if value is not None}

    def rows(self, cell: RunSpec, name: str) -> Iterator[dict[str, Any]]:
        """The lines of rounds.jsonl or clients.jsonl of a finished cell."""
        return map(json.loads, (cell.run_dir(self.root) / name).read_text().splitlines())


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), deviation(values)


def accuracy(results: Results) -> View:
    """Final accuracies."""
    seeds = list(dict.fromkeys(cell.seed for cell in results.cells))
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        means = {cell.seed: mean for cell in cells if (mean := results.mean(cell)) is not None}
        if means:
            rows += [(setting, label, *_spread(list(means.values())), len(means), *map(means.get, seeds))]
    return View(
        "accuracy",
        f"Test {results.metric} after the last round; bars are one standard deviation, ticks are seeds.",
        ("setting", "algorithm", "mean", "sd", "seeds", *(f"seed {seed}" for seed in seeds)),
        rows,
        metric=results.metric,
    )


def curves(results: Results) -> View:
    """Accuracies over rounds."""
    rows = [
        (setting, label, *at)
        for (setting, label), cells in results.groups().items()
        for at in results.by_round(cells, lambda row: metric_of(row, results.metric).get("mean"))
    ]
    return View(
        "curves",
        f"Test {results.metric} over rounds, mean over seeds; bands are one standard deviation, where there are "
        "several seeds.",
        ("setting", "algorithm", "round", "mean", "sd"),
        rows,
        metric=results.metric,
    )


def clients(results: Results) -> View:
    """Differences client by client between two algorithms."""
    assert results.study.pair is not None
    one, other = results.study.pair
    by = {(cell.setting.title, cell.seed, cell.label): cell for cell in results.done}
    rows: list[tuple[Any, ...]] = []
    for setting, seed, label in by:
        if label == one and (setting, seed, other) in by:
            a, b = (results.clients(by[setting, seed, name]) for name in (one, other))
            rows += [
                (setting, seed, client, a[client], b[client], a[client] - b[client]) for client in a if client in b
            ]
    told: list[tuple[str, ...]] = []
    signs = (1, -1) if METRICS[results.metric].higher else (-1, 1)
    for setting in dict.fromkeys(row[0] for row in rows):
        found = [row[-1] for row in rows if row[0] == setting]
        shares = (percent(sum(sign * difference > 0 for difference in found) / len(found), 0) for sign in signs)
        told.append((setting or "-", str(len(found)), *shares, gap(results.metric, statistics.fmean(found))))
    return View(
        "clients",
        f"{results.metric.capitalize()} of each client with {one} minus with {other}; clients of all seeds together, "
        "sorted.",
        ("setting", "seed", "client", one, other, "difference"),
        rows,
        (("setting", "clients", f"better with {one}", f"better with {other}", "mean difference"), told),
        metric=results.metric,
    )


def targets(results: Results) -> View:
    """The costs of reaching an accuracy, as the paper counts them and as polyfed does."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        seeds = sum(
            (cell.setting.title, cell.label) == (setting, label) for cell in results.cells
        )  # diverged and open, too
        value = 8 if cells[0].config.run.precision == "fp64" else 4  # bytes
        for place, target in enumerate(cells[0].config.run.targets):
            reached = [
                (done, done["targets"][place]) for cell in cells if (done := results.done[cell])["targets"][place]
            ]
            many = [
                (
                    at["round"],
                    at["round"]
                    * (done["bytes"]["up_values"] + done["bytes"]["down_values"])
                    / value
                    / participations(done),
                    scaled(done["flops_per_example"], at["round"]),
                    scaled(done["flops"], at["round"], participations(done)),
                    at["bytes_up"] + at["bytes_down"],
                    at["flops"],
                )
                for done, at in reached
            ]
            means = [None] * 6 if len(many) < seeds else map(mean_over, zip(*many, strict=True))
            rows.append((setting, label, target, seeds, len(many), *means))
    told = [
        (
            row[0] or "-",
            row[1],
            aim_text(row[2]),
            *([f"{row[4]} of {row[3]} seeds", *["-"] * 5] if row[5] is None else _told(row[5:])),
        )
        for row in rows
    ]
    heads = (
        *("setting", "algorithm", "target", "rounds", "parameters, one client", "FLOPs, one forward pass"),
        *("training FLOPs, one client", "bytes, all clients", "training FLOPs, all clients"),
    )
    return View(
        "targets",
        "Cost until the mean first reaches a target at an evaluated round; only if all seeds do. As the paper "
        "defines it: parameters exchanged between the server and one client in a round, both ways, the mean over the "
        "run, times rounds; and FLOPs of one client in a round times rounds, which seems to mean one forward pass of "
        "one example. As it is: counted training FLOPs of one client, forward and backward over all its examples and "
        "epochs, times rounds; and bytes and training FLOPs of all clients that took part.",
        (
            *("setting", "algorithm", "target", "seeds", "seeds_that_reached", "rounds", "parameters_one_client"),
            *("forward_flops_one_example", "training_flops_one_client"),
            *("bytes_all_clients", "training_flops_all_clients"),
        ),
        rows,
        (heads, told),
    )


def _told(found: Sequence[Any]) -> list[str]:
    rounds, parameters, forward, training, sent, everything = found
    return [f"{rounds:.0f}", flops(parameters), flops(forward), flops(training), size(sent), flops(everything)]


def grid(results: Results) -> View:
    """Accuracies along the values of a grid."""
    rows: list[tuple[Any, ...]] = []
    for cells in results.groups().values():
        setting, label = cells[0].setting, cells[0].label
        if not setting.point:
            continue
        varied = [key for key in setting.point if len({str(c.setting.point.get(key)) for c in results.cells}) > 1]
        key, *others = varied or list(setting.point)[:1]
        panel = replace(setting, point={other: setting.point[other] for other in others}).title
        means = [mean for cell in cells if (mean := results.mean(cell)) is not None]
        if means:
            rows.append((panel, label, key.rpartition(".")[2], setting.point[key], *_spread(means)))
    return View(
        "grid",
        f"Test {results.metric} after the last round along a grid; bars are one standard deviation over seeds.",
        ("setting", "algorithm", "key", "value", "mean", "sd"),
        rows,
        metric=results.metric,
    )


def predictors(results: Results) -> View:
    """Accuracies of every predictor."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        found = [metric_of(results.done[cell], results.metric)["predictors"] for cell in cells]
        for name in found[0]:
            means = [one[name] for one in found if one[name] is not None]
            rows += [(setting, label, name, *_spread(means))] if means else []
    told = [
        (
            row[0] or "-",
            row[1],
            row[2],
            spread_text(results.metric, row[3], row[4]),
        )
        for row in rows
    ]
    return View(
        "predictors",
        f"Test {results.metric} of every predictor after the last round; the first of each algorithm is the headline.",
        ("setting", "algorithm", "predictor", "mean", "sd"),
        rows,
        (("setting", "algorithm", "predictor", results.metric), told),
        metric=results.metric,
    )


def gradient(results: Results) -> View:
    """Squared gradient norms over rounds."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        found = results.by_round(cells, lambda row: row.get("gradient_squared"))
        so_far = (statistics.fmean(mean for _, mean, _ in found[:end]) for end in range(1, len(found) + 1))
        rows += [(setting, label, *at, mean) for at, mean in zip(found, so_far, strict=True)]
    return View(
        "gradient",
        "Squared norm of the gradient of a client's whole local model on all its training examples, mean over a sample "
        "of clients and over seeds; thick: the mean over the evaluated rounds so far. The theorem bounds the mean over "
        "rounds and local steps; what is measured here is the start of each evaluated round.",
        ("setting", "algorithm", "round", "gradient_squared", "sd", "mean_so_far"),
        rows,
    )


def networks(results: Results) -> View:
    """Parameters and sizes of the clients' networks, counted."""
    config = results.study.configuration
    data = config.data
    task = Task(input_shape=row_shape(data.dataset, data.image_size, data.options), num_classes=SHAPES[data.dataset][1])
    auxiliary = ModelSpec.parse("cnn5").having(rep_dim=int(config.algorithm.keys.get("rep_dim", 100)))
    rows: list[tuple[Any, ...]] = []
    for spec in dict.fromkeys((*config.clients.models, auxiliary)):
        model = task.build(spec)
        count = sum(model.shapes[name].numel() for name in model.parameter_names)
        rows.append((str(spec), model.rep_dim, count, count * 4 / 2**20))
    told = [(name, str(width), f"{count:,}", f"{mebi:.2f} MiB") for name, width, count, mebi in rows]
    return View(
        "networks",
        "Networks, counted on the layers that are trained.",
        ("network", "rep_dim", "parameters", "MiB"),
        rows,
        (("network", "representation", "parameters", "size in fp32"), told),
    )


def protocol(results: Results) -> View:
    """Hyper-parameters of each algorithm in the file, as the runs of other studies with the same base have them."""
    study = results.study.model_copy(update={"algorithms": tuple(results.study.entries), "settings": {}, "grid": {}})
    cells = {cell.label: cell.config for cell in study.cells()}
    rows: list[tuple[Any, ...]] = []
    for label, config in cells.items():
        run, data, clients, train, whole = config.run, config.data, config.clients, config.train, config.resolved()
        keys = {key: value for key, value in whole.algorithm.keys.items() if value not in (None, "", (), {})}
        keys.pop("unseen_capacities", None)  # tests alone read it
        schedule = whole.train.schedule.model_dump(exclude_defaults=True) if whole.train.schedule else {}
        length = f"{train.steps} steps" if train.steps else f"{train.epochs} epochs"
        network, *others = map(str, clients.models)
        cohort = f"{clients.wanted} of {clients.count}"
        named = (label, data.dataset, network if not others else f"{network}, ...", cohort, clients.selection)
        rates = (train.optimizer, train.lr, _listed(schedule) or "constant", train.momentum, train.weight_decay)
        rows.append((*named, run.rounds, length, train.batch_size, *rates, _listed(keys) or "-"))
    heads = ("algorithm", "data", "network", "clients in a round", "selection", "rounds", "local work", "batch")
    heads = (*heads, "optimizer", "rate", "schedule", "momentum", "weight decay", "own keys")
    return View(
        "protocol",
        "Hyper-parameters of the algorithms at this scale; own keys that are empty are left out. The rest of the "
        "configuration is in the files of the studies.",
        heads,
        rows,
        (heads, [tuple(map(str, row)) for row in rows]),
    )


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in keys.items())


VIEWS: dict[str, Callable[[Results], View]] = {
    "accuracy": accuracy,
    "curves": curves,
    "clients": clients,
    "targets": targets,
    "grid": grid,
    "predictors": predictors,
    "gradient": gradient,
    "networks": networks,
    "protocol": protocol,
}
