"""FedProto: clients exchange class prototypes, the mean representations of their classes.

    Y. Tan, G. Long, L. Liu, T. Zhou, Q. Lu, J. Jiang, C. Zhang: FedProto: Federated Prototype Learning across
    Heterogeneous Clients. AAAI 2022. https://arxiv.org/abs/2105.00243

Client i keeps a network of any architecture whose representation f_i(x) has d numbers, d the same for all. It uploads
the mean representation C_i[c] of each of its classes; the server averages them into Cbar[c]; local training pulls
f_i(x) towards Cbar[y].

Differences from yuetan031/FedProto: prototypes come from a pass of their own after training, in evaluation mode, not
from the training-mode outputs of the last epoch; a class that nobody in the cohort has keeps its prototype; three
predictors are told apart. docs/algorithms/fedproto.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polyfed.base.ranges import NonNegative
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.classwise import check_by_class, class_counts, class_means, class_table, distance_to_class, nearness
from polyfed.blocks.losses import cross_entropy
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FedProto(Algorithm):
    """Hyper-parameters of FedProto.

    Args:
        weight: lambda, of the distance to the prototypes.
    """

    name = "fedproto"
    exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "prototypes are made even if nothing moves"}
    weight: NonNegative = 1.0

    class Server(State):
        """Cbar: a prototype (d,) by class."""

        prototypes: Params

    class Private(State):
        """A client's model."""

        model: Params

    class Broadcast(Message):
        """Cbar."""

        prototypes: Params

    class Upload(Message):
        """C_i: a prototype (d,) of each of the client's classes."""

        prototypes: Params

    def check(self, task: Task) -> None:
        """Representations of one width."""
        task.common_width(self.name)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """No prototypes yet: the first round is trained without the term."""
        return self.Server({})

    def init_client(self, client: LocalClient) -> Private:
        """A model of the client's own."""
        return self.Private(client.models["model"].init(client.rng.at("model")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Cbar[c] = the plain mean of C_i[c] over the clients of the round that have c."""
        mean = MeanByName(default=server.prototypes)
        got = yield from exchange(cohort, self.Broadcast(server.prototypes), gather={"prototypes": mean})
        return self.Server(got["prototypes"])

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of the loss; then C_i[c] = the mean of f_i over the client's examples of class c."""
        parts = self.predictor_parts(private, msg, client)
        frozen = {"prototypes": parts["prototypes"]}
        fitted = yield from fit(client, {"model": parts["model"]}, loss=self.loss, frozen=frozen)
        prototypes = yield from class_means(client, fitted.parts, self.represent)
        return self.Private(fitted.parts["model"]), self.Upload(prototypes)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """CE(F_i(x), y) + lambda MSE(f_i(x), Cbar[y]); the second over examples whose class has a prototype."""
        x, y = batch
        r = nets["model"].represent(x)  # (B, d)
        distance = distance_to_class(r, y, nets["prototypes"])
        return cross_entropy(nets["model"].classify(r), y) + self.weight * distance

    def represent(self, nets: Nets, x: Tensor) -> Tensor:
        """f_i(x), (B, d)."""
        return nets["model"].represent(x)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """Cbar, to train or to predict with."""
        return self.Broadcast(server.prototypes)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's own model, the prototypes, and which classes are its own."""
        model = client.models["model"]
        own = torch.zeros(model.num_classes)
        own[list(class_counts(client))] = 1.0
        table = class_table(msg.prototypes, model.num_classes, model.rep_dim)
        return {"model": private.model, "prototypes": {**table, "own": own}}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Rows of the common width for classes that there are."""
        check_by_class("prototypes", up.prototypes, task.num_classes, task.common_width(self.name))

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The nearest of all prototypes (the paper's), the nearest of the client's own classes, the header's logits.

        Minus the distance is the logit of a prototype. Without any, every class is as good as another.
        """
        r, table = nets["model"].represent(x), nets["prototypes"]
        near = nearness(r, table)  # (B, L)
        return {
            "prototype": near,
            "prototype-own": torch.where(table["own"] > 0, near, -torch.inf),
            "header": nets["model"].classify(r),
        }
