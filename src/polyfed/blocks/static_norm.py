"""Static BatchNorm (HeteroFL): statistics that are asked for once a model is trained, and that belong to its width."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from polyfed.base.errors import MessageError, ModelError
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import RunningMean
from polyfed.blocks.submodel import Slice, take
from polyfed.core.checks import check_like
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.gather import Gather
from polyfed.core.message import Message
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import Steps, reduce

#: What is held for each capacity.
Known = TypeVar("Known")


class Statistics(Message):
    """Means and variances, and the number of examples behind them."""

    statistics: Params
    num_examples: int


def statistics_at(
    known: Mapping[str, Params], capacity: float, prefix: Callable[[float], Slice]
) -> dict[str, Tensor] | None:
    """Statistics of one width: its own; else the first channels of those of the next width.

    Args:
        known: statistics by ``str(capacity)``; empty where a network has none.
        capacity: the capacity.
        prefix: the channels of a capacity.

    Returns:
        the statistics; None where the network has some, and this width is above all that are known.
    """
    if str(capacity) in known:
        return dict(known[str(capacity)])
    wider = [float(c) for c in known if float(c) >= capacity]
    if not wider:
        return None if known else {}
    return take(known[str(min(wider))], prefix(capacity).inside(prefix(min(wider))))


def of_capacity(known: Mapping[str, Known], capacity: float) -> Known:
    """What there is for a capacity, by ``str(capacity)``.

    Raises:
        ModelError: there is nothing.
    """
    if str(capacity) not in known:
        listed = ", ".join(f"{c:g}" for c in sorted(map(float, known), reverse=True))
        raise ModelError(f"the run has nothing for capacity {capacity:g}; expected one of its clients': {listed}")
    return known[str(capacity)]


def sums(nets: Nets, batch: Batch) -> dict[str, Tensor]:
    """Sums over a batch's examples, "n" of them, of its means and unbiased variances at each layer of ``model``.

    A batch of a single example has no variance, and counts for nothing.
    """
    n = len(batch[0]) if len(batch[0]) > 1 else 0
    found = nets["model"].batch_statistics(batch[0]) if n else {}
    return {"n": torch.tensor(n), **{name: n * value.double() for name, value in found.items()}}


def measured(client: LocalClient, parts: Parts, like: Params) -> Steps[Statistics | None]:
    """Measure the means of a client's batches, in the types of ``like``; None where it has a single example."""
    total = yield from reduce(client, parts, sums)
    n = int(total["n"])
    return Statistics({name: (total[name] / n).to(old.dtype) for name, old in like.items()}, n) if n else None


def check_statistics(up: Message, like: Params) -> None:
    """Check an answer to a question for statistics.

    Raises:
        MessageError: it is no `Statistics`; names, shapes or types differ from ``like``; or a variance is negative.
    """
    if not isinstance(up, Statistics):
        raise MessageError(f"{type(up).__name__} came where statistics were asked for")
    check_like("statistics", up.statistics, like)
    for name, value in up.statistics.items():
        if name.endswith("running_var") and bool((value < 0).any()):
            raise MessageError(f"statistics[{name!r}] has a negative variance; expected 0 or more")


@dataclass(frozen=True)
class MeanByCapacity(Gather):
    """For each capacity the mean over its clients.

    Args:
        weight: the field of the upload that holds its number of examples; None weighs all alike.
        default: by ``str(capacity)``, what stays where no client of a capacity replied; no other capacity is known.
    """

    weight: str | None
    default: Mapping[str, Params]

    def init(self) -> dict[str, RunningMean]:
        """No capacity."""
        return {}

    def add(
        self, total: dict[str, RunningMean], client: ClientInfo, value: Params, upload: Message
    ) -> dict[str, RunningMean]:
        """One more upload."""
        weight = 1 if self.weight is None else getattr(upload, self.weight)
        total.setdefault(str(client.capacity), RunningMean()).add(value, weight)
        return total

    def finish(self, total: Mapping[str, RunningMean]) -> dict[str, Params]:
        """The means, by capacity."""
        return {
            capacity: total[capacity].mean({}) if capacity in total else old for capacity, old in self.default.items()
        }
