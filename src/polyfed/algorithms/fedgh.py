"""FedGH: private extractors under one header, which the server trains on class-mean representations.

    L. Yi, G. Wang, X. Liu, Z. Shi, H. Yu: FedGH: Heterogeneous Federated Learning with Generalized Global Header.
    ACM Multimedia 2023. https://arxiv.org/abs/2303.13137

Client k keeps an extractor f_k of any architecture whose representation has d numbers, trains it under the global
header h, and uploads the mean representation C_k[c] of each of its classes. The server trains h to classify them and
sends it down, where it takes the place of the client's header.

Differences from LipingYi/FedGH: the server steps with an optimizer of its own on gradients of its own (there the header
never leaves its initial values); class means are exact over examples (there: means of batches' means).
docs/algorithms/fedgh.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from polyfed.base.ranges import Positive, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.classwise import check_by_class, class_means, representation, stack_rows
from polyfed.blocks.losses import cross_entropy, supervised
from polyfed.blocks.server_training import train_at_server
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Nets
from polyfed.core.plan import LocalSGD, Step
from polyfed.core.requests import ClientResult, Steps, each, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FedGH(Algorithm):
    """Hyper-parameters of FedGH.

    Args:
        server_lr: learning rate of the header at the server, by plain SGD.
        server_epochs: passes over the representations of a round.
        server_batch: representations in a step of the server.
    """

    name = "fedgh"
    exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "the server trains even if no client does"}
    server_lr: Rate = 0.01
    server_epochs: Positive = 1
    server_batch: Positive = 10

    class Server(State):
        """The global header."""

        head: Params

    class Private(State):
        """All of a client's network but its header."""

        body: Params

    class Broadcast(Message):
        """The header."""

        head: Params

    class Upload(Message):
        """C_k: a mean representation (d,) of each of the client's classes."""

        means: Params

    def check(self, task: Task) -> None:
        """Equal heads of one linear layer."""
        task.common_head(self.name, linear=True)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """h, as the networks begin with it."""
        model = task.common_head(self.name)
        return self.Server(model.head(model.init(rng.at("head"))))

    def init_client(self, client: LocalClient) -> Private:
        """An extractor of the client's own."""
        model = client.models["model"]
        return self.Private(model.body(model.init(client.rng.at("model"))))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send h; then steps of CE(h(C_k[c]), c) over all C_k[c] of the round."""
        got = yield from exchange(cohort, self.Broadcast(server.head), gather={"means": each})
        rows, labels = stack_rows([*got["means"].values()])  # (n, d), (n,)

        def loss(head: Params, step: Step) -> Tensor:
            logits = linear(rows[step.rows], head["weight"], head.get("bias"))  # (B, L)
            return cross_entropy(logits, labels[step.rows])

        plan = LocalSGD(epochs=self.server_epochs, batch_size=self.server_batch, lr=self.server_lr)
        return self.Server(train_at_server(server.head, loss, plan, len(labels), cohort))

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy on extractor and header together; then C_k[c] = the mean of f_k over class c."""
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=supervised)
        means = yield from class_means(client, fitted.parts, representation)
        return self.Private(client.models["model"].body(fitted.parts["model"])), self.Upload(means)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The header, to train or to predict with."""
        return self.Broadcast(server.head)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's extractor under the received header."""
        return {"model": client.models["model"].with_head(private.body, msg.head)}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Rows for classes that there are, as wide as what the header takes."""
        check_by_class("means", up.means, task.num_classes, down.head["weight"].shape[1])

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the own extractor under the current global header."""
        return {"local": nets["model"](x)}
