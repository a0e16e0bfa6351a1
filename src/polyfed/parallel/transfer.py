"""Transfers Python values between the processes of a run: a pickle in the pipe, large arrays in files without a name.

A pipe carries half a gigabyte per second, and its output is copied three more times into new memory. So arrays of
64 kB and more are written once, into files that exist in memory only, and the pipe carries their descriptors; the
receiver maps the files and copies nothing. A mapping is private, so it may be written to like any memory. A value that
goes back and forth unchanged, such as a client's private state, is a `Parcel`, whose file is written once.

No value comes from outside: both ends are forks, or children, of one program.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import socket
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
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


class Parcel:
    """A value whose large arrays were written once, into one file, and which can be sent any number of times.

    Args:
        body: the pickle of the value without these arrays.
        descriptor: the file, which the parcel closes.
        sizes: bytes of each array.
    """

    def __init__(self, body: bytes, descriptor: int, sizes: Sequence[int]) -> None:
        self.body, self.descriptor, self.sizes = body, descriptor, sizes
        weakref.finalize(self, os.close, descriptor)


def pack(value: Any) -> Any:
    """Return a parcel of the value; without large arrays, or where files are short, the value itself."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return value
    large: list[memoryview] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=_aside(large))
    if not large:
        return value
    try:
        return Parcel(body, _write(large), [raw.nbytes for raw in large])
    except OSError:
        return value


def unpack(value: Any) -> Any:
    """Return the value of a parcel; any other value as it is."""
    if not isinstance(value, Parcel):
        return value
    return pickle.loads(value.body, buffers=_mapped(value.descriptor, value.sizes))


class _Pickler(pickle.Pickler):
    """Puts parcels aside, by their numbers."""

    def __init__(self, file: io.BytesIO, aside: Callable[[pickle.PickleBuffer], bool] | None = None) -> None:
        super().__init__(file, protocol=5, buffer_callback=aside)
        self.parcels: list[Parcel] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Parcel):
            return None
        self.parcels.append(obj)
        return len(self.parcels) - 1, obj.body, obj.sizes


class _Unpickler(pickle.Unpickler):
    def __init__(self, body: bytes, buffers: Iterable[memoryview], descriptors: list[int]) -> None:
        super().__init__(io.BytesIO(body), buffers=buffers)
        self._descriptors = descriptors

    def persistent_load(self, pid: Any) -> Parcel:
        number, body, sizes = pid
        parcel = Parcel(body, self._descriptors[number], sizes)
        self._descriptors[number] = -1  # the parcel's from now on
        return parcel


def send(pipe: Any, value: Any) -> None:
    """Send a value whose large parts are parcels or contiguous numpy arrays.

    Raises:
        OSError: the other end is gone.
        BaseException: pickling failed; nothing was sent.
    """
    body, files, parcels = _packed(value)
    descriptors = [*(parcel.descriptor for parcel in parcels), *(descriptor for descriptor, _ in files)]
    try:
        pipe.send((body, [sizes for _, sizes in files], len(parcels)))
        if descriptors:
            with socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                for descriptor in descriptors:
                    socket.send_fds(channel, [b"f"], [descriptor])
    finally:
        _close(files)


def receive(pipe: Any) -> Any:
    """Receive a value that `send` sent.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    body, files, parcels = pipe.recv()
    expected = parcels + len(files)
    descriptors: list[int] = []
    if expected:
        with socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            for _ in range(expected):  # all descriptors first: a rest in the pipe would be read as the next message
                came, descriptor, *_ = socket.recv_fds(channel, 1, 1)
                descriptors += descriptor
                if not came:
                    break
    try:
        if len(descriptors) < expected:
            raise EOFError(f"got {len(descriptors)} of {expected} files; are too many files open?")
        own = zip(descriptors[parcels:], files, strict=True)
        buffers = [array for file, sizes in own for array in _mapped(file, sizes)]
        return _Unpickler(body, buffers, descriptors).load()
    finally:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _packed(value: Any) -> tuple[bytes, list[tuple[int, list[int]]], list[Parcel]]:
    """Return the pickle, the files of large arrays, each a descriptor and the arrays' sizes, and the parcels."""
    large: list[memoryview] = []
    files: list[tuple[int, list[int]]] = []
    if hasattr(os, "memfd_create"):  # Linux
        pickler = _Pickler(body := io.BytesIO(), _aside(large))
        pickler.dump(value)
        try:
            files.extend((_write(group), [raw.nbytes for raw in group]) for group in _groups(large))
            return body.getvalue(), files, pickler.parcels
        except OSError:  # descriptors or memory are short: the pipe needs neither
            _close(files)
    pickler = _Pickler(body := io.BytesIO())
    pickler.dump(value)
    return body.getvalue(), [], pickler.parcels


def _aside(large: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    """Return the callback of a pickler that adds large arrays to ``large`` and leaves others in the pickle."""

    def aside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= LARGE:
            large.append(raw)
        return raw.nbytes < LARGE  # true: the array stays in the pickle

    return aside


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
    whole = torch.from_file(
        f"/proc/self/fd/{descriptor}", shared=False, size=os.fstat(descriptor).st_size, dtype=torch.uint8
    )
    memory = whole.numpy().data
    starts = accumulate(map(_up, sizes), initial=0)
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _up(position: int) -> int:
    return -(-position // PAGE) * PAGE


def _close(files: Sequence[tuple[int, list[int]]]) -> None:
    for descriptor, _ in files:
        os.close(descriptor)
