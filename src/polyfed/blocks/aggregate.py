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

from polyfed.base.errors import MessageError, ModelError
from polyfed.base.types import Params
from polyfed.blocks.submodel import Mask
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
class NestedMean(Gather):
    """For each coordinate the weighted mean over the uploads that hold it; ``default`` where none does.

    Args:
        weight: as of `MeanByName`.
        default: what is averaged, at full shape; an upload has leading blocks of its tensors: the first rows, columns
            and so on.
    """

    weight: str | None
    default: Params

    def init(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Zeros for sums and weights, at full shape."""
        return {
            name: (torch.zeros_like(value, dtype=torch.float64), torch.zeros_like(value, dtype=torch.float64))
            for name, value in self.default.items()
        }

    def add(self, total: Any, client: ClientInfo, value: Params, upload: Message) -> Any:
        """One more upload.

        Raises:
            MessageError: a name that ``default`` lacks, or a block that does not fit.
        """
        weight = _weight(upload, self.weight)
        for name, block in value.items():
            shape = tuple(self.default[name].shape) if name in self.default else ()
            if block.dim() != len(shape) or any(a > b for a, b in zip(block.shape, shape, strict=True)):
                raise MessageError(
                    f"{name!r} came with shape {tuple(block.shape)}; expected a leading block of {shape}"
                )
            corner = tuple(map(slice, block.shape))
            total[name][0][corner].add_(block, alpha=weight)
            total[name][1][corner].add_(weight)
        return total

    def finish(self, total: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The means."""
        tiny = torch.finfo(torch.float64).tiny
        return {
            name: _like(torch.where(weight > 0, sums / weight.clamp_min(tiny), self.default[name].double()), like.dtype)
            for (name, (sums, weight)), like in zip(total.items(), self.default.values(), strict=True)
        }


@dataclass(frozen=True)
class CoverageMean(Gather):
    """Per coordinate the unweighted mean over the clients whose mask covers it; 0 where none does.

    The count is of masks, never of non-zero values: a covered weight that did not move still counts.

    Args:
        mask: of a client. An upload holds, of each tensor that the mask names, the values that it keeps, flat and in
            order; a tensor that it does not name comes whole and counts everywhere.
    """

    mask: Callable[[ClientInfo], Mask]

    def init(self) -> dict[str, tuple[Tensor, Tensor, torch.dtype]]:
        """No names."""
        return {}

    def add(self, total: Any, client: ClientInfo, value: Params, upload: Message) -> Any:
        """One more upload.

        Raises:
            MessageError: a tensor does not hold as many values as the mask keeps, or has another shape than before.
        """
        mask = self.mask(client)
        for name, kept in value.items():
            whole = mask[name].to(kept.device) if name in mask else torch.ones_like(kept, dtype=torch.bool)
            if name not in total:
                total[name] = (
                    torch.zeros(whole.shape, dtype=torch.float64, device=kept.device),
                    torch.zeros(whole.shape, dtype=torch.int64, device=kept.device),
                    kept.dtype,
                )
            sums, count, _ = total[name]
            if whole.shape != sums.shape:
                raise MessageError(f"{name!r} came with shape {tuple(whole.shape)}; expected {tuple(sums.shape)}")
            if kept.numel() != int(whole.sum()):
                raise MessageError(f"{kept.numel()} values of {name!r} came; its mask keeps {int(whole.sum())}")
            sums[whole] += kept.reshape(-1)
            count += whole
        return total

    def finish(self, total: Mapping[str, tuple[Tensor, Tensor, torch.dtype]]) -> dict[str, Tensor]:
        """The means; of integers in float64, as a mean change of a counter need not be whole."""
        return {
            name: (sums / count.clamp(min=1)).to(dtype if dtype.is_floating_point else torch.float64)
            for name, (sums, count, dtype) in total.items()
        }
