"""What a worker process answers; in a module that one that starts afresh can import."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from polyfed.base.errors import DivergedError


def echo() -> dict[str, Any]:
    """Each request by name."""

    def fail(what: str) -> None:
        raise DivergedError(what) if what == "ours" else KeyError(what)

    return {
        "echo": lambda *given: given,
        "pid": os.getpid,
        "threads": torch.get_num_threads,
        "fail": fail,
        "sleep": lambda seconds: time.sleep(seconds),
        "die": lambda: os._exit(7),
    }
