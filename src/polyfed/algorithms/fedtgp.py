"""FedTGP: class prototypes that the server trains to keep apart by a margin.

    J. Zhang, Y. Liu, Y. Hua, J. Cao: FedTGP: Trainable Global Prototypes with Adaptive-Margin-Enhanced Contrastive
    Learning for Data and Model Heterogeneity in Federated Learning. AAAI 2024. https://arxiv.org/abs/2401.03230

Clients upload the mean representation C_k[c] of each of their classes and pull their own representations towards a
prototype P[c] of each class. P is not a mean, as in FedProto: an embedding and two layers at the server put it out,
trained so that C_k[c] is nearest to P[c] even with delta added to that distance. Differences: docs/algorithms/fedtgp.md
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from polyfed.base.ranges import NonNegative, Positive, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks import classwise
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.losses import cross_entropy
from polyfed.blocks.server_training import run_two_layers, train_at_server, two_layers
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.plan import LocalSGD, Step
from polyfed.core.requests import ClientResult, Steps, each, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FedTGP(Algorithm):
    """Hyper-parameters of FedTGP.

    Args:
        weight: lambda, of the distance to the prototypes.
        margin_to: delta is the largest, over classes, of the distance to the ``"farthest"`` other class, which is the
            largest of all pairs (the paper), or to the ``"nearest"`` (released code).
        max_margin: tau, the most that delta may be.
        server_lr: learning rate of the prototypes at the server, by plain SGD.
        server_epochs, server_batch: S, passes over a round's representations, and how many make a step.
    """

    name = "fedtgp"
    exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "the server trains even if no client does"}
    weight: NonNegative = 1.0
    margin_to: Literal["farthest", "nearest"] = "farthest"
    max_margin: NonNegative = 100.0
    server_lr: Rate = 0.01
    server_epochs: Positive = 100
    server_batch: Positive = 10

    class Server(State):
        """What puts P out, and P of each class that somebody has had."""

        weights: Params
        prototypes: Params

    class Private(State):
        """A client's model."""

        model: Params

    class Broadcast(Message):
        """P."""

        prototypes: Params

    class Upload(Message):
        """C_k: a mean representation (d,) of each of the client's classes."""

        prototypes: Params

    def check(self, task: Task) -> None:
        """Representations of one width."""
        task.common_width(self.name)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """An embedding (L, d) and two layers of width d; no prototype is sent before they have been trained."""
        d = task.common_width(self.name)
        e = torch.randn(task.num_classes, d, generator=rng.at("embedding").torch())
        return self.Server({"e": e, **two_layers(d, d, d, rng.at("layers"))}, {})

    def init_client(self, client: LocalClient) -> Private:
        """A model of the client's own."""
        return self.Private(client.models["model"].init(client.rng.at("model")))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send P; then S epochs of CE(-(||C - P_j|| + delta [j = c]), c) over all (C, c) of the round."""
        got = yield from exchange(cohort, self.Broadcast(server.prototypes), gather={"prototypes": each})
        uploads: list[Params] = [*got["prototypes"].values()]
        (rows, labels), delta = classwise.stack_rows(uploads), self.margin(uploads)  # (n, d), (n,)

        def loss(weights: Params, step: Step) -> Tensor:
            P = run_two_layers(weights, weights["e"])  # (L, d) = W2 relu(W1 e + b1) + b2
            return self.contrast(rows[step.rows], labels[step.rows], P, delta)

        plan = LocalSGD(epochs=self.server_epochs, batch_size=self.server_batch, lr=self.server_lr)
        weights = train_at_server(server.weights, loss, plan, len(labels), cohort)
        P, known = run_two_layers(weights, weights["e"]), {*map(int, server.prototypes), *labels.tolist()}
        return self.Server(weights, {str(c): P[c].clone() for c in sorted(known)})

    def margin(self, uploads: list[Params]) -> float:
        """Delta = min(tau, max over c of the distance of c's mean over clients to that of another class)."""
        means, classes = classwise.stack_rows([by_name_mean(uploads, [1] * len(uploads), default={})])
        return min(self.max_margin, float(classwise.gaps(means, self.margin_to).max())) if len(classes) > 1 else 0.0

    def contrast(self, rows: Tensor, labels: Tensor, P: Tensor, delta: float) -> Tensor:
        """CE of minus the distances; delta makes the distance to the true class longer, hence the task harder."""
        # Not the root of a difference, which has no gradient at distance 0 and may be that of a negative number.
        distance = torch.cdist(rows, P, compute_mode="donot_use_mm_for_euclid_dist")  # (B, L)
        return cross_entropy(-(distance + delta * one_hot(labels, len(P))), labels)

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of the loss; then C_k[c] = the mean of f_k, as trained, over the client's examples of class c."""
        frozen = {"prototypes": self.predictor_parts(private, msg, client)["prototypes"]}
        fitted = yield from fit(client, {"model": private.model}, loss=self.loss, frozen=frozen)
        prototypes = yield from classwise.class_means(client, fitted.parts, classwise.representation)
        return self.Private(fitted.parts["model"]), self.Upload(prototypes)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """CE(F_k(x), y) + lambda MSE(f_k(x), P[y])."""
        r = nets["model"].represent(batch[0])  # (B, d)
        distance = classwise.distance_to_class(r, batch[1], nets["prototypes"])
        return cross_entropy(nets["model"].classify(r), batch) + self.weight * distance

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """P, to train or to predict with."""
        return self.Broadcast(server.prototypes)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's own model, and P."""
        L, d = client.models["model"].num_classes, client.models["model"].rep_dim
        return {"model": private.model, "prototypes": classwise.class_table(msg.prototypes, L, d)}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Rows of the common width for classes that there are."""
        classwise.check_by_class("prototypes", up.prototypes, task.num_classes, task.common_width(self.name))

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The nearest prototype (class 0 before there is any), and the header's logits."""
        r = nets["model"].represent(x)
        return {"prototype": classwise.nearness(r, nets["prototypes"]), "header": nets["model"].classify(r)}
