"""Atomic writes: a file is written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from polyfed.base.errors import CheckpointError, StorageError


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Generator[IO[bytes]]:
    """Yield a file to write; it replaces ``path`` if the block ends without an error, else nothing changes.

    Args:
        path: path of the file; missing folders are made.
        mode: permissions before the umask; 0o600 for a file that only its owner may read.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, as two processes may write the same path; in the same folder, so that the rename is atomic. The
    # pattern ".*.tmp" matches the file that a killed process leaves.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: Path, data: bytes, *, mode: int = 0o666) -> str:
    """Write ``data`` atomically and return its SHA-256.

    Args:
        path: path of the file.
        data: the content.
        mode: see `replacing`.

    Raises:
        StorageError: the disk is full or the folder not writable; an older file is intact.
    """
    try:
        with replacing(path, mode=mode) as file:
            file.write(data)
    except OSError as error:
        raise StorageError(
            f"could not write {path} ({len(data):,} bytes): {error.strerror or error}; an older file is intact. "
            "Make room or choose another --out, then resume"
        ) from error
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically; a number that is not known (NaN) becomes null."""
    write(path, (json.dumps(nulled(value), indent=2) + "\n").encode())


def nulled(value: Any) -> Any:
    """Return the mappings and sequences of ``value`` with None in place of each NaN, for which JSON has no notation."""
    if isinstance(value, Mapping):
        return {key: nulled(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [nulled(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_json(path: Path) -> Any:
    """Read a value that `write_json` wrote.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore the file, or start a new run") from error
