"""The table of a comparison: means, spreads, differences and a paired test, as markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyfed.report import (
    SIMULATED_TIME,
    TRAINING_TIME,
    Summary,
    duration,
    flops,
    percent,
    simulated_time,
    size,
    targets_of,
)

COSTS = ("up", "down", "FLOPs", "training time")  # headings

_FEW = 3  # seeds below which a paired t-test is not shown: with two it has one degree of freedom


@dataclass(frozen=True)
class Line:
    """An algorithm's row of the table. Accuracies are fractions; costs are means over seeds.

    Args:
        label: of the algorithm.
        means: mean accuracy over clients, per seed.
        worst: of the worst tenth of clients, per seed.
        bytes_up: sent by clients.
        bytes_down: sent to clients.
        flops: of training.
        seconds: of training.
        times: simulated seconds of the run, then to each of the comparison's targets; None where a seed did not reach
            it; empty without a simulated clock.
        against: label of the best of the others; "" if there is none.
        difference: of the means, this minus the other; None if there is none.
        p: of the two-sided paired t-test over seeds; None where it cannot be made.
    """

    label: str
    means: tuple[float, ...]
    worst: tuple[float, ...]
    bytes_up: float
    bytes_down: float
    flops: float
    seconds: float
    times: tuple[float | None, ...] = ()
    against: str = ""
    difference: float | None = None
    p: float | None = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.means)


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Args:
        lines: one per algorithm, in the order asked for; the first is the one under examination.
        seeds: in order.
        notes: what has to be known to read the table.
        targets: accuracies to which the simulated time is told.
        out: where the runs and tables lie.
    """

    lines: tuple[Line, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]
    out: Path
    targets: tuple[float, ...] = ()

    @property
    def headings(self) -> tuple[str, ...]:
        """Of `cells`."""
        return ("algorithm", "mean", "worst tenth", *self.costs, "difference", "against", "p")

    @property
    def costs(self) -> tuple[str, ...]:
        """Headings of the columns of costs."""
        simulated = any(line.times for line in self.lines)
        return (*COSTS, "simulated time", *(f"to {percent(target)}" for target in self.targets)) if simulated else COSTS

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, one tuple per algorithm."""
        return [
            (
                line.label,
                _spread(line.means),
                _spread(line.worst),
                size(line.bytes_up),
                size(line.bytes_down),
                flops(line.flops),
                duration(line.seconds),
                *("-" if seconds is None else duration(seconds) for seconds in line.times),
                "-" if line.difference is None else f"{100 * line.difference:+.1f}",
                line.against or "-",
                "-" if line.p is None else "< 0.001" if line.p < 0.001 else f"{line.p:.3f}",
            )
            for line in self.lines
        ]

    def to_markdown(self) -> str:
        """The table and its notes."""
        rows = [self.headings, ("---", *["---:"] * (len(self.costs) + 3), "---", "---:"), *self.cells()]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        return "\n\n".join([table, *self.notes]) + "\n"

    def to_csv(self) -> str:
        """Plain numbers: fractions, bytes, FLOPs, seconds; the mean accuracy of every seed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        seeds = [f"mean_seed_{seed}" for seed in self.seeds]
        costs = ["bytes_up", "bytes_down", "flops", "seconds"]
        simulated = len(self.costs) - len(COSTS)
        times = ["simulated_seconds", *(f"simulated_seconds_to_{target:g}" for target in self.targets)][:simulated]
        head = ["algorithm", "mean", "mean_sd", "worst_decile", "worst_decile_sd"]
        writer.writerow([*head, *costs, *times, "difference", "against", "p", *seeds])
        for line in self.lines:
            accuracy = (line.mean, _sd(line.means), statistics.fmean(line.worst), _sd(line.worst))
            row = [line.label, *accuracy, *(getattr(line, cost) for cost in costs), *line.times]
            writer.writerow([_blank(x) for x in (*row, line.difference, line.against, line.p, *line.means)])
        return text.getvalue()


def _blank(value: Any) -> Any:
    return "" if value is None else value


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _spread(values: Sequence[float]) -> str:
    deviation = _sd(values)
    return (
        percent(statistics.fmean(values))
        if deviation is None
        else (f"{100 * statistics.fmean(values):.1f} ± {100 * deviation:.1f} %")
    )


def tabulate(runs: Mapping[str, Sequence[Summary]], seeds: Sequence[int], out: Path) -> Comparison:
    """The table of runs that are there.

    Args:
        runs: summaries by label, in order of ``seeds``.
        seeds: of the runs.
        out: where they lie.
    """
    everything = [summary for summaries in runs.values() for summary in summaries]
    targets = tuple(targets_of(everything)) if all("simulated" in summary for summary in everything) else ()
    plain = [_line(label, summaries, targets) for label, summaries in runs.items()]
    lines: list[Line] = []
    same: list[str] = []
    for line in plain:
        others = [other for other in plain if other is not line]
        if not others:
            lines.append(line)
            continue
        best = max(others, key=lambda other: other.mean)
        differences = [a - b for a, b in zip(line.means, best.means, strict=True)]
        p = paired_p(differences)
        if p is None and len(seeds) >= _FEW:
            what = "equal" if not any(differences) else "apart by the same amount"
            same.append(f"{line.label} and {best.label} are {what} for every seed: there is nothing to test.")
        lines.append(replace(line, against=best.label, difference=statistics.fmean(differences), p=p))
    notes = [*_notes(len(plain), len(seeds)), *same, *([SIMULATED_TIME] if plain[0].times else [])]
    return Comparison(tuple(lines), tuple(seeds), tuple(notes), out, targets)


def _line(label: str, summaries: Sequence[Summary], targets: Sequence[float]) -> Line:
    wanted = (None, *targets) if "simulated" in summaries[0] else ()
    found = [[simulated_time(summary, target) for summary in summaries] for target in wanted]
    times = [[seconds for seconds in over if seconds is not None] for over in found]
    return Line(
        label,
        tuple(summary["accuracy"]["mean"] for summary in summaries),
        tuple(summary["accuracy"]["worst_decile"] for summary in summaries),
        statistics.fmean(summary["bytes"]["up"] for summary in summaries),
        statistics.fmean(summary["bytes"]["down"] for summary in summaries),
        statistics.fmean(summary["flops"] for summary in summaries),
        statistics.fmean(summary["seconds"] for summary in summaries),
        tuple(statistics.fmean(over) if len(over) == len(summaries) else None for over in times),
    )


def _notes(algorithms: int, seeds: int) -> list[str]:
    over = "1 seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation"
    splits = f"Accuracy over clients on the same splits for all algorithms; {over}; costs are means over seeds."
    notes = [splits, TRAINING_TIME]
    if algorithms > 1:
        notes.append("Difference: percentage points to the best of the other algorithms, which is named.")
        if seeds < _FEW:
            notes.append(f"No test was made: it needs at least {_FEW} seeds, and there are {seeds}.")
        else:
            notes.append("p: paired two-sided t-test over seeds, not corrected for the number of comparisons.")
    return notes


def paired_p(differences: Sequence[float]) -> float | None:
    """The p of the two-sided paired t-test; None for fewer than three pairs or differences without any spread."""
    if len(differences) < _FEW or max(differences) - min(differences) < 1e-12:
        return None
    from scipy.stats import ttest_rel  # half a second to load

    return float(ttest_rel(differences, [0.0] * len(differences)).pvalue)
