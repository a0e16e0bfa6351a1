"""Decoded pixels are kept, and made anew when they are not the files' any more."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import parquet_cifar

from polyfed.data import sources
from polyfed.data.readers.cache import file_digest
from polyfed.data.sources import load_dataset


def test_decoded_pixels_are_cached_and_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = parquet_cifar(tmp_path / "p")
    decoded: list[Path] = []
    original = sources.read_images
    monkeypatch.setattr(sources, "read_images", lambda *a: decoded.append(a[0]) or original(*a))

    def load() -> int:
        before = len(decoded)
        dataset = load_dataset("cifar10", path=tmp_path / "p", cache=tmp_path / "c")
        assert np.array_equal(dataset.x, pixels)
        assert dataset.y.tolist() == [3, 4, 9, 0, 1]
        return len(decoded) - before

    assert load() == 3
    assert load() == 0
    (kept,) = (tmp_path / "c" / "decoded").iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[:100], b"", bytes(flipped), whole[:-20]):
        kept.write_bytes(damaged)
        assert load() == 3
        assert load() == 0
    np.savez(kept, x=np.zeros(3), y=np.zeros(3))  # whole, but something else
    assert load() == 3
    # a source file that changes makes another key
    (tmp_path / "p" / "test-00000-of-00001.parquet").touch()
    assert load() == 3
    assert [p for p in kept.parent.iterdir() if p.name.startswith(".")] == []


def test_unwritable_cache_only_means_no_caching(tmp_path: Path) -> None:
    pixels = parquet_cifar(tmp_path / "p")
    (tmp_path / "file").write_text("in the way")
    dataset = load_dataset("cifar10", path=tmp_path / "p", cache=tmp_path / "file")
    assert np.array_equal(dataset.x, pixels)


def test_a_large_file_is_hashed_once_as_long_as_it_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes that every run hashes again, and a digest of before for a file that changed."""
    path, hashed = tmp_path / "large.npz", []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: (hashed.append(1), real(*arguments))[1])

    def digest(*, times: int) -> str:
        hashed.clear()
        found = file_digest(path, tmp_path / "cache")
        assert len(hashed) == times
        return found

    content = bytearray(2 << 20)
    path.write_bytes(content)
    first = digest(times=1)
    assert digest(times=1) == first  # too young: it may change again within this tick of the clock
    os.utime(path, (1, 1))
    assert digest(times=1) == first
    assert digest(times=0) == first
    os.utime(path, (2, 2))  # touched
    assert digest(times=1) == first
    content[5] = 1
    path.write_bytes(content)
    os.utime(path, (3, 3))
    assert digest(times=1) != first
    path.with_name("other").write_bytes(bytes(2 << 20))  # put in its place, of the same size and time
    os.utime(path.with_name("other"), (3, 3))
    path.with_name("other").replace(path)
    assert digest(times=1) == first
    for kept in (tmp_path / "cache" / "digests").iterdir():
        kept.write_text("[")
    assert digest(times=1) == first
