"""The errors of a client, as its own terminal shows them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path


class ErrorLog:
    """The new lines of a client's errors.jsonl, which has the full text of what the server learns in short.

    Args:
        path: the file; it need not exist yet. What it holds already is not new.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = path.stat().st_size if path.exists() else 0
        self._last = ""

    def new(self) -> list[str]:
        """Return the errors since the last call; one that repeats the error before it is left out."""
        found: list[str] = []
        if not self.path.exists():
            return found
        with open(self.path, "rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):  # the rest is being written
                    break
                self._place += len(line)
                with suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    what = "describe" if row["kind"] == "describe" else f"{row['kind']} in round {row['key'][0]}"
                    text = f"{what}: {row['error']}"
                    if text != self._last:
                        found.append(f"{text}\n  ({row['time']}; {self.path} has the traceback)")
                    self._last = text
        return found
