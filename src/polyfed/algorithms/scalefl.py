"""ScaleFL: clients train networks that are narrower and shallower, with early exits that learn from their deepest.

    F. Ilhan, G. Su, L. Liu: ScaleFL: Resource-Adaptive Federated Learning with Heterogeneous Clients. CVPR 2023.

Client i has a level: the width s_i, a share of the channels of every layer, and its number e_i of exits. It trains

    L = sum_j j l_j / (e (e + 1) / 2),    l_e = CE(z_e, y),
    l_j = CE(z_j, y) + gamma T^2 KL(softmax(sg z_e / T) || softmax(z_j / T))    (j < e),

with gamma = 0 in the first quarter of the rounds, and with the outputs of layers that s_i narrows divided by s_i (the
Scaler, in training only). The server averages each weight over the clients whose submodel runs it, all alike; layers
and exits behind a client's last exit neither travel nor count. Statistics of BatchNorm each capacity has for itself.

Which capacity has which level, and every difference from paper and released code: docs/algorithms/scalefl.md.
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
from polyfed.blocks.levels import Levels, exit_weights, submodel
from polyfed.blocks.losses import cross_entropy, kl_divergence
from polyfed.blocks.static_norm import MeanByCapacity
from polyfed.blocks.submodel import divided
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.exits import with_exits
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class ScaleFL(Algorithm):
    """Hyper-parameters.

    Args:
        exits: E, the number of exits; or the submodules that follow an early exit, such as ``("layer3", "layer4")``.
        levels: (capacity, width, exits) of each capacity; empty: levels whose weights are the capacity's share.
        kd_weight: gamma.
        temperature: T.
        kd_start: the share of the rounds after which exits learn from the deepest.
        scaler: whether training divides outputs by the width.
        horizon: the number of rounds that ``kd_start`` is a share of; None is the number of rounds.
    """

    name = "scalefl"
    uses_rounds = True
    exits: Positive | tuple[str, ...] = 4
    levels: tuple[tuple[Portion, Portion, Positive], ...] = ()
    kd_weight: NonNegative = 0.05
    temperature: Rate = 3.0
    kd_start: Fraction = 0.25
    scaler: bool = True
    horizon: Positive | None = None

    class Server(State):
        """The weights of the network with all exits, its buffers by capacity, and (width, exits) by capacity."""

        model: Params
        buffers: Mapping[str, Params]
        anatomy: Levels
        chosen: Mapping[str, tuple[float, int]]

    class Broadcast(Message):
        """The weights of the client's level, the buffers of its capacity, and gamma in this round."""

        model: Params
        buffers: Params
        kd_weight: float

    class Upload(Message):
        """Weights and buffers after training."""

        model: Params
        buffers: Params

    def anatomy(self, own: SplitModel) -> Levels:
        """The channels and the depths of a network."""
        return Levels.of(own, self.exits)

    def check(self, task: Task) -> None:
        """One architecture for all clients, with channels to leave out, and a level for each capacity."""
        for capacity in task.capacities:
            self.anatomy(task.common(self.name)).level(capacity, self.levels)

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The network of the capacity's level; and the whole one, which nothing runs."""
        return {"model": submodel(own, self.exits, *self.anatomy(own).level(capacity, self.levels)), "own": own}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """The network's own draw, with heads; the same buffers for all capacities."""
        own = task.common(self.name)
        full, anatomy, key = with_exits(own, self.exits), self.anatomy(own), rng.at("model")
        w = {**full.init(key), **{f"net.{name}": value for name, value in own.init(key).items()}}
        chosen = {str(c): anatomy.level(c, self.levels) for c in task.capacities}
        b = tree.pick(w, full.buffer_names)
        buffers = {c: anatomy.part(s).take(tree.pick(b, anatomy.names[e - 1])) for c, (s, e) in chosen.items()}
        return self.Server(tree.drop(w, b), buffers, anatomy, chosen)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send each level, average each weight over those that run it, and buffers within a capacity."""
        gamma = self.kd_weight if cohort.round > self.kd_start * (self.horizon or cohort.rounds) else 0.0
        down = {c.capacity: replace(self.message_for(server, c), kd_weight=gamma) for c in cohort}
        part = {c: server.anatomy.part(server.chosen[str(c)][0]) for c in down}
        gather = {
            "model": CoverageMean(lambda client: part[client.capacity], None, server.model),
            "buffers": MeanByCapacity(None, server.buffers),
        }
        got = yield from exchange(cohort, lambda client: down[client.capacity], gather=gather)
        return replace(server, model=got["model"], buffers=got["buffers"])

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """What a client of this capacity holds."""
        width, e = server.chosen[str(client.capacity)]
        held = server.anatomy.part(width).take(tree.pick(server.model, server.anatomy.names[e - 1]))
        return self.Broadcast(held, server.buffers[str(client.capacity)], 0.0)

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of L; weights and buffers go back."""
        parts, anatomy = self.predictor_parts(private, msg, client), self.anatomy(client.models["own"])
        s = anatomy.level(client.info.capacity, self.levels)[0] if self.scaler else 1.0
        names = anatomy.layout.scaling(msg.model.keys() - client.models["model"].norm_names)
        frozen = {
            "exits": parts["exits"],
            "rho": {n: torch.tensor(s, dtype=msg.model[n].dtype) for n in names},
            "kd": {"weight": torch.tensor(msg.kd_weight)},
        }
        fitted = yield from fit(client, {"model": parts["model"]}, loss=self.loss, frozen=frozen)
        new = fitted.parts["model"]
        return private, self.Upload(tree.pick(new, msg.model), tree.pick(new, msg.buffers))

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L of the scaled network; the teacher is a constant."""
        net, T = nets["model"], self.temperature
        z = self.logits(Net(net.model, divided(net.params, nets["rho"].params)), nets["exits"], batch[0])  # (e, B, L)
        kd = [kl_divergence(z_j / T, z[-1].detach() / T) for z_j in z[:-1]] if self.kd_weight else []
        gamma = nets["kd"]["weight"] * T**2
        losses = [cross_entropy(z_j, batch) + (gamma * kd[j] if j < len(kd) else 0.0) for j, z_j in enumerate(z)]
        return (nets["exits"]["weight"] * torch.stack(losses)).sum()

    def logits(self, net: Net, exits: Net, x: Tensor) -> Tensor:
        """The logits of each exit, (e, B, L)."""
        return net(x).unflatten(1, (len(exits["weight"]), -1)).transpose(0, 1)

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's network, and the weights of its exits."""
        e = client.models["model"].num_classes // client.models["own"].num_classes
        return {"model": {**msg.model, **msg.buffers}, "exits": exit_weights(e)}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the deepest exit that there is."""
        return {"submodel": self.logits(nets["model"], nets["exits"], x)[-1]}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The network of each capacity."""
        own, found = task.common(self.name), dict[str, Nets]()
        for c in task.capacities:
            msg, (s, e) = self.message_for(server, ClientInfo(0, c)), server.chosen[str(c)]
            net = Net(submodel(own, self.exits, s, e), {**msg.model, **msg.buffers})
            found[f"capacity {c:g}"] = {"model": net, "exits": Net(None, exit_weights(e))}
        return found
