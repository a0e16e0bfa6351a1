"""DepthFL: every client trains the first stages of one network, with a classifier after each, that teach one another.

    M. Kim, S. Yu, S. Kim, S.-M. Moon: DepthFL: Depthwise Federated Learning for Heterogeneous Clients. ICLR 2023.
    https://openreview.net/forum?id=pf8RIZTMU58

A client of depth d has the logits z_1, ..., z_d of d classifiers, and in round t the loss

    sum_i CE(z_i, y) + lambda_t / (d - 1) sum_i sum_{j != i} KL(sg softmax(z_j) || softmax(z_i)),
    lambda_t = exp(-5 (1 - min(t, R) / R)^2).

The server takes the plain mean of each tensor, by name, over the clients of the round that have it. The mean of the
logits predicts. FedDyn: `polyfed.blocks.feddyn`. Known from a summary; differences: docs/algorithms/depthfl.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from polyfed.base import tree
from polyfed.base.ranges import Positive
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.depths import Depths, each_logits, mutual, rampup, staged
from polyfed.blocks.feddyn import FedDyn, corrected, pulled, remembered
from polyfed.blocks.losses import cross_entropy
from polyfed.core.algorithm import Algorithm, Task, raise_idle
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class DepthFL(FedDyn, Algorithm):
    """Hyper-parameters beside those of `FedDyn`.

    Args:
        exits: submodules after which there is a classifier besides the network's own; by default see `stage_ends`.
        head: the network of these classifiers, built for the features; "" for a mean over positions and a linear layer.
        depths: the depth of each capacity that occurs, the largest capacity first; by default what fits.
        distill: whether classifiers learn from one another.
        ramp: R, the rounds until they do so fully.
    """

    name = "depthfl"
    own_networks = False
    exempt = dict.fromkeys(("equal_answers_count_once", "idle_rounds_change_nothing"), "FedDyn's h is a rounded sum")
    exits: tuple[str, ...] = ()
    head: str = ""
    depths: tuple[Positive, ...] = ()
    distill: bool = True
    ramp: Positive = 300

    def __post_init__(self) -> None:
        """No key without an effect."""
        raise_idle(self, (not self.feddyn, "feddyn is off", {"alpha"}), (not self.distill, "distill is off", {"ramp"}))

    class Server(State):
        """w, FedDyn's h, what each capacity holds, and N."""

        model: Params
        h: Params
        depths: Depths
        clients: int

    class Private(State):
        """FedDyn's g_k; empty without FedDyn."""

        memory: Params

    class Broadcast(Message):
        """The first stages, with their classifiers."""

        model: Params

    class Upload(Broadcast):
        """The same after training."""

    def networks(self, task: Task, own: SplitModel) -> tuple[tuple[SplitModel, ...], Depths]:
        """The network of each depth, and what capacities allow."""
        return staged(own, self.exits, self.head, task.capacities, self.depths)

    def check(self, task: Task) -> None:
        """One architecture for all clients, that can be cut behind its stages."""
        self.networks(task, task.common(self.name))

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The stages that fit."""
        nets, depths = self.networks(task, own)
        return {"model": nets[depths.at(capacity) - 1]}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """w_0, and h = 0."""
        nets, depths = self.networks(task, task.common(self.name))
        model, names = nets[-1].init(rng.at("model")), nets[-1].parameter_names if self.feddyn else ()
        return self.Server(model, {n: torch.zeros_like(model[n]) for n in sorted(names)}, depths, task.num_clients)

    def init_client(self, client: LocalClient) -> Private:
        """g_k = 0."""
        model = client.models["model"]
        return self.Private({n: torch.zeros(model.shapes[n]) for n in sorted(model.parameter_names) if self.feddyn})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Average each tensor over the clients that have it; with FedDyn, then less h / alpha."""
        down = {client.capacity: self.message_for(server, client) for client in cohort}
        got = yield from exchange(cohort, lambda c: down[c.capacity], gather={"model": MeanByName(None, server.model)})
        counts = {name: sum(name in down[client.capacity].model for client in got.clients) for name in server.model}
        h, model = corrected(server.h, server.model, got["model"], counts, server.clients, self.alpha)
        return replace(server, model=model, h=h)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The stages that fit the client's capacity."""
        return self.Broadcast(tree.pick(server.model, server.depths.names_at(client.capacity)))

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs; the weights go back, the memory stays."""
        g, start = private.memory, tree.pick(msg.model, private.memory)
        frozen = {"memory": g, "start": start, "ramp": {"weight": torch.tensor(rampup(client.round, self.ramp))}}
        fitted = yield from fit(client, {"model": msg.model}, gradient=self.gradient, frozen=frozen)
        return self.Private(remembered(g, fitted.parts["model"], start, self.alpha)), self.Upload(fitted.parts["model"])

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """That of the loss; with FedDyn that of the regularised one."""
        w, start, g = (nets[part].params for part in ("model", "start", "memory"))
        return {"model": pulled(grad(self.loss)["model"], w, start, g, self.alpha)}

    def loss(self, nets: Nets, batch: Batch) -> torch.Tensor:
        """Cross-entropy of all classifiers, and what they learn from one another."""
        z = each_logits(nets["model"], batch[0])
        loss = torch.stack([cross_entropy(own, batch) for own in z]).sum()
        return loss + nets["ramp"]["weight"] * mutual(z) if self.distill else loss

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The received stages."""
        return {"model": msg.model}

    def predict(self, nets: Nets, x: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The mean of the logits of all classifiers, the first classifier and the last; or the last alone."""
        z = each_logits(nets["model"], x)
        return {**({} if "alone" in nets else {"ensemble": torch.stack(z).mean(0), "first": z[0]}), "last": z[-1]}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """Of every depth, the largest first, the ensemble; and its last classifier alone."""
        nets = enumerate(self.networks(task, task.common(self.name))[0], 1)
        made = [(i, Net(net, tree.pick(server.model, net.shapes))) for i, net in nets][::-1]
        alone = {f"classifier {i}": {"model": net, "alone": Net(None, {})} for i, net in made}
        return {**{f"depth {i}": {"model": net} for i, net in made}, **alone}
