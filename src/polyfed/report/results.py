"""The result of a run: the numbers of its run directory as values, columns, records, a table and a picture.

This module does not import torch.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from polyfed.base.errors import RunDirError
from polyfed.config import Config
from polyfed.metrics.catalogue import headline
from polyfed.report.consoles import text
from polyfed.report.curves import Curve, drawn
from polyfed.report.tables import show, tested_clients
from polyfed.report.units import measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from polyfed.trained.adapt import Adapted
    from polyfed.trained.model import TrainedModel


class RunResult:
    """The result of a complete run, simulated or deployed. docs/run-directory.md explains every number.

    ``print(result)`` prints the closing table; a notebook shows it where the result ends a cell. What the logs hold is
    read when it is first asked for.

    Args:
        run_dir: the run directory.
        summary: the content of its summary.json.
    """

    def __init__(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        self.run_dir, self.summary = run_dir, summary

    @property
    def accuracy(self) -> float | None:
        """The mean over clients of the accuracy of the last evaluation, a fraction; None for a regression."""
        return self.summary.get("accuracy", {}).get("mean")

    @property
    def metrics(self) -> dict[str, float | None]:
        """The mean over clients of each metric of the last evaluation; None where a metric is not defined.

        Metrics are fractions, or in the unit of the data. ``summary`` has the worst tenth and the other means.
        """
        found: Mapping[str, Any] = self.summary.get("metrics") or {"accuracy": self.summary.get("accuracy", {})}
        return {name: means.get("mean") for name, means in found.items()}

    @property
    def costs(self) -> dict[str, float | None]:
        """The costs of the run, all clients and rounds together.

        ``bytes_up``, ``bytes_down`` and ``flops`` are of training, ``flops_evaluation`` of the evaluations; FLOPs are
        None if a network has a layer that cannot be counted. ``seconds`` is the wall clock of training,
        ``seconds_evaluation`` that of the evaluations, ``process_peak`` the largest resident memory in bytes. With
        ``[devices]`` there is ``simulated_seconds``.
        """
        found = self.summary
        simulated = {"simulated_seconds": found["simulated"]["seconds"]} if "simulated" in found else {}
        return {
            "bytes_up": found["bytes"]["up"],
            "bytes_down": found["bytes"]["down"],
            **{key: found[key] for key in ("flops", "flops_evaluation", "seconds", "seconds_evaluation")},
            "process_peak": found["memory"]["process_peak"],
            **simulated,
        }

    @cached_property
    def config(self) -> Config:
        """The configuration with all defaults, as config.toml has it."""
        return Config.stored(self.run_dir / "config.toml")

    @cached_property
    def rounds(self) -> dict[str, list[Any]]:
        """The lines of rounds.jsonl as columns, such as ``rounds["accuracy.mean"]``; None where a line has no value.

        ``pandas.DataFrame(result.rounds)`` has a row for each round, from round 0.
        """
        return _columns([_flat(row) for row in self._lines("rounds.jsonl")])

    @cached_property
    def clients(self) -> dict[str, list[Any]]:
        """The tests of the clients that the run reports, as columns; one entry per client.

        They are of the round that the run keeps, on test rows. Columns are ``client``, ``model``, ``examples``,
        ``accuracy``, ``metrics.auroc`` with ``run.metrics`` and others, and ``name`` where clients have names.
        """
        return _columns([_flat(row) for row in tested_clients(self.run_dir, self.summary).values()])

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of clients.jsonl, for ``pandas.DataFrame(result.records())``.

        There is a record for each round and client that trained or was tested. Nested keys are joined by dots.
        """
        return [_flat(row) for row in self._lines("clients.jsonl")]

    def curve(self) -> Curve:
        """Return the means over clients of the headline metric in the evaluated rounds."""
        tested = [row for row in self._lines("rounds.jsonl") if headline(row)[1].get("mean") is not None]
        sent = [row["totals"]["bytes_up"] + row["totals"]["bytes_down"] for row in tested]
        return Curve([row["round"] for row in tested], sent, [headline(row)[1]["mean"] for row in tested])

    def plot(self) -> Figure:
        """Return a picture of the headline metric over rounds and over bytes; ``savefig`` writes it to a file."""
        return drawn({self.summary["algorithm"]: self.curve()}, headline(self.summary)[0])

    def model(
        self, client: int | str | None = None, *, predictor: str | None = None, capacity: float | None = None
    ) -> TrainedModel:
        """Return a trained model as an ``nn.Module``, as `polyfed.trained_model` does."""
        from polyfed.trained.load import trained_model  # torch is loaded for a model, not for a result

        return trained_model(self.run_dir, client, predictor=predictor, capacity=capacity)

    def adapt(
        self,
        data: Path | str,
        *,
        rounds: int | None = None,
        model: str | None = None,
        capacity: float | None = None,
        out: Path | str | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> Adapted:
        """Let a client that was never trained adapt to this run, as `polyfed.trained.adapt.adapt` does."""
        from polyfed.trained.adapt import adapt

        return adapt(
            self.run_dir,
            data,
            rounds=rounds,
            model=model,
            capacity=capacity,
            out=out,
            options=options,
            device=device,
        )

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir / name
        try:
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise RunDirError(f"{path} cannot be read ({error}); restore the run directory") from error

    def _show(self, console: Console) -> None:
        summary = {**self.summary, "run_dir": str(self.run_dir)}
        show(console, {summary["algorithm"]: summary})

    def __str__(self) -> str:
        """The closing table of the run."""
        return text(self._show)

    def __repr__(self) -> str:
        """One line."""
        metric, means = headline(self.summary)
        reached = measured(metric, means.get("mean"))
        return f"RunResult({str(self.run_dir)!r}: {self.summary['algorithm']}, {metric} {reached})"

    def _repr_html_(self) -> str:
        """The closing table, for a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"


def load_run(path: Path | str) -> RunResult:
    """Return the result of a complete run, simulated or deployed, from its run directory.

    The user's own networks and algorithms need not be there.

    Raises:
        RunDirError: the folder holds no run, the run is not complete, or its summary cannot be read.
    """
    folder = Path(path)
    own = (next(folder.glob(f"{depth}trained.json"), None) for depth in ("", "*/", "*/*/"))
    if any(own) and not (folder / "rounds.jsonl").exists():
        raise RunDirError(
            f"{folder} is a deployed client's: it holds a model and no results; open it with "
            f"polyfed.trained_model({str(folder)!r}), or the server's run directory with load_run"
        )
    if not (folder / "config.toml").exists():
        raise RunDirError(f"{folder} holds no run: it has no config.toml; give the run directory of a run")
    if (summary := summary_of(folder)) is None:
        raise RunDirError(f"the run in {folder} is not complete; continue it with `polyfed resume {folder}`")
    return RunResult(folder, summary)


def summary_of(run_dir: Path) -> dict[str, Any] | None:
    """Return summary.json of a complete run; None while the run is not complete.

    Raises:
        RunDirError: the file is not JSON.
    """
    path = run_dir / "summary.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path} cannot be read: {error}; remove it and resume the run") from error


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a line of a log with nested keys joined by dots; lists stay."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns of equal length; None where a row lacks a key."""
    return {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
