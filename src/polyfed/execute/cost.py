"""The costs of a step: counted floating-point operations and measured tensor memory, once per kind of step.

The counter runs one step of its own on copies, under torch's FLOP counter and a mode that follows every storage from
its first use to its release. All drivers use the same counter, so they report the same numbers. A step's operations
are affine in its batch size, so two sizes determine all.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from polyfed.base.types import Params
from polyfed.core.net import Batch
from polyfed.core.plan import Step
from polyfed.core.requests import Fit
from polyfed.execute.local_training import Local
from polyfed.execute.placement import Placement


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensor storages made or used inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def follow(self, value: Any) -> None:
        """Count the storage of a tensor until it is released."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]  # the only identity a storage has
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(result if isinstance(result, tuple | list) else (result,))):
            self.follow(value)
        return result


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step with B examples are ``fixed + per_example * B``."""

    fixed: float
    per_example: float

    def flops(self, examples: int) -> int:
        """Return the FLOPs of one step with that many examples."""
        return round(self.fixed + self.per_example * examples)


def _affine(count: Callable[[int], int], examples: int) -> tuple[float, float]:
    """Return offset and slope of ``count`` from its values at ``examples`` and at about half as many.

    It avoids a batch of one example, which BatchNorm refuses, unless ``examples`` is 1.
    """
    other = examples // 2 if examples >= 4 else examples + 1
    flops = count(examples)
    slope = (flops - count(other)) / (examples - other)
    return flops - slope * examples, slope


@dataclass
class CostCounter:
    """Remembers the costs of each kind of step; ``seconds`` is the time that it spent on counting."""

    placement: Placement
    known: dict[object, StepCost] = field(default_factory=dict[object, StepCost])
    peaks: dict[object, int] = field(default_factory=dict[object, int])
    seconds: float = 0.0

    def step(self, key: object, fit: Fit, examples: int, due: bool) -> StepCost:
        """Return the cost of a training step at that batch size.

        FLOPs are those of products and convolutions, forward and backward: torch's counter counts no others.
        """
        key = (key, due)
        if key not in self.known:
            with self._aside(fit):
                self.known[key] = StepCost(*_affine(lambda n: self._flops(fit, n, due), examples))
        return self.known[key]

    def peak(self, key: object, fit: Fit, examples: int, due: bool) -> int:
        """Return the largest sum of live tensors, in bytes, of a whole step at that batch size, optimizer included."""
        key = (key, due, examples)
        if key not in self.peaks:
            with self._aside(fit):
                self.peaks[key] = self._peak(fit, examples, due)
        return self.peaks[key]

    @contextmanager
    def _aside(self, fit: Fit) -> Generator[None]:
        """Run a step of the counter's own: its seconds count as counting, and random streams do not move."""
        for model in fit.client.models.values():
            model.train(True)
        with self.aside(), fit.client.rng.at("cost").fork():
            yield

    @contextmanager
    def aside(self) -> Generator[None]:
        """Add the seconds of the block to those of counting, which are no cost of a run."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def _batch(self, fit: Fit, examples: int) -> tuple[Batch, Params]:
        """Return a batch of that size, and the tensors that are drawn for it."""
        rows = torch.arange(examples) % len(fit.client.train)
        return self.placement.batch(fit.client.train, rows), fit.drawn(Step(rows, 0, 0))

    def _flops(self, fit: Fit, examples: int, due: bool) -> int:
        local, (batch, drawn) = Local(fit, self.placement), self._batch(fit, examples)
        with FlopCounterMode(display=False) as counter:
            local.step(batch, due, drawn)
        return counter.get_total_flops()

    def _peak(self, fit: Fit, examples: int, due: bool) -> int:
        batch, drawn = self._batch(fit, examples)
        local = Local(fit, self.placement)
        with PeakMemory() as memory:
            leaves = (leaf for params in local.parts.values() for leaf in params.values())
            for tensor in (*batch, *drawn.values(), *leaves):
                memory.follow(tensor)
            local.step(batch, due, drawn)
        return memory.peak

    def forward(self, key: object, run: Callable[[Tensor], Mapping[str, Tensor]], x: Tensor) -> StepCost:
        """Return the FLOPs of a forward pass."""
        if key not in self.known:
            started = time.perf_counter()

            def count(examples: int) -> int:
                with FlopCounterMode(display=False) as counter:
                    run(x[torch.arange(examples, device=x.device) % len(x)])
                return counter.get_total_flops()

            self.known[key] = StepCost(*_affine(count, len(x)))
            self.seconds += time.perf_counter() - started
        return self.known[key]
