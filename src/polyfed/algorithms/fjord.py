"""FjORD, ordered dropout: at each step a client trains the first channels of every layer, at a width that is drawn.

    S. Horváth, S. Laskaridis, M. Almeida, I. Leontiadis, S. I. Venieris, N. D. Lane: FjORD: Fair and Accurate Federated
    Learning under heterogeneous targets with Ordered Dropout. NeurIPS 2021. https://arxiv.org/abs/2102.13451

Client i holds the width p_i, the largest of P that its capacity allows. At each step it draws p uniformly from
{p in P: p <= p_i} and steps on the first ceil(p n) of the n channels of every layer, with the loss

    CE(f_p(x), y),   or with distillation   CE(f_{p_i}(x), y) + CE(f_p(x), sg softmax(f_{p_i}(x)))      (p < p_i).

The server averages each weight, by n_k, over the clients whose width has it. All widths share weights and affine
parameters; running statistics of BatchNorm each width has for itself. docs/algorithms/fjord.md has the differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, randint

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.ranges import Portions
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.losses import cross_entropy
from polyfed.blocks.submodel import Layout, Slice, prefix_inside, take
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FjORD(Algorithm):
    """Hyper-parameters.

    Args:
        widths: P, the shares of the channels that are trained.
        distill: whether a client's narrower networks learn from its widest instead of from the labels.
    """

    name = "fjord"
    widths: Portions = (0.2, 0.4, 0.6, 0.8, 1.0)
    distill: bool = False

    class Server(State):
        """The full network's weights with the statistics of each width, ``"0.2/bn.running_mean"``; its channels."""

        model: Params
        layout: Layout

    class Broadcast(Message):
        """The weights of the client's width with the statistics of all widths up to it."""

        model: Params

    class Upload(Message):
        """The same after training, and n_k."""

        model: Params
        num_examples: int

    def held(self, capacity: float) -> tuple[float, ...]:
        """{p in P: p^2 <= capacity}, ascending: the number of weights goes with p^2. The last is p_i."""
        if found := tuple(p for p in sorted(set(self.widths)) if p <= capacity**0.5 + 1e-9):
            return found
        needs = f"capacity {capacity:g}: the smallest width {min(self.widths):g} needs {min(self.widths) ** 2:g}"
        raise ModelError(f"{needs}; add a width of at most {capacity**0.5:g} to algorithm.widths")

    def check(self, task: Task) -> None:
        """One architecture for all clients, and a width for each capacity."""
        task.common(self.name)
        self.held(min(task.capacities))

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The client's network, and those of all its widths."""
        nets = {f"{p:g}": Slice.prefix(Layout.of(own), p).network(own) for p in self.held(capacity)}
        return {"model": list(nets.values())[-1], **nets}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """w_0, and the statistics of a new network for each width."""
        own = task.common(self.name)
        params, layout = own.init(rng.at("model")), Layout.of(own)
        new = {p: Slice.prefix(layout, p).take(tree.pick(params, own.buffer_names)) for p in self.held(1.0)}
        statistics = {f"{p:g}/{name}": value for p, values in new.items() for name, value in values.items()}
        return self.Server({**tree.drop(params, own.buffer_names), **statistics}, layout)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Average each weight, and the statistics of each width, over the clients that hold them, by n_k."""
        down = {client.capacity: self.message_for(server, client) for client in cohort}
        part = {capacity: Slice.prefix(server.layout, self.held(capacity)[-1]) for capacity in down}
        gather = {"model": CoverageMean(lambda client: part[client.capacity], "num_examples", server.model)}
        got = yield from exchange(cohort, lambda client: down[client.capacity], gather=gather)
        return self.Server(got["model"], server.layout)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """What a client of this capacity holds."""
        own = self.held(client.capacity)
        wider = tuple(f"{p:g}/" for p in self.held(1.0) if p not in own)
        params = tree.drop(server.model, [name for name in server.model if name.startswith(wider)])
        return self.Broadcast(Slice.prefix(server.layout, own[-1]).take(params))

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs, each step at a width of its own; the weights and the statistics of all widths go back."""
        parts, steps = self.predictor_parts(private, msg, client), client.plan.count(len(client.train))
        drawn = randint(len(parts) - 1, (steps,), generator=client.rng.at("widths").torch()).tolist()
        fitted = yield from fit(client, parts, gradient=self.gradient, every=drawn.__getitem__)
        own = {f"{p}/{n}": value for p, part in fitted.parts.items() if p != "model" for n, value in part.items()}
        return private, self.Upload({**fitted.parts["model"], **own}, len(client.train))

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: int) -> Parts:
        """That of the loss at the width of this number."""
        return grad(lambda nets, batch: self.loss(nets, batch, self.held(1.0)[due]))

    def loss(self, nets: Nets, batch: Batch, p: float) -> Tensor:
        """CE(f_p, y); with distillation CE(f_{p_i}, y) and, where p < p_i, CE(f_p, sg softmax(f_{p_i}))."""
        if not self.distill or p == self.widest(nets):
            return cross_entropy(self.at(nets, p)(batch[0]), batch)
        z = self.at(nets, self.widest(nets))(batch[0])  # (B, L)
        return cross_entropy(z, batch) + cross_entropy(self.at(nets, p)(batch[0]), z.detach().softmax(1))

    def widest(self, nets: Nets) -> float:
        """p_i, the largest width that there are statistics of."""
        return max(p for p in self.widths if f"{p:g}" in nets)

    def at(self, nets: Nets, p: float) -> Net:
        """f_p: the leading channels of the weights, and the width's own statistics."""
        widest, own, most = nets["model"], nets[f"{p:g}"], self.widest(nets)
        w = take(widest.params, prefix_inside(widest.model, p, most)) if p < most else widest.params
        return Net(own.model, {**w, **own.params})

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """What the client holds: the weights, and the statistics of each width."""
        statistics = {f"{p:g}": tree.under(msg.model, f"{p:g}/") for p in self.held(client.info.capacity)}
        return {"model": tree.pick(msg.model, client.models["model"].parameter_names), **statistics}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the widest network that there is."""
        return {"submodel": self.at(nets, self.widest(nets))(x)}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The network of every width of P, the widest first."""
        full, found = task.common(self.name), dict[str, Nets]()
        for p, held in {p: Slice.prefix(server.layout, p) for p in reversed(self.held(1.0))}.items():
            net, w = held.network(full), held.take(tree.pick(server.model, full.parameter_names))
            found[f"width {p:g}"] = {"model": Net(net, w), f"{p:g}": Net(net, tree.under(server.model, f"{p:g}/"))}
        return found
