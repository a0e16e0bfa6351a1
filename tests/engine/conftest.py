"""Real SuperLink, SuperNodes and client processes on loopback: the second step of .ci/run, `pytest tests/engine`.

Plain `pytest` leaves this folder alone: it takes minutes, and its bars are other ones than those of the fast tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Only who names this folder runs it."""
    asked = any("engine" in str(argument) for argument in config.invocation_params.args)
    return None if asked else True
