"""Settings of glibc for freed memory; with another C library the functions do nothing."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
_LARGE = 4 << 20  # bytes


def give_back() -> None:
    """Return freed memory to the system: after dealing five million rows, glibc keeps 200 MB for later."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Return blocks of 4 MB and more to the system as soon as they are freed, from now on.

    For a process that passes large messages on and trains nothing: else glibc keeps such blocks in its heap, in pieces,
    and the process grows with the number of messages. In a process that trains networks it would cost page faults.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
