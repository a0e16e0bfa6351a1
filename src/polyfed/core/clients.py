"""The clients: as the server knows them, and as they know themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from polyfed.base.errors import PolyfedError
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.core.net import Batch, WeightedBatch
from polyfed.core.plan import LocalSGD
from polyfed.models.split import SplitModel


class Examples(Protocol):
    """One client's examples: a view by index."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    @property
    def labels(self) -> Tensor:
        """The labels, (n,) int64, or the targets of a regression, (n,) float64; on the CPU."""
        ...

    @property
    def channels_first(self) -> bool:
        """Whether series are ``(C, T)``; else ``(T, C)``."""
        ...

    def batch(self, positions: Tensor, *, generator: Any = None, dtype: Any = ..., device: Any = ...) -> Batch:
        """Return the examples at ``positions``; with a generator, augmented."""
        ...


class NeedsDataError(PolyfedError):
    """A client's data would be needed, where they are not at hand."""


class NoData:
    """A client's examples where they are not at hand: each use of them raises NeedsDataError."""

    def __len__(self) -> int:
        """Refuse."""
        raise NeedsDataError("the number of a client's examples was asked for")

    @property
    def labels(self) -> Tensor:
        """Refuse."""
        raise NeedsDataError("a client's labels were asked for")

    @property
    def channels_first(self) -> bool:
        """Refuse."""
        raise NeedsDataError("the layout of a client's examples was asked for")

    def batch(self, positions: Tensor, *, generator: Any = None, dtype: Any = None, device: Any = None) -> Batch:
        """Refuse."""
        raise NeedsDataError("a client's examples were asked for")

    def hold_out(self, share: float, rng: Rng) -> tuple[NoData, NoData | None]:
        """Split nothing in two."""
        return self, self if share else None


@dataclass(frozen=True)
class ClientInfo:
    """The server's knowledge of a client.

    Args:
        id: the number of the client.
        capacity: the fraction of a full-size model that it can hold, in (0, 1].
        architecture: the name of its network if the algorithm needs the server to know it, else "".
    """

    id: ClientId
    capacity: float = 1.0
    architecture: str = ""


@dataclass(frozen=True)
class LocalClient:
    """A client's knowledge of itself while it works on one round.

    Args:
        info: the server's knowledge of the client.
        models: the networks of its parts, by part; `Algorithm.models` names them.
        train: its training examples.
        plan: the plan of its training.
        rng: randomness keyed by seed, round and client.
        round: the number of the round, from 1.
        held_out: the examples that `Algorithm.holdout` takes out of its training data, the same in every round; None if
            there are none.
        class_weights: returns the weight of each class in its supervised losses, (L,) float64; None weighs all alike.
    """

    info: ClientInfo
    models: Mapping[str, SplitModel]
    train: Examples
    plan: LocalSGD
    rng: Rng
    round: int = 0
    held_out: Examples | None = None
    class_weights: Callable[[], Tensor] | None = None

    @cached_property
    def weights(self) -> Tensor | None:
        """The weight of each class, (L,) float64, made when it is first used; None weighs all alike."""
        return None if self.class_weights is None else self.class_weights()

    def weigh(self, batch: Batch, weights: Tensor | None = None) -> Batch:
        """Return a batch of this client's examples with its class weights and label smoothing, if it has any.

        Args:
            batch: inputs, and labels (B,).
            weights: the weights, (L,), if they are at hand on the device; None takes the client's.
        """
        weights = self.weights if weights is None else weights
        if weights is None and not self.plan.label_smoothing:
            return batch
        x, y = batch
        like = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        weights = None if weights is None else weights.to(y.device, like)
        return WeightedBatch(x, y, weights, self.plan.label_smoothing)


@dataclass(frozen=True)
class Cohort:
    """The clients of one round, in order of id.

    Args:
        clients: the server's knowledge of each client.
        round: the number of the round, from 1.
        rounds: the number of rounds of the run.
        rng: randomness keyed by seed and round.
    """

    clients: tuple[ClientInfo, ...]
    round: int
    rounds: int
    rng: Rng

    def __iter__(self) -> Iterator[ClientInfo]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)
