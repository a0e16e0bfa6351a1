"""ScaleFL: clients train networks that are narrower and shallower, with early exits that learn from their deepest.

    F. Ilhan, G. Su, L. Liu: ScaleFL: Resource-Adaptive Federated Learning with Heterogeneous Clients. CVPR 2023.

Client i has a level: its width s_i, a share of the channels of every layer, and its number e_i of exits. It trains

    L = sum_j j l_j / (e (e + 1) / 2),    l_e = CE(z_e, y),
    l_j = CE(z_j, y) + gamma T^2 KL(softmax(sg z_e / T) || softmax(z_j / T))    (j < e),

with gamma = 0 in the first quarter of the rounds. In training the outputs of layers that s_i narrows are divided by s_i
(the Scaler). The server averages each weight over the clients whose submodel runs it, all alike. BatchNorm's statistics
each capacity has for itself. Levels, and differences from paper and released code: docs/algorithms/scalefl.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.ranges import Fraction, NonNegative, Portion, Positive, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.depths import each_logits
from polyfed.blocks.inco import InCo
from polyfed.blocks.levels import Levels, submodel, weighted
from polyfed.blocks.losses import cross_entropy, kl_divergence
from polyfed.blocks.static_norm import MeanByCapacity, of_capacity
from polyfed.blocks.submodel import divided
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.exits import each_depth, inside
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class ScaleFL(InCo, Algorithm):
    """Hyper-parameters, besides those of `InCo`.

    Args:
        exits: E, the number of exits; or submodules after which there is an early exit, such as ``("layer2",)``.
        head: the network of early exits, built for the features; "" for a mean over positions and a linear layer.
        levels: (capacity, width, exits) of each capacity; empty: levels whose weights are the capacity's share.
        kd_weight, temperature, kd_start, horizon: gamma and T; gamma counts after the share kd_start of horizon rounds.
        scaler: whether training divides outputs by the width, of a network without BatchNorm, which takes it out.
    """

    name = "scalefl"
    uses_rounds = True
    exits: Positive | tuple[str, ...] = 4
    head: str = ""
    levels: tuple[tuple[Portion, Portion, Positive], ...] = ()
    kd_weight: NonNegative = 0.05
    temperature: Rate = 3.0
    kd_start: Fraction = 0.25
    scaler: bool = True
    horizon: Positive | None = None

    class Server(State):
        """The network's weights, all exits included; its buffers and (width, exits) by capacity; what InCo mixes."""

        model: Params
        buffers: Mapping[str, Params]
        anatomy: Levels
        chosen: Mapping[str, tuple[float, int]]
        mixes: Mapping[str, str]

    class Upload(Message):
        """The weights of the client's level, and the buffers of its capacity."""

        model: Params
        buffers: Params

    class Broadcast(Upload):
        """The same, and gamma in this round."""

        kd_weight: float

    def level(self, own: SplitModel, capacity: float) -> tuple[float, int]:
        """(s, e) of a capacity; ModelError where there is none."""
        return Levels.of(own, self.exits, self.head).level(capacity, self.levels)

    def check(self, task: Task) -> None:
        """One architecture with channels to leave out, a level for each capacity, and layers that InCo can mix."""
        own = task.common(self.name)
        self.mixes(task.family(), lambda _: inside(own))
        _ = [self.level(own, capacity) for capacity in task.capacities]  # raises where there is none

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The network of the capacity's level."""
        return {"model": submodel(own, self.exits, self.head, *self.level(own, capacity))}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """The network's own draw, with heads; the same buffers for all capacities."""
        own = task.common(self.name)
        full, levels = each_depth(own, self.exits, self.head)[-1], Levels.of(own, self.exits, self.head)
        w, chosen = full.init(rng.at("model")), {str(c): self.level(own, c) for c in task.capacities}
        b, mixes = tree.pick(w, full.buffer_names), self.mixes(task.family(), lambda _: inside(own))
        return self.Server(tree.drop(w, b), {c: levels.take(b, *at) for c, at in chosen.items()}, levels, chosen, mixes)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send each level, average each weight over those that run it, and buffers within a capacity."""
        gamma = self.kd_weight if cohort.round > self.kd_start * (self.horizon or cohort.rounds) else 0.0
        down = {c.capacity: replace(self.message_for(server, c), kd_weight=gamma) for c in cohort}
        part = {c: server.anatomy.part(server.chosen[str(c)][0]) for c in down}
        mean = CoverageMean(lambda c: part[c.capacity], None, server.model)
        gather = {"model": mean, "buffers": MeanByCapacity(None, server.buffers)}
        got = yield from exchange(cohort, lambda c: down[c.capacity], gather=gather)
        return replace(self.moved(server, got["model"]), buffers=got["buffers"])

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """What a client of this capacity holds; ModelError where no client has it."""
        (s, e), buffers = of_capacity(server.chosen, client.capacity), of_capacity(server.buffers, client.capacity)
        return self.Broadcast(server.anatomy.take(server.model, s, e), buffers, 0.0)

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of L; weights and buffers go back."""
        parts, net = self.predictor_parts(private, msg, client), client.models["model"]
        s = 1.0 if net.statistic_names or not self.scaler else self.level(net.whole, client.info.capacity)[0]
        rho = Levels.of(net.whole, self.exits, self.head).scaler(tree.pick(msg.model, net.layer_names), s)
        frozen = {"rho": rho, "kd": {"weight": torch.tensor(msg.kd_weight)}}
        w = (yield from fit(client, {"model": parts["model"]}, loss=self.loss, frozen=frozen)).parts["model"]
        return private, self.Upload(tree.pick(w, msg.model), tree.pick(w, msg.buffers))

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L of the scaled network; the teacher z_e is a constant."""
        net, T, gamma = nets["model"], self.temperature, nets["kd"]["weight"]
        *shallow, z = each_logits(Net(net.model, divided(net.params, nets["rho"].params)), batch[0])
        losses = [cross_entropy(z_j, batch) + gamma * T**2 * kl_divergence(z_j / T, z.detach() / T) for z_j in shallow]
        return weighted([*losses, cross_entropy(z, batch)])

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's network."""
        return {"model": {**msg.model, **msg.buffers}}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the deepest exit that there is."""
        return {"submodel": each_logits(nets["model"], x)[-1]}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The network of each capacity."""
        own, capacities = task.common(self.name), [float(c) for c in server.chosen]
        held = {c: self.message_for(server, ClientInfo(0, c)) for c in capacities}
        nets = {c: Net(self.models_at(task, own, c)["model"], {**m.model, **m.buffers}) for c, m in held.items()}
        return {f"capacity {c:g}": {"model": net} for c, net in nets.items()}
