"""What glibc does with freed memory. Elsewhere nothing is done."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
_LARGE = 4 << 20  # bytes


def give_back() -> None:
    """Return freed memory to the system: of dealing five million rows, glibc keeps 200 MB for later."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """From now on blocks of 4 MB and more go back to the system as soon as they are freed.

    For a process that passes large messages on and trains nothing: else glibc keeps such blocks in its heap, in pieces,
    and the process grows with the number of messages. Where networks are trained it would cost page faults.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
