"""Keyed randomness: a key names the purpose of every random draw, whenever the draw happens.

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
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64: 2^64 over the golden ratio


@dataclass(frozen=True)
class Rng:
    """A name for a stream of random numbers.

    Args:
        key: the purpose of the stream; integers and strings only, so that it is the same on every machine.

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

    def uniform(self, numbers: ArrayLike) -> NDArray[np.float64]:
        """Return a draw in [0, 1) for each of ``numbers``, which depends on the key and that number only.

        A draw for a single client is as cheap as one of a million draws: it is output ``n`` of a SplitMix64 generator
        (Steele, Lea and Flood 2014) that starts at this stream's seed, computed without the outputs before it.

        Args:
            numbers: whole numbers from 0, of any shape.
        """
        z = np.uint64(self.seed()) + (np.asarray(numbers, dtype=np.uint64).ravel() + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return ((z >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(np.shape(numbers))

    @contextmanager
    def fork(self) -> Generator[None]:
        """Inside the block torch's global generator follows this stream; afterwards it is restored.

        For code that takes no generator: ``nn.Module`` constructors and dropout layers.
        """
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(self.seed())  # torch.manual_seed asks every backend: ten times slower
            if devices:
                torch.cuda.manual_seed_all(self.seed())
            yield
