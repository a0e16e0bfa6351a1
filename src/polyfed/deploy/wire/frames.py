"""A header and the bytes of a message as one byte string."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

#: A header, and the bytes of a message or None.
Frame: TypeAlias = tuple[str, bytes | None]
_Bytes = TypeVar("_Bytes", bytes, bytearray)


def pack(header: str, body: bytes | None) -> bytes:
    """Return a frame as one byte string."""
    head = header.encode()
    return b"".join((len(head).to_bytes(8, "little"), head, *((b"-",) if body is None else (b"+", body))))


def unpack(data: _Bytes) -> tuple[str, _Bytes | None]:
    """Return the frame that `pack` packed."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start].decode(), None if data[start : start + 1] == b"-" else data[start + 1 :]
