"""The costs of a step: counted floating-point operations and measured tensor memory, once per kind of step.

The counter runs one step of its own on copies, under torch's FLOP counter and a mode that follows every storage from
its first use to its release. All drivers use the same counter, so they report the same numbers.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from polyfed.core.plan import Step
from polyfed.core.requests import Fit
from polyfed.execute.local_training import Local, set_training
from polyfed.execute.placement import Placement
from polyfed.models.flops import Flops

log = logging.getLogger(__name__)


@contextmanager
def counting() -> Generator[Flops]:
    """Count the FLOPs of the block; if it fails, its work is done elsewhere, and its FLOPs are unknown."""
    counter = Flops()
    try:
        with counter:
            yield counter
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.info("the FLOPs of a step are unknown: %s", error)
        counter.total = math.nan


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of all tensor storages made or used inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def follow(self, value: Any) -> None:
        """Count the storage of a tensor until it is released."""
        if isinstance(value, Tensor) and value.layout == torch.strided:  # others have several storages
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


class Counts(dict[int, float]):
    """FLOPs of one kind of step by number of examples.

    They are affine in that number, so two counted sizes tell all others; but not those of `Fit.pairwise`.
    """

    def at(self, examples: int, count: Callable[[], float]) -> float:
        """Return the FLOPs of a step; ``count`` counts them if two sizes are not known yet."""
        if examples not in self and len(self) >= 2:
            (a, first), (b, second), *_ = self.items()
            slope = (second - first) * (examples - a) / (b - a)
            return first + (slope if math.isnan(slope) else round(slope))
        return self[examples] if examples in self else self.setdefault(examples, count())


@dataclass
class CostCounter:
    """Remembers the costs of each kind of step; ``seconds`` is the time that it spent on counting."""

    placement: Placement
    counts: dict[object, Counts] = field(default_factory=dict[object, Counts])
    peaks: dict[object, int] = field(default_factory=dict[object, int])
    seconds: float = 0.0

    def step(self, key: object, fit: Fit, examples: int, due: int) -> float:
        """Return the FLOPs of a training step at that batch size; NaN if they cannot be counted.

        They are those of products and convolutions, forward and backward: torch's counter counts no others.
        """
        counts = self.counts.setdefault((key, due), Counts())
        if fit.pairwise and examples not in counts:
            counts[examples] = self._measure(fit, examples, due)[0]
        return counts.at(examples, lambda: self._measure(fit, examples, due)[0])

    def peak(self, key: object, fit: Fit, examples: int, due: int) -> int:
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

    def _measure(self, fit: Fit, examples: int, due: int) -> tuple[float, int]:
        """Return the FLOPs and the peak of a step of the counter's own, which moves no random stream of the run.

        Texts count at full length, as the length of a batch depends on its rows.
        A step that fails here, and not in training, has unknown FLOPs, and the peak up to its failure.
        """
        set_training(fit.client.models, True)
        with self.aside(), fit.client.rng.at("cost").fork():
            rows = torch.arange(examples) % len(fit.client.train)
            x, y = self.placement.batch(fit.client.train, rows)
            full = [model.input_shape[0] for model in fit.client.models.values() if model.dtype == x.dtype]
            if full and x.dim() == 2:  # tokens
                x = functional.pad(x, (0, full[0] - x.shape[1]))
            batch = fit.client.weigh((x, y))
            drawn = fit.drawn(Step(rows, 0, 0))
            local = Local(fit, self.placement)
            with counting() as counter, PeakMemory() as memory:
                leaves = (leaf for params in local.parts.values() for leaf in params.values())
                for tensor in (*batch, *drawn.values(), *leaves):
                    memory.follow(tensor)
                local.step(batch, due, drawn)
            return counter.total, memory.peak

    def forward(self, key: object, run: Callable[[Tensor], Mapping[str, Tensor]], x: Tensor) -> float:
        """Return the FLOPs of a forward pass over these examples, from counts for two and three of them."""

        def count(examples: int) -> float:
            with self.aside(), counting() as counter:
                run(x[torch.arange(examples, device=x.device) % len(x)])
            return counter.total

        counts = self.counts.setdefault(key, Counts())
        for few in (2, 3):
            counts.at(few, lambda few=few: count(few))
        return counts.at(len(x), lambda: count(len(x)))
