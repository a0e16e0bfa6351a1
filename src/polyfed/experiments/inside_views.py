"""The views of the networks that a server has: their accuracy on all test data, and what a look into them shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch

from polyfed.blocks.in_training import InTraining
from polyfed.comparison.render import gap
from polyfed.comparison.specs import RunSpec
from polyfed.comparison.statistics import deviation, mean_over, participations, scaled, standard_error
from polyfed.experiments.inside import Inside, conflicts, embedded, linear_cka, mixing, stage_outputs
from polyfed.experiments.leakage import leakage
from polyfed.experiments.sizes import global_mean
from polyfed.experiments.views import Results, View
from polyfed.report.tables import Summary, metric_of
from polyfed.report.units import flops, percent, size, spread_text

#: Clients of each architecture and capacity that the views look into.
EACH = 2
#: Test rows of the view cka: its time grows with their square.
ROWS = 256
#: Test rows of one class, for each of three clients, of the view tsne.
POINTS = 100
#: Batches of each client of the view conflict.
BATCHES = 8


def whole(results: Results) -> View:
    """Accuracies of the server's own networks on all test data."""
    rows: list[tuple[Any, ...]] = []
    told: list[tuple[str, ...]] = []
    for (setting, label), cells in results.groups().items():
        found = [_globals(results.done[cell], results.metric) for cell in cells]
        if not found[0]:
            continue
        done = [results.done[cell] for cell in cells]
        sent = statistics.fmean((d["bytes"]["up"] + d["bytes"]["down"]) / participations(d) for d in done)
        trained = mean_over([scaled(d["flops"], 1, 2 * participations(d)) for d in done])
        mean = {"mean": [statistics.fmean(one.values()) for one in found]}
        named = mean | {name: [one[name] for one in found] for name in found[0]}
        rows += [(setting, label, n, *_spread(v), len(v), sent, trained) for n, v in named.items()]
        each = "; ".join(f"{name} {_text(results, values)}" for name, values in named.items() if name != "mean")
        told.append((setting or "-", label, _text(results, mean["mean"]), each, size(sent), flops(trained)))
    heads = ("setting", "algorithm", "mean", "network by network", "bytes", "MACs")
    return View(
        "whole",
        f"Test {results.metric} of each network that the server has after the last round, on the test rows of all "
        "clients, and its mean over these networks (in the picture a dot, with a tick for each network and a bar for "
        "the deviation over seeds); beside it bytes, both ways, and multiply-accumulates of local training, of one "
        "client in one round.",
        ("setting", "algorithm", "network", "mean", "sd", "seeds", "bytes", "macs"),
        rows,
        (heads, told),
        metric=results.metric,
    )


def differences(results: Results) -> View:
    """Differences of all algorithms to the first, with intervals."""
    rows: list[tuple[Any, ...]] = []
    for setting in dict.fromkeys(cell.setting.title for cell in results.done):
        here = {(cell.label, cell.seed): cell for cell in results.done if cell.setting.title == setting}
        labels = list(dict.fromkeys(cell.label for cell in results.cells if cell.setting.title == setting))
        seeds = sorted({seed for _, seed in here})
        for other in labels[1:]:
            pairs = [(here.get((other, seed)), here.get((labels[0], seed))) for seed in seeds]
            gaps = [_gap(results, one, main) for one, main in pairs if one is not None and main is not None]
            if found := [value for value in gaps if value is not None]:
                half = _half(found)
                mean = statistics.fmean(found)
                ends = (None, None) if half is None else (mean - half, mean + half)
                rows.append((setting, other, labels[0], len(found), mean, *ends))
    told = [
        (
            row[0] or "-",
            row[1],
            str(row[3]),
            gap(results.metric, row[4]),
            "-" if row[5] is None else f"{gap(results.metric, row[5])} to {gap(results.metric, row[6])}",
        )
        for row in rows
    ]
    against = rows[0][2] if rows else "the first"
    return View(
        "differences",
        f"Test {results.metric} minus that of {against}, seed by seed: of the mean over the server's own networks on "
        "all test data, without sizes that no client has, or where one of the two servers has none, of the mean over "
        "clients. Bars are 95 % intervals of Student's t over seeds, not corrected for their number; one seed has "
        "none.",
        ("setting", "algorithm", "against", "seeds", "difference", "low", "high"),
        rows,
        (("setting", "algorithm", "seeds", "difference", "95 % interval"), told),
        metric=results.metric,
    )


def cka(results: Results) -> View:
    """Similarity of what clients' networks compute, stage by stage."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), round_, insides in _looks(results):
        found: dict[tuple[str, str], list[float]] = {}
        for inside in insides:
            x = inside.tests(ROWS)
            clients = list(inside.trained(inside.some(EACH)).values())
            server = [nets["model"] for nets in inside.kept.nets.values()]
            for of, nets in (("clients", clients), ("server", server)):
                outputs = [stage_outputs(net, x) for net in nets]
                for (one, a), (other, b) in combinations(zip(nets, outputs, strict=True), 2):
                    unlike = of == "clients" and one.model is not other.model
                    for stage in a.keys() & b.keys():
                        value = linear_cka(a[stage], b[stage])
                        for kind in (of, *(["clients of unlike networks"] if unlike else [])):
                            found.setdefault((kind, stage), []).append(value)
        order = sorted(found, key=lambda key: (key[0], key[1] == "last", key[1]))
        rows += [(setting, label, round_, *key, len(found[key]), statistics.fmean(found[key])) for key in order]
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for setting, label, round_, of, stage, _, value in rows:
        table.setdefault((setting or "-", label, str(round_), of), {})[stage] = f"{value:.3f}"
    names = list(dict.fromkeys(row[4] for row in rows))
    told = [(*key, *(values.get(name, "-") for name in names)) for key, values in table.items()]
    return View(
        "cka",
        f"Linear CKA between networks, by stage, on the same test rows, at most {ROWS}, mean over pairs: `clients` are "
        f"the first {EACH} of each architecture and capacity after the local training of the round that follows; "
        "`server` is the server's network of each architecture. The last stage gives the classifier's input. "
        "Clients that the server sends one network differ only by that training. The picture has `clients` alone.",
        ("setting", "algorithm", "round", "pairs", "stage", "number", "cka"),
        rows,
        (("setting", "algorithm", "round", "pairs", *names), told),
    )


def tsne(results: Results) -> View:
    """Representations of one class in three clients of unlike networks."""
    rows: list[tuple[Any, ...]] = []
    told: list[tuple[str, ...]] = []
    for (setting, label), round_, insides in _looks(results):
        inside = insides[0]
        clients = _three(inside)
        x = inside.tests(POINTS, label=0)
        points: list[torch.Tensor] = []
        for net in inside.trained(clients).values():
            with torch.no_grad(), net.evaluating():
                points.append(net.represent(x))
        owners = torch.tensor(clients).repeat_interleave(len(x))
        together = torch.cat(points)
        plane = embedded(together)
        names = {k: str(inside.federation.info(k).architecture) for k in clients}
        rows += [
            (setting, label, round_, k, names[k], *map(float, place))
            for k, place in zip(owners.tolist(), plane, strict=True)
        ]
        chance = (len(together) - len(x)) / (len(together) - 1)
        told.append((setting or "-", label, str(round_), percent(mixing(together, owners)), percent(chance)))
    return View(
        "tsne",
        f"t-SNE of the classifier's inputs for {POINTS} test rows at most of the first class, in the smallest, a "
        "middle and the largest network, each of one client after the local training of the round that follows; the "
        "first seed. Mixed colours say that clients represent the class alike. A plane distorts: the table has the "
        "share of a point's 10 nearest neighbours, among the points themselves, that another client made, and what "
        "chance gives.",
        ("setting", "algorithm", "round", "client", "network", "x", "y"),
        rows,
        (("setting", "algorithm", "round", "neighbours of other clients", "by chance"), told),
    )


def conflict(results: Results) -> View:
    """How often the gradients of IN training oppose those of local training, stage by stage."""
    rows: list[tuple[Any, ...]] = []
    for (setting, label), round_, insides in _looks(results):
        found: dict[str, list[float]] = {}
        for inside in insides:
            algorithm = inside.kept.algorithm
            if isinstance(algorithm, InTraining):
                for fit in inside.fits(inside.some(EACH)).values():
                    with inside.placement.defaults():
                        shares = conflicts(fit, algorithm, inside.placement, BATCHES)
                    for stage, values in shares.items():
                        found.setdefault(stage, []).extend(values)
        for stage in sorted(found, key=lambda name: (name == "last", name)):
            values = found[stage]
            quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
            share = sum(value < 0 for value in values) / len(values)
            rows.append((setting, label, round_, stage, len(values), share, *quarters))
    told = [
        (row[0] or "-", row[1], str(row[2]), row[3], str(row[4]), percent(row[5]), *(f"{q:.3g}" for q in row[6:]))
        for row in rows
    ]
    heads = ("setting", "algorithm", "round", "stage", "gradients", "b < 0", "quarter", "median", "three quarters")
    return View(
        "conflict",
        "How often IN training opposes local training: b = <g_IN, g_loc> and a = ||g_loc||^2 of each weight that IN "
        f"training moves, in {BATCHES} batches at most of the first {EACH} clients of each architecture, at the "
        "weights that they receive after the round and with the pairs that they are dealt; share of b < 0, and "
        "quartiles of b / a.",
        ("setting", "algorithm", "round", "stage", "gradients", "share_negative", "q25", "median", "q75"),
        rows,
        (heads, told),
    )


def _looks(results: Results) -> Iterator[tuple[tuple[str, str], int, list[Inside]]]:
    """Each group of finished cells at each round that it keeps."""
    for key, cells in results.groups().items():
        for round_ in cells[0].config.run.keep_rounds:
            yield key, round_, [Inside(cell.run_dir(results.root), round_) for cell in cells]


def _three(inside: Inside) -> list[int]:
    """The first client with the smallest, a middle and the largest network; fewer where there are fewer kinds."""
    first = inside.some(1)
    by_size = sorted(first, key=lambda k: sum(s.numel() for s in inside.federation.own(k).shapes.values()))
    return sorted({by_size[0], by_size[len(by_size) // 2], by_size[-1]})


def _globals(done: Summary, metric: str) -> dict[str, float]:
    found = metric_of(done, metric).get("global") or {}
    return {name: value for name, value in found.items() if value is not None}


def _gap(results: Results, one: RunSpec, main: RunSpec) -> float | None:
    """The difference of two cells in the same mean: over the networks of both servers, or else over clients."""
    first, second = (metric_of(results.done[cell], results.metric) for cell in (one, main))
    for a, b in ((global_mean(first), global_mean(second)), (first.get("mean"), second.get("mean"))):
        if a is not None and b is not None:
            return a - b
    return None


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), deviation(values)


def _text(results: Results, values: Sequence[float]) -> str:
    return spread_text(results.metric, *_spread(values))


def _half(found: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean; None for fewer than two values."""
    error = standard_error(found)
    if error is None:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(found) - 1)) * error
    return half if math.isfinite(half) else None


INSIDE: dict[str, Callable[[Results], View]] = {
    "whole": whole,
    "differences": differences,
    "cka": cka,
    "tsne": tsne,
    "conflict": conflict,
    "leakage": leakage,
}
