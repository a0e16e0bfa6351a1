"""FedAvg: one model for all; clients train it in turn and the server averages what they send.

    H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data. AISTATS 2017. https://arxiv.org/abs/1602.05629, Algorithm 1.

Server:  w <- sum_k (n_k / n) w_k over the clients of the round.
Client:  E epochs of SGD on cross-entropy from w.

All clients have one architecture. BatchNorm's statistics travel and are averaged like weights.
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
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """No hyper-parameters beyond the local training's."""

    name = "fedavg"
    tasks = ("classification", "regression")

    class Server(State):
        """The global model w."""

        model: Params

    class Broadcast(Message):
        """w."""

        model: Params

    class Upload(Message):
        """w_k and n_k."""

        model: Params
        num_examples: int

    def check(self, task: Task) -> None:
        """One architecture for all clients."""
        task.common(self.name)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """w_0."""
        return self.Server(task.common(self.name).init(rng.at("model")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send w, average what comes back by numbers of examples."""
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": Mean("num_examples")})
        return self.Server(got["model"])

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy from w."""
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Upload(fitted.parts["model"], len(client.train))

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The global model."""
        return self.Broadcast(server.model)

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The global model."""
        return {"model": msg.model}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The global model's logits."""
        return {"global": nets["model"](x)}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The global model."""
        return {"global": {"model": Net(task.common(self.name), server.model)}}
