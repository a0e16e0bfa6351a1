"""The exception tree. Every error that a user can cause is in it, and each class has an exit code.

    PolyfedError                 1
    ├── ConfigError              2   a configuration that cannot be run; lists every fault found
    ├── DataError                3   data missing, truncated, mislabelled, or too few for the partition
    ├── ModelError               4   a model that cannot be built, cut or matched with the others
    ├── MessageError             5   bytes that do not decode to the declared message
    ├── CheckpointError          6   a checkpoint that is corrupt, foreign or missing
    ├── RunDirError              7   a run directory that is in use, not a run, or already full
    ├── DivergedError            8   a loss or a weight that is not finite
    └── StorageError             9   a write that failed (disk full, no permission)

Ctrl-C ends with 130, as a shell expects, and prints the command that resumes the run. A message says what was got,
what was expected, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class PolyfedError(Exception):
    """Base of all errors that polyfed raises on purpose."""

    exit_code = 1


class ConfigError(PolyfedError):
    """A configuration with one or more faults; the error lists all of them.

    Args:
        faults: one sentence per fault, each naming the key, what was got and what was expected.
    """

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        self.faults: Sequence[str] = faults
        super().__init__("\n".join(faults))


class DataError(PolyfedError):
    """Data that are missing, damaged, out of range or too few."""

    exit_code = 3


class ModelError(PolyfedError):
    """A model that cannot be imported, cannot be cut as requested, or does not fit the other clients' models."""

    exit_code = 4


class MessageError(PolyfedError):
    """Bytes or values that are not the declared message."""

    exit_code = 5


class CheckpointError(PolyfedError):
    """A checkpoint that is damaged, missing, or belongs to another run."""

    exit_code = 6


class RunDirError(PolyfedError):
    """A run directory that another process uses, or whose content is not as expected."""

    exit_code = 7


class DivergedError(PolyfedError):
    """Training produced a number that is not finite; the last checkpoint is intact."""

    exit_code = 8


class StorageError(PolyfedError):
    """A file could not be written; an older file is intact."""

    exit_code = 9
