"""Uploads of one mapping with one weight, and what they add up to."""

from collections.abc import Sequence
from typing import Any

from polyfed.base.types import Params
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Fold, Gather
from polyfed.core.message import Message


class Upload(Message):
    """Something to average."""

    value: Params
    n: float


def uploads(values: Sequence[Params], weights: Sequence[float] | None = None) -> list[Upload]:
    """Those of clients 0, 1, ...; they weigh alike without ``weights``."""
    return [Upload(value, n) for value, n in zip(values, weights or [1] * len(values), strict=True)]


def gathered(gather: Gather, values: Sequence[Params], weights: Sequence[float] | None = None) -> Any:
    """The total of what clients 0, 1, ... send."""
    fold = Fold({"value": gather})
    for client, upload in enumerate(uploads(values, weights)):
        fold.add(ClientInfo(client), upload)
    return fold.finish({})["value"]
