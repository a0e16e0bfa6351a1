"""The tables of a comparison: accuracies with a paired test, and costs, as Markdown and CSV.

docs/costs.md defines every cost.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from polyfed.compare.cells import Cell
from polyfed.report import SIMULATED_TIME, Summary, duration, flops, percent, simulated_time, size

COSTS = (
    "up",
    "down",
    "header",
    "training FLOPs",
    "inference FLOPs",
    "extra memory",
    "training time",
)  # headings of the second table, before those of the targets

COST_NOTE = (
    "Up, down and training FLOPs are per client and round; header is its share of the bytes; inference FLOPs are of "
    "one example; extra memory is what a training step needs beyond Standalone's; training time is wall clock of all "
    "rounds, without evaluation."
)

_FEW = 3  # seeds below which a paired t-test is not shown: with two it has one degree of freedom


@dataclass(frozen=True)
class Target:
    """What it took to reach an accuracy, for one seed.

    Args:
        round: the first evaluated one that reached it.
        bytes: sent both ways, by and to all clients, up to there.
        flops: of all clients' training, up to there.
        simulated: seconds on the simulated clock, up to there; None without one.
    """

    round: int
    bytes: int
    flops: int
    simulated: float | None = None


@dataclass(frozen=True)
class Costs:
    """What an algorithm cost; means over seeds.

    Args:
        up: bytes that a client sends in a round.
        down: bytes that a client receives in a round, for training.
        header: share of these bytes that is neither values nor indices.
        training: FLOPs of a client's training in a round.
        inference: FLOPs of predicting one example, with every predictor of the algorithm.
        memory: bytes that a training step's peak is above Standalone's with the same batches and optimizer, mean over
            architectures; None without it.
        seconds: of training, all rounds.
        simulated: seconds on the simulated clock, all rounds; None without one.
        targets: for each accuracy of ``run.targets``, what it took, by seed; None where it was not
            reached, or the run is not complete.
    """

    up: float
    down: float
    header: float
    training: float
    inference: float
    memory: float | None
    seconds: float
    simulated: float | None = None
    targets: Mapping[float, tuple[Target | None, ...]] = field(default_factory=dict[float, tuple[Target | None, ...]])

    @classmethod
    def of(
        cls, summaries: Sequence[Summary], alone: Sequence[Summary], targets: Sequence[float], missing: int
    ) -> Costs:
        """Of the runs of one algorithm.

        Args:
            summaries: of those that are complete.
            alone: Standalone's in the same setting, if there are any.
            targets: ``run.targets``.
            missing: how many runs are not complete: no target counts as reached by every seed without them.
        """
        up, down, header = zip(*(_traffic(summary) for summary in summaries), strict=True)
        return cls(
            statistics.fmean(up),
            statistics.fmean(down),
            statistics.fmean(header),
            statistics.fmean(s["flops"] / _participations(s) for s in summaries),
            statistics.fmean(s["flops_per_example"] for s in summaries),
            _peak(summaries) - _peak(alone) if alone else None,
            statistics.fmean(s["seconds"] for s in summaries),
            _mean([simulated_time(summary) for summary in summaries]),
            {
                target: (*(_target(summary, i) for summary in summaries), *[None] * missing)
                for i, target in enumerate(targets)
            },
        )


def _participations(summary: Summary) -> int:
    return max(1, summary["clients"]["participations"])


def _traffic(summary: Summary) -> tuple[float, float, float]:
    sent, times = summary["bytes"], _participations(summary)
    both = sent["up"] + sent["down"]
    return sent["up"] / times, sent["down"] / times, (sent["up_header"] + sent["down_header"]) / both if both else 0.0


def _peak(summaries: Sequence[Summary]) -> float:
    return statistics.fmean(statistics.fmean(s["memory"]["step_peak"].values()) for s in summaries)


def _target(summary: Summary, place: int) -> Target | None:
    found = summary["targets"][place]
    if found is None:
        return None
    sent = found["bytes_up"] + found["bytes_down"]
    return Target(found["round"], sent, found["flops"], found.get("simulated_seconds"))


@dataclass(frozen=True)
class Line:
    """An algorithm's row of the tables. Accuracies are fractions.

    Args:
        setting: in which; "" where there is but one.
        label: of the algorithm.
        means: mean accuracy over clients, by seed, of the runs that are complete.
        worst: of the worst tenth of clients, likewise.
        diverged: how many runs ended without a result.
        costs: None where no run is complete.
        against: label of the best of the others, over the seeds of both; "" if there is none.
        difference: mean over the seeds of both, this minus the other; None if there is none.
        p: of the two-sided paired t-test over seeds; None where it cannot be made.
    """

    setting: str
    label: str
    means: Mapping[int, float]
    worst: Mapping[int, float]
    diverged: int
    costs: Costs | None
    against: str = ""
    difference: float | None = None
    p: float | None = None

    @property
    def mean(self) -> float | None:
        """Over seeds; None where no run is complete."""
        return statistics.fmean(self.means.values()) if self.means else None

    @property
    def told(self) -> str:
        """The mean and its standard deviation, for people."""
        parts = [spread(self.means.values())] if self.means else []
        parts += [f"{self.diverged} diverged"] if self.diverged else []
        return ", ".join(parts) or "-"


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Args:
        lines: by setting, then in the order asked for; the first algorithm is the one under examination.
        seeds: in order.
        notes: what has to be known to read the tables.
        out: where the tables lie.
    """

    lines: tuple[Line, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]
    out: Path

    @cached_property
    def _first(self) -> tuple[str, ...]:
        return ("setting", "algorithm") if any(line.setting for line in self.lines) else ("algorithm",)

    @property
    def headings(self) -> tuple[str, ...]:
        """Of `cells`."""
        return (*self._first, "mean", "worst tenth", "difference", "against", "p")

    def cells(self) -> list[tuple[str, ...]]:
        """The accuracies as text, one tuple per line."""
        return [
            (
                *self._names(line),
                line.told,
                spread(line.worst.values()) if line.worst else "-",
                "-" if line.difference is None else f"{100 * line.difference:+.1f}",
                line.against or "-",
                "-" if line.p is None else "< 0.001" if line.p < 0.001 else f"{line.p:.3f}",
            )
            for line in self.lines
        ]

    @property
    def cost_headings(self) -> tuple[str, ...]:
        """Of `cost_cells`."""
        simulated = ("simulated time",) if self._simulated else ()
        return (*self._first, *COSTS, *simulated, *(f"to {percent(target, 0)}" for target in self._targets))

    def cost_cells(self) -> list[tuple[str, ...]]:
        """The costs as text, one tuple per line with a result."""
        rows: list[tuple[str, ...]] = []
        for line in self.lines:
            if (costs := line.costs) is not None:
                memory = "-" if costs.memory is None else f"{'-' if costs.memory < 0 else ''}{size(abs(costs.memory))}"
                share = f"{100 * costs.header:.2g} %" if costs.header else "-"
                traffic = (size(costs.up), size(costs.down), share)
                work = (flops(costs.training), flops(costs.inference), memory, duration(costs.seconds))
                reached = (_told(costs.targets.get(target, ())) for target in self._targets)
                clock = ("-" if costs.simulated is None else duration(costs.simulated),) if self._simulated else ()
                rows.append((*self._names(line), *traffic, *work, *clock, *reached))
        return rows

    @cached_property
    def _targets(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(t for line in self.lines if line.costs is not None for t in line.costs.targets))

    @cached_property
    def _simulated(self) -> bool:
        return any(line.costs is not None and line.costs.simulated is not None for line in self.lines)

    def _names(self, line: Line) -> tuple[str, ...]:
        return (line.setting, line.label) if len(self._first) == 2 else (line.label,)

    @property
    def _reached(self) -> tuple[str, ...]:
        return ("round", "bytes", "flops", *(("simulated",) if self._simulated else ()))

    def to_markdown(self) -> str:
        """Both tables and the notes."""
        tables = [markdown(self.headings, self.cells(), left=(*self._first, "against"))]
        tables += [markdown(self.cost_headings, self.cost_cells(), left=self._first)] if self.cost_cells() else []
        return "\n\n".join([*tables, *self.notes]) + "\n"

    def to_csv(self) -> str:
        """Plain numbers: fractions, bytes, FLOPs, seconds; the mean accuracy of every seed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["setting", "algorithm", "mean", "mean_sd", "worst_decile", "worst_decile_sd", "diverged"]
        costs = ["up", "down", "header", "training", "inference", "memory", "seconds"]
        costs += ["simulated"] if self._simulated else []
        reached = [f"{what}_to_{target:g}" for target in self._targets for what in self._reached]
        seeds = [f"mean_seed_{seed}" for seed in self.seeds]
        writer.writerow([*head, *costs, *reached, "difference", "against", "p", *seeds])
        for line in self.lines:
            worst = list(line.worst.values())
            row: list[Any] = [line.setting, line.label, line.mean, deviation(line.means.values())]
            row += [statistics.fmean(worst) if worst else None, deviation(worst), line.diverged]
            row += [getattr(line.costs, cost) if line.costs else None for cost in costs]
            for target in self._targets:
                at = line.costs.targets.get(target, ()) if line.costs else ()
                row += [_mean([getattr(one, what, None) for one in at]) for what in self._reached]
            row += [line.difference, line.against, line.p, *(line.means.get(seed) for seed in self.seeds)]
            writer.writerow(["" if value is None else value for value in row])
        return text.getvalue()


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> str:
    """A table; columns of numbers are flush right."""
    rule = ["---" if heading in left else "---:" for heading in headings]
    lines = [headings, rule, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def deviation(values: Any) -> float | None:
    """The standard deviation (n - 1); None for fewer than two values."""
    some = list(values)
    return statistics.stdev(some) if len(some) > 1 else None


def spread(values: Any) -> str:
    """Fractions as ``71.6 ± 1.3 %``: mean and standard deviation."""
    some, found = list(values), deviation(values)
    if found is None:
        return percent(statistics.fmean(some))
    return f"{100 * statistics.fmean(some):.1f} ± {100 * found:.1f} %"


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over seeds; None where a seed has no value."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there and len(there) == len(values) else None


def _told(found: Sequence[Target | None]) -> str:
    """What it took to reach a target, for people."""
    reached = [one for one in found if one is not None]
    if not reached or len(reached) < len(found):
        return f"{len(reached)} of {len(found)} seeds" if reached else "not reached"
    round_, sent = (
        statistics.fmean(values) for values in zip(*((one.round, one.bytes) for one in reached), strict=True)
    )
    clock = _mean([one.simulated for one in reached])
    return f"round {round_:.3g}, {size(sent)}{'' if clock is None else f', {duration(clock)}'}"


def tabulate(cells: Sequence[Cell], root: Path, out: Path) -> Comparison:
    """The tables of the cells that are done.

    Args:
        cells: by setting, in the order of the table.
        root: they lie in ``cells/`` of it.
        out: where the tables will lie.
    """
    settings = list(dict.fromkeys(cell.setting.title for cell in cells))
    lines: list[Line] = []
    same: list[str] = []
    for title in settings:
        here = [cell for cell in cells if cell.setting.title == title]
        plain = [_line(label, here, root) for label in dict.fromkeys(cell.label for cell in here)]
        for line in plain:
            found, note = _compared(line, plain)
            lines.append(found)
            same += [note] if note else []
    seeds = tuple(dict.fromkeys(cell.seed for cell in cells))
    several = len({line.label for line in lines}) > 1
    clock = any(line.costs is not None and line.costs.simulated is not None for line in lines)
    counts = [len({cell.seed for cell in cells if cell.setting.title == title}) for title in settings]
    notes = [*(_notes(several, counts) if counts else ()), *same, *([SIMULATED_TIME] if clock else [])]
    return Comparison(tuple(lines), seeds, tuple(notes), out)


def _line(label: str, cells: Sequence[Cell], root: Path) -> Line:
    own = [cell for cell in cells if cell.label == label]
    done = {cell.seed: summary for cell in own if (summary := cell.summary(root)) is not None}
    alone = [
        summary
        for cell in cells
        if cell.config.algorithm.name == "standalone"
        and _step(cell) == _step(own[0])
        and (summary := cell.summary(root)) is not None
    ]
    return Line(
        own[0].setting.title,
        label,
        {seed: summary["accuracy"]["mean"] for seed, summary in done.items()},
        {seed: summary["accuracy"]["worst_decile"] for seed, summary in done.items()},
        sum(cell.state(root) == "diverged" for cell in own),
        Costs.of(list(done.values()), alone, own[0].config.run.targets, len(own) - len(done)) if done else None,
    )


def _step(cell: Cell) -> object:
    """What the memory of a training step depends on, but for the algorithm; how many there are is no part of it."""
    config, train = cell.config, cell.config.train
    return config.clients.models, train.batch_size, train.optimizer, train.momentum != 0, config.run.precision


def _compared(line: Line, lines: Sequence[Line]) -> tuple[Line, str]:
    """A line set beside the best of the others, and what is to be said of them if no test can be made."""
    others = [other for other in lines if other is not line and set(other.means) & set(line.means)]
    if not others:
        return line, ""
    # The closest over the seeds of both: neither one easy seed more nor a hard one less must make a rival the best.
    # Those with all of the line's seeds come first.
    best = min(others, key=lambda other: (-len(differences(line, other)), statistics.fmean(differences(line, other))))
    found = differences(line, best)
    p, note = paired_p(found), ""
    if p is None and len(found) >= _FEW:
        what = "equal" if not any(found) else "apart by the same amount"
        where = f" ({line.setting})" if line.setting else ""
        note = f"{line.label} and {best.label} are {what} for every seed{where}: there is nothing to test."
    return replace(line, against=best.label, difference=statistics.fmean(found), p=p), note


def differences(line: Line, other: Line) -> list[float]:
    """Accuracy of one minus the other, by seed, of the seeds of both."""
    return [line.means[seed] - other.means[seed] for seed in line.means if seed in other.means]


def standard_error(found: Sequence[float]) -> float | None:
    """Of the mean of paired differences; None for fewer than two."""
    return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None


def _notes(several: bool, seeds: Sequence[int]) -> list[str]:
    """What has to be known, for settings with so many seeds each."""
    least, most = min(seeds), max(seeds)
    count = f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"
    over = f"{count}, mean ± standard deviation" if most > 1 else count
    notes = [f"Accuracy over clients on the same splits for all algorithms; {over}; costs are means over seeds."]
    if several:
        notes.append("Difference: percentage points to the best of the other algorithms, which is named.")
        if most < _FEW:
            notes.append(f"No test was made: it needs at least {_FEW} seeds, and there are {most}.")
        elif least < _FEW:
            notes.append(f"Settings with fewer than {_FEW} seeds have no test.")
        if most >= _FEW:
            notes.append("p: paired two-sided t-test over seeds, not corrected for the number of comparisons.")
    return [*notes, COST_NOTE]


def paired_p(found: Sequence[float]) -> float | None:
    """The p of the two-sided paired t-test; None for fewer than three pairs or differences without any spread."""
    if len(found) < _FEW or max(found) - min(found) < 1e-12:
        return None
    from scipy.stats import ttest_rel  # half a second to load

    return float(ttest_rel(found, [0.0] * len(found)).pvalue)
