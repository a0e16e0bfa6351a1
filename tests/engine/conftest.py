"""Real SuperLink, SuperNodes and client processes on loopback: the second step of .ci/run, `pytest tests/engine`.

Plain `pytest` leaves this folder alone: it takes minutes, and its bars are other ones than those of the fast tests.
Nothing here is to be over by a certain time: patience is several times what a quiet machine takes, and costs nothing
where all goes well.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Only who names this folder runs it."""
    here = Path(__file__).parent
    given = (config.invocation_params.dir / str(word).split("::")[0] for word in config.invocation_params.args)
    return None if any(path.resolve().is_relative_to(here) for path in given) else True


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """One after another: each test here starts more processes than there are cores."""
    return 0
