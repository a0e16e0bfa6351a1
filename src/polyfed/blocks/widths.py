"""What algorithms share whose clients train one network at unlike widths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from polyfed.base.ranges import Portion
from polyfed.base.types import ClientId, Params
from polyfed.blocks.static_norm import statistics_at
from polyfed.blocks.submodel import Layout, Slice
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import Cohort
from polyfed.core.net import Net, Nets
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class Widths(Algorithm):
    """An algorithm whose clients hold a share of the channels of every layer, by capacity.

    Args:
        width: a client's share of channels: ``"root"`` of its capacity, which is then about its share of weights; or
            the ``"capacity"`` itself.
        unseen_capacities: capacities that no client has, to test the global model at.
    """

    width: Literal["root", "capacity"] = "root"
    unseen_capacities: tuple[Portion, ...] = (0.5, 0.125, 0.03125)

    def share(self, capacity: float) -> float:
        """rho: the share of channels."""
        return capacity**0.5 if self.width == "root" else capacity

    def prefix(self, layout: Layout, capacity: float) -> Slice:
        """The first channels of every layer."""
        return Slice.prefix(layout, self.share(capacity))

    def check(self, task: Task) -> None:
        """One architecture for all clients, with channels to leave out."""
        Layout.of(task.common(self.name))

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The small network; and the full one, which nothing runs: a small one does not say what was narrowed."""
        return {"model": self.prefix(Layout.of(own), capacity).network(own), "full": own}

    def slices(self, layout: Layout, cohort: Cohort) -> Mapping[ClientId, Slice]:
        """The slices that clients train in a round, by client; one object for all clients with the same."""
        made = {capacity: self.prefix(layout, capacity) for capacity in {client.capacity for client in cohort}}
        return {client.id: made[client.capacity] for client in cohort}

    def tested(
        self, task: Task, model: Params, statistics: Mapping[str, Params], part: Callable[[float], Slice]
    ) -> dict[str, Nets]:
        """Slices of the global model, at the capacities of clients and at unseen ones that have statistics.

        Args:
            task: the common knowledge of server and clients.
            model: the tensors of the full network, but for those that ``statistics`` has.
            statistics: by ``str(capacity)``; empty where there are none.
            part: the slice of a capacity.
        """
        own, nets = task.common(self.name), dict[str, Nets]()
        for capacity in sorted({*task.capacities, *self.unseen_capacities}, reverse=True):
            held, found = part(capacity), statistics_at(statistics, capacity, part)
            if found is not None:
                nets[f"capacity {capacity:g}"] = {"model": Net(held.network(own), {**held.take(model), **found})}
        return nets
