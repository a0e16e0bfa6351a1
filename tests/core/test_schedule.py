"""The factor of a round is that of torch's schedulers, which take one step a round."""

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from polyfed.core.schedule import Schedule


def by_torch(make: Any, rounds: int) -> list[float]:
    """The learning rate of each round, of a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found: list[float] = []
    for _ in range(rounds):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ramp(optimizer: Any, warmup: int) -> Any:
    return lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Schedule(kind="step", every=3, gamma=0.5), lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
        (Schedule(kind="step", milestones=(4, 7)), lambda o: lr_scheduler.MultiStepLR(o, [4, 7])),
        (
            Schedule(kind="step", every=3, gamma=0.5, warmup=4),
            lambda o: lr_scheduler.ChainedScheduler([ramp(o, 4), lr_scheduler.StepLR(o, 3, 0.5)]),
        ),
        (
            Schedule(kind="cosine", rounds=12, floor=0.1),
            lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.1),
        ),
        (
            Schedule(kind="cosine", rounds=12, warmup=3),
            lambda o: lr_scheduler.SequentialLR(o, [ramp(o, 3), lr_scheduler.CosineAnnealingLR(o, 9)], [3]),
        ),
        (Schedule(kind="warmup", warmup=5), lambda o: ramp(o, 5)),
    ],
)
def test_it_is_torchs(schedule: Schedule, make: Any) -> None:
    """Catches a factor that comes a round early or late, another ramp, and a cosine of another length."""
    assert [schedule.factor(t) for t in range(1, 13)] == pytest.approx(by_torch(make, 12), abs=1e-6)


def test_after_the_horizon_the_rate_stays_and_is_never_none() -> None:
    """Catches a cosine that rises again, or that leaves a run which goes on without a rate."""
    schedule = Schedule(kind="cosine", rounds=10)
    last = (1 + math.cos(math.pi * 0.9)) / 2
    assert [schedule.factor(t) for t in (10, 11, 200)] == pytest.approx([last] * 3)
    assert Schedule().factor(7) == 1.0
    assert schedule.factor(0) == schedule.factor(1) == 1.0
