"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from polyfed.base.errors import CheckpointError, StorageError


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Generator[IO[bytes]]:
    """A file to write; it takes the place of ``path`` when the block ends well, otherwise nothing changes.

    Args:
        path: where; folders that are missing are made.
        mode: who may read and write it, less what the umask takes away; 0o600 for what is its owner's alone.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of our own, as two processes may write the same path; in the same folder, so that rename is atomic. What
    # a killed process leaves is found by ".*.tmp".
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
    """Write ``data`` atomically; returns its SHA-256.

    Args:
        path: where.
        data: what.
        mode: see `replacing`.

    Raises:
        StorageError: the disk is full or the place not writable; a file that was there before is intact.
    """
    try:
        with replacing(path, mode=mode) as file:
            file.write(data)
    except OSError as error:
        raise StorageError(
            f"could not write {path} ({len(data):,} bytes): {error.strerror or error}; what was there before "
            "is intact. Make room or choose another --out, then resume"
        ) from error
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
