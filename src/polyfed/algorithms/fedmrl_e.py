"""FedMRL-E: FedMRL with one header for all granularities, tied by their weights and kept at home.

    The step that L. Yi et al. leave for later (FedMRL, NeurIPS 2024, https://arxiv.org/abs/2406.00488, section 6), with
    the MRL-E of A. Kusupati et al.: Matryoshka Representation Learning. NeurIPS 2022. https://arxiv.org/abs/2205.13147

As in FedMRL, client k fuses the representations of a shared small model G and of its own F_k by a projector P_k. Here
G has no header. F_k's header, W (L x d2) and b, classifies every prefix m of the fused vector by its first m columns:
y_m = W[:, :m] R~[:m] + b, with one W and one b. Unpublished: docs/algorithms/fedmrl-e.md has what is chosen here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.ranges import Positive
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import task_loss
from polyfed.blocks.matryoshka import fuse, networks, prefix
from polyfed.blocks.submodel import leading, put, take
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FedMRLE(Algorithm):
    """Hyper-parameters of FedMRL-E.

    Args:
        auxiliary: architecture of G.
        rep_dim: d1, the width of G's representation; at most d2, that of every private model.
        granularities: the prefixes of the fused vector that are classified besides the whole, each at most d2; if none
            are given, d1 alone, as in FedMRL.
        projector: one linear layer, or ``"mlp"``, two with a ReLU between.
        header: ``"shared"`` sends and averages the first d1 columns of the header, and its bias.
    """

    name = "fedmrl-e"
    tasks = ("classification", "regression")
    auxiliary: str = "cnn5"
    rep_dim: Positive = 100
    granularities: tuple[Positive, ...] = ()
    projector: Literal["linear", "mlp"] = "linear"
    header: Literal["local", "shared"] = "local"

    class Server(State):
        """The small model without its header; with a shared one, its first d1 columns and bias."""

        G: Params
        H: Params

    class Private(State):
        """A client's model, header included, and its projector."""

        F: Params
        P: Params

    class Broadcast(Message):
        """The small model without its header; and what is shared of the header."""

        G: Params
        H: Params

    class Upload(Message):
        """The same as this client trained it, and n_k."""

        G: Params
        H: Params
        num_examples: int

    @property
    def nested(self) -> tuple[int, ...]:
        """M without d2: the granularities, ascending, each once."""
        return tuple(sorted({*self.granularities} or {self.rep_dim}))

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """G, the client's F, and P: (d1 + d2) -> d2."""
        if self.nested[-1] > own.rep_dim:
            raise ModelError(
                f"{own.name} has a representation of d2 = {own.rep_dim}; set algorithm.granularities "
                f"({', '.join(map(str, self.nested))}) <= {own.rep_dim}"
            )
        linear = {"weight": (own.num_classes, own.rep_dim), "bias": (own.num_classes,)}
        if self.header == "shared" and own.head_shapes != linear:
            raise ModelError(f"{own.name} has a classifier {own.head_shapes}; a shared header needs {linear}")
        return networks(task, own, auxiliary=self.auxiliary, rep_dim=self.rep_dim, kind=self.projector)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """theta^0 without theta_hd."""
        model = task.auxiliary(self.auxiliary, rep_dim=self.rep_dim)
        G = model.init(rng.at("G"))
        return self.Server(tree.drop(G, model.classifier_names), model.head(G) if self.header == "shared" else {})

    def init_client(self, client: LocalClient) -> Private:
        """A client's own draws."""
        return self.Private(**{part: client.models[part].init(client.rng.at(part)) for part in ("F", "P")})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """theta_ex^t = sum_k (n_k / n) theta_ex,k^t over the clients of the round; likewise of a shared header."""
        mean = Mean("num_examples")
        got = yield from exchange(cohort, self.Broadcast(server.G, server.H), gather={"G": mean, "H": mean})
        return self.Server(got["G"], got["H"])

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Train G, F_k and P_k together; keep F_k and P_k, send G."""
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=self.loss)
        F, P, G = (fitted.parts[part] for part in ("F", "P", "G"))
        H = take(tree.pick(client.models["F"].head(F), msg.H), leading(tree.shapes(msg.H)))
        return self.Private(F, P), self.Upload(tree.pick(G, msg.G), H, len(client.train))

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """Sum over m in M of CE(W[:, :m] R~[:m] + b, y), with d2 in M: MRL's loss, all importances 1."""
        _, _, fused = fuse(nets, batch[0])  # R~ = P_k([R_G ; R_F])                                     (B, d2)
        widths = {*self.nested, fused.shape[1]}
        return torch.stack([task_loss(nets["F"].classify(prefix(fused, m)), batch) for m in sorted(widths)]).sum()

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """G, to train or to predict with."""
        return self.Broadcast(server.G, server.H)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """G as received, with the client's own F, but for what is shared of its header, and P.

        A network runs on all of its tensors, so G's header is there as zeros: nothing reads it, nothing moves it, and
        it is neither kept nor sent.
        """
        G = client.models["G"]
        header = {name: torch.zeros(G.shapes[name]) for name in G.shapes if name in G.classifier_names}
        F = client.models["F"]
        head = put(msg.H, None, F.head(private.F))
        return {"G": {**msg.G, **header}, "F": F.with_head(private.F, head), "P": private.P}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The header on the whole fused vector, on each of its prefixes, and on F's representation unfused."""
        _, large, fused = fuse(nets, x)
        F = nets["F"].classify
        mixed = {f"mix-{m}": F(prefix(fused, m)) for m in self.nested}
        return {"mix-large": F(fused), **mixed, "single-large": F(large)}
