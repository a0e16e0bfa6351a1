"""The views of submodels of several sizes: accuracy, at the end and over rounds, and costs of a client of each."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from polyfed.blocks.submodel import above
from polyfed.comparison.specs import RunSpec
from polyfed.comparison.statistics import deviation
from polyfed.core.net import Nets
from polyfed.experiments.views import Results, View
from polyfed.models.flops import multiplications
from polyfed.report.tables import mean_costs, metric_of
from polyfed.report.units import flops, size, spread_text
from polyfed.trained.kept import kept_round

#: How `Algorithm.global_nets` names the network of a capacity.
_NAME = re.compile(r"capacity ([\d.e-]+)")


def size_text(capacity: float) -> str:
    """0.015625 -> "1/64", 1 -> "1", 0.04 -> "0.04": powers of a half as fractions, as papers write them."""
    parts = round(1 / capacity)
    power = parts > 1 and not parts & (parts - 1) and abs(parts * capacity - 1) < 1e-4
    return f"1/{parts}" if power else f"{capacity:g}"


@lru_cache(maxsize=1)  # `unseen_sizes` and `named_values` read it again
def sizes(results: Results) -> View:
    """Accuracies of each size on the own and on all test data."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        found = [by_size(results, cell, metric_of(results.done[cell], results.metric)) for cell in cells]
        for where, capacity in found[0]:
            values = [one[where, capacity] for one in found]
            rows.append((setting, label, where, capacity, statistics.fmean(values), deviation(values), len(values)))
    headings = dict.fromkeys(size_text(row[3]) for row in sorted(rows, key=lambda row: row[3] or 0) if row[3])
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for setting, label, where, capacity, mean, sd, _ in rows:
        name = "mean" if capacity is None else size_text(capacity)
        table.setdefault((setting or "-", label, where), {})[name] = spread_text(results.metric, mean, sd)
    names = ("mean", *headings)
    return View(
        "sizes",
        f"Test {results.metric} by size. *Local*: clients of a size on their own test data, and the mean over clients. "
        "*Global*: the submodel of a size on the test data of all clients, and the mean over the sizes that clients "
        "have; sizes that have no Local are of no client, and hollow in the picture. An algorithm without submodels "
        "has one network for all, a level line. Bars and bands are one deviation over several seeds, cut at 0; "
        "algorithms are drawn side by side at a size. A variant has its algorithm's colour and dashes of its own.",
        ("setting", "algorithm", "where", "size", "mean", "sd", "seeds"),
        rows,
        (
            ("setting", "algorithm", "on", *names),
            [(*key, *(found.get(name, "-") for name in names)) for key, found in table.items()],
        ),
        metric=results.metric,
    )


def unseen_sizes(results: Results) -> View:
    """The same, for sizes that no client has: its picture has all test data alone, as such sizes have no others."""
    return replace(sizes(results), name="unseen_sizes")


def size_curves(results: Results) -> View:
    """Accuracies of each size over rounds."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        first = by_size(results, cells[0], metric_of(results.done[cells[0]], results.metric))
        own = [capacity for where, capacity in first if where == "Local" and capacity is not None]
        found: dict[tuple[str, float | None], dict[int, list[float]]] = {key: {} for key in first if key[1] in own}
        for cell in cells:
            for row in results.rows(cell, "rounds.jsonl"):
                for key, value in by_size(results, cell, metric_of(row, results.metric)).items():
                    if key in found:
                        found[key].setdefault(row["round"], []).append(value)
        for key, rounds in found.items():
            rows += [(setting, label, *key, at, statistics.fmean(v), deviation(v)) for at, v in sorted(rounds.items())]
    return View(
        "size_curves",
        f"Test {results.metric} of each size that clients have over rounds, on own (Local) and on all test data "
        "(Global), mean over seeds; bands are one standard deviation, where there are several seeds.",
        ("setting", "algorithm", "where", "size", "round", "mean", "sd"),
        rows,
        metric=results.metric,
    )


def size_costs(results: Results) -> View:
    """Costs of a client of each size."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), cells in results.groups().items():
        found = [_costs(results, cell) for cell in cells]
        for capacity in sorted(found[0], key=lambda capacity: capacity or 0, reverse=True):
            some = zip(*(one[capacity] for one in found), strict=True)
            known = [[value for value in values if value is not None] for values in some]
            rows.append((setting, label, capacity, *(statistics.fmean(values) if values else None for values in known)))
    texts = (flops, flops, size, size, flops)
    told = [
        (
            setting or "-",
            label,
            "all" if at is None else size_text(at),
            *("-" if n is None else text(n) for n, text in zip(numbers, texts, strict=True)),
        )
        for setting, label, at, *numbers in rows
    ]
    return View(
        "size_costs",
        "What a client of each size costs, mean over the seeds that have a value: weights that it holds and "
        "multiply-accumulates of one example in the layers that it runs, both counted in the server's model at the "
        "last kept round (- for runs whose states are gone); bytes down and up and FLOPs of training in one round, as "
        "the run counted them (- if no client of the size trained). Multiply-accumulates count kept weights only; "
        "FIARSE runs them in layers of full size, so that its FLOPs are those of the largest.",
        ("setting", "algorithm", "size", "parameters", "macs", "bytes_down", "bytes_up", "training_flops"),
        rows,
        (("setting", "algorithm", "size", "parameters", "MACs", "down", "up", "training FLOPs"), told),
    )


def by_size(results: Results, cell: RunSpec, found: Mapping[str, Any]) -> dict[tuple[str, float | None], float]:
    """Return the values of a metric by ("Local" or "Global", size); the size None is the mean.

    Args:
        results: the results.
        cell: the cell.
        found: the metric, as a row of rounds.jsonl or summary.json has it.
    """
    named = nominal(results, cell)
    local = {named.get(name, float(name)): value for name, value in (found.get("by_capacity") or {}).items()}
    whole = {
        named.get(match[1], float(match[1])): value
        for name, value in (found.get("global") or {}).items()
        if (match := _NAME.fullmatch(name))
    }
    of_no_capacity = not whole and len(found.get("global") or {}) > 1  # FjORD's and DepthFL's
    out: dict[tuple[str, float | None], float | None] = {("Local", None): found.get("mean")}
    out |= {("Local", capacity): value for capacity, value in local.items()}
    if not of_no_capacity:
        out["Global", None] = global_mean(found)
    out |= {("Global", capacity): value for capacity, value in whole.items()}
    return {key: value for key, value in out.items() if value is not None}


def global_mean(found: Mapping[str, Any]) -> float | None:
    """Return the mean over the server's networks on all test data, without sizes that no client has; None for none.

    Args:
        found: the metric, as a row of rounds.jsonl or summary.json has it.
    """
    tested, local = found.get("global") or {}, set(map(float, found.get("by_capacity") or {}))
    sizes = {name: float(match[1]) for name in tested if (match := _NAME.fullmatch(name))}
    values = [v for name, v in tested.items() if v is not None and (not sizes or sizes.get(name) in local)]
    return statistics.fmean(values) if values else None


def nominal(results: Results, cell: RunSpec) -> dict[str, float]:
    """Return the setting's capacity for each of the cell's own: an algorithm may need others for an equal cost."""
    common = results.study.configuration.clients.capacities
    asked = cast("Mapping[str, Any]", cell.setting.tables.get("clients", {})).get("capacities", common)
    own = cell.config.clients.capacities
    return {f"{one:g}": float(other) for one, other in zip(own, asked, strict=False)} if len(own) == len(asked) else {}


def named_values(results: Results) -> dict[tuple[str, str, str], str]:
    """Return the values of `sizes` as text by setting, algorithm and name: "Local", "Global at 1/64"."""
    return {
        (setting, label, where if capacity is None else f"{where} at {size_text(capacity)}"): spread_text(
            results.metric, mean, sd
        )
        for setting, label, where, capacity, mean, sd, _ in sizes(results).rows
    }


def _costs(results: Results, cell: RunSpec) -> dict[float | None, tuple[float | None, ...]]:
    """Return by size, or None for all, weights, MACs, bytes down and up, and training FLOPs of a client in a round."""
    named = nominal(results, cell)
    held: dict[float | None, tuple[float | None, ...]] = {}
    folder = cell.run_dir(results.root)
    if cell.config.run.keep_rounds and (folder / "checkpoint").exists():
        kept = kept_round(folder, cell.config.run.keep_rounds[-1])
        for name, nets in kept.nets.items():
            match = _NAME.fullmatch(name)
            held[named.get(match[1], float(match[1])) if match else None] = held_by(nets)

    whole = metric_of(results.done[cell], results.metric).get("global") or {}
    single = len(whole) == 1 and not any(map(_NAME.fullmatch, whole))  # one network for all capacities

    def at(capacity: float) -> float | None:
        return None if single else named.get(f"{capacity:g}", capacity)

    spent = mean_costs(results.rows(cell, "clients.jsonl"), at)
    means = {key: (down, up, done) for key, (_, up, down, done) in spent.items()}
    sizes = {None} if single else {*named.values(), *means}
    return {key: (*held.get(key, (None, None)), *means.get(key, (None,) * 3)) for key in sizes}


def held_by(nets: Nets) -> tuple[float, float | None]:
    """Return the trained numbers that a network holds, and the multiply-accumulates of an example with them.

    Args:
        nets: a network as ``"model"``; ``"gate"`` may have thresholds of tensors, below which weights are not held.
    """
    net = nets["model"]
    assert net.model is not None
    gates = nets["gate"].params if "gate" in nets else {}
    masks = {name: mask & (net.params[name] != 0) for name, mask in above(net.params, gates).items()}
    counts = {
        name: int(masks[name].sum()) if name in masks else net.params[name].numel()
        for name in net.model.parameter_names
    }
    each = multiplications(net.model)
    return sum(counts.values()), sum(each.get(name, 0.0) * count for name, count in counts.items())


SIZES: dict[str, Callable[[Results], View]] = {
    "sizes": sizes,
    "unseen_sizes": unseen_sizes,
    "size_curves": size_curves,
    "size_costs": size_costs,
}
