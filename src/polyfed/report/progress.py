"""The progress of a run: a line that is redrawn in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from polyfed.metrics.catalogue import headline
from polyfed.report.consoles import console
from polyfed.report.units import clock, duration, measured, size
from polyfed.rounds.callbacks import Several

if TYPE_CHECKING:
    from polyfed.config import Config
    from polyfed.rounds.callbacks import Callback

_LINES = 20  # about the number of plain lines that a run may print


Summary = Mapping[str, Any]
Row = Mapping[str, Any]


class _Clock:
    """The elapsed and the remaining time of a run, by the wall clock, evaluation included."""

    def __init__(self, first_round: int, now: Callable[[], float]) -> None:
        self._done, self._now, self._start = first_round - 1, now, now()

    def elapsed(self) -> float:
        """Return the seconds since this process began or resumed the run."""
        return self._now() - self._start

    def left(self, row: Row) -> float | None:
        """Return the seconds to the end; None before the first round is over, and after the last."""
        played, more = row["round"] - self._done, row["rounds"] - row["round"]
        return self.elapsed() / played * more if played > 0 and more > 0 else None


def _traffic(row: Row) -> int:
    totals = row.get("totals", {})
    return int(totals.get("bytes_up", 0)) + int(totals.get("bytes_down", 0))


class Lines:
    """Progress as plain lines, at most about 20 per run, for logs and pipes.

    Args:
        console: the output.
        label: the name of the run.
        now: a clock in seconds.
    """

    def __init__(self, console: Console, label: str, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._label, self._now = console, label, now
        self._clock = _Clock(1, now)
        self._last: int | None = None

    def _say(self, text: str) -> None:
        # A record is one line: without wrapping, without colours, and brackets in paths are printed as they are.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def started(self, run_dir: Path, config: Config, first_round: int) -> None:
        """Print the name, the rounds and the directory of the run."""
        self._clock = _Clock(first_round, self._now)
        goes_on = f", from round {first_round}" if first_round > 1 else ""
        self._say(f"{self._label}: {config.run.rounds} rounds{goes_on}, in {run_dir}")

    def round_ended(self, row: Row) -> None:
        """Print a line for an evaluated round, unless the last line is too recent."""
        (metric, found), round_, rounds = headline(row), row["round"], row["rounds"]
        recent = self._last is not None and round_ != rounds and round_ - self._last < rounds / _LINES
        if not found or recent:
            return
        self._last = round_
        parts = [
            f"round {round_:>{len(str(rounds))}}/{rounds}",
            f"{metric} {measured(metric, found['mean'])}",
            f"{size(_traffic(row))} up and down",
            duration(self._clock.elapsed()),
        ]
        left = self._clock.left(row)
        self._say(f"{self._label}: {'  '.join(parts)}{'' if left is None else f'  ETA {duration(left)}'}")

    def note(self, text: str) -> None:
        """Print a line of text."""
        self._say(f"{self._label}: {text}")

    def ended(self, summary: Summary) -> None:
        """Print nothing: the last round has its line, and the table follows."""


class Live:
    """Progress as a line that is redrawn, for a terminal.

    Args:
        console: the terminal.
        label: the name of the run.
        now: a clock in seconds.
    """

    def __init__(self, console: Console, label: str, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._clock = _Clock(1, now)
        self._reached = "accuracy -"
        self._bar = Progress(
            # The name of the run is shortened first if 80 columns are too few.
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[told]}"),
            console=console,
        )
        self._task = self._bar.add_task(label, total=None, told="")

    def started(self, run_dir: Path, config: Config, first_round: int) -> None:
        """Draw the bar."""
        self._clock = _Clock(first_round, self._now)
        self._bar.update(self._task, total=config.run.rounds, completed=first_round - 1)
        self._bar.start()

    def round_ended(self, row: Row) -> None:
        """Move the bar."""
        metric, found = headline(row)
        if found:
            self._reached = f"{metric} {measured(metric, found['mean'])}"
        left = self._clock.left(row)
        told = f"{self._reached}  {size(_traffic(row))}  {clock(self._clock.elapsed())}"
        told += "" if left is None else f"  ETA {clock(left)}"
        self._bar.update(self._task, completed=row["round"], told=told)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def ended(self, summary: Summary) -> None:
        """Leave the finished bar where it is."""
        self.close()

    def close(self) -> None:
        """Release the terminal, also after an error."""
        self._bar.stop()


def callback_for(terminal: Console) -> Callable[[str], Callback]:
    """Return a maker of callbacks by the name of the run: live for a terminal, plain lines otherwise."""
    return lambda label: Live(terminal, label) if terminal.is_terminal else Lines(terminal, label)


def reporting(label: str, callbacks: Sequence[Callback], progress: bool) -> Several:
    """Return what passes the events of a run on to the callbacks, after the progress on standard output if asked for.

    Raises:
        ConfigError: an entry is no callback.
    """
    asked = Several(callbacks).callbacks
    return Several([callback_for(console())(label), *asked]) if progress else Several(asked)


def close(callback: Callback) -> None:
    """Have a callback release the terminal, if it or one that it passes events on to holds it."""
    for one in callback.callbacks if isinstance(callback, Several) else (callback,):
        if isinstance(one, Live):
            one.close()
