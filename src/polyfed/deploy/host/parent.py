"""Processes that end with their parents."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable


def with_parent() -> None:  # pragma: no cover - runs in the child, before its program
    """Have the kernel end this process with its parent, also where the parent is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; Linux only


def watch_parent(last: Callable[[], None], every: float = 0.5) -> None:
    """End this process soon after its parent has ended, and call ``last`` just before.

    For a run whose server was killed: the run would try for long to reach it, and hold its run directory meanwhile.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        try:
            last()
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="polyfed-parent", daemon=True).start()
