"""What a person sees of a run: progress while it goes, a table when it is over. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from polyfed.config import Config
    from polyfed.runtime.watch import Watch

Summary = Mapping[str, Any]
Row = Mapping[str, Any]

TRAINING_TIME = "Training time is wall clock without evaluation, and FLOPs are of training alone."

SIMULATED_TIME = (
    "Simulated time is of training on the devices of the table; 'to' is the time to the first evaluation at a target."
)

_BOUNDLESS = 10_000  # columns
_GAP = 2  # columns between columns
_FOLDED = 10  # columns to which text may be folded
_LINES = 20  # about as many plain lines as a run may print
_NOTEWORTHY = 0.01  # share of the bytes that are not values above which the table's notes tell them apart


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.8312 -> "83.1 %"; None, of what was not measured, -> "-"."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000: 1234567 -> "1.23 MB"."""
    return _scaled(count, "B")


def flops(count: float) -> str:
    """Floating-point operations for people: 1.2e12 -> "1.2 T"."""
    return _scaled(count, "")


def _scaled(count: float, unit: str) -> str:
    if count < 1000:
        return f"{count:.0f} {unit}".rstrip()
    power = 1
    while count >= 999.5 * 1000**power and power < 6:  # 999.6 kB is 1 MB, not 1e+03 kB
        power += 1
    return f"{count / 1000**power:.3g} {' kMGTPE'[power]}{unit}"


def duration(seconds: float) -> str:
    """Seconds for people: 3725 -> "1 h 02 min"; 95 -> "1 min 35 s"; 8.25 -> "8.2 s"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """Seconds where there is little room: 3725 -> "1:02:05"; 95 -> "1:35"."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class _Clock:
    """How far a run is and when it will be over, by the wall clock, evaluation included."""

    def __init__(self, first_round: int, now: Callable[[], float]) -> None:
        self._done, self._now, self._start = first_round - 1, now, now()

    def elapsed(self) -> float:
        """Seconds since this process took up the run."""
        return self._now() - self._start

    def left(self, row: Row) -> float | None:
        """Seconds to the end; None before the first round is over, and after the last."""
        played, more = row["round"] - self._done, row["rounds"] - row["round"]
        return self.elapsed() / played * more if played > 0 and more > 0 else None


def _traffic(row: Row) -> int:
    totals = row.get("totals", {})
    return int(totals.get("bytes_up", 0)) + int(totals.get("bytes_down", 0))


class Lines:
    """Progress as plain lines, at most about 20 per run, for logs and pipes.

    Args:
        console: where to.
        label: what is running.
        now: a clock in seconds.
    """

    def __init__(self, console: Console, label: str, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._label, self._now = console, label, now
        self._clock = _Clock(1, now)
        self._last: int | None = None

    def _say(self, text: str) -> None:
        # One record is one line: never wrapped, never coloured, brackets in paths left alone.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def started(self, run_dir: Path, config: Config, first_round: int) -> None:
        """Say what begins, and where it is written."""
        self._clock = _Clock(first_round, self._now)
        goes_on = f", from round {first_round}" if first_round > 1 else ""
        self._say(f"{self._label}: {config.run.rounds} rounds{goes_on}, in {run_dir}")

    def round_ended(self, row: Row) -> None:
        """A line for an evaluated round, unless the one before was only a moment ago."""
        accuracy = row.get("accuracy")
        if accuracy is None:
            return
        last, rounds = row["round"] == row["rounds"], row["rounds"]
        if self._last is not None and not last and row["round"] - self._last < rounds / _LINES:
            return
        self._last = row["round"]
        parts = [
            f"round {row['round']:>{len(str(rounds))}}/{rounds}",
            f"accuracy {percent(accuracy['mean'])}",
            f"{size(_traffic(row))} up and down",
            duration(self._clock.elapsed()),
        ]
        left = self._clock.left(row)
        self._say(f"{self._label}: {'  '.join(parts)}{'' if left is None else f'  ETA {duration(left)}'}")

    def note(self, text: str) -> None:
        """A line of its own."""
        self._say(f"{self._label}: {text}")

    def ended(self, summary: Summary) -> None:
        """Nothing: the last round had its line, and the table follows."""


class Live:
    """Progress as one line that is drawn anew, for a terminal.

    Args:
        console: the terminal.
        label: what is running.
        now: a clock in seconds.
    """

    def __init__(self, console: Console, label: str, now: Callable[[], float] = time.monotonic) -> None:
        self._label, self._now = label, now
        self._clock = _Clock(1, now)
        self._accuracy = "-"
        self._bar = Progress(
            # What is running gives way first where 80 columns are too few.
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[told]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def started(self, run_dir: Path, config: Config, first_round: int) -> None:
        """Draw the bar."""
        self._clock = _Clock(first_round, self._now)
        done = first_round - 1
        self._task = self._bar.add_task(self._label, total=config.run.rounds, completed=done, told="")
        self._bar.start()

    def round_ended(self, row: Row) -> None:
        """Move the bar."""
        if self._task is None:
            return
        if "accuracy" in row:
            self._accuracy = percent(row["accuracy"]["mean"])
        left = self._clock.left(row)
        told = f"accuracy {self._accuracy}  {size(_traffic(row))}  {clock(self._clock.elapsed())}"
        told += "" if left is None else f"  ETA {clock(left)}"
        self._bar.update(self._task, completed=row["round"], told=told)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def ended(self, summary: Summary) -> None:
        """Leave the finished bar where it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self._bar.stop()


def console() -> Console:
    """Standard output; where it is no terminal, as wide as any table: a pipe has no width to cut it to."""
    return Console() if Console().is_terminal else Console(width=_BOUNDLESS)


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    costs: Sequence[str] = (),
) -> None:
    """Print a table, as two where the console is too narrow for it: first without the costs, then these alone.

    Text may be folded, numbers are never cut: what is too wide even so is left to the terminal to wrap.

    Args:
        console: where to.
        headings: one per column; a line break makes a narrow column of a long heading.
        rows: cells as text.
        left: headings of the columns of text.
        costs: headings of the columns of the second table; none keeps it in one.
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
    """A table and how wide it is.

    Attributes:
        width: with nothing folded.
        least: with the text folded as far as it may be.
    """

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> None:
        self._headings, self._rows, self._left = headings, rows, left
        cells = [[line for cell in column for line in cell.split("\n")] for column in zip(headings, *rows, strict=True)]
        wide = [max(map(cell_len, column)) for column in cells]
        text = [heading in left for heading in headings]
        gaps = _GAP * len(headings)
        self.width = sum(wide) + gaps
        self.least = sum(min(w, _FOLDED) if t else w for w, t in zip(wide, text, strict=True)) + gaps

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        for heading in self._headings:
            if heading in self._left:
                table.add_column(heading, overflow="fold")
            else:
                table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(*row)
        return table


def watch_of(console: Console) -> Callable[[str], Watch]:
    """A maker of watches, by what is running: live for a terminal, plain lines otherwise."""
    return lambda label: Live(console, label) if console.is_terminal else Lines(console, label)


def close(watch: Watch) -> None:
    """Let a watch give the terminal back, if it holds it."""
    if isinstance(watch, Live):
        watch.close()


def closing_table(console: Console, summaries: Mapping[str, Summary]) -> None:
    """Print one row per run, the main one first.

    Args:
        console: where to.
        summaries: summary.json of each run, by label.
    """
    targets = targets_of(summaries.values())
    simulated = any("simulated" in summary for summary in summaries.values())
    times = ("simulated\ntime", *(f"to\n{percent(target)}" for target in targets)) if simulated else ()
    costs = ("up", "down", "FLOPs", "training\ntime", "peak\nmemory", *times)
    rows: list[tuple[str, ...]] = []
    for label, summary in summaries.items():
        accuracy, sent = summary["accuracy"], summary["bytes"]
        rows.append(
            (
                label,
                percent(accuracy["mean"]),
                percent(accuracy["worst_decile"]),
                size(sent["up"]),
                size(sent["down"]),
                flops(summary["flops"]),
                duration(summary["seconds"]),
                size(summary["memory"]["process_peak"]),
                *((_told(simulated_time(summary)),) if simulated else ()),
                *(_told(simulated_time(summary, target)) for target in (targets if simulated else ())),
            )
        )
    print_table(console, ("algorithm", "mean", "worst\ntenth", *costs), rows, left=("algorithm",), costs=costs)


def targets_of(summaries: Iterable[Summary]) -> list[float]:
    """The target accuracies that some run reached, ascending."""
    reached = {target["accuracy"] for summary in summaries for target in summary.get("targets", ()) if target}
    return sorted(reached)


def simulated_time(summary: Summary, target: float | None = None) -> float | None:
    """Simulated seconds of a run, or up to a target; None without a simulated clock or where it was not reached."""
    if "simulated" not in summary:
        return None
    if target is None:
        return summary["simulated"]["seconds"]
    found = (reached for reached in summary["targets"] if reached is not None and reached["accuracy"] == target)
    return next((reached["simulated_seconds"] for reached in found), None)


def _told(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def remarks(summaries: Mapping[str, Summary]) -> list[str]:
    """What must be said under the table: who leads the main run, and what the bytes, times and peaks are.

    Args:
        summaries: as for `closing_table`; the first is the main run.
    """
    (main, first), *others = summaries.items()
    mean = first["accuracy"]["mean"]
    said: list[str] = []
    for label, summary in others:
        lead = summary["accuracy"]["mean"]
        if lead > mean:
            said.append(
                f"{label} leads {main}: {percent(lead, 2)} against {percent(mean, 2)} in the mean over clients."
            )
    for label, summary in summaries.items():
        for way in ("up", "down"):
            sent = summary["bytes"]
            total, values = sent[way], sent.get(f"{way}_values", sent[way])
            if total and (total - values) / total > _NOTEWORTHY:
                rest = f"{size(sent.get(f'{way}_indices', 0))} indices, {size(sent.get(f'{way}_header', 0))} header"
                said.append(f"{label}: of the {size(total)} {way}, {size(values)} are values, {rest}.")
    for label, summary in summaries.items():
        if "simulated" in summary and (in_vain := _in_vain(summary["simulated"])):
            said.append(f"{label}: {in_vain}.")
    said.append(TRAINING_TIME)
    if any("simulated" in summary for summary in summaries.values()):
        said.append(SIMULATED_TIME)
    if others:
        said.append("Peak memory is the process's so far, whatever the row, and its workers', which share part of it.")
    return said


def _in_vain(simulated: Summary) -> str:
    """The clients that did not count, by reason, and what they cost; "" if all did."""
    failed = {reason: count for reason, count in simulated["failed"].items() if count}
    if not failed:
        return ""
    wasted = simulated["wasted"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in failed.items())
    void = f"; {simulated['void']} rounds were void" if simulated["void"] else ""
    cost = f"{size(wasted['bytes_up'])} up, {size(wasted['bytes_down'])} down, {flops(wasted['flops'])} FLOPs"
    return f"clients asked in vain: {reasons}{void}; that cost {cost}, which are not in the table"


def show(console: Console, summaries: Mapping[str, Summary], notes: Sequence[str] = ()) -> None:
    """Print the closing table, the notes, the remarks, and where the runs lie.

    Args:
        console: where to.
        summaries: as for `closing_table`.
        notes: what the labels stand for.
    """
    console.print()
    closing_table(console, summaries)
    console.print()
    for remark in (*notes, *remarks(summaries)):
        console.print(remark, soft_wrap=True, markup=False, highlight=False)
    first = next(iter(summaries.values()))
    console.print(f"The run lies in {Path(first['run_dir']).absolute()}", soft_wrap=True, markup=False, highlight=False)
