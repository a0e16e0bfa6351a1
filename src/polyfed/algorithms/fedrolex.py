"""FedRolex: every client trains a window of channels that moves on by one every round, so that all are trained.

    S. Alam, L. Liu, M. Yan, M. Zhang: FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model
    Extraction. NeurIPS 2022. https://arxiv.org/abs/2212.01548

Round j:  of every n coupled channels a client holds number (j + i) mod n, i = 0, ..., m - 1, with m = ceil(rho n).
Client and server: as HeteroFL, without static BatchNorm.

``window = "random"`` is federated dropout (S. Caldas, J. Konečný, H. B. McMahan, A. Talwalkar: Expanding the Reach of
Federated Learning by Reducing Client Resource Requirements. 2018. https://arxiv.org/abs/1812.07210) without its
compression: m channels drawn per round and client, by the server alone: no position travels.

The paper does not say which slice a small client predicts with; here the prefix of the new model. Differences from
AIoT-MLSys-Lab/FedRolex: docs/algorithms/fedrolex.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from polyfed.base.errors import ModelError
from polyfed.base.ranges import Count
from polyfed.base.types import ClientId
from polyfed.blocks.submodel import Layout, Slice
from polyfed.blocks.widths import Widths
from polyfed.core.algorithm import Task
from polyfed.core.clients import Cohort
from polyfed.core.net import Nets


@dataclass(frozen=True, kw_only=True)
class FedRolex(Widths):
    """Hyper-parameters of FedRolex; those of `Widths` come first, with ``calibrate`` off.

    Args:
        window: the channels of a round: ``"rolling"``; ``"random"``, drawn for each client; or ``"static"``, the first.
        test_offsets: numbers of channels where windows begin that the global model is tested with, beside the prefix.
    """

    name = "fedrolex"

    calibrate: bool = False
    window: Literal["rolling", "random", "static"] = "rolling"
    test_offsets: tuple[Count, ...] = ()

    def check(self, task: Task) -> None:
        """As of `Widths`; statistics of prefixes are none of other windows."""
        super().check(task)
        if self.test_offsets and self.calibrate and task.common(self.name).statistic_names:
            raise ModelError(
                "algorithm.test_offsets: with algorithm.calibrate BatchNorm has statistics for prefixes alone, so "
                "no other window can be tested; set one of the two, or use a normalisation without statistics"
            )

    def slices(self, layout: Layout, cohort: Cohort) -> Mapping[ClientId, Slice]:
        """The windows of round j = ``cohort.round`` - 1; nested over shares, unless random."""
        if self.window == "static":
            return super().slices(layout, cohort)
        if self.window == "random":
            return {
                client.id: Slice.random(layout, self.share(client.capacity), cohort.rng.at("window", client.id))
                for client in cohort
            }
        shares = {client.capacity: self.share(client.capacity) for client in cohort}
        made = {capacity: Slice.window(layout, share, cohort.round - 1) for capacity, share in shares.items()}
        return {client.id: made[client.capacity] for client in cohort}

    def global_nets(self, server: Widths.Server, task: Task) -> Mapping[str, Nets]:
        """The prefix of every capacity, and other windows."""
        found = dict(super().global_nets(server, task))
        for offset in self.test_offsets:
            part = partial(self.windowed, server.layout, offset)
            nets = self.tested(task, server.model, {}, part)
            found |= {f"{name}, offset {offset}": net for name, net in nets.items()}
        return found

    def windowed(self, layout: Layout, offset: int, capacity: float) -> Slice:
        """The window that begins at a number of channels."""
        return Slice.window(layout, self.share(capacity), offset)
