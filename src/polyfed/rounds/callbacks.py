"""Callbacks, which receive the events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from polyfed.config import Config


class Callback(Protocol):
    """Receives the events of a run and changes nothing."""

    def started(self, run_dir: Path, config: Config, first_round: int) -> None:
        """The run is about to play ``first_round`` (1 for a new run)."""

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """A round is over; ``row`` is its line of rounds.jsonl."""

    def note(self, text: str) -> None:
        """Receive a line of text about the run."""

    def ended(self, summary: Mapping[str, Any]) -> None:
        """The run is over; ``summary`` is summary.json."""


class Quiet(Callback):
    """A callback that ignores all events."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the checkpoint holds the last complete round or, rarely, an earlier round.

    Args:
        run_dir: the directory that `polyfed resume` resumes.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(str(run_dir))
        self.run_dir = run_dir
