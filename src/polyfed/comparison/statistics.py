"""The numbers of a comparison: metrics with a paired test, and costs.

docs/costs.md defines every cost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from polyfed.comparison.specs import RunSpec
from polyfed.metrics.catalogue import METRICS
from polyfed.report.tables import Summary, baseline, metric_of, simulated_time
from polyfed.report.units import spread

FEW = 3  # seeds below which a paired t-test is not shown: with two it has one degree of freedom


#: A target as ``run.targets`` has it: 0.9, an accuracy, or "auroc=0.9".
Aim: TypeAlias = float | str


@dataclass(frozen=True)
class Target:
    """The costs of reaching a target, for one seed.

    Args:
        round: the first evaluated round that reached it.
        bytes: bytes to and from all clients, up to that round.
        flops: FLOPs of all clients' training, up to that round; None if they cannot be counted.
        simulated: seconds on the simulated clock, up to that round; None without the clock.
    """

    round: int
    bytes: int
    flops: int | None
    simulated: float | None = None


@dataclass(frozen=True)
class Costs:
    """The costs of an algorithm; means over seeds.

    Args:
        up: bytes that a client sends in a round.
        down: bytes that a client receives in a round, for training.
        header: share of these bytes that is neither values nor indices.
        training: FLOPs of a client's training in a round; None if a run could not count them.
        inference: FLOPs of predicting one example, with every predictor of the algorithm; likewise.
        memory: bytes by which a training step's peak exceeds Standalone's with the same batches and optimizer, mean
            over architectures; None without a run of Standalone, or if nobody trained in a run.
        seconds: seconds of training, all rounds.
        simulated: seconds on the simulated clock, all rounds; None without the clock.
        targets: for each entry of ``run.targets`` the costs of reaching it, by seed; None where it was not reached, or
            the run is not complete.
    """

    up: float
    down: float
    header: float
    training: float | None
    inference: float | None
    memory: float | None
    seconds: float
    simulated: float | None = None
    targets: Mapping[Aim, tuple[Target | None, ...]] = field(default_factory=dict[Aim, tuple[Target | None, ...]])

    @classmethod
    def of(cls, summaries: Sequence[Summary], alone: Sequence[Summary], targets: Sequence[Aim], missing: int) -> Costs:
        """Return the costs of the runs of one algorithm.

        Args:
            summaries: the summaries of the complete runs.
            alone: the summaries of Standalone in the same setting; may be empty.
            targets: ``run.targets``.
            missing: number of runs that are not complete; with such a run no target counts as reached by all seeds.
        """
        up, down, header = zip(*map(_traffic, summaries), strict=True)
        return cls(
            statistics.fmean(up),
            statistics.fmean(down),
            statistics.fmean(header),
            mean_over([scaled(s["flops"], 1, participations(s)) for s in summaries]),
            mean_over([s["flops_per_example"] for s in summaries]),
            _peak(summaries) - _peak(alone)
            if alone and all(s["memory"]["step_peak"] for s in (*summaries, *alone))
            else None,
            statistics.fmean(s["seconds"] for s in summaries),
            mean_over([simulated_time(summary) for summary in summaries]),
            {
                target: (*(_target(summary, i) for summary in summaries), *[None] * missing)
                for i, target in enumerate(targets)
            },
        )


def participations(summary: Summary) -> int:
    """Return how often a client took part, at least 1, by which totals over all clients are divided."""
    return max(1, summary["clients"]["participations"])


def scaled(total: float | None, times: int, over: int = 1) -> float | None:
    """Return ``times * total / over``; None if the total is not known."""
    return None if total is None else times * total / over


def _traffic(summary: Summary) -> tuple[float, float, float]:
    sent, times = summary["bytes"], participations(summary)
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
    """An algorithm's row of the tables. Metrics are fractions, or in the unit of the data.

    Args:
        setting: the title of the setting; "" if there is a single setting.
        label: the label of the algorithm.
        means: mean over clients of the headline metric, by seed, of the runs that are complete.
        worst: its mean over the worst tenth of clients, likewise.
        diverged: number of runs that ended without a result.
        costs: the costs; None if no run is complete.
        against: label of the best other algorithm, over the seeds of both; "" if there is no other.
        difference: mean over the seeds of both, this minus the other; None if there is no other.
        p: the p of the two-sided paired t-test over seeds; None if the test cannot be made.
        metric: the headline metric.
        more: the means of the run's other metrics, by metric and seed.
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
    metric: str = "accuracy"
    more: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, Mapping[int, float]])

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if no run is complete."""
        return statistics.fmean(self.means.values()) if self.means else None

    @property
    def accuracy_text(self) -> str:
        """The mean over seeds and its standard deviation, as text."""
        parts = [spread(self.means.values(), self.metric)] if self.means else []
        parts += [f"{self.diverged} diverged"] if self.diverged else []
        return ", ".join(parts) or "-"


def deviation(values: Any) -> float | None:
    """Return the standard deviation (n - 1); None for fewer than two values."""
    some = list(values)
    return statistics.stdev(some) if len(some) > 1 else None


def mean_over(values: Sequence[float | None]) -> float | None:
    """Return the mean over seeds; None if a seed has no value."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there and len(there) == len(values) else None


def differences(line: Line, other: Line) -> list[float]:
    """Return the headline metric of ``line`` minus that of ``other``, by seed, for the seeds of both."""
    return [line.means[seed] - other.means[seed] for seed in line.means if seed in other.means]


def standard_error(found: Sequence[float]) -> float | None:
    """Return the standard error of the mean of paired differences; None for fewer than two."""
    return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None


def paired_p(found: Sequence[float]) -> float | None:
    """Return the p of the two-sided paired t-test; None for fewer than three pairs or differences without spread."""
    if len(found) < FEW or max(found) - min(found) < 1e-12:
        return None
    from scipy.stats import ttest_rel  # half a second to load

    return float(ttest_rel(found, [0.0] * len(found)).pvalue)


def line_of(label: str, cells: Sequence[RunSpec], root: Path) -> Line:
    """Return the row of one algorithm in its setting, not yet compared with the other algorithms."""
    own = [cell for cell in cells if cell.label == label]
    done = {cell.seed: summary for cell in own if (summary := cell.summary(root)) is not None}
    alone = [
        summary
        for cell in cells
        if cell.config.algorithm.name == "standalone"
        and _step(cell) == _step(own[0])
        and (summary := cell.summary(root)) is not None
    ]
    metric, *others = own[0].config.metrics
    return Line(
        own[0].setting.title,
        label,
        by_seed(done, lambda summary: metric_of(summary, metric)["mean"]),
        by_seed(done, lambda summary: metric_of(summary, metric)["worst_decile"]),
        sum(cell.state(root) == "diverged" for cell in own),
        Costs.of(list(done.values()), alone, own[0].config.run.targets, len(own) - len(done)) if done else None,
        metric=metric,
        more={name: by_seed(done, lambda summary, name=name: metric_of(summary, name)["mean"]) for name in others},
    )


def baseline_of(cells: Sequence[RunSpec], root: Path) -> Line | None:
    """Return the row of the majority class, or of the training mean, in a setting; None if no run has one."""
    done = {
        cell.seed: summary for cell in cells if (summary := cell.summary(root)) is not None and "majority" in summary
    }
    if not done:
        return None
    metric, *others = cells[0].config.metrics
    return Line(
        cells[0].setting.title,
        baseline(next(iter(done.values()))),
        by_seed(done, lambda summary: summary["majority"][metric]["mean"]),
        by_seed(done, lambda summary: summary["majority"][metric]["worst_decile"]),
        0,
        None,
        metric=metric,
        more={name: by_seed(done, lambda summary, name=name: summary["majority"][name]["mean"]) for name in others},
    )


def by_seed(done: Mapping[int, Summary], value: Callable[[Summary], float | None]) -> dict[int, float]:
    """Return a value of each summary, without those in which it is not defined."""
    return {seed: found for seed, summary in done.items() if (found := value(summary)) is not None}


def _step(cell: RunSpec) -> object:
    """Return the settings, apart from the algorithm, on which the memory of a training step depends."""
    config, train = cell.config, cell.config.train
    return config.clients.models, train.batch_size, train.optimizer, train.momentum != 0, config.run.precision


def compared(line: Line, lines: Sequence[Line]) -> tuple[Line, str]:
    """Return a line compared with the best other line, and a note if no test can be made of the two."""
    others = [other for other in lines if other is not line and set(other.means) & set(line.means)]
    if not others:
        return line, ""
    # The comparison is over the seeds of both, so that no line is the best because of an easy seed that others lack.
    # Lines with all seeds of this line come first.
    better = 1 if METRICS[line.metric].higher else -1
    best = min(
        others, key=lambda other: (-len(differences(line, other)), better * statistics.fmean(differences(line, other)))
    )
    found = differences(line, best)
    p, note = paired_p(found), ""
    if p is None and len(found) >= FEW:
        what = "equal" if not any(found) else "apart by the same amount"
        where = f" ({line.setting})" if line.setting else ""
        note = f"{line.label} and {best.label} are {what} for every seed{where}: there is nothing to test."
    return replace(line, against=best.label, difference=statistics.fmean(found), p=p), note
