"""FML, federated mutual learning: a private and a shared "meme" network teach each other; the meme is averaged.

    T. Shen, J. Zhang, X. Jia, F. Zhang, G. Huang, P. Zhou, K. Kuang, F. Wu, C. Wu: Federated Mutual Learning. 2020.
    https://arxiv.org/abs/2006.16765

Client k keeps a network F_k of any architecture. In each round it forks the global meme G, trains both at once by deep
mutual learning, and sends its G back to be merged. Differences from the paper: none known; from
ZJU-DAI/Federated-Mutual-Learning and two re-implementations: docs/algorithms/fml.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from polyfed.base.ranges import Fraction
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import cross_entropy, kl_divergence
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FML(Algorithm):
    """Hyper-parameters of FML.

    Args:
        auxiliary: architecture of the meme G.
        alpha: weight of the labels in the private network's loss; the rest is G's opinion.
        beta: weight of the labels in the meme's loss; the rest is F_k's opinion.
    """

    name = "fml"
    auxiliary: str = "cnn5"
    alpha: Fraction = 0.5
    beta: Fraction = 0.5

    class Server(State):
        """The global meme."""

        G: Params

    class Private(State):
        """A client's private network."""

        F: Params

    class Broadcast(Message):
        """The meme."""

        G: Params

    class Upload(Message):
        """The meme as this client trained it."""

        G: Params

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """The private network and the meme."""
        return {"F": own, "G": task.auxiliary(self.auxiliary)}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """The first meme."""
        return self.Server(task.auxiliary(self.auxiliary).init(rng.at("G")))

    def init_client(self, client: LocalClient) -> Private:
        """A private network of the client's own."""
        return self.Private(client.models["F"].init(client.rng.at("F")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Every client forks the meme; merge: G = the plain mean of G_k over the clients of the round."""
        got = yield from exchange(cohort, self.Broadcast(server.G), gather={"G": Mean()})
        return self.Server(got["G"])

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Train both networks together; keep F_k, send G_k."""
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=self.loss)
        return self.Private(fitted.parts["F"]), self.Upload(fitted.parts["G"])

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L_local + L_meme. Teachers are detached, so each network descends its own loss only."""
        z, g = nets["F"](batch[0]), nets["G"](batch[0])  # (B, L), (B, L)
        # L_local = alpha CE(z, y) + (1 - alpha) KL(sg[p(g)] || p(z))
        local = self.alpha * cross_entropy(z, batch) + (1 - self.alpha) * kl_divergence(z, g.detach())
        # L_meme = beta CE(g, y) + (1 - beta) KL(sg[p(z)] || p(g))
        return local + self.beta * cross_entropy(g, batch) + (1 - self.beta) * kl_divergence(g, z.detach())

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The meme, to train or to predict with."""
        return self.Broadcast(server.G)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's own network, and the meme as received."""
        return {"F": private.F, "G": msg.G}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The private network's logits and the meme's; the server has the meme alone."""
        return {name: nets[part](x) for name, part in (("private", "F"), ("meme", "G")) if part in nets}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The meme."""
        return {"meme": {"G": Net(task.auxiliary(self.auxiliary), server.G)}}
