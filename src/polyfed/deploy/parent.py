"""A process that ends with the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import signal


def with_parent() -> None:  # pragma: no cover - runs in the child, before its program
    """Let the kernel end this process with its parent, also where that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; Linux only
