"""LG-FedAvg: private representations under one shared head.

    P. P. Liang, T. Liu, L. Ziyin, N. B. Allen, R. P. Auerbach, D. Brent, R. Salakhutdinov, L.-P. Morency: Think
    Locally, Act Globally: Federated Learning with Local and Global Representations. 2020.
    https://arxiv.org/abs/2001.01523

Client k keeps all of its network before the classifier, of any architecture; the classifier (head) is averaged as in
FedAvg. Heads have to be equal in shape, hence representations in width.

Differences from the paper: only the head is shared, as networks that differ have nothing else in common (the paper's
share upper layers); no FedAvg beforehand. From pliang279/LG-FedAvg: docs/algorithms/lg-fedavg.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import supervised
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class LGFedAvg(Algorithm):
    """No hyper-parameters beyond the local training's."""

    name = "lg-fedavg"
    tasks = ("classification", "regression")

    class Server(State):
        """The global head."""

        head: Params

    class Private(State):
        """All of a client's network but its classifier."""

        body: Params

    class Broadcast(Message):
        """The head."""

        head: Params

    class Upload(Message):
        """The head as this client trained it, and n_k."""

        head: Params
        num_examples: int

    def check(self, task: Task) -> None:
        """Equal heads."""
        task.common_head(self.name)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """One head for all: heads that started apart would have nothing to agree on."""
        model = task.common_head(self.name)
        return self.Server(model.head(model.init(rng.at("head"))))

    def init_client(self, client: LocalClient) -> Private:
        """A body of the client's own."""
        model = client.models["model"]
        return self.Private(model.body(model.init(client.rng.at("model"))))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send the head, then head = sum_k (n_k / n) head_k over the clients of the round."""
        got = yield from exchange(cohort, self.Broadcast(server.head), gather={"head": Mean("num_examples")})
        return self.Server(got["head"])

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy on body and head together; keep the body, send the head."""
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=supervised)
        model, params = client.models["model"], fitted.parts["model"]
        return self.Private(model.body(params)), self.Upload(model.head(params), len(client.train))

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The head, to train or to predict with."""
        return self.Broadcast(server.head)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's body under the received head."""
        return {"model": client.models["model"].with_head(private.body, msg.head)}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the own body under the current global head."""
        return {"local": nets["model"](x)}
