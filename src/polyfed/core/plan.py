"""How a client trains: the optimizer's settings, and which rows make which batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from polyfed.base.rng import Rng

#: At which steps of a local training something extra is due.
Every: TypeAlias = Literal["never", "step", "epoch", "round"]


@dataclass(frozen=True)
class Step:
    """One optimizer step of a local training: its rows and its place.

    Args:
        rows: positions in the client's training data, (B,) int64.
        index: number of the step in this round's training, from 0.
        in_epoch: number of the step in its epoch, from 0.
    """

    rows: Tensor
    index: int
    in_epoch: int


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """Local training between receiving and replying. The optimizer is new at every participation.

    Args:
        epochs: passes over the client's data; exactly one of ``epochs`` and ``steps`` is given.
        steps: optimizer steps, over as many passes as they need.
        batch_size: examples per step.
        optimizer: ``"sgd"`` (torch's, with momentum) or ``"adam"`` (betas 0.9 and 0.999).
        lr: learning rate.
        momentum: of SGD.
        weight_decay: L2 penalty added to the gradient, as in torch's SGD and Adam.
        clip: largest norm of the gradient of one part (module); 0 switches clipping off.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0

    def count(self, examples: int) -> int:
        """How many steps a client with ``examples`` training examples takes in a round."""
        return self.steps if self.steps is not None else len(self._cuts(examples)) * (self.epochs or 0)

    def _cuts(self, examples: int) -> list[int]:
        starts = list(range(0, examples, self.batch_size))
        # BatchNorm cannot normalise a single example, so a last batch of one is left out of its epoch.
        lone = examples - starts[-1] == 1 and 1 < self.batch_size < examples
        return starts[:-1] if lone else starts

    def sizes(self, examples: int) -> Iterator[tuple[int, int, int]]:
        """Of each step of one participation: how many examples, its number, and its number in its epoch."""
        starts, total = self._cuts(examples), self.count(examples)
        for index in range(total):
            in_epoch = index % len(starts)
            yield min(self.batch_size, examples - starts[in_epoch]), index, in_epoch

    def schedule(self, examples: int, rng: Rng) -> Iterator[Step]:
        """The steps of one participation: a fresh permutation for every epoch, the last partial batch kept."""
        starts = self._cuts(examples)
        index = epoch = 0
        while index < self.count(examples):
            order = torch.randperm(examples, generator=rng.at("epoch", epoch).torch())
            batches = order.split(self.batch_size)[: min(len(starts), self.count(examples) - index)]
            for in_epoch, rows in enumerate(batches):
                yield Step(rows, index, in_epoch)
                index += 1
            epoch += 1
