"""A header and the bytes of a message as one piece."""

from __future__ import annotations

from typing import TypeAlias

#: A header and, where something is sent, the bytes of a message.
Frame: TypeAlias = tuple[str, bytes | None]


def pack(header: str, body: bytes | None) -> bytes:
    """A frame as one piece."""
    head = header.encode()
    return len(head).to_bytes(8, "little") + head + (b"-" if body is None else b"+" + body)


def unpack(data: bytes) -> Frame:
    """The frame of `pack`."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start].decode(), None if data[start : start + 1] == b"-" else data[start + 1 :]
