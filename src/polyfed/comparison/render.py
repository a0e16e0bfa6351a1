"""A comparison as text: Markdown, CSV, and cells for a terminal. docs/costs.md defines every cost."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from polyfed.base.text import csv_text
from polyfed.comparison.specs import RunSpec
from polyfed.comparison.statistics import FEW, Aim, Line, Target, baseline_of, compared, deviation, line_of, mean_over
from polyfed.metrics.catalogue import METRICS, aim
from polyfed.report.consoles import text
from polyfed.report.curves import Curve, drawn, mean_curve
from polyfed.report.results import RunResult
from polyfed.report.tables import SIMULATED_TIME, left_out, print_table, second_class
from polyfed.report.units import duration, flops, measured, size, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST_NOTE = (
    "Up, down and training FLOPs are per client and round; header is its share of the bytes; inference FLOPs are of "
    "one example; extra memory is what a training step needs beyond Standalone's, by the client of each architecture "
    "that needs most; training time is wall clock of all rounds, without evaluation."
)


@dataclass(frozen=True)
class ComparedRun:
    """A complete run of a comparison.

    Args:
        setting: the title of its setting; "" if there is a single setting.
        label: the label of its algorithm.
        seed: its seed.
        result: its result.
    """

    setting: str
    label: str
    seed: int
    result: RunResult


@dataclass(frozen=True, repr=False)
class Comparison:
    """The outcome of `compare`. ``print(comparison)`` prints the tables; a notebook shows them at the end of a cell.

    Args:
        lines: by setting, then in the order of the request; the first algorithm is the main algorithm.
        seeds: the seeds, in order.
        notes: notes for the reader of the tables.
        out: the folder of the tables.
        baselines: the rows of the majority class, by setting.
        runs: the complete runs, in the order of the request.
    """

    lines: tuple[Line, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]
    out: Path
    baselines: tuple[Line, ...] = ()
    runs: tuple[ComparedRun, ...] = ()

    @cached_property
    def rows(self) -> tuple[Line, ...]:
        """The lines, and after those of a setting its baseline."""
        titles = dict.fromkeys(line.setting for line in self.lines)
        return tuple(line for at in titles for line in (*self.lines, *self.baselines) if line.setting == at)

    @cached_property
    def _metrics(self) -> tuple[str, ...]:
        """The metrics that any line has, the headline first."""
        return tuple(dict.fromkeys(name for line in self.lines for name in (line.metric, *line.more)))

    @cached_property
    def _first(self) -> tuple[str, ...]:
        return ("setting", "algorithm") if any(line.setting for line in self.lines) else ("algorithm",)

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings of `cells`."""
        first, *more = self._metrics or ("accuracy",)
        mean = "mean" if first == "accuracy" else f"mean {first}"
        return (*self._first, mean, "worst tenth", *more, "difference", "against", "p")

    def cells(self) -> list[tuple[str, ...]]:
        """The metrics as text, one tuple per line."""
        return [
            (
                *self._names(line),
                line.accuracy_text,
                spread(line.worst.values(), line.metric) if line.worst else "-",
                *(spread(m.values(), name) if (m := line.more.get(name)) else "-" for name in self._metrics[1:]),
                "-" if line.difference is None else gap(line.metric, line.difference),
                line.against or "-",
                "-" if line.p is None else "< 0.001" if line.p < 0.001 else f"{line.p:.3f}",
            )
            for line in self.rows
        ]

    @property
    def cost_headings(self) -> tuple[str, ...]:
        """The headings of `cost_cells`."""
        return (
            *self._first,
            *("up", "down", "header", "training FLOPs", "inference FLOPs", "extra memory", "training time"),
            *(("simulated time",) if self._simulated else ()),
            *(f"to {aim_text(target)}" for target in self._targets),
        )

    def cost_cells(self) -> list[tuple[str, ...]]:
        """The costs as text, one tuple per line with a result."""
        return [
            (
                *self._names(line),
                size(costs.up),
                size(costs.down),
                f"{100 * costs.header:.2g} %" if costs.header else "-",
                flops(costs.training),
                flops(costs.inference),
                "-" if costs.memory is None else f"{'-' if costs.memory < 0 else ''}{size(abs(costs.memory))}",
                duration(costs.seconds),
                *((duration(costs.simulated),) if self._simulated else ()),
                *(_told(costs.targets.get(target, ())) for target in self._targets),
            )
            for line in self.lines
            if (costs := line.costs) is not None
        ]

    @cached_property
    def _targets(self) -> tuple[Aim, ...]:
        return tuple(dict.fromkeys(t for line in self.lines if line.costs is not None for t in line.costs.targets))

    @cached_property
    def _simulated(self) -> bool:
        return any(line.costs is not None and line.costs.simulated is not None for line in self.lines)

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each complete run, for ``pandas.DataFrame(comparison.records())``.

        A record has ``setting``, ``algorithm``, ``seed``, the mean over clients of each metric, the costs of
        `RunResult.costs`, and ``run_dir``.
        """
        return [
            {
                "setting": run.setting,
                "algorithm": run.label,
                "seed": run.seed,
                **run.result.metrics,
                **run.result.costs,
                "run_dir": str(run.result.run_dir),
            }
            for run in self.runs
        ]

    def plot(self) -> Figure:
        """Return a picture of the headline metric over rounds and over bytes, a curve for each algorithm and setting.

        A curve is the mean over seeds, in the rounds that all seeds evaluated. ``savefig`` writes it to a file.
        """
        found: dict[str, list[Curve]] = {}
        for run in self.runs:
            name = f"{run.setting}: {run.label}" if run.setting else run.label
            found.setdefault(name, []).append(run.result.curve())
        return drawn({name: mean_curve(curves) for name, curves in found.items()}, self._metrics[0])

    def show(self, console: Console) -> None:
        """Print both tables and the notes."""
        for headings, rows in ((self.headings, self.cells()), (self.cost_headings, self.cost_cells())):
            console.print()
            print_table(console, headings, rows, left=("setting", "algorithm", "against"))
        console.print()
        for note in (*self.notes, f"The tables lie in {self.out.absolute()}"):
            console.print(note, soft_wrap=True, markup=False, highlight=False)

    def __str__(self) -> str:
        """Both tables and the notes."""
        return text(self.show).lstrip("\n")

    def __repr__(self) -> str:
        """One line."""
        labels = dict.fromkeys(line.label for line in self.lines)
        return f"Comparison({', '.join(labels)}; seeds {', '.join(map(str, self.seeds))}; in {str(self.out)!r})"

    def _repr_html_(self) -> str:
        """The tables, for a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def _names(self, line: Line) -> tuple[str, ...]:
        return (line.setting, line.label) if len(self._first) == 2 else (line.label,)

    def to_markdown(self) -> str:
        """Return both tables and the notes."""
        costs = self.cost_cells()
        parts = [
            markdown(self.headings, self.cells(), left=(*self._first, "against")),
            *([markdown(self.cost_headings, costs, left=self._first)] if costs else []),
            *self.notes,
        ]
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """Return a CSV of plain numbers: fractions, bytes, FLOPs, seconds; the headline metric of every seed."""
        clock = ("simulated",) if self._simulated else ()
        costs = ("up", "down", "header", "training", "inference", "memory", "seconds", *clock)
        reached = [(target, what) for target in self._targets for what in ("round", "bytes", "flops", *clock)]
        head = (
            *("setting", "algorithm", "mean", "mean_sd", "worst_decile", "worst_decile_sd", "diverged", *costs),
            *(f"{what}_to_{_plain(target)}" for target, what in reached),
            *("difference", "against", "p"),
            *(f"mean_seed_{seed}" for seed in self.seeds),
            *self._metrics[1:],
        )
        rows = (
            (
                *(line.setting, line.label, line.mean, deviation(line.means.values())),
                *(mean_over([*line.worst.values()]), deviation(line.worst.values()), line.diverged),
                *(getattr(line.costs, cost) if line.costs else None for cost in costs),
                *(
                    mean_over([getattr(one, what, None) for one in line.costs.targets.get(target, ())])
                    if line.costs
                    else None
                    for target, what in reached
                ),
                *(line.difference, line.against, line.p),
                *(line.means.get(seed) for seed in self.seeds),
                *(mean_over([*line.more.get(name, {}).values()]) for name in self._metrics[1:]),
            )
            for line in self.rows
        )
        return csv_text(head, rows)


def gap(metric: str, difference: float) -> str:
    """Return a difference as text: in percentage points, or as a number."""
    return f"{100 * difference:+.1f}" if METRICS[metric].percent else f"{difference:+.3g}"


def aim_text(target: Aim) -> str:
    """Return a target as text: "80 %", an accuracy, or "auroc 0.9"."""
    name, value = aim(target)
    return measured(name, value, 0) if name == "accuracy" else f"{name} {measured(name, value)}"


def _plain(target: Aim) -> str:
    name, value = aim(target)
    return f"{value:g}" if name == "accuracy" else f"{name}_{value:g}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> str:
    """Return a table in which columns of numbers are flush right."""
    rule = ["---" if heading in left else "---:" for heading in headings]
    lines = [headings, rule, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(found: Sequence[Target | None]) -> str:
    """Return the costs of reaching a target as text."""
    reached = [one for one in found if one is not None]
    if not reached or len(reached) < len(found):
        return f"{len(reached)} of {len(found)} seeds" if reached else "not reached"
    round_, sent = (
        statistics.fmean(values) for values in zip(*((one.round, one.bytes) for one in reached), strict=True)
    )
    clock = mean_over([one.simulated for one in reached])
    return f"round {round_:.3g}, {size(sent)}{'' if clock is None else f', {duration(clock)}'}"


def tabulate(cells: Sequence[RunSpec], root: Path, out: Path) -> Comparison:
    """Return the tables of the cells that are done.

    Args:
        cells: the cells by setting, in the order of the table.
        root: the folder that contains ``cells/``.
        out: the folder of the tables.
    """
    titles = dict.fromkeys(cell.setting.title for cell in cells)
    settings = [[cell for cell in cells if cell.setting.title == title] for title in titles]
    found: list[tuple[Line, str]] = []
    for here in settings:
        plain = [line_of(label, here, root) for label in dict.fromkeys(cell.label for cell in here)]
        found += [compared(line, plain) for line in plain]
    lines = tuple(line for line, _ in found)
    baselines = [line for here in settings if (line := baseline_of(here, root)) is not None]
    counts = [len({cell.seed for cell in here}) for here in settings]
    done = [summary for cell in cells if (summary := cell.summary(root)) is not None]
    notes = (
        *(_notes(lines[0].metric, len({line.label for line in lines}) > 1, counts) if counts else ()),
        *(note for _, note in found if note),
        *second_class(done),
        *left_out(done, "clients, counted in each run,"),
        *([SIMULATED_TIME] if any(line.costs and line.costs.simulated is not None for line in lines) else []),
    )
    runs = tuple(
        ComparedRun(cell.setting.title, cell.label, cell.seed, RunResult(cell.run_dir(root), summary))
        for cell in cells
        if (summary := cell.summary(root)) is not None
    )
    return Comparison(lines, tuple(dict.fromkeys(cell.seed for cell in cells)), notes, out, tuple(baselines), runs)


def _notes(metric: str, several: bool, seeds: Sequence[int]) -> list[str]:
    """Return the notes for settings with these numbers of seeds."""
    least, most = min(seeds), max(seeds)
    count = f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"
    over = f"{count}, mean ± standard deviation" if most > 1 else count
    what = metric.replace("_", " ").capitalize()
    notes = [f"{what} over clients on the same splits for all algorithms; {over}; costs are means over seeds."]
    if several:
        unit = "percentage points to" if METRICS[metric].percent else "from"
        notes.append(f"Difference: {unit} the best of the other algorithms, which the table names.")
        if most < FEW:
            notes.append(f"No test was made: it needs at least {FEW} seeds, and there are {most}.")
        elif least < FEW:
            notes.append(f"Settings with fewer than {FEW} seeds have no test.")
        if most >= FEW:
            notes.append("p: paired two-sided t-test over seeds, not corrected for the number of comparisons.")
    return [*notes, COST_NOTE]
