"""Small runs, and what of a run directory must not depend on how often it was interrupted."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from polyfed.config import Config

#: What may differ between two runs of one configuration.
INCIDENTAL = {"seconds", "seconds_evaluation", "memory", "peak", "step_peak", "run_dir"}


def config(**sections: dict[str, Any]) -> Config:
    """Four clients with dense networks and a small shared CNN on 16x16 digits: private state, and the server's."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"rounds": 4, "eval_every": 2, "checkpoint_every": 1, "threads": 1, "driver": "sequential"},
        "data": {"dataset": "digits", "image_size": 16},
        "partition": {"kind": "classes", "classes_per_client": 3, "samples_per_client": 16},
        "clients": {"count": 4, "participation": 0.5, "models": ["mlp(hidden=(12, 8))"]},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.05, "momentum": 0.9},
        "algorithm": {"name": "fedmrl", "auxiliary": "cnn5", "rep_dim": 4},
    }
    for name, keys in sections.items():
        tables[name] = keys if name == "algorithm" else {**tables.get(name, {}), **keys}
    return Config.parse(tables)


def lines(path: Path) -> list[dict[str, Any]]:
    """A log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_so_far(path: Path) -> list[str]:
    """The whole lines of a log of a run that was killed; there may be none."""
    return path.read_text().splitlines() if path.exists() else []


def essence(value: Any) -> Any:
    """A log or summary without what may differ."""
    if isinstance(value, dict):
        return {key: essence(item) for key, item in value.items() if key not in INCIDENTAL}
    return [essence(item) for item in value] if isinstance(value, list) else value


def rows(states: Path) -> list[tuple[Any, ...]]:
    """The index of private states: client, round, SHA-256 and, of small ones, the state itself."""
    if not (states / "index.sqlite").exists():
        return []
    with closing(sqlite3.connect(states / "index.sqlite")) as index:
        return list(index.execute("SELECT client, round, sha256, data FROM states ORDER BY client, round"))


def outcome(folder: Path) -> dict[str, Any]:
    """All of a complete run that must be the same, interrupted or not: states bitwise, logs and summary."""
    manifest = json.loads((folder / "checkpoint" / "manifest.json").read_text())["manifest"]
    kept = sorted(path for name in ("checkpoint", "states") for path in (folder / name).glob("**/*.safetensors"))
    return {
        "round": manifest["round"],
        "states": rows(folder / "states"),
        "seal": manifest["states"],
        "files": {str(path.relative_to(folder)): path.read_bytes() for path in kept},
        "rounds": essence(lines(folder / "rounds.jsonl")),
        "clients": essence(lines(folder / "clients.jsonl")),
        "summary": essence(json.loads((folder / "summary.json").read_text())),
        "progress": essence(manifest["progress"]),
    }


def same(folder: Path, other: Path) -> None:
    """Assert that two complete runs ended alike; says what differs."""
    one, two = outcome(folder), outcome(other)
    assert one["files"].keys() == two["files"].keys()
    for key in one:
        assert one[key] == two[key], key
