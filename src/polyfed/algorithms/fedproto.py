"""FedProto: clients exchange class prototypes, the mean representations of their classes.

    Y. Tan, G. Long, L. Liu, T. Zhou, Q. Lu, J. Jiang, C. Zhang: FedProto: Federated Prototype Learning across
    Heterogeneous Clients. AAAI 2022. https://arxiv.org/abs/2105.00243

Client i keeps a network of any architecture whose representation f_i(x) has d numbers, d the same for all. It uploads
the mean representation C_i[c] of each of its classes; the server averages them into Cbar[c]; local training pulls
f_i(x) towards Cbar[y]. A client receives, and predicts, the classes of its own training data.

Differences from yuetan031/FedProto: prototypes come from a pass of their own after training, in evaluation mode, not
from the training-mode outputs of the last epoch; a class that no client of the cohort has keeps its prototype.
docs/algorithms/fedproto.md has the lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from polyfed.base.ranges import NonNegative
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.classwise import (
    check_by_class,
    class_counts,
    class_means,
    class_table,
    distance_to_class,
    nearness,
    representation,
)
from polyfed.blocks.losses import cross_entropy
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Each, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FedProto(Algorithm):
    """Hyper-parameters of FedProto.

    Args:
        weight: lambda, of the distance to the prototypes.
        classes: whose prototypes a client receives and can predict: the classes of its ``"own"`` training data, as in
            the paper, or ``"all"`` classes.
    """

    name = "fedproto"
    exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "prototypes are made even if nothing moves"}
    personal_message = True
    weight: NonNegative = 1.0
    classes: Literal["own", "all"] = "own"

    class Server(State):
        """Cbar: a prototype (d,) by class; and the classes of each client's last upload."""

        prototypes: Params
        classes: Mapping[int, tuple[int, ...]]

    class Private(State):
        """A client's model."""

        model: Params

    class Broadcast(Message):
        """Cbar[c] of the classes that the client needs."""

        prototypes: Params

    class Upload(Message):
        """C_i: a prototype (d,) of each of the client's classes."""

        prototypes: Params

    def check(self, task: Task) -> None:
        """Representations of one width."""
        task.common_width(self.name)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """No prototypes yet: the first round is trained without the term."""
        return self.Server({}, {})

    def init_client(self, client: LocalClient) -> Private:
        """A model of the client's own."""
        return self.Private(client.models["model"].init(client.rng.at("model")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Cbar[c] = the plain mean of C_i[c] over the clients of the round that have c."""
        gather = {"prototypes": (MeanByName(default=server.prototypes), Each(lambda rows: tuple(map(int, rows))))}
        got = yield from exchange(cohort, lambda client: self.message_for(server, client), gather=gather)
        prototypes, classes = got["prototypes"]
        return self.Server(prototypes, {**server.classes, **classes})

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of the loss; then C_i[c] = the mean of f_i over the client's examples of class c."""
        frozen = {"prototypes": self.predictor_parts(private, msg, client)["prototypes"]}
        fitted = yield from fit(client, {"model": private.model}, loss=self.loss, frozen=frozen)
        prototypes = yield from class_means(client, fitted.parts, representation)
        return self.Private(fitted.parts["model"]), self.Upload(prototypes)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """CE(F_i(x), y) + lambda MSE(f_i(x), Cbar[y]); the second over examples whose class has a prototype."""
        x, y = batch
        r = nets["model"].represent(x)  # (B, d)
        distance = distance_to_class(r, y, nets["prototypes"])
        return cross_entropy(nets["model"].classify(r), batch) + self.weight * distance

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """Cbar of the client's classes, to train or to predict with; all of it until the server knows its classes."""
        if self.classes == "all" or client.id not in server.classes:
            return self.Broadcast(server.prototypes)
        return self.Broadcast({str(c): server.prototypes[str(c)] for c in server.classes[client.id]})

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's own model, the prototypes, and which classes it can predict."""
        model = client.models["model"]
        candidates = torch.full((model.num_classes,), float(self.classes == "all"))
        candidates[list(class_counts(client))] = 1.0
        table = class_table(msg.prototypes, model.num_classes, model.rep_dim)
        return {"model": private.model, "prototypes": {**table, "candidates": candidates}}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Rows of the common width for classes that there are."""
        check_by_class("prototypes", up.prototypes, task.num_classes, task.common_width(self.name))

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The nearest prototype (the paper's), and the header's logits.

        Minus the distance is the logit of a prototype. A candidate without a prototype comes after all that have one,
        and before every class that is no candidate.
        """
        r, table = nets["model"].represent(x), nets["prototypes"]
        near = nearness(r, table)  # (B, L)
        near = near.clamp(min=torch.finfo(near.dtype).min)
        return {
            "prototype": torch.where(table["candidates"] > 0, near, -torch.inf),
            "header": nets["model"].classify(r),
        }
