"""FedAPEN: a private and a shared network teach each other, joined in an ensemble whose weight each client learns.

    Z. Qin, S. Deng, M. Zhao, X. Yan: FedAPEN: Personalized Cross-silo Federated Learning with Adaptability to
    Statistical Heterogeneity. KDD 2023. https://doi.org/10.1145/3580305.3599344

Client k keeps a network F_k of any architecture and a number lambda_k; G is shared. The ensemble's logits are
lambda_k z + (1 - lambda_k) g. Before it trains or predicts, a client learns lambda_k on examples that no network is
trained on, its adaptability set: a part of its training data. Differences from the paper: the shared networks are
averaged over the clients of the round, not all; from zhenqincn/FedAPEN: docs/algorithms/fedapen.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyfed.base.ranges import NonNegative, Positive, Share
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import cross_entropy, kl_divergence, soft_labels, total_weight
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit, reduce
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FedAPEN(Algorithm):
    """Hyper-parameters of FedAPEN.

    Args:
        auxiliary: architecture of the shared network G.
        holdout: the share of a client's training examples that is its adaptability set.
        lr_lambda: learning rate of lambda_k; 0 keeps it at 1/2, the paper's FedEN.
        epochs_lambda: passes over the adaptability set each time that lambda_k is learnt.
    """

    name = "fedapen"
    auxiliary: str = "cnn5"
    holdout: Share = 0.05
    lr_lambda: NonNegative = 0.001
    epochs_lambda: Positive = 10

    class Server(State):
        """The shared network."""

        G: Params

    class Private(State):
        """A client's own network, and lambda_k as it last trained with it."""

        F: Params
        weight: float

    class Broadcast(Message):
        """The shared network."""

        G: Params

    class Upload(Message):
        """The shared network as this client trained it."""

        G: Params

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """The client's own network and the shared one."""
        return {"F": own, "G": task.auxiliary(self.auxiliary)}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """The first G: all clients begin with the same."""
        return self.Server(task.auxiliary(self.auxiliary).init(rng.at("G")))

    def init_client(self, client: LocalClient) -> Private:
        """A network of the client's own, and lambda_k = 1/2."""
        return self.Private(client.models["F"].init(client.rng.at("F")), 0.5)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """G = the plain mean of G_k over the clients of the round."""
        got = yield from exchange(cohort, self.Broadcast(server.G), gather={"G": Mean()})
        return self.Server(got["G"])

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Learn lambda_k, then train both networks with it; keep F_k and lambda_k, send G_k."""
        parts = yield from self.predictor_parts(private, msg, client)
        fitted = yield from fit(
            client, {"F": parts["F"], "G": parts["G"]}, loss=self.loss, frozen={"lambda": parts["lambda"]}
        )
        return self.Private(fitted.parts["F"], float(parts["lambda"]["weight"])), self.Upload(fitted.parts["G"])

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L_private + L_shared. What a network is compared or joined with is detached: each descends its own loss."""
        x, b = batch[0], batch
        z, g, lam = nets["F"](x), nets["G"](x), nets["lambda"]["weight"]  # (B, L), (B, L), ()
        # L_private = CE(z, y) + KL(sg[p(g)] || p(z)) + CE(lambda z + (1 - lambda) sg[g], y)
        own = cross_entropy(z, b) + kl_divergence(z, g.detach()) + cross_entropy(lam * z + (1 - lam) * g.detach(), b)
        # L_shared = CE(g, y) + KL(sg[p(z)] || p(g)) + CE(lambda sg[z] + (1 - lambda) g, y)
        all_ = cross_entropy(g, b) + kl_divergence(g, z.detach()) + cross_entropy(lam * z.detach() + (1 - lam) * g, b)
        return own + all_

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The shared network, to train or to predict with."""
        return self.Broadcast(server.G)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[Parts]:
        """Both networks, and lambda_k as their logits on the adaptability set have it."""
        nets = {"F": private.F, "G": msg.G}
        everything = torch.arange(len(client.held_out or ()))
        seen = yield from reduce(client, nets, self.logits, rows=everything, held_out=True)
        lam = self.learnt(private.weight, seen, client.plan.batch_size, client.weigh)
        return {**nets, "lambda": {"weight": torch.tensor(lam)}}

    def logits(self, nets: Nets, batch: Batch) -> Params:
        """What both networks say of examples, and what these are."""
        x, y = batch
        return {"z": nets["F"](x), "g": nets["G"](x), "y": y}

    def learnt(self, lam: float, seen: Params, batch_size: int, weigh: Callable[[Batch], Batch] = tuple) -> float:
        """Epochs of SGD on CE(lambda z + (1 - lambda) g, y) over lambda alone, cut to [0, 1] after every step."""
        for _ in range(self.epochs_lambda):
            for z, g, y in zip(*(seen[name].split(batch_size) for name in ("z", "g", "y")), strict=True):
                batch, p = weigh((z, y)), (lam * z + (1 - lam) * g).softmax(dim=1)
                q = soft_labels(batch, p)
                rise = (q.sum(dim=1, keepdim=True) * p - q) * (z - g)
                slope = rise.sum(dim=1).sum() / total_weight(batch)  # d CE / d lambda
                lam = min(1.0, max(0.0, lam - self.lr_lambda * float(slope)))
        return lam

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The ensemble's logits and each network's; the server has the shared one alone."""
        alone = {name: nets[part](x) for name, part in (("private", "F"), ("shared", "G")) if part in nets}
        if "F" not in nets:
            return alone
        lam = nets["lambda"]["weight"]
        return {"ensemble": lam * alone["private"] + (1 - lam) * alone["shared"], **alone}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The shared network."""
        return {"shared": {"G": Net(task.auxiliary(self.auxiliary), server.G)}}
