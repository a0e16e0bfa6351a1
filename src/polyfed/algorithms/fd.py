"""FD, federated distillation: clients exchange what they answer, by class, instead of what they are.

    E. Jeong, S. Oh, H. Kim, J. Park, M. Bennis, S.-L. Kim: Communication-Efficient On-Device Machine Learning:
    Federated Distillation and Augmentation under Non-IID Private Data. 2018. https://arxiv.org/abs/1811.11479

Client i uploads, for each of its classes c, the mean Fbar_i[c] of its softmax outputs on its examples of c. It is sent
the mean of the others' vectors, without its own, and pulls each example's output towards the one of its label. Any
networks; L numbers per class travel. (The paper's FAug, a generator trained by the server, is another method.)

Differences from the paper: the means come from a pass of their own after training, in evaluation mode, not from outputs
noted while the network moved; with partial participation the server keeps each client's latest means for ``max_age``
rounds. Released re-implementations: docs/algorithms/fd.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyfed.base.ranges import NonNegative, Positive
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.classwise import check_by_class, class_means, class_table
from polyfed.blocks.losses import cross_entropy
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Record, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Steps, each, exchange, fit


class Means(Record):
    """A client's mean softmax output (L,) by class, and the round in which it was made."""

    by_class: Params
    round: int


@dataclass(frozen=True, kw_only=True)
class FD(Algorithm):
    """Hyper-parameters of FD.

    Args:
        weight: gamma, of the distillation term.
        max_age: rounds after which a client's means leave the server's bank; 1 keeps those of the last round only.
    """

    name = "fd"
    weight: NonNegative = 1.0
    max_age: Positive = 10

    class Server(State):
        """Each client's latest means."""

        bank: Mapping[int, Means]

    class Private(State):
        """A client's model."""

        model: Params

    class Broadcast(Message):
        """Fhat_i: the others' mean softmax output (L,) by class; nothing for a class that no other has."""

        targets: Params

    class Upload(Message):
        """Fbar_i: this client's mean softmax output (L,) by class."""

        means: Params

    def init_server(self, task: Task, rng: Rng) -> Server:
        """Nobody has answered yet: the first round is trained without the term."""
        return self.Server({})

    def init_client(self, client: LocalClient) -> Private:
        """A model of the client's own."""
        return self.Private(client.models["model"].init(client.rng.at("model")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send each client the others' means, and renew the bank by what comes back."""
        down = {client.id: self.Broadcast(self.targets(server, client)) for client in cohort}
        got = yield from exchange(cohort, down, gather={"means": each})
        bank = {**server.bank, **{client: Means(means, cohort.round) for client, means in got["means"].items()}}
        return self.Server({k: means for k, means in bank.items() if cohort.round - means.round < self.max_age})

    def targets(self, server: Server, client: ClientInfo) -> Params:
        """Fhat_i[c] = (sum_j Fbar_j[c] - Fbar_i[c]) / (M_c - 1): the mean over the M_c clients with c but i itself."""
        others = [means.by_class for k, means in sorted(server.bank.items()) if k != client.id]
        return by_name_mean(others, [1] * len(others), default={})

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs with the others' means as targets; then the means of what was learnt."""
        classes = client.models["model"].num_classes
        targets = {"targets": class_table(msg.targets, classes, classes)}
        fitted = yield from fit(client, {"model": private.model}, loss=self.loss, frozen=targets)
        means = yield from class_means(client, fitted.parts, self.output)
        return self.Private(fitted.parts["model"]), self.Upload(means)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """CE(p(F(x)), y) + gamma CE(p(F(x)), Fhat_i[y]); the second is 0 where nobody else has the class."""
        x, y = batch
        logits = nets["model"](x)  # (B, L)
        soft = nets["targets"]["rows"][y]  # (B, L): probabilities, or zeros, whose cross-entropy is 0
        return cross_entropy(logits, batch) + self.weight * cross_entropy(logits, soft)

    def output(self, nets: Nets, x: Tensor) -> Tensor:
        """p(F(x)), (B, L): probabilities, never raw logits."""
        return nets["model"](x).softmax(dim=1)

    def message_for(self, server: Server, client: ClientInfo) -> None:
        """Nothing is needed to predict."""

    def predictor_parts(self, private: Private, msg: Any, client: LocalClient) -> Parts:
        """The client's own model."""
        return {"model": private.model}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """A row of L numbers for classes that there are."""
        check_by_class("means", up.means, task.num_classes, task.num_classes)

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The model's logits."""
        return {"local": nets["model"](x)}
