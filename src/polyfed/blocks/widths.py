"""Algorithms whose clients train one network at unlike widths: rounds, label masks, Scaler, statistics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.ranges import Portion
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId, Params, Parts
from polyfed.blocks.aggregate import OwnRows
from polyfed.blocks.inco import InCo
from polyfed.blocks.losses import cross_entropy_among, without
from polyfed.blocks.static_norm import MeanByCapacity, Statistics, check_statistics, measured, statistics_at
from polyfed.blocks.submodel import Layout, Slice, divided
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_classes, check_like
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class Widths(InCo, Algorithm):
    """An algorithm whose clients train a share of the channels of every layer, by capacity.

    Args:
        width: a client's share of channels: ``"root"`` of its capacity, which is then about its share of weights; or
            the ``"capacity"`` itself.
        scaler: whether outputs are divided by the share in training. Not where training itself makes BatchNorm's
            statistics, without ``calibrate``: BatchNorm takes the factor out, and tests would see other outputs.
        absent: logits of classes without examples: ``"excluded"``; ``"zero"``, as released; ``"kept"``.
        own_rows: whether rows of the output layer are averaged over those clients alone that have the class; this takes
            a network that names its classifier.
        calibrate: whether BatchNorm's statistics are asked for after each round; else they are averaged as weights are.
        unseen_capacities: capacities that no client has, to test the global model at.
    """

    Answer = Statistics
    numbers = 2

    width: Literal["root", "capacity"] = "root"
    scaler: bool = True
    absent: Literal["excluded", "zero", "kept"] = "excluded"
    own_rows: bool = True
    calibrate: bool = True
    unseen_capacities: tuple[Portion, ...] = (0.5, 0.125, 0.03125)

    def share(self, capacity: float) -> float:
        """rho: the share of channels."""
        return capacity**0.5 if self.width == "root" else capacity

    def prefix(self, layout: Layout, capacity: float) -> Slice:
        """The first channels of every layer."""
        return Slice.prefix(layout, self.share(capacity))

    def check(self, task: Task) -> None:
        """One architecture for all clients, with channels to leave out, also at unseen capacities."""
        own = task.common(self.name)
        _, layout = self.mixes(task.family()), Layout.of(own)
        if self.own_rows and own.cuts[0] is None:
            raise ModelError(
                f"{self.name} averages the rows of {own.name}'s output layer by class, but it names no classifier; "
                'name the first submodule of its classifier (classifier = "..."), or set algorithm.own_rows = false'
            )
        for capacity in self.unseen_capacities:
            try:
                self.prefix(layout, capacity).network(own)
            except ModelError as error:
                raise ModelError(
                    f"algorithm.unseen_capacities: {own.name} cannot be tested at capacity {capacity:g}; "
                    f"leave that capacity out: {error}"
                ) from error

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The small network."""
        return {"model": self.prefix(Layout.of(own), capacity).network(own)}

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

    class Server(State):
        """w, statistics by capacity, the channels, the output layer's names if `own_rows`, and what InCo mixes."""

        model: Params
        statistics: Mapping[str, Params]
        layout: Layout
        head: tuple[str, ...]
        mixes: Mapping[str, str] = field(default_factory=dict[str, str])

    class Broadcast(Message):
        """A slice of w, and the statistics of its width."""

        model: Params
        statistics: Params

    class Query(Broadcast):
        """The same, of which the statistics are asked for."""

    class Upload(Message):
        """The slice as this client trained it, and whether it has each class, (L,) bool."""

        model: Params
        classes: Tensor

    def init_server(self, task: Task, rng: Rng) -> Server:
        """w_0, and statistics as they are drawn."""
        own = task.common(self.name)
        w, layout = own.init(rng.at("model")), Layout.of(own)
        asked = tree.pick(w, own.statistic_names if self.calibrate else ())
        held = {str(c): self.prefix(layout, c).take(asked) for c in task.capacities if asked}
        names = own.classifier_names if self.own_rows else ()
        rows = {name for name in names if own.shapes[name][:1] == (task.num_classes,)}
        head = tuple(sorted(rows - {*layout.scaling(rows)}))
        return self.Server(tree.drop(w, asked), held, layout, head, self.mixes(task.family()))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Train slices and average where they are held; then ask for the statistics of the new model."""
        held = self.slices(server.layout, cohort)
        first = {id(held[client.id]): client for client in cohort}  # a message for each slice, not for each client
        down = {slice_: self.message_for(server, client, held[client.id]) for slice_, client in first.items()}
        mean = OwnRows(lambda c: held[c.id], None, server.model, server.head)
        got = yield from exchange(cohort, lambda c: down[id(held[c.id])], gather={"model": mean})
        new: Widths.Server = self.moved(server, got["model"])
        if not new.statistics:
            return new
        first = {client.capacity: client for client in got.clients}
        ask = {capacity: self.Query(**vars(self.message_for(new, client))) for capacity, client in first.items()}
        gather = {"statistics": MeanByCapacity("num_examples", new.statistics)}
        got = yield from exchange(replace(cohort, clients=got.clients), lambda c: ask[c.capacity], gather=gather)
        return replace(new, statistics=got["statistics"])

    def message_for(self, server: Server, client: ClientInfo, held: Slice | None = None) -> Broadcast:
        """A slice, by default the prefix, with the statistics of its width; ModelError where there are none."""
        prefix, known = partial(self.prefix, server.layout), server.statistics
        found = statistics_at(known, client.capacity, prefix)
        if found is None:
            raise ModelError(
                f"{self.name} has no statistics of BatchNorm for capacity {client.capacity:g}; expected at most "
                f"{max(map(float, known)):g}, the largest capacity of the run's clients"
            )
        return self.Broadcast((prefix(client.capacity) if held is None else held).take(server.model), found)

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Train the slice; or, asked for statistics, take their mean over the client's examples."""
        parts, full = self.predictor_parts(private, msg, client), client.models["model"].whole
        if isinstance(msg, self.Query):
            return private, (yield from measured(client, parts, msg.statistics))
        kept = not self.calibrate and client.models["model"].statistic_names  # they would be those of scaled outputs
        rho = self.share(client.info.capacity) if self.scaler and not kept else 1.0
        names = Layout.of(full).scaling(full.layer_names)
        frozen = {"rho": {n: torch.tensor(rho, dtype=msg.model[n].dtype) for n in names}, "own": parts["own"]}
        fitted = yield from fit(client, {"model": parts["model"]}, loss=self.loss, frozen=frozen)
        return private, self.Upload(tree.drop(fitted.parts["model"], msg.statistics), parts["own"]["classes"])

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """Cross-entropy of the scaled network over the client's classes: (W / rho) x + b / rho = (W x + b) / rho."""
        return cross_entropy_among(self.scaled(nets)(batch[0]), batch, nets["own"]["classes"], self.absent)

    def scaled(self, nets: Nets) -> Net:
        """The network with the Scaler."""
        return Net(nets["model"].model, divided(nets["model"].params, nets["rho"].params))

    def check_upload(self, task: Task, client: ClientInfo, down: Any, up: Any) -> None:
        """The slice, trained, with classes; or the statistics that were asked for."""
        if isinstance(down, self.Query):
            return check_statistics(up, down.statistics)
        check_like("model", up.model, down.model)
        check_classes("classes", up.classes, task.num_classes)

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The slice with its statistics, and the client's classes."""
        own = torch.bincount(client.train.labels, minlength=client.models["model"].num_classes) > 0
        return {"model": {**msg.model, **msg.statistics}, "own": {"classes": own}}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits, without the Scaler; and at a client the same among its own classes.

        Just after training BatchNorm's statistics are those of scaled outputs, and the Scaler stays.
        """
        model = nets["model"].model
        assert model is not None
        logits = (self.scaled(nets) if "rho" in nets and model.statistic_names else nets["model"])(x)
        return {"submodel": logits, **({"own": without(logits, nets["own"]["classes"])} if "own" in nets else {})}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The prefix of every capacity that clients have, and of those that none has and that have statistics."""
        return self.tested(task, server.model, server.statistics, partial(self.prefix, server.layout))
