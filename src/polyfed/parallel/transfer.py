"""Transfers Python values between the processes of a run: a pickle in the pipe, large arrays in files without a name.

A pipe carries half a gigabyte per second, and its output is copied three more times into new memory. So arrays of
64 kB and more are written once, into files that exist in memory only, and the pipe carries their descriptors; the
receiver maps the files and copies nothing. A mapping is private, so it may be written to like any memory.

No value comes from outside: both ends are forks, or children, of one program.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: Bytes from which an array goes into a file; for smaller arrays the pipe is as fast.
LARGE = 1 << 16
#: Bytes of a file that arrays share; keeping one array keeps the file's other arrays in memory, so it is small.
FULL = 1 << 23
#: About the most files of a value: descriptors in a pipe count against a user's limit.
MOST = 16
#: Arrays begin in a file at multiples of this number of bytes, where a mapping can begin.
PAGE = mmap.ALLOCATIONGRANULARITY


def send(pipe: Any, value: Any) -> None:
    """Send a value whose large parts are contiguous numpy arrays.

    Raises:
        OSError: the other end is gone.
        BaseException: pickling failed; nothing was sent.
    """
    body, files = _packed(value)
    try:
        pipe.send((body, [sizes for _, sizes in files]))
        if files:
            with socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                for descriptor, _ in files:
                    socket.send_fds(channel, [b"f"], [descriptor])
    finally:
        _close(files)


def receive(pipe: Any) -> Any:
    """Receive a value that `send` sent.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    body, files = pipe.recv()
    descriptors: list[int] = []
    if files:
        with socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            for _ in files:  # all descriptors first: a rest in the pipe would be read as the next message
                came, descriptor, *_ = socket.recv_fds(channel, 1, 1)
                descriptors += descriptor
                if not came:
                    break
    try:
        if len(descriptors) < len(files):
            raise EOFError(f"got {len(descriptors)} of {len(files)} files; are too many files open?")
        buffers = [array for file, sizes in zip(descriptors, files, strict=True) for array in _mapped(file, sizes)]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return pickle.loads(body, buffers=buffers)


def _packed(value: Any) -> tuple[bytes, list[tuple[int, list[int]]]]:
    """Return the pickle, and the files of large arrays: each a descriptor and the arrays' sizes."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return pickle.dumps(value, protocol=5), []
    large: list[memoryview] = []

    def aside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= LARGE:
            large.append(raw)
        return raw.nbytes < LARGE  # true: the array stays in the pickle

    body = pickle.dumps(value, protocol=5, buffer_callback=aside)
    files: list[tuple[int, list[int]]] = []
    try:
        files.extend((_write(group), [raw.nbytes for raw in group]) for group in _groups(large))
    except OSError:  # descriptors or memory are short: the pipe needs neither
        _close(files)
        return pickle.dumps(value, protocol=5), []
    return body, files


def _groups(large: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Yield the arrays of each file, in order."""
    full = max(FULL, 2 * sum(raw.nbytes for raw in large) // MOST)
    group: list[memoryview] = []
    for raw in large:
        if group and sum(raw.nbytes for raw in group) + raw.nbytes > full:
            yield group
            group = []
        group.append(raw)
    if group:
        yield group


def _write(group: Sequence[memoryview]) -> int:
    """Write ``group`` into a file without a name and return its descriptor."""
    descriptor = os.memfd_create("polyfed", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            for raw in group:
                file.seek(_up(file.tell()))
                file.write(raw)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _mapped(descriptor: int, sizes: Sequence[int]) -> list[memoryview]:
    """Return the arrays of a file. The mapping lasts as long as they do and, unlike mmap's, needs no descriptor."""
    length = os.fstat(descriptor).st_size
    whole = torch.from_file(f"/proc/self/fd/{descriptor}", shared=False, size=length, dtype=torch.uint8)
    memory = whole.numpy().data
    found: list[memoryview] = []
    start = 0
    for size in sizes:
        found.append(memory[start : start + size])
        start = _up(start + size)
    return found


def _up(position: int) -> int:
    return -(-position // PAGE) * PAGE


def _close(files: Sequence[tuple[int, list[int]]]) -> None:
    for descriptor, _ in files:
        os.close(descriptor)
