"""Neuron-wise FIARSE: every client trains, as a small dense network, the strongest channels that its capacity allows.

    A design of polyfed, on what F. Wu et al. name as future work: FIARSE, NeurIPS 2024, https://arxiv.org/abs/2407.19389

A channel is what can be left out by itself, residual streams tied. Its score is the norm of the weights of its outputs,
s_c = sqrt(sum_l ||W_lc||^2 / z_l), z_l the mean of ||W_lc||^2 over the channels of layer l. A client of capacity gamma
holds k_g channels of each group g, at about one share of all, so that cost <= gamma * cost of all: those first in the
order of the server's scores, with hysteresis, nested over capacities. In the round these stay, and

    e = w * M,   M_c = 1[s_c >= theta_g],   theta_g = the smallest s_c at the round's start
    g(w) = dF/de * M + <dF/de, w>_c * M * 2 theta / (s_c + theta)^2 * ds_c/dw

The server averages each coordinate over the clients that hold it. docs/algorithms/fiarse-neuron.md derives g.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from polyfed.base.ranges import NonNegative, Portion
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.losses import supervised
from polyfed.blocks.neurons import Neurons, gate_parts, gated, open_rows, prefix_of, ranked, settled, through_gate
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FIARSENeuron(Algorithm):
    """Hyper-parameters of neuron-wise FIARSE.

    Args:
        gate: ``"biased"``, channels close in training, with the gradient above; ``"frozen"``, all stay.
        capacity_in: what a capacity is a share of: ``"parameters"``, ``"macs"`` (multiply-accumulates), or ``"table"``.
        table: by layer the cost at full size, in any unit; a smaller one costs the kept share of inputs times outputs.
        normalise: whether squared weights are divided by z_l.
        hysteresis: the factor by which a newcomer's score must exceed that of the channel that it replaces; 1 is off.
        unseen_capacities: capacities that no client has, to test the global model at if one channel of each group fits.
    """

    name = "fiarse-neuron"
    tasks = ("classification", "regression")

    gate: Literal["biased", "frozen"] = "biased"
    capacity_in: Literal["parameters", "macs", "table"] = "parameters"
    table: Mapping[str, NonNegative] = field(default_factory=dict[str, float])
    normalise: bool = True
    hysteresis: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1
    unseen_capacities: tuple[Portion, ...] = (0.5, 0.125, 0.03125)

    class Server(State):
        """The model, its channels, the order of each group's, and the sizes of the clients' slices."""

        model: Params
        neurons: Neurons
        order: Mapping[str, Tensor]
        sizes: tuple[Mapping[str, int], ...]

    class Broadcast(Message):
        """The slice of a capacity."""

        model: Params

    class Upload(Message):
        """The slice, trained."""

        model: Params

    def neurons(self, own: SplitModel) -> Neurons:
        """The channels, and what they cost."""
        return Neurons.of(own, self.capacity_in, self.table, self.normalise)

    def check(self, task: Task) -> None:
        """One architecture for all clients, with channels to leave out, of which one each fits all capacities."""
        self.neurons(task.common(self.name)).sizes(min(task.capacities))

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The small network."""
        neurons = self.neurons(own)
        return {"model": prefix_of(neurons.layout, neurons.sizes(capacity)).network(own)}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """w_0, and its channels in the order of their scores."""
        own = task.common(self.name)
        w, neurons = own.init(rng.at("model")), self.neurons(own)
        sizes = tuple(map(neurons.sizes, task.capacities))
        return self.Server(w, neurons, ranked(neurons.scores(w), sizes), sizes)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Train slices, average each coordinate over those who hold it, and order the channels anew."""
        part = {c: server.neurons.part(server.order, c) for c in {client.capacity for client in cohort}}
        down = {capacity: self.Broadcast(held.take(server.model)) for capacity, held in part.items()}
        gather = {"model": CoverageMean(lambda client: part[client.capacity], None, server.model)}
        w = (yield from exchange(cohort, lambda client: down[client.capacity], gather=gather))["model"]
        order = ranked(server.neurons.scores(w), server.sizes, server.order, self.hysteresis)
        return replace(server, model=w, order=order)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The strongest channels that a capacity allows."""
        return self.Broadcast(server.neurons.part(server.order, client.capacity).take(server.model))

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Train the slice, with a gate or without."""
        parts, gate = self.predictor_parts(private, msg, client), self.gate_of(msg, client)
        moves = self.moves if gate and client.plan.moves_without_gradient else None
        w = (yield from fit(client, parts, gradient=self.gradient, frozen=gate, moves=moves)).parts["model"]
        return private, self.Upload(settled(w, msg.model, gate) if gate else w)

    def gate_of(self, msg: Broadcast, client: LocalClient) -> dict[str, Params]:
        """What the slice's gate needs beside its weights; nothing if all channels stay."""
        if self.gate == "frozen":
            return {}
        neurons = self.neurons(full := client.models["model"].whole)
        return gate_parts(neurons, full, neurons.sizes(client.info.capacity), msg.model)

    def moves(self, nets: Nets) -> Parts:
        """The rows of open channels: a channel that closed stays as it is for the round, and so closed."""
        return {"model": open_rows(nets)}

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """g(w), by way of the gradient at e = w * M(w); with a frozen gate the plain gradient."""
        if "gate" not in nets:
            return grad(supervised)
        return {"model": through_gate(grad(supervised, model=gated(nets))["model"], nets)}

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The slice, all of whose channels are open until it trains."""
        return {"model": msg.model}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the slice; just after training, channels that closed take no part."""
        net = nets["model"]
        return {"submodel": (Net(net.model, gated(nets)) if "gate" in nets else net)(x)}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The slice of every capacity that clients have, and of unseen ones that one channel of each group fits."""
        neurons, own = server.neurons, task.common(self.name)
        unseen = [c for c in self.unseen_capacities if c >= neurons.least()]
        capacities = sorted({*task.capacities, *unseen}, reverse=True)
        parts = {f"capacity {c:g}": neurons.part(server.order, c) for c in capacities}
        return {name: {"model": Net(held.network(own), held.take(server.model))} for name, held in parts.items()}
