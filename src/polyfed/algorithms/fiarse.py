"""FIARSE: every client trains the submodel of the largest weights that its capacity allows, chosen anew each round.

    F. Wu, X. Wang, Y. Wang, T. Liu, L. Su, J. Gao: FIARSE: Model-Heterogeneous Federated Learning via
    Importance-Aware Submodel Extraction. NeurIPS 2024. https://arxiv.org/abs/2407.19389, Algorithm 1.

A weight's magnitude is its importance: client i holds M_i(x) = 1[|x| >= theta_i], the gamma_i * d largest weights of
the one global model x. Local steps keep theta_i fixed, recompute the mask from the current weights, and use a
threshold-controlled gradient (Eq. 3). The server averages each coordinate over the clients whose mask holds it.

Weights and biases of convolutions and linear layers are masked; normalisation layers are held whole by all. The paper
calls capacity a FLOPs ratio; its code, and this file, use the fraction of masked weights. docs/algorithms/fiarse.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from polyfed.base import tree
from polyfed.base.ranges import Portion, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.losses import supervised
from polyfed.blocks.submodel import Sparse, above, apply_mask, bias_factor, gates, take, top_k_threshold
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FIARSE(Algorithm):
    """Hyper-parameters of FIARSE.

    Args:
        gate: ``"biased"``, the paper's gradient (Eq. 3); ``"released"``, what the released code computes, where the
            bias factor never runs; ``"frozen"``, the mask of the round's start kept throughout (pruning-greedy).
        scope: where the weights compete: ``"model"``, all together, or ``"layer"``, within each tensor.
        server_lr: eta_s.
        unseen_capacities: capacities that no client has, to test the global model at.
    """

    name = "fiarse"
    tasks = ("classification", "regression")

    gate: Literal["biased", "released", "frozen"] = "biased"
    scope: Literal["model", "layer"] = "model"
    server_lr: Rate = 1.0
    unseen_capacities: tuple[Portion, ...] = (0.5, 0.125, 0.03125)

    class Server(State):
        """The global model x, the names of its masked tensors, and of its buffers."""

        model: Params
        masked: tuple[str, ...]
        buffers: tuple[str, ...]

    class Broadcast(Message):
        """x * M_i(x) and theta_i: one number, or one per masked tensor when the scope is the layer."""

        submodel: Sparse
        threshold: tuple[float, ...]

    class Upload(Message):
        """x_K - x_0, the kept values only: the server knows the mask."""

        delta: Params

    def check(self, task: Task) -> None:
        """One architecture for all clients."""
        task.common(self.name)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """x_0."""
        model = task.common(self.name)
        params = model.init(rng.at("model"))
        masked = model.parameter_names - model.norm_names
        return self.Server(params, tuple(n for n in params if n in masked), tuple(sorted(model.buffer_names)))

    def threshold(self, server: Server, capacity: float) -> tuple[float, ...]:
        """theta_i = TopK of |x| at a capacity (line 3 of Algorithm 1)."""
        weights = {name: server.model[name] for name in server.masked}
        if self.scope == "layer":
            return tuple(top_k_threshold({name: value}, capacity) for name, value in weights.items())
        return (top_k_threshold(weights, capacity),)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Extract a submodel for each capacity, exchange, and average per coordinate by mask counts."""
        down = {client.capacity: self.message_for(server, client) for client in cohort}
        mask = {capacity: self.mask(server, msg.threshold) for capacity, msg in down.items()}
        gather = {"delta": CoverageMean(lambda client: mask[client.capacity])}
        got = yield from exchange(cohort, lambda client: down[client.capacity], gather=gather)
        step = got["delta"]  # 0 where nobody holds the weight                                  line 13
        moved = tree.add(server.model, tree.pick(step, server.buffers))  # running statistics are averaged as they are
        return replace(server, model=tree.add(moved, tree.drop(step, server.buffers), scale=self.server_lr))

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The submodel of the client's capacity."""
        threshold = self.threshold(server, client.capacity)
        return self.Broadcast(Sparse.take(server.model, self.mask(server, threshold)), threshold)

    def mask(self, server: Server, threshold: tuple[float, ...]) -> dict[str, Tensor]:
        """M_i(x) = 1[|x| >= theta_i]."""
        return above(server.model, gates(server.model, server.masked, threshold))

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """K steps of the threshold-controlled gradient; the difference goes back."""
        parts = self.predictor_parts(private, msg, client)
        mask = msg.submodel.mask(client.models["model"].shapes)
        frozen = {"gate": parts["gate"], "mask": mask}
        fitted = yield from fit(client, {"model": parts["model"]}, gradient=self.gradient, frozen=frozen)
        delta = tree.sub(fitted.parts["model"], parts["model"])  # lines 10-11, with the opposite sign
        return private, self.Upload(take(delta, mask))

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """g(x) = dF/dw * M(x) * (1 + 2 |x| theta / (|x| + theta)^2) at w = x * M(x).                Eq. 3."""
        x, theta, M = nets["model"].params, nets["gate"].params, self.mask_now(nets)
        g = grad(supervised, model=apply_mask(x, M))["model"]
        bias = self.gate == "biased"
        return {"model": {n: v * M[n] * bias_factor(x[n], theta[n], bias) if n in M else v for n, v in g.items()}}

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The submodel at full shape, and its thresholds."""
        model = msg.submodel.dense(client.models["model"].shapes)
        return {"model": model, "gate": gates(model, msg.submodel.masked, msg.threshold)}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The submodel's logits; weights that fell below the threshold while training do not take part."""
        w = apply_mask(nets["model"].params, self.mask_now(nets))
        return {"submodel": Net(nets["model"].model, w)(x)}

    def mask_now(self, nets: Nets) -> Mapping[str, Tensor]:
        """M(x) at the current weights; with a frozen gate, that of the round's start as long as the round lasts."""
        if self.gate == "frozen" and "mask" in nets:
            return nets["mask"].params
        return above(nets["model"].params, nets["gate"].params)

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The submodel of every capacity that clients have, and of capacities that none has."""
        capacities = sorted({*task.capacities, *self.unseen_capacities}, reverse=True)
        return {
            f"capacity {c:g}": {
                "model": Net(task.common(self.name), server.model),
                "gate": Net(None, gates(server.model, server.masked, self.threshold(server, c))),
            }
            for c in capacities
        }
