"""What goes between processes of our own: large arrays beside the pipe, and nothing shared or left open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyfed.parallel import transfer

LARGE = transfer.LARGE // 8


def across(value: Any, callback: Callable[[Any], object] = lambda pipe: None) -> Any:
    """What arrives of a value; sending and receiving go on at the same time."""
    ours, theirs = Pipe()
    sender = threading.Thread(target=transfer.send, args=(theirs, value))
    sender.start()
    callback(ours)
    got = transfer.receive(ours)
    sender.join()
    ours.close()
    theirs.close()
    return got


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count)


def test_arrays_of_any_size_arrive_among_other_things() -> None:
    """Catches arrays in another order, cut, or at another place in the file."""
    arrays = [numbers(n, n) for n in (0, 1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE + 5)]
    got = across({"arrays": arrays, "turned": arrays[-1][:9000].reshape(3, -1).T, "text": "x" * 100_000, "none": None})
    for one, other in zip(got["arrays"], arrays, strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(got["turned"], arrays[-1][:9000].reshape(3, -1).T)
    assert (got["text"], got["none"]) == ("x" * 100_000, None)


def test_what_arrives_is_the_receivers_own() -> None:
    """Catches memory that both ends write to, or that the receiver may not write to."""
    sent = {"large": numbers(LARGE), "small": numbers(5)}
    before = {name: array.copy() for name, array in sent.items()}
    got = across(sent)
    for name in sent:
        sent[name][:] = 7
        assert np.array_equal(got[name], before[name])
        got[name][:] = 8


def test_large_arrays_go_beside_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches arrays that are pickled after all: megabytes through a pipe of kilobytes."""
    seen: list[int] = []
    reader = transfer._Unpickler
    monkeypatch.setattr(transfer, "_Unpickler", lambda body, *rest: seen.append(len(body)) or reader(body, *rest))
    got = across([numbers(LARGE), numbers(4 * LARGE)])
    assert [len(array) for array in got] == [LARGE, 4 * LARGE]
    assert seen == [seen[0]]
    assert seen[0] < 1000


def test_who_keeps_one_array_does_not_keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one file for everything, whose memory stays as long as any of it."""
    sizes: list[list[int]] = []
    mapped = transfer._mapped
    monkeypatch.setattr(transfer, "_mapped", lambda fd, told: sizes.append(list(told)) or mapped(fd, told))
    across([numbers(transfer.FULL // 16, k) for k in range(5)])
    assert [len(told) for told in sizes] == [2, 2, 1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files")
def test_no_file_stays_open() -> None:
    """Catches descriptors that run out after some rounds, also where what came is kept."""
    across([numbers(LARGE)])
    before = len(os.listdir("/proc/self/fd"))
    kept = [across([numbers(transfer.FULL // 8) for _ in range(4)]) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(kept[0][3], numbers(transfer.FULL // 8))


def test_few_files_are_on_their_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one file for each of thousands of uploads: descriptors in flight count against a user's limit."""
    monkeypatch.setattr(transfer, "FULL", transfer.LARGE)
    sent = [numbers(LARGE + k, k) for k in range(100)]
    _, files, _ = transfer._packed(sent)
    transfer._close(files)
    assert transfer.MOST // 2 <= len(files) <= transfer.MOST + 1
    assert all(np.array_equal(one, other) for one, other in zip(across(sent), sent, strict=True))


def test_after_a_message_that_could_not_be_mapped_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches descriptors that stay in the pipe, and are read as the length of what comes next."""
    ours, theirs = Pipe()
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_mapped", refuse)
        transfer.send(theirs, [numbers(transfer.FULL // 8, k) for k in range(3)])
        with pytest.raises(OSError, match="Too many"):
            transfer.receive(ours)
    transfer.send(theirs, "next")
    assert transfer.receive(ours) == "next"
    for end in (ours, theirs):
        end.close()


@pytest.mark.parametrize("short", ["descriptors", "system"])
def test_where_there_are_no_files_the_pipe_carries_all(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends because descriptors are short, and systems without such files."""
    if short == "system":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    assert np.array_equal(across([numbers(LARGE)])[0], numbers(LARGE))


def refuse(*_: Any) -> int:
    raise OSError(24, "Too many open files")


def test_a_parcel_is_written_once_and_read_any_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a state that is copied on each of its ways, and one that a receiver has written to."""
    value = {"large": numbers(LARGE), "small": numbers(3), "more": numbers(3 * LARGE, 1)}
    parcel = transfer.pack(value)
    monkeypatch.setattr(transfer, "_write", refuse)
    for sent in (parcel, across(parcel), across([across(parcel)])[0]):
        got = transfer.unpack(sent)
        assert got.keys() == value.keys()
        for name, array in value.items():
            assert np.array_equal(got[name], array)
            got[name][:] = 7


def test_parcels_go_beside_other_arrays_and_each_has_its_own_file() -> None:
    """Catches descriptors that are mixed up."""
    values = [numbers(LARGE + k, k) for k in range(4)]
    got = across((transfer.pack(values[0]), values[1], transfer.pack(values[2]), values[3]))
    assert all(np.array_equal(transfer.unpack(one), other) for one, other in zip(got, values, strict=True))


def test_what_needs_no_file_is_no_parcel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file for each small state, and a worker that ends where files are short."""
    small, large = numbers(5), numbers(LARGE)
    assert transfer.pack(small) is small
    monkeypatch.setattr(transfer, "_write", refuse)
    assert transfer.pack(large) is large
    assert transfer.unpack(large) is large


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files")
def test_a_parcel_that_nobody_keeps_closes_its_file() -> None:
    """Catches descriptors that run out after some rounds."""
    before = len(os.listdir("/proc/self/fd"))
    kept = [across(transfer.pack(numbers(LARGE, k))) for k in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    values = [transfer.unpack(parcel) for parcel in kept]
    del kept
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(values[4], numbers(LARGE, 4))


def test_a_sender_that_dies_halfway_is_noticed() -> None:
    """Catches a receiver that waits for ever for the files of a worker that was killed."""
    ours, theirs = Pipe()
    theirs.send((b"", [[transfer.LARGE]], 0))
    theirs.close()
    with pytest.raises(EOFError):
        transfer.receive(ours)
