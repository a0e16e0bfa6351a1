"""Names of metrics with one-line summaries; imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

TaskKind: TypeAlias = Literal["classification", "regression"]


@dataclass(frozen=True)
class About:
    """What a reader of a metric needs to know.

    Args:
        summary: one line about it.
        task: the task that it belongs to.
        higher: whether a higher value is better.
        percent: whether it is printed in percent.
        fraction: whether it lies between 0 and 1.
        unit: whether it is in the target's unit.
        probabilities: whether it compares scores with probabilities.
    """

    summary: str
    task: TaskKind = "classification"
    higher: bool = True
    percent: bool = False
    fraction: bool = True
    unit: bool = False
    probabilities: bool = False


#: Name of a metric -> what it is; docs/metrics.md has the equations.
METRICS: Mapping[str, About] = MappingProxyType(
    {
        "accuracy": About("share of the examples whose class is predicted", percent=True),
        "balanced_accuracy": About("mean over the classes that occur of the share found of each", percent=True),
        "macro_f1": About("mean over classes of the harmonic mean of precision and sensitivity", percent=True),
        "sensitivity": About("share of a class's examples that are found, by class", percent=True),
        "specificity": About("share of the other classes' examples that are not taken for it, by class", percent=True),
        "auroc": About("area under the ROC curve, one class against the rest; ties count half"),
        "auprc": About("average precision, one class against the rest"),
        "brier": About(
            "mean squared error of the predicted probabilities", higher=False, fraction=False, probabilities=True
        ),
        "ece": About(
            "expected calibration error in 15 bins of confidence", higher=False, percent=True, probabilities=True
        ),
        "rmse": About(
            "root mean squared error, in the target's unit", "regression", higher=False, fraction=False, unit=True
        ),
        "mae": About(
            "mean absolute error, in the target's unit", "regression", higher=False, fraction=False, unit=True
        ),
        "r2": About("share of the target's variance that is predicted", "regression", fraction=False),
    }
)

#: Task -> the metrics of a run that names none.
DEFAULTS: Mapping[TaskKind, tuple[str, ...]] = MappingProxyType(
    {"classification": ("accuracy",), "regression": ("rmse", "mae", "r2")}
)


def of_task(task: TaskKind) -> list[str]:
    """Return the names of a task's metrics."""
    return [name for name, about in METRICS.items() if about.task == task]


def beyond_accuracy(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the metrics that need more than counts of right answers: none if the accuracy is the only one."""
    return () if metrics == ("accuracy",) else metrics


def headline(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the first metric of a summary, or of a line of rounds.jsonl, and its means; empty without a test."""
    return next(iter(row.get("metrics", {}).items()), ("accuracy", row.get("accuracy", {})))


def aimed(reached: Mapping[str, Any]) -> tuple[str, float]:
    """Return the metric and the value of a target that a summary says was reached."""
    return next((name, reached[name]) for name in METRICS if name in reached)


def aim(target: float | str) -> tuple[str, float]:
    """Return the metric and the value of an entry of ``run.targets``: 0.9 is an accuracy, "auroc=0.9" names its metric.

    Raises:
        ValueError: the text is no name and number; it says what is expected.
    """
    if not isinstance(target, str):
        return "accuracy", target
    name, _, number = (part.strip() for part in target.partition("="))
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if name not in METRICS or not abs(value) < float("inf"):
        raise ValueError(
            f'got {target!r}; expected a fraction (of accuracy), or a metric and a number, such as "auroc=0.9"; '
            f"the metrics are {', '.join(METRICS)}"
        )
    return name, value


def reaches(name: str, value: float, target: float) -> bool:
    """Return whether a value is at least as good as a target."""
    return value >= target if METRICS[name].higher else value <= target
