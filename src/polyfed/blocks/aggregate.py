"""What uploads add up to. Sums run in order of client id and in float64, so that order is not luck.

Each class is a declaration for `polyfed.core.requests.exchange`. None keeps an upload: a total is as large as what is
averaged, whatever the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.types import Params
from polyfed.blocks.submodel import Part, Slice, check_fits, flat_places, leading
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Gather
from polyfed.core.message import Message


def _weight(upload: Message, name: str | None) -> float:
    """The number called ``name`` of an upload; 1 where there is no name."""
    return 1 if name is None else getattr(upload, name)


def _like(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """A mean in the type of what was averaged; integers (BatchNorm's counter) are rounded."""
    return (mean if dtype.is_floating_point else mean.round()).to(dtype)


class RunningMean:
    """For each name the weighted mean over the mappings that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._types: dict[str, torch.dtype] = {}

    def add(self, params: Params, weight: float) -> None:
        """One more mapping.

        Raises:
            ModelError: a name has another shape than before.
        """
        for name, value in params.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value, dtype=torch.float64)
                self._weights[name], self._types[name] = 0.0, value.dtype
            total = self._sums[name]
            if total.shape != value.shape:
                raise ModelError(
                    f"{name!r} came with the shapes {sorted({tuple(total.shape), tuple(value.shape)})} from different "
                    "clients; expected one shape: choose models, or cuts, where they are equal"
                )
            total.add_(value, alpha=weight)
            self._weights[name] += weight

    def mean(self, default: Params) -> dict[str, Tensor]:
        """The means, and ``default`` where no mapping had the name.

        Raises:
            ValueError: the weights of a name add up to 0.
        """
        weightless = [name for name, weight in self._weights.items() if not weight]
        if weightless:
            raise ValueError(f"the weights of {weightless[0]!r} add up to 0; expected positive weights")
        means = {k: _like(total / self._weights[k], self._types[k]) for k, total in self._sums.items()}
        return {**default, **means}


def by_name_mean(models: Sequence[Params], weights: Sequence[float], *, default: Params) -> dict[str, Tensor]:
    """`RunningMean` of values that are all there, such as those that `polyfed.core.gather.each` kept."""
    total = RunningMean()
    for model, weight in zip(models, weights, strict=True):
        total.add(model, weight)
    return total.mean(default)


@dataclass(frozen=True)
class MeanByName(Gather):
    """For each name the weighted mean over the uploads that have it; ``default`` where none has.

    Args:
        weight: the field of the upload that holds its weight, usually its number of training examples; None weighs
            all alike.
        default: for names that no upload has.
    """

    weight: str | None = None
    default: Params = field(default_factory=dict[str, Tensor])

    def init(self) -> RunningMean:
        """No names."""
        return RunningMean()

    def add(self, total: RunningMean, client: ClientInfo, value: Params, upload: Message) -> RunningMean:
        """One more upload."""
        total.add(value, _weight(upload, self.weight))
        return total

    def finish(self, total: RunningMean) -> dict[str, Tensor]:
        """The means."""
        return total.mean(self.default)


@dataclass(frozen=True)
class Mean(Gather):
    """``sum_k w_k * value_k / sum_k w_k`` of mappings that all have the same names and shapes.

    Args:
        weight: as of `MeanByName`.
        of: what is averaged, made of the field; None is the field itself.
    """

    weight: str | None = None
    of: Callable[[Any], Params] | None = None

    def init(self) -> tuple[RunningMean, list[list[str]]]:
        """Nothing, and no names."""
        return RunningMean(), []

    def add(self, total: Any, client: ClientInfo, value: Any, upload: Message) -> Any:
        """One more upload.

        Raises:
            ValueError: its names are not those of the others.
        """
        running, names = total
        params = value if self.of is None else self.of(value)
        names = names or [sorted(params)]
        if sorted(params) != names[0]:
            raise ValueError(f"client {client.id} sent other names than the clients before it; expected {names[0]}")
        running.add(params, _weight(upload, self.weight))
        return running, names

    def finish(self, total: Any) -> dict[str, Tensor]:
        """The mean.

        Raises:
            ValueError: there were no uploads.
        """
        running, names = total
        if not names:
            raise ValueError("a mean of no uploads; expected at least one")
        return running.mean({})


@dataclass(frozen=True)
class CoverageMean(Gather):
    """For each coordinate the weighted mean over the clients whose part covers it.

    What counts is what a part covers, not what is not zero: a covered weight that did not move still counts.

    Args:
        part: what a client holds, such as a mask or a `polyfed.blocks.submodel.Slice`. An upload holds what
            `polyfed.blocks.submodel.take` takes; a tensor that the part does not name comes whole. None: of each tensor
            the leading block of the shape that comes: the first rows, columns and so on.
        weight: as of `MeanByName`.
        default: tensors at full shape, whose values stay, bit by bit, where no client covers a coordinate. Without them
            the mean is 0 there, as is right for changes; leading blocks need them, as they do not say the full shapes.
        nonzero: count of what is covered only values that are not zero, as released code of FIARSE does.
    """

    part: Callable[[ClientInfo], Part] | None
    weight: str | None = None
    default: Params | None = None
    nonzero: bool = field(default=False, kw_only=True)

    def init(self) -> dict[str, tuple[Tensor, Tensor, torch.dtype]]:
        """No names."""
        return {}

    def add(self, total: Any, client: ClientInfo, value: Params, upload: Message) -> Any:
        """One more upload.

        Raises:
            MessageError: a tensor is none of ``default``, or has not the shape of what the part holds of it.
        """
        part = leading(tree.shapes(value)) if self.part is None else self.part(client)
        weight = _weight(upload, self.weight)
        for name, held in value.items():
            where = part.get(name, ...)
            held = held.reshape(-1) if isinstance(where, Tensor) else held
            if name not in total:
                shape = self._shape(part, name, held)
                zeros = torch.zeros(shape or (), dtype=torch.float64, device=held.device)
                check_fits(name, held, part, shape)
                total[name] = (zeros, zeros.clone(), held.dtype)
            else:
                check_fits(name, held, part, tuple(total[name][0].shape))
            sums, weights, _ = total[name]
            if isinstance(where, Tensor):
                where, sums, weights = flat_places(where, held.device), sums.reshape(-1), weights.reshape(-1)  # views
            sums[where] = sums[where].add(held, alpha=weight)
            weights[where] += weight * (held != 0) if self.nonzero else weight
        return total

    def _shape(self, part: Part, name: str, held: Tensor) -> tuple[int, ...] | None:
        """The full shape of a tensor; None for one that there is not."""
        if self.default is not None:
            return tuple(self.default[name].shape) if name in self.default else None
        if isinstance(part, Slice):
            return part.shapes.get(name, tuple(held.shape))
        where = part.get(name, held)
        if not isinstance(where, Tensor):
            raise TypeError("a mean over leading blocks needs their full shapes; give CoverageMean a default")
        return tuple(where.shape)

    def finish(self, total: Mapping[str, tuple[Tensor, Tensor, torch.dtype]]) -> dict[str, Tensor]:
        """The means; without ``default`` those of integers in float64, as a counter's mean change need not be whole."""
        tiny = torch.finfo(torch.float64).tiny
        means = {name: sums / weights.clamp_min(tiny) for name, (sums, weights, _) in total.items()}
        if self.default is None:
            types = {name: dtype if dtype.is_floating_point else torch.float64 for name, (_, _, dtype) in total.items()}
            return {name: mean.to(types[name]) for name, mean in means.items()}
        covered = {name: weights > 0 for name, (_, weights, _) in total.items()}
        return {
            name: _like(torch.where(covered[name], means[name], value.double()), value.dtype)
            if name in means
            else value
            for name, value in self.default.items()
        }


@dataclass(frozen=True)
class OwnRows(CoverageMean):
    """`CoverageMean` in which a client covers, of the tensors ``head``, the rows of its own classes alone.

    An upload has all rows, and a field ``classes``, (L,) bool, that says which count.

    Args:
        head: names of tensors whose first dimension has the classes.
    """

    head: tuple[str, ...] = ()

    def add(self, total: Any, client: ClientInfo, value: Params, upload: Any) -> Any:
        """One more upload; errors as of `CoverageMean`."""
        assert self.part is not None
        part, rows = dict(self.part(client)), upload.classes.nonzero()[:, 0]
        for name in self.head:
            axes = list(part.get(name, tuple(map(slice, value[name].shape))))
            axes = [rows, *(torch.arange(axis.stop) if isinstance(axis, slice) else axis for axis in axes[1:])]
            ones = [1] * len(axes)
            part[name] = tuple(a.reshape(*ones[:d], -1, *ones[d + 1 :]) for d, a in enumerate(axes))
        own = {name: held[rows] if name in self.head else held for name, held in value.items()}
        return CoverageMean(lambda _: part, self.weight, self.default).add(total, client, own, upload)
