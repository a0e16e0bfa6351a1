"""Settings of glibc for freed memory, which do nothing with another C library, and of Python's garbage collection."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager, suppress

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1


def give_back() -> None:
    """Return freed memory to the system: after dealing five million rows, glibc keeps 200 MB for later."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def without_collection() -> Generator[None]:
    """Collect no garbage inside the block: collections during a large import take as long as the import itself."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def map_large_blocks() -> None:
    """Return blocks of 4 MB and more to the system as soon as they are freed, from now on.

    For a process that passes large messages on and trains nothing: else glibc keeps such blocks in its heap, in pieces,
    and the process grows with the number of messages. In a process that trains networks it would cost page faults.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def keep_freed_blocks() -> None:
    """Keep freed blocks of up to 32 MB, the most that glibc allows, for the next step, from now on.

    For a process that trains networks: each step allocates the same blocks, and each new page costs a page fault.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
