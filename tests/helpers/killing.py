"""Runs in processes of their own that end at an appointed moment, forked from one that has imported torch already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal

from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import state_store

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.utils.flop_counter", "polyfed.simulation.simulate", "polyfed.algorithms.fedmrl"]
)

#: Which calls count: those up to the first training, those after it, those of the latter that write a checkpoint.
Phase = Literal["start", "rounds", "saving"]

#: Between the sizes of the two networks' states: one is a row of the index, the other a file.
INLINE = 20_000
_SAVING = ("run_dir.py", "state_store.py", "files.py")


class Countdown(Quiet):
    """Counts the calls of all functions, Python's and C's; at the appointed one, sends the process a signal.

    The moment is thus one of a million, the same at every try: within a step, an evaluation, a write, or between the
    writing of a file and its renaming.
    """

    def __init__(self, phase: Phase, moment: int, sent: int) -> None:
        self.phase, self.moment, self.sent = phase, moment, sent
        self.counts: dict[str, int] = {"start": 0, "rounds": 0, "saving": 0}
        self.now: Phase = "start"

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.counts[self.now] += 1
        if self.now == "rounds" and frame.f_code.co_filename.endswith(_SAVING):
            self.counts["saving"] += 1
            self._perhaps("saving")
        self._perhaps(self.now)

    def _perhaps(self, phase: Phase) -> None:
        if phase == self.phase and self.counts[phase] == self.moment:
            sys.setprofile(None)
            os.kill(os.getpid(), self.sent)

    def started(self, run_dir: Path, config: Any, first_round: int) -> None:
        """Begin to count."""
        self.now = "start" if first_round == 1 else "rounds"
        sys.setprofile(self)

    def round_ended(self, row: Any) -> None:
        """The first rounds find out what a step costs, in very many calls; then the run proper begins."""
        if row["round"] >= 2:
            self.now = "rounds"


def play(config: Any, folder: Path, callback: Countdown, counts: Path | None, rounds: int | None = None) -> None:
    """Start the run, or go on with it (to more rounds); without a moment or a file for the counts, at full speed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    state_store.INLINE = INLINE
    watcher = callback if callback.moment or counts else Quiet()
    try:
        if (folder / "config.toml").exists():
            resume(folder, rounds=rounds, callbacks=[watcher], progress=False)
        else:
            simulate(config, out=folder, callbacks=[watcher], progress=False)
    except Interrupted:
        sys.exit(130)
    finally:
        sys.setprofile(None)
    if counts:
        counts.write_text(json.dumps(callback.counts))


def start(
    config: Any,
    folder: Path,
    *,
    phase: Phase = "rounds",
    moment: int = 0,
    sent: int = signal.SIGKILL,
    counts: Path | None = None,
    daemon: bool = True,
    rounds: int | None = None,
) -> Any:
    """A process that plays a run; one that is to have workers of its own must not be a daemon."""
    args = (config, folder, Countdown(phase, moment, sent), counts, rounds)
    process = CONTEXT.Process(target=play, args=args, daemon=daemon)
    process.start()
    return process


def ended(process: Any) -> int:
    """Its exit code: 0, 130, or minus the signal that ended it."""
    process.join(200)
    assert process.exitcode is not None, "the run hangs"
    return int(process.exitcode)
