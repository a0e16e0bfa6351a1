"""FedMRL: a small shared model beside every private one, learnt at two nested granularities.

    L. Yi, H. Yu, C. Ren, G. Wang, X. Liu, X. Li: Federated Model Heterogeneous Matryoshka Representation Learning.
    NeurIPS 2024. https://arxiv.org/abs/2406.00488, Algorithm 1. Equation numbers below are the paper's.

Client k keeps a private model F_k of any architecture and a private projector P_k; all share one small auxiliary
model G, and only G travels. P_k fuses both representations into d2 numbers; G's header classifies the first d1 of
them, F_k's header all d2; one backward pass of the summed losses trains all three. Differences from the paper: none
known; from LipingYi/FedMRL@8b90f41: docs/algorithms/fedmrl.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from polyfed.base import tree
from polyfed.base.ranges import NonNegative, Positive, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import task_loss
from polyfed.blocks.matryoshka import fuse, networks
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FedMRL(Algorithm):
    """Hyper-parameters of FedMRL.

    Args:
        auxiliary: architecture of G.
        rep_dim: d1, the width of G's representation; at most d2, that of every private model.
        weights: m_G and m_F, of the coarse and the fine loss.
        lr_auxiliary, lr_private, lr_projector: learning rates of G, F_k and P_k; ``train.lr`` if not given.
        projector: one linear layer, or ``"mlp"``, two with a ReLU between.
        mrl: false is the paper's ablation: no slice, no coarse loss, and G's header neither learns nor travels.
        header: ``"local"`` keeps G's header at home: every client has and trains its own.
        share: false is the local-only control: the same three modules, and nothing travels.
    """

    name = "fedmrl"
    tasks = ("classification", "regression")
    auxiliary: str = "cnn5"
    rep_dim: Positive = 100
    weights: tuple[NonNegative, NonNegative] = (1.0, 1.0)
    lr_auxiliary: Rate | None = None
    lr_private: Rate | None = None
    lr_projector: Rate | None = None
    projector: Literal["linear", "mlp"] = "linear"
    mrl: bool = True
    header: Literal["shared", "local"] = "shared"
    share: bool = True

    class Server(State):
        """The auxiliary model, as much of it as travels."""

        G: Params

    class Private(State):
        """A client's model and projector, and what of G does not travel (nothing, by default)."""

        F: Params
        P: Params
        G: Params

    class Broadcast(Message):
        """The auxiliary model."""

        G: Params

    class Upload(Message):
        """The auxiliary model as this client trained it, and n_k."""

        G: Params
        num_examples: int

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """G, the client's F, and P: (d1 + d2) -> d2."""
        return networks(task, own, auxiliary=self.auxiliary, rep_dim=self.rep_dim, kind=self.projector)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """theta^0; of it, what travels."""
        G = task.auxiliary(self.auxiliary, rep_dim=self.rep_dim)
        home = () if self.mrl and self.header == "shared" else G.classifier_names
        return self.Server(tree.drop(G.init(rng.at("G")), home) if self.share else {})

    def init_client(self, client: LocalClient) -> Private:
        """A client's own draws; what arrives as G later takes the place of this one."""
        return self.Private(**{part: client.models[part].init(client.rng.at(part)) for part in ("F", "P", "G")})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Broadcast theta^(t-1), then theta^t = sum_k (n_k / n) theta_k^t over the clients of the round."""
        gather = {"G": Mean("num_examples")} if self.share else {}
        got = yield from exchange(cohort, self.Broadcast(server.G) if self.share else None, gather=gather)
        return self.Server(got["G"]) if self.share else server

    def client_round(self, private: Private, msg: Broadcast | None, client: LocalClient) -> Steps[ClientResult]:
        """Train G, F_k and P_k together; keep F_k and P_k, send G."""
        rates = {"G": self.lr_auxiliary, "F": self.lr_private, "P": self.lr_projector}
        lr = {part: rate for part, rate in rates.items() if rate is not None}
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=self.loss, lr=lr)
        F, P, G = (fitted.parts[part] for part in ("F", "P", "G"))
        if msg is None:
            return self.Private(F, P, G), None
        return self.Private(F, P, tree.drop(G, msg.G)), self.Upload(tree.pick(G, msg.G), len(client.train))

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """m_G * CE(coarse) + m_F * CE(fine)."""
        small, _, fused = fuse(nets, batch[0])  # R = [R_G ; R_F], P_k(R)                                 Eq. 3, 4
        fine = task_loss(nets["F"].classify(fused), batch)  # R_hi = all d2                      Eq. 5, 7, 8
        if not self.mrl:
            return fine
        coarse = task_loss(nets["G"].classify(fused[:, : small.shape[1]]), batch)  # R_lo        Eq. 5, 6, 8
        return self.weights[0] * coarse + self.weights[1] * fine  #                              Eq. 9

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The paper's four inference modes (appendix C.3); the single ones bypass the projector."""
        small, large, fused = fuse(nets, x)
        G, F = nets["G"].classify, nets["F"].classify
        modes = {"mix-large": F(fused), "single-large": F(large)}
        coarse = {"mix-small": G(fused[:, : small.shape[1]]), "single-small": G(small)} if self.mrl else {}
        return modes | coarse

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast | None:
        """G, to train or to predict with."""
        return self.Broadcast(server.G) if self.share else None

    def predictor_parts(self, private: Private, msg: Broadcast | None, client: LocalClient) -> Parts:
        """G as received, with the client's own F and P."""
        return {"G": {**private.G, **(msg.G if msg else {})}, "F": private.F, "P": private.P}
