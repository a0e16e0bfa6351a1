"""Arrays in .npz files, a cache of decoded arrays, and a cache of the digests of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.base.files import replacing

#: Names of arrays -> arrays, as an .npz file holds them.
Arrays = Mapping[str, NDArray[Any]]

_QUICK = 1 << 20  # bytes that are hashed in a millisecond, faster than a cached digest is written

# What numpy and zipfile raise on a damaged or foreign .npz file.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file; never runs code from it (pickled objects are refused).

    Raises:
        DataError: the file is missing, damaged, not an .npz, or holds pickled objects.
    """
    try:
        with path.open("rb") as handle:  # opened here, because np.load does not close a damaged file
            loaded = np.load(handle, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: holds a single array; expected an .npz file, written by numpy.savez")
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected an .npz file; correct the path") from error
    except _DAMAGED as error:
        raise DataError(
            f"{path}: cannot be read as an .npz file without pickled objects ({error}); it is damaged or "
            "foreign, write it again with numpy.savez"
        ) from error


def file_digest(path: Path, folder: Path) -> str:
    """Return the SHA-256 (hex) of a file's content; that of a large file is cached until the file changes.

    A file counts as unchanged while its path, size, time of change and inode are. A file that changed in the last two
    seconds is always hashed: a second change within one tick of the clock would not show.

    Args:
        path: path of the file.
        folder: folder of the cache, in ``digests/``; without permission to write there, nothing is cached.

    Raises:
        DataError: the file cannot be read.
    """
    return _digest(path, [path], folder, lambda: _sha256(path))


def folder_digest(path: Path, names: Sequence[str], folder: Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of files below ``path``; cached as by `file_digest`.

    Args:
        path: the folder.
        names: the files, relative to it.
        folder: folder of the cache.

    Raises:
        DataError: a file cannot be read.
    """
    files = [path / name for name in names]
    return _digest(
        path,
        files,
        folder,
        lambda: hashlib.sha256(
            json.dumps([[name, _sha256(file)] for name, file in zip(names, files, strict=True)]).encode()
        ).hexdigest(),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(path: Path, files: Sequence[Path], folder: Path, compute: Callable[[], str]) -> str:
    """``compute()``, which is cached under ``path`` while all files stay as they are."""
    try:
        stats = [file.stat() for file in files]
        key = [str(path.absolute()), *(x for stat in stats for x in (stat.st_size, stat.st_mtime_ns, stat.st_ino))]
        large = sum(stat.st_size for stat in stats) > _QUICK
        kept = folder / "digests" / f"{hashlib.sha256(str(key[0]).encode()).hexdigest()[:24]}.json"
        if large:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(kept.read_bytes())
                if found["of"] == key:
                    return str(found["sha256"])
        digest = compute()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); correct the path or its permissions"
        ) from error
    if large and time.time_ns() - max(stat.st_mtime_ns for stat in stats) > 2_000_000_000:
        with contextlib.suppress(OSError), replacing(kept) as handle:
            handle.write(json.dumps({"of": key, "sha256": digest}).encode())
    return digest


def fingerprint(*parts: object, files: Sequence[Path] = ()) -> str:
    """A short name for decoded data: changes when a source file is replaced or a setting differs."""
    stats = [(path.name, path.stat()) for path in files]
    seen = [*parts, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:24]


def cached_arrays(path: Path, build: Callable[[], Arrays], usable: Callable[[Arrays], bool]) -> Arrays:
    """Return the arrays cached at ``path``; build and cache them if they are absent or not usable.

    A cache is a convenience: a damaged file is built anew, and a folder that cannot be written only means no
    caching.

    Args:
        path: file of the cached arrays.
        build: makes the arrays from the source.
        usable: whether arrays read from ``path`` have the names, shapes and types expected.
    """
    with contextlib.suppress(DataError):
        arrays = read_npz(path)
        if usable(arrays):
            return arrays
    arrays = build()
    with contextlib.suppress(OSError), replacing(path) as handle:
        np.savez(handle, **dict[str, Any](arrays))
    return arrays
