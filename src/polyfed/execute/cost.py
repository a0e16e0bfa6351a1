"""The costs of a step: counted floating-point operations and measured tensor memory, once per kind of step.

The counter runs one step of its own on copies, under torch's FLOP counter and a mode that follows every storage from
its first use to its release. All drivers use the same counter, so they report the same numbers.
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

from polyfed.core.plan import Step
from polyfed.core.requests import Fit
from polyfed.execute.local_training import Local, set_training
from polyfed.execute.placement import Placement


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensor storages made or used inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def follow(self, value: Any) -> None:
        """Count the storage of a tensor until it is released."""
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            key = storage._cdata  # pyright: ignore[reportPrivateUsage]  # the only identity a storage has
            if key not in self._known:
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


class Counts(dict[int, int]):
    """FLOPs of one kind of step by number of examples.

    They are affine in that number, so two counted sizes tell all others.
    """

    def at(self, examples: int, count: Callable[[], int]) -> int:
        """Return the FLOPs of a step; ``count`` counts them if two sizes are not known yet."""
        if examples not in self and len(self) >= 2:
            (a, first), (b, second), *_ = self.items()
            return first + round((second - first) * (examples - a) / (b - a))
        return self[examples] if examples in self else self.setdefault(examples, count())


@dataclass
class CostCounter:
    """Remembers the costs of each kind of step; ``seconds`` is the time that it spent on counting."""

    placement: Placement
    counts: dict[object, Counts] = field(default_factory=dict[object, Counts])
    peaks: dict[object, int] = field(default_factory=dict[object, int])
    seconds: float = 0.0

    def step(self, key: object, fit: Fit, examples: int, due: bool) -> int:
        """Return the FLOPs of a training step at that batch size.

        They are those of products and convolutions, forward and backward: torch's counter counts no others.
        """
        return self.counts.setdefault((key, due), Counts()).at(examples, lambda: self._measure(fit, examples, due)[0])

    def peak(self, key: object, fit: Fit, examples: int, due: bool) -> int:
        """Return the largest sum of live tensors, in bytes, of a whole step at that batch size, optimizer included."""
        if (key, due, examples) not in self.peaks:
            flops, self.peaks[key, due, examples] = self._measure(fit, examples, due)
            self.counts.setdefault((key, due), Counts())[examples] = flops
        return self.peaks[key, due, examples]

    def clock(self) -> Callable[[], float]:
        """Return a function that returns the seconds from now on, without those of counting."""
        start = time.perf_counter() - self.seconds
        return lambda: time.perf_counter() - self.seconds - start

    @contextmanager
    def aside(self) -> Generator[None]:
        """Add the seconds of the block to those of counting, which are no cost of a run."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def _measure(self, fit: Fit, examples: int, due: bool) -> tuple[int, int]:
        """Return the FLOPs and the peak of a step of the counter's own, which moves no random stream of the run."""
        set_training(fit.client.models, True)
        with self.aside(), fit.client.rng.at("cost").fork():
            rows = torch.arange(examples) % len(fit.client.train)
            batch, drawn = self.placement.batch(fit.client.train, rows), fit.drawn(Step(rows, 0, 0))
            local = Local(fit, self.placement)
            with FlopCounterMode(display=False) as counter, PeakMemory() as memory:
                leaves = (leaf for params in local.parts.values() for leaf in params.values())
                for tensor in (*batch, *drawn.values(), *leaves):
                    memory.follow(tensor)
                local.step(batch, due, drawn)
            return counter.get_total_flops(), memory.peak

    def forward(self, key: object, run: Callable[[Tensor], Mapping[str, Tensor]], x: Tensor) -> int:
        """Return the FLOPs of a forward pass over these examples, from counts for two and three of them."""

        def count(examples: int) -> int:
            with self.aside(), FlopCounterMode(display=False) as counter:
                run(x[torch.arange(examples, device=x.device) % len(x)])
            return counter.get_total_flops()

        counts = self.counts.setdefault(key, Counts())
        for few in (2, 3):
            counts.at(few, lambda few=few: count(few))
        return counts.at(len(x), lambda: count(len(x)))
