"""Keyed randomness: every random draw is named by what it is for, never by when it happens.

A generator is derived from a key such as ``(seed, "round", 3, "client", 17, "batches")`` by hashing. Hence nothing
about randomness needs to be checkpointed, the order in which clients run cannot change a result, and adding a draw
in one place moves no number elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rng:
    """A name for a stream of random numbers.

    Args:
        key: what the stream is for; integers and strings only, so that the name is the same on every machine.

    Example:
        >>> rng = Rng((0,))
        >>> rng.at("client", 3).seed() == Rng((0, "client", 3)).seed()
        True
        >>> rng.at("client", 3).seed() == rng.at("client", 4).seed()
        False
    """

    key: tuple[int | str, ...]

    def at(self, *more: int | str) -> Rng:
        """The stream named by this key followed by ``more``."""
        return Rng((*self.key, *more))

    def seed(self) -> int:
        """A 63-bit integer that depends on the key only."""
        digest = hashlib.blake2b(repr(self.key).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def torch(self) -> torch.Generator:
        """A fresh CPU generator at the start of this stream."""
        return torch.Generator().manual_seed(self.seed())

    def numpy(self) -> np.random.Generator:
        """A fresh NumPy generator at the start of this stream."""
        return np.random.default_rng(self.seed())

    @contextmanager
    def fork(self) -> Generator[None]:
        """Inside the block torch's global generator follows this stream; outside it is as it was.

        For code that cannot be handed a generator: ``nn.Module`` constructors and dropout layers.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed())
            yield
