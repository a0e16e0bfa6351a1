"""What a client's terminal shows of its errors."""

from __future__ import annotations

import json
from pathlib import Path

from polyfed.deploy.host.errors import ErrorLog


def row(error: str, kind: str = "describe", round_: int = 0) -> str:
    return (
        json.dumps({"time": "12:00", "kind": kind, "key": [round_, 1, 1], "error": error, "traceback": "Trace"}) + "\n"
    )


def test_each_new_error_is_shown_in_full_and_once(tmp_path: Path) -> None:
    """Catches errors of an earlier run, half a line, and the same refusal every minute."""
    path = tmp_path / "errors.jsonl"
    path.write_text(row("DataError: old"))
    log = ErrorLog(path)
    assert log.new() == []
    long = "DataError: " + "x" * 5000
    with open(path, "a") as file:
        file.write(row(long) + row(long) + row("ModelError: no", "train", 3)[:20])
    (text,) = log.new()
    assert text == f"describe: {long}\n  (12:00; {path} has the traceback)"
    with open(path, "a") as file:
        file.write(row("ModelError: no", "train", 3)[20:])
    (text,) = log.new()
    assert text.startswith("train in round 3: ModelError: no")
    assert "Trace" not in text
    assert ErrorLog(tmp_path / "none").new() == []
