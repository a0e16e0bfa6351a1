"""FIARSE: every client trains the submodel of the largest weights that its capacity allows, chosen anew each round.

    F. Wu, X. Wang, Y. Wang, T. Liu, L. Su, J. Gao: FIARSE: Model-Heterogeneous Federated Learning via
    Importance-Aware Submodel Extraction. NeurIPS 2024. https://arxiv.org/abs/2407.19389, Algorithm 1.

A weight's magnitude is its importance: client i holds M_i(x) = 1[|x| >= theta_i], the gamma_i * d largest weights of
the one global model x. Local steps keep theta_i fixed, recompute the mask from the current weights, and use a
threshold-controlled gradient (Eq. 3). The server averages each coordinate over the clients whose mask holds it.

Weights and biases of convolutions and linear layers are masked; normalisation layers are held whole by all. Which
weights compete, what a capacity is a share of, and other scores than magnitude: `polyfed.blocks.weightwise`. The
differences from paper and released code: docs/algorithms/fiarse.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from polyfed.base import tree
from polyfed.base.ranges import Portion, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.losses import supervised
from polyfed.blocks.submodel import Mask, Sparse, above, apply_mask, bias_factor, take
from polyfed.blocks.weightwise import Global, WeightWise
from polyfed.core.algorithm import Task, idle_keys
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FIARSE(WeightWise):
    """Hyper-parameters of FIARSE; those of `WeightWise` come first.

    Args:
        gate: ``"biased"``, the paper's gradient (Eq. 3); ``"released"``, what the released code computes, where the
            bias factor never runs; ``"frozen"``, the mask of the round's start kept throughout (pruning-greedy).
        sticky: a weight that fell below its threshold stays as it is for the round; else momentum and decay move it.
        counts: the server divides by the number of masks that hold a weight, or of changes that are not zero.
        server_lr: eta_s.
        unseen_capacities: capacities that no client has, to test the global model at.
    """

    name = "fiarse"
    tasks = ("classification", "regression")
    numbers = 3

    gate: Literal["biased", "released", "frozen"] = "biased"
    sticky: bool = True
    counts: Literal["mask", "nonzero"] = "mask"
    server_lr: Rate = 1.0
    unseen_capacities: tuple[Portion, ...] = (0.5, 0.125, 0.03125)

    class Server(Global):
        """x, and what its masks depend on."""

    class Broadcast(Message):
        """x * M_i(x) and theta_i: a number for each group of weights that compete; 0 where scores made the mask."""

        submodel: Sparse
        threshold: tuple[float, ...]

    class Upload(Message):
        """x_K - x_0, the kept values only: the server knows the mask."""

        delta: Params

    def faults(self) -> list[str]:
        """Those of `WeightWise`, and where masks stay as they are in a round, what speaks of their changes."""
        frozen = (self.gate == "frozen", "gate = 'frozen' fixes masks", {"sticky"})
        scored = (self.importance != "magnitude", f"importance = {self.importance!r} fixes masks", {"gate", "sticky"})
        return [*super().faults(), *idle_keys(self, frozen, scored)]

    def init_server(self, task: Task, rng: Rng) -> Server:
        """x_0."""
        return self.begin(self.Server, task, rng)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Extract a submodel for each capacity (line 3), exchange, and average per coordinate over its holders."""
        at = {client.id: self.reach(server, client) for client in cohort}
        cut = self.extract(server)
        made = {capacity: cut(capacity) for capacity in {*at.values()}}
        down = {c: self.Broadcast(Sparse.take(server.model, M), theta) for c, (M, theta) in made.items()}
        mean = self.total(lambda client: made[at[client.id]][0], nonzero=self.counts == "nonzero")
        got = yield from exchange(cohort, lambda client: down[at[client.id]], gather={"delta": mean})
        step, server = self.learnt(server, cohort, got, at, {c: M for c, (M, _) in made.items()})
        # `step` is 0 where nobody holds the weight                                                line 13
        moved = tree.add(server.model, tree.pick(step, server.buffers))  # running statistics are averaged as they are
        return replace(server, model=tree.add(moved, tree.drop(step, server.buffers), scale=self.server_lr))

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The submodel of the client's capacity."""
        mask, theta = self.extract(server)(self.reach(server, client))
        return self.Broadcast(Sparse.take(server.model, mask), theta)

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """K steps of the threshold-controlled gradient; the difference goes back."""
        mask = msg.submodel.mask(client.models["model"].shapes)
        parts = self.predictor_parts(private, msg, client, mask)
        fixed = self.gate == "frozen" or not any(msg.threshold)  # M(x) stays as it is: of the round's start, or scores'
        fitted = yield from fit(
            client,
            {"model": parts["model"]},
            gradient=self.gradient,
            frozen={"gate": {} if fixed else parts["gate"]},
            moves=self.mask_of_model if self.sticky and client.plan.moves_without_gradient and not fixed else None,
            within={"model": {name: held for name, held in mask.items() if not held.all()}},
        )
        delta = tree.sub(fitted.parts["model"], parts["model"])  # lines 10-11, with the opposite sign
        return private, self.Upload(take(delta, mask))

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """g(x) = dF/dw * M(x) * (1 + 2 |x| theta / (|x| + theta)^2) at w = x * M(x).                Eq. 3."""
        x, theta, M = nets["model"].params, nets["gate"].params, self.mask_now(nets)
        g = grad(supervised, model=apply_mask(x, M))["model"] if M else grad(supervised)["model"]
        bias = self.gate == "biased"
        return {"model": {n: v * M[n] * bias_factor(x[n], theta[n], bias) if n in M else v for n, v in g.items()}}

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient, mask: Mask | None = None) -> Parts:
        """The submodel at full shape, by the mask if it is known, and its thresholds."""
        shapes = client.models["model"].shapes
        model = msg.submodel.dense(shapes, mask)
        return {"model": model, "gate": self.gates(model, msg.submodel.names(shapes), msg.threshold)}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The submodel's logits; weights that fell below the threshold while training do not take part."""
        w = apply_mask(nets["model"].params, self.mask_now(nets))
        return {"submodel": Net(nets["model"].model, w)(x)}

    def mask_now(self, nets: Nets) -> Mapping[str, Tensor]:
        """M(x) at the current weights, of the tensors that have a threshold."""
        return above(nets["model"].params, nets["gate"].params)

    def mask_of_model(self, nets: Nets) -> Parts:
        """M(x): the weights that may move. One below its threshold does not, so it does not come back in the round."""
        return {"model": self.mask_now(nets)}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The submodel of every capacity that clients have, and of capacities that none has."""
        found, own, cut = dict[str, Nets](), task.common(self.name), self.extract(server)
        for c in sorted({*task.capacities, *self.unseen_capacities}, reverse=True):
            mask, theta = cut(c)
            x = server.model if self.importance == "magnitude" else apply_mask(server.model, mask)
            gate = Net(None, self.gates(server.model, server.masked, theta))
            found[f"capacity {c:g}"] = {"model": Net(own, x), "gate": gate}
        return found
