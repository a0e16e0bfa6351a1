"""The closing table of a run and its notes. This module does not import torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from polyfed.metrics.catalogue import METRICS, aimed, headline, reaches
from polyfed.report.progress import Summary
from polyfed.report.units import duration, flops, heading, measured, size

if TYPE_CHECKING:
    from polyfed.trained.adapt import Adapted

K = TypeVar("K")

TRAINING_TIME = "Training time is wall clock without evaluation, and FLOPs are those of training alone."

SELECTED = "Validation rows chose the round; test rows chose nothing, and the first table has the kept model's."

SIMULATED_TIME = (
    "Simulated time is of training on the devices of the table; 'to' is the time to the first evaluation at a target."
)

_GAP = 2  # columns between columns
_FOLDED = 10  # columns to which text may be folded
_CLIENTS = 20  # clients for whom a table per client is printed
_NOTEWORTHY = 0.01  # share of indices and header in the bytes, above which the notes list them


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    costs: Sequence[str] = (),
) -> None:
    """Print a table; if the console is too narrow for it, print two tables, the second with the costs.

    Text may be folded, but numbers are never cut: the terminal wraps a table that is still too wide.

    Args:
        console: the output.
        headings: a heading per column; a line break makes a narrow column of a long heading.
        rows: cells as text.
        left: headings of the columns of text.
        costs: headings of the columns of the second table; without any there is a single table.
    """
    whole = _Part(headings, rows, left)
    parts = [whole]
    if costs and whole.width > console.width:
        chosen = [heading for heading in headings if heading not in costs], [headings[0], *costs]
        parts = [_Part(some, [[row[headings.index(name)] for name in some] for row in rows], left) for some in chosen]
    for number, part in enumerate(parts):
        if number:
            console.print()
        room = console if part.least <= console.width else Console(file=console.file, width=part.least)
        room.print(part.table(), markup=False, highlight=False)


class _Part:
    """A table and its width.

    Attributes:
        width: width without folding.
        least: width with the text folded as far as permitted.
    """

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> None:
        self._headings, self._rows, self._left = headings, rows, left
        cells = [[line for cell in column for line in cell.split("\n")] for column in zip(headings, *rows, strict=True)]
        wide = [max(map(cell_len, column)) for column in cells]
        gaps = _GAP * len(headings)
        self.width = sum(wide) + gaps
        self.least = sum(min(w, _FOLDED) if h in left else w for h, w in zip(headings, wide, strict=True)) + gaps

    def table(self) -> Table:
        columns = (
            Column(heading, overflow="fold")
            if heading in self._left
            else Column(heading, justify="right", no_wrap=True)
            for heading in self._headings
        )
        table = Table(*columns, box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        for row in self._rows:
            table.add_row(*row)
        return table


def closing_table(console: Console, summaries: Mapping[str, Summary]) -> None:
    """Print a row per run, the main run first.

    Args:
        console: where to.
        summaries: summary.json of each run, by label.
    """
    targets = sorted({aimed(one) for summary in summaries.values() for one in summary.get("targets", ()) if one})
    first = next(iter(summaries.values()))
    metric, _ = headline(first)
    more = [name for name in first.get("metrics", {}) if name != metric]
    pool = "metrics" in first
    means = ("mean" if metric == "accuracy" else heading(metric), "worst\ntenth", *(["pooled"] if pool else []))
    alike = [(name, kind) for name in more for kind in ("mean", "pooled") if kind == "mean" or _pooled(summaries, name)]
    means += tuple(heading(name) if kind == "mean" else f"{heading(name)}\n{kind}" for name, kind in alike)
    simulated = any("simulated" in summary for summary in summaries.values())
    aims = ((heading(name) if name != "accuracy" else "", measured(name, value)) for name, value in targets)
    times = ("simulated\ntime", *("\n".join(filter(None, ("to", *aim))) for aim in aims)) if simulated else ()
    costs = ("up", "down", "FLOPs", "training\ntime", "peak\nmemory", *times)
    rows = [
        (
            label,
            *(_mean(summary, metric, kind) for kind in ("mean", "worst_decile", *(["pooled"] if pool else []))),
            *(_mean(summary, name, kind) for name, kind in alike),
            size(summary["bytes"]["up"]),
            size(summary["bytes"]["down"]),
            flops(summary["flops"]),
            duration(summary["seconds"]),
            size(summary["memory"]["process_peak"]),
            *(duration(simulated_time(summary, target)) for target in ((None, *targets) if simulated else ())),
        )
        for label, summary in summaries.items()
    ]
    if found := first.get("majority"):
        shown = (measured(metric, found[metric]["mean"]), measured(metric, found[metric]["worst_decile"]))
        rest = (measured(name, found[name]["mean"]) if kind == "mean" else "-" for name, kind in alike)
        rows.append((baseline(first), *shown, *(["-"] if pool else []), *rest, *["-"] * len(costs)))
    print_table(console, ("algorithm", *means, *costs), rows, left=("algorithm",), costs=costs)


def metric_of(summary: Summary, metric: str) -> Mapping[str, Any]:
    """Return the means of a metric of a run; empty if the run does not have it."""
    return summary.get("metrics", {}).get(metric) or summary.get(metric, {})


def _pooled(summaries: Mapping[str, Summary], metric: str) -> bool:
    """Return whether a run has the metric of all test rows together."""
    return any(metric_of(summary, metric).get("pooled") is not None for summary in summaries.values())


def _mean(summary: Summary, metric: str, which: str) -> str:
    """Return a mean of a metric as text."""
    return measured(metric, metric_of(summary, metric).get(which))


def baseline(summary: Summary) -> str:
    """Return the name of the row of a prediction that is computed by counting."""
    return _counted(headline(summary)[0])


def adapted_table(console: Console, found: Adapted) -> None:
    """Print a row for each predictor of a client that adapted, of its training alone, and of no training."""
    metrics = list(found.baseline)
    labels = {"adapted": "adapted", "alone": "trained alone", "baseline": _counted(metrics[0])}
    rows = [
        (labels[row["way"]], row["predictor"] or "-", *(measured(name, row[name]) for name in metrics))
        for row in found.records()
    ]
    left = ("way", "predictor")
    print_table(console, (*left, *map(heading, metrics)), rows, left=left)


def _counted(metric: str) -> str:
    """Return the name of a prediction that is computed by counting, by a metric of the task."""
    return "training mean" if METRICS[metric].task == "regression" else "majority class"


def client_table(console: Console, summary: Summary) -> None:
    """Print a row per client of the last evaluation, for at most 20 clients; nothing where a run left no logs.

    Capacities have a column where they differ.

    Args:
        console: the output.
        summary: summary.json of the run.
    """
    if "run_dir" not in summary or summary.get("clients", {}).get("count", 0) > _CLIENTS:
        return
    tested = tested_clients(Path(summary["run_dir"]), summary)
    if not tested:
        return
    metric, _ = headline(summary)
    names = list(summary.get("metrics", {metric: None}))
    unlike = len({row.get("capacity") for row in tested.values()}) > 1
    counted = any("majority" in row for row in tested.values())
    rows = [
        (
            row.get("name", str(client)),
            row["model"] or "-",
            *([f"{row['capacity']:g}"] if unlike else []),
            str(row["examples"]),
            *(measured(name, row.get("metrics", row).get(name)) for name in names),
            *([measured(metric, row.get("majority", {}).get(metric))] if counted else []),
        )
        for client, row in sorted(tested.items())
    ]
    last = (f"{heading(metric)} of the\n{baseline(summary)}",) if counted else ()
    left = ("client", "network")
    print_table(
        console,
        (*left, *(["capacity"] if unlike else []), "test\nexamples", *map(heading, names), *last),
        rows,
        left=left,
    )


def capacity_table(console: Console, summary: Summary) -> None:
    """Print a row per capacity, where they differ: what a client sends, receives and computes in a round, on average.

    Args:
        console: the output.
        summary: summary.json of the run.
    """
    metric, _ = headline(summary)
    means = metric_of(summary, metric).get("by_capacity", {})
    log = Path(summary.get("run_dir", "")) / "clients.jsonl"
    if len(means) < 2 or not log.is_file():
        return
    with log.open(encoding="utf-8") as lines:
        costs = mean_costs(map(json.loads, lines), lambda capacity: f"{capacity:g}")
    rows: list[tuple[str, ...]] = []
    for name, mean in sorted(means.items(), key=lambda item: float(item[0])):
        clients, up, down, done = costs.get(name, (0, 0.0, 0.0, None))
        spent = (size(up), size(down), flops(done)) if clients else ("-",) * 3
        rows.append((name, str(clients), measured(metric, mean), *spent))
    mean = "mean" if metric == "accuracy" else heading(metric)
    each = ("up, a client\nand round", "down, a client\nand round", "FLOPs, a client\nand round")
    console.print()
    print_table(console, ("capacity", "clients\nthat trained", mean, *each), rows)


def mean_costs(
    rows: Iterable[Mapping[str, Any]], key: Callable[[float], K]
) -> dict[K, tuple[int, float, float, float | None]]:
    """Return by size how many clients trained, and bytes up, bytes down and FLOPs of a client in a round, in the mean.

    FLOPs are None where those of any round are not counted.

    Args:
        rows: lines of clients.jsonl, of which one at a time is kept; lines of tests are left out.
        key: makes a size of a capacity.
    """
    sums: dict[K, tuple[set[int], int, float, float, float | None]] = {}
    for row in rows:
        if "bytes_up" in row:
            at, more = key(row["capacity"]), row["flops"]
            clients, count, up, down, done = sums.get(at, (set[int](), 0, 0.0, 0.0, 0.0))
            clients.add(row["client"])
            done = None if done is None or more is None else done + more
            sums[at] = clients, count + 1, up + row["bytes_up"], down + row["bytes_down"], done
    return {
        at: (len(clients), up / count, down / count, None if done is None else done / count)
        for at, (clients, count, up, down, done) in sums.items()
    }


def tested_clients(run_dir: Path, summary: Summary) -> dict[int, dict[str, Any]]:
    """Return the test of each client that a finished run reports, by client; empty where a run left no logs.

    Args:
        run_dir: the run directory.
        summary: its summary.json.
    """
    selection = summary.get("selection")
    log = run_dir / ("clients.jsonl" if selection is None else "tests.jsonl")
    if not log.exists():
        return {}
    lines = map(json.loads, log.read_text("utf-8").splitlines())
    rows = (row for row in lines if "examples" in row)
    if selection is None:
        return {row["client"]: row for row in rows if row["round"] == summary["rounds"]}
    return {row["client"]: row for row in rows if row["kept"] == selection["kept"]}


def selection_table(console: Console, summaries: Mapping[str, Summary]) -> None:
    """Print, for the runs whose validation rows chose a round, what those rows and the test rows say of each model.

    Args:
        console: where to.
        summaries: as for `closing_table`.
    """
    chosen = {label: found for label, summary in summaries.items() if (found := summary.get("selection"))}
    if not chosen:
        return
    kinds = {label: [kind for kind in ("best", "last") if kind in found] for label, found in chosen.items()}
    names = list(next((found[kinds[label][0]]["validation"] for label, found in chosen.items() if kinds[label]), ()))
    rows = [
        (
            label,
            kind,
            str(found[kind]["round"]),
            *(measured(name, (found[kind][part] or {}).get(name)) for name in names for part in ("validation", "test")),
        )
        for label, found in chosen.items()
        for kind in kinds[label]
    ]
    columns = (f"{heading(name)}\n{part}" for name in names for part in ("validation", "test"))
    console.print()
    print_table(console, ("algorithm", "model", "round", *columns), rows, left=("algorithm", "model"))


def simulated_time(summary: Summary, target: tuple[str, float] | None = None) -> float | None:
    """Return the simulated seconds of a run, or up to a target; None without the clock or if it was not reached."""
    if "simulated" not in summary:
        return None
    if target is None:
        return summary["simulated"]["seconds"]
    found = (reached for reached in summary["targets"] if reached is not None and aimed(reached) == target)
    return next((reached["simulated_seconds"] for reached in found), None)


def remarks(summaries: Mapping[str, Summary]) -> list[str]:
    """Return the remarks under the table: runs that are better than the main run, and notes on bytes, times and peaks.

    Args:
        summaries: as for `closing_table`; the first is the main run.
    """
    (main, first), *others = summaries.items()
    metric, found = headline(first)
    mean = found.get("mean")
    said = [
        f"{label} leads {main}: {measured(metric, lead, 2)} against {measured(metric, mean, 2)} in the mean over "
        "clients."
        for label, summary in others
        if (lead := headline(summary)[1].get("mean")) not in (None, mean) and mean is not None
        if reaches(metric, lead, mean)
    ]
    said += [*second_class([first]), *left_out([first])]
    for label, summary in summaries.items():
        for way in ("up", "down"):
            sent = summary["bytes"]
            total, values = sent[way], sent.get(f"{way}_values", sent[way])
            if total and (total - values) / total > _NOTEWORTHY:
                rest = f"{size(sent.get(f'{way}_indices', 0))} indices, {size(sent.get(f'{way}_header', 0))} header"
                said.append(f"{label}: of the {size(total)} {way}, {size(values)} are values, {rest}.")
    for label, summary in summaries.items():
        if stopped := summary.get("selection", {}).get("stopped"):
            said.append(f"{label} ended at round {stopped['round']} of {summary['rounds']}: {stopped['reason']}.")
        if "asked" in summary.get("selection", {}):
            metric = summary["selection"]["metric"]
            said.append(
                f"{label}: {metric} was not defined in any evaluation, so the last round is kept, not the best."
            )
    if any("selection" in summary for summary in summaries.values()):
        said.append(SELECTED)
    said += [missing for summary in summaries.values() if (missing := _missing(summary))]
    clocks = {label: summary["simulated"] for label, summary in summaries.items() if "simulated" in summary}
    peak = "Peak memory is that of the process and its workers so far, for all rows; they share part of it."
    return [
        *said,
        *(f"{label}: {in_vain}." for label, clock in clocks.items() if (in_vain := _in_vain(clock))),
        TRAINING_TIME,
        *([SIMULATED_TIME] if clocks else []),
        *([peak] if others else []),
    ]


def second_class(summaries: Sequence[Summary]) -> list[str]:
    """Return a remark on the metrics that are those of the second of two classes, if runs have any."""
    said: dict[str, None] = {}
    for summary in summaries:
        parts = {name: list(part.get("pooled_by_class", ())) for name, part in summary.get("metrics", {}).items()}
        named = [name for name in ("sensitivity", "specificity", "auprc") if len(parts.get(name, ())) == 2]
        if named:
            first, second = parts[named[0]]
            what = f"{', '.join(named)}: of class {second!r}, the second of ({first}, {second})"
            said[f"{what}; data.options.classes sets the order."] = None
    return list(said)


def left_out(summaries: Sequence[Summary], whose: str = "clients") -> list[str]:
    """Return a remark for each metric that is not defined for some clients, of all runs together."""
    said: list[str] = []
    for name in dict.fromkeys(name for summary in summaries for name in summary.get("metrics", {})):
        parts = [summary["metrics"][name] for summary in summaries if name in summary.get("metrics", {})]
        if count := sum(part.get("undefined", 0) for part in parts):
            total = sum(part["clients"] for part in parts)
            said.append(f"{name}: {count} of {total} {whose} are left out of the mean; it is not defined there.")
    return said


def _missing(summary: Summary) -> str:
    """Return which clients of a deployed run were not connected; "" if all were."""
    missing = summary.get("deployed", {}).get("missing", {})
    moments = (("begin", "began"), ("end", "ended"))
    parts = [
        f"client{'s' * (len(clients) > 1)} {', '.join(map(str, clients))} when the run {moment}"
        for key, moment in moments
        if (clients := missing.get(key))
    ]
    return f"Not connected: {'; '.join(parts)}." if parts else ""


def _in_vain(simulated: Summary) -> str:
    """Return the clients whose replies did not count, by reason, and their costs; "" if all counted."""
    failed = {reason: count for reason, count in simulated["failed"].items() if count}
    if not failed:
        return ""
    wasted = simulated["wasted"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in failed.items())
    void = f"; {simulated['void']} rounds were void" if simulated["void"] else ""
    cost = f"{size(wasted['bytes_up'])} up, {size(wasted['bytes_down'])} down, {flops(wasted['flops'])} FLOPs"
    return f"clients asked in vain: {reasons}{void}; they cost {cost}, which the table does not include"


def show(console: Console, summaries: Mapping[str, Summary], notes: Sequence[str] = ()) -> None:
    """Print the closing table, the notes, the remarks, and the directory of the run.

    Args:
        console: where to.
        summaries: as for `closing_table`.
        notes: the meanings of the labels.
    """
    console.print()
    closing_table(console, summaries)
    selection_table(console, summaries)
    client_table(console, next(iter(summaries.values())))
    capacity_table(console, next(iter(summaries.values())))
    console.print()
    for remark in (*notes, *remarks(summaries)):
        console.print(remark, soft_wrap=True, markup=False, highlight=False)
    first = next(iter(summaries.values()))
    drawing = f"To draw its curves: polyfed plot {shlex.quote(str(first['run_dir']))}"
    console.print(drawing, soft_wrap=True, markup=False, highlight=False)
    console.print(f"The run lies in {Path(first['run_dir']).absolute()}", soft_wrap=True, markup=False, highlight=False)
