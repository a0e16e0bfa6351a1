"""States as files: safetensors with the structure in the metadata, identified by their SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from polyfed.base.errors import CheckpointError, MessageError
from polyfed.core.message import Record, State, flatten, unflatten


def dump(state: State) -> bytes:
    """Return a state as the bytes of a safetensors file, with its structure in the metadata."""
    skeleton, tensors = flatten(state)
    # safetensors refuses tensors that share memory, hence the copies.
    named: dict[str, Tensor] = {str(i): tensor.detach().cpu().clone() for i, (_, tensor) in enumerate(tensors)}
    return safetensors.torch.save(named, metadata={"structure": json.dumps(skeleton)})


def load(path: Path, sha256: str, *known: type[Record]) -> Any:
    """Read a state that `dump` wrote.

    Raises:
        CheckpointError: the file is missing, was changed, or holds another state.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read: {error.strerror or error}; restore it, or start a new run"
        ) from error
    return parse(data, sha256, str(path), *known)


def parse(data: bytes, sha256: str, where: str, *known: type[Record]) -> Any:
    """Return the state in the bytes of `dump`.

    Args:
        data: the bytes.
        sha256: the SHA-256 that the bytes must have.
        where: the place of the bytes, for the error.
        known: the classes that the state may have.

    Raises:
        CheckpointError: the bytes were changed, or hold another state.
    """
    check(data, sha256, where)
    return unpack(data, *known, where=f"checkpoint file {where}")


def check(data: bytes, sha256: str, where: str) -> None:
    """Check that a file holds what was written.

    Raises:
        CheckpointError: the bytes were changed.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"checkpoint file {where} is damaged: its SHA-256 is {found[:12]}..., expected {sha256[:12]}...; restore "
            "it, or start a new run"
        )


def unpack(data: bytes, *known: type[Record], where: str = "a private state") -> Any:
    """Return the state in the bytes of `dump`, which must come from this run's own processes.

    Raises:
        CheckpointError: the bytes hold no state of these classes.
    """
    try:
        named = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        structure = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["structure"])
        return unflatten(structure, [named[str(i)] for i in range(len(named))], *known)
    except (MessageError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{where} holds no state of this algorithm: {error}") from error
