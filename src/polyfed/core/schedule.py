"""Learning-rate schedules over rounds: a factor that is a pure function of the settings and the number of the round.

This module does not import torch, so that a configuration is checked before torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: torch's SGD, Adam and AdamW.
OptimizerName: TypeAlias = Literal["sgd", "adam", "adamw"]
ScheduleKind: TypeAlias = Literal["constant", "step", "cosine", "warmup"]

#: The keys of each kind of schedule.
SCHEDULE_KEYS: Mapping[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("every", "milestones", "gamma", "warmup"),
    "cosine": ("rounds", "floor", "warmup"),
    "warmup": ("warmup",),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor of the learning rate for each round. torch's scheduler of the same name takes one step a round.

    Args:
        kind: "constant", 1; "step", a factor ``gamma`` at certain rounds (torch's StepLR and MultiStepLR); "cosine",
            from 1 along half a cosine (CosineAnnealingLR); "warmup", 1 after the warm-up.
        rounds: T, the horizon of "cosine": the factor would reach ``floor`` in round T + 1. After round T it stays what
            it was in round T, so a run that goes on trains with a small rate and never with none.
        floor: the end of "cosine", as a share of the rate.
        warmup: W; in round t <= W the factor is multiplied by t / (W + 1) (torch's LinearLR from 1 / (W + 1)). "cosine"
            begins to fall after these rounds; "step" counts its rounds from the first.
        every: rounds between two factors of "step".
        milestones: the rounds after which "step" multiplies by ``gamma``, instead of ``every``.
        gamma: the factor of "step".
    """

    kind: ScheduleKind = "constant"
    rounds: int = 1
    floor: float = 0.0
    warmup: int = 0
    every: int | None = None
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def factor(self, round_: int) -> float:
        """Return the factor of a round, from 1; that of round 0, in which a client is created, is that of round 1."""
        t = max(1, round_)
        ramp = t / (self.warmup + 1) if t <= self.warmup else 1.0
        if self.kind == "step":
            passed = sum(t > milestone for milestone in self.milestones)
            return ramp * self.gamma ** (passed if self.every is None else (t - 1) // self.every)
        if self.kind == "cosine" and t > self.warmup:
            done = (min(t, self.rounds) - self.warmup - 1) / (self.rounds - self.warmup)  # in [0, 1)
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2
        return ramp
