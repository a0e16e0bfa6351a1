"""How a client trains: the optimizer's settings, and which rows make which batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from polyfed.base.errors import ConfigError
from polyfed.base.rng import Rng
from polyfed.core.schedule import OptimizerName

#: At which steps of a local training something extra is due; or what is due at a step, a whole number, by the number
#: of the step.
Every: TypeAlias = Literal["never", "step", "epoch", "round"] | Callable[[int], int]


def is_due(every: Every, index: int, in_epoch: int) -> int:
    """Return whether ``every`` selects the step of these numbers; where it is a function, what it returns."""
    if callable(every):
        return every(index)
    return {"never": False, "step": True, "epoch": in_epoch == 0, "round": index == 0}[every]


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


@dataclass(frozen=True)
class PartRate:
    """The learning rate of one part of the model in a round.

    Args:
        part: the name of the part, such as ``"G"``.
        lr: its rate before the schedule; None takes the algorithm's for this part, or that of the plan.
        factor: the schedule's factor in this round.
    """

    part: str
    lr: float | None = None
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """Local training of one round, between receiving and replying. The optimizer is new at every participation.

    Plans are values: equal plans of clients with equal networks train in one stack.

    Args:
        epochs: passes over the client's data; exactly one of ``epochs`` and ``steps`` is given.
        steps: optimizer steps, over as many passes as they need.
        batch_size: examples per step.
        optimizer: ``"sgd"`` (torch's, with momentum), ``"adam"`` or ``"adamw"`` (betas 0.9 and 0.999).
        lr: learning rate before the schedule.
        momentum: of SGD.
        weight_decay: L2 penalty added to the gradient, as in torch's SGD and Adam; of AdamW the share ``lr *
            weight_decay`` that each step takes off the weights.
        clip: largest norm of the gradient of one part (module); 0 switches clipping off.
        factor: the schedule's factor in this round; it multiplies every rate.
        parts: parts with a rate or a factor of their own.
        label_smoothing: the share of each label that supervised cross-entropy divides among all classes.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    optimizer: OptimizerName = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0
    factor: float = 1.0
    parts: tuple[PartRate, ...] = ()
    label_smoothing: float = 0.0

    @property
    def moves_without_gradient(self) -> bool:
        """Whether a weight of gradient 0 may move: by momentum, by moments of Adam, or by weight decay."""
        return self.optimizer != "sgd" or self.momentum != 0 or self.weight_decay != 0

    def rate(self, part: str, own: float | None = None) -> float:
        """Return the learning rate of a part in this round: its rate times its factor.

        Args:
            part: the name of the part.
            own: the algorithm's rate of this part, such as FedMRL's ``lr_private`` of ``F``; None if it has none.

        Raises:
            ConfigError: the algorithm and ``train.parts`` both give the part a rate.
        """
        named = next((rate for rate in self.parts if rate.part == part), PartRate(part, factor=self.factor))
        if own is not None and named.lr is not None:
            raise ConfigError(
                f"train.parts.{part}.lr: got {named.lr:g}, but the algorithm gives {part} a rate of its own, {own:g}; "
                "give one of the two (a schedule of train.parts multiplies either)"
            )
        lr = next(rate for rate in (own, named.lr, self.lr) if rate is not None)
        return lr * named.factor

    def count(self, examples: int) -> int:
        """How many steps a client with ``examples`` training examples takes in a round."""
        return self.steps if self.steps is not None else len(self._cuts(examples)) * (self.epochs or 0)

    def due(self, every: Every, examples: int) -> int:
        """At how many steps of a participation ``every`` is due, for a client with ``examples`` training examples."""
        return sum(bool(is_due(every, index, in_epoch)) for _, index, in_epoch in self.sizes(examples))

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
