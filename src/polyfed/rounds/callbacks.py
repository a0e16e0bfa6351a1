"""Callbacks, which receive the events of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from polyfed.base.errors import ConfigError

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


class Several(Callback):
    """Passes each event on to several callbacks, in order.

    Args:
        callbacks: the callbacks.

    Raises:
        ConfigError: an entry is no callback.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        events = ("started", "round_ended", "note", "ended")
        listed = isinstance(callbacks, list | tuple)
        wrong = [one for one in callbacks if not all(hasattr(one, name) for name in events)] if listed else [callbacks]
        if wrong:
            raise ConfigError(
                f"callbacks: got {type(wrong[0]).__name__}; expected a list of objects with the methods "
                f"{', '.join(events)}: derive yours from polyfed.Callback"
            )
        self.callbacks = tuple(callbacks)

    def started(self, run_dir: Path, config: Config, first_round: int) -> None:
        """Pass the event on."""
        for one in self.callbacks:
            one.started(run_dir, config, first_round)

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """Pass the event on."""
        for one in self.callbacks:
            one.round_ended(row)

    def note(self, text: str) -> None:
        """Pass the text on."""
        for one in self.callbacks:
            one.note(text)

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Pass the event on."""
        for one in self.callbacks:
            one.ended(summary)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the checkpoint holds the last complete round or, rarely, an earlier round.

    Args:
        run_dir: the directory that `polyfed resume` resumes.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(str(run_dir))
        self.run_dir = run_dir
