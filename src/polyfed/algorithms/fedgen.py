"""FedGen: the server trains a generator of representations, which clients classify beside their own.

    Z. Zhu, J. Hong, J. Zhou: Data-Free Knowledge Distillation for Heterogeneous Federated Learning. ICML 2021.
    https://arxiv.org/abs/2105.10056

From class and Gaussian noise G makes representations that the clients' heads h_k together take for that class; clients
learn from them beside their own data. Heads are averaged. Differences from paper and code: docs/algorithms/fedgen.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from polyfed.base.ranges import NonNegative, Portion, Positive, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.feature_generator import draw_classes, ensemble, generate, sameness
from polyfed.blocks.losses import cross_entropy, kl_divergence
from polyfed.blocks.server_training import train_at_server, two_layers
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_counts, check_like
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.plan import LocalSGD, Step
from polyfed.core.requests import ClientResult, Draw, Steps, each, exchange, fit


@dataclass(frozen=True, kw_only=True)
class FedGen(Algorithm):
    """Hyper-parameters of FedGen.

    Args:
        alpha, beta: of a client's CE on generated representations, and of the KL; multiplied by ``decay`` each round.
        diversity: of `sameness`. noise_dim, hidden: widths of G. server_*: its training, by Adam.
    """

    name = "fedgen"
    exempt: ClassVar[Mapping[str, str]] = {"idle_rounds_change_nothing": "the server trains even if no client does"}
    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0
    decay: Portion = 0.98
    diversity: NonNegative = 1.0
    noise_dim: Positive = 32
    hidden: Positive = 256
    server_lr: Rate = 3e-4
    server_steps: Positive = 50
    server_batch: Positive = 32

    class Server(State):
        """The mean head, G, and the classes that G has been trained for."""

        head: Params
        generator: Params
        classes: tuple[int, ...]

    class Private(State):
        """All of a client's network but its head."""

        body: Params

    class Broadcast(Message):
        """All of that; to predict with, the head alone."""

        head: Params
        generator: Params
        classes: tuple[int, ...]

    class Upload(Message):
        """The head as trained, and how many examples of each class the client has, (L,)."""

        head: Params
        counts: Tensor

    def check(self, task: Task) -> None:
        """Equal heads of one linear layer."""
        task.common_head(self.name, linear=True)

    def init_server(self, task: Task, rng: Rng) -> Server:
        """A head for all and a G that knows no class yet."""
        model = task.common_head(self.name)
        G = two_layers(self.noise_dim + task.num_classes, self.hidden, model.rep_dim, rng.at("generator"))
        return self.Server(model.head(model.init(rng.at("head"))), G, ())

    def init_client(self, client: LocalClient) -> Private:
        """A body of the client's own."""
        model = client.models["model"]
        return self.Private(model.body(model.init(client.rng.at("model"))))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Average the heads by examples; train G for the classes that the clients of the round have."""
        down = self.Broadcast(server.head, server.generator, server.classes)
        got = yield from exchange(cohort, down, gather={"head": each, "counts": each})
        heads, counts = [*got["head"].values()], torch.stack([*got["counts"].values()])  # (K, L)
        present = counts.sum(dim=0).nonzero().flatten().tolist()  # classes
        plan = LocalSGD(steps=self.server_steps, batch_size=self.server_batch, optimizer="adam", lr=self.server_lr)
        loss = partial(self.server_loss, heads, counts, partial(draw_classes, present, self.noise_dim, cohort.rng))
        G = train_at_server(server.generator, loss, plan, self.server_batch, cohort)
        head = by_name_mean(heads, counts.sum(dim=1).tolist(), default={})
        return self.Server(head, G, tuple(sorted({*server.classes, *present})))

    def server_loss(self, heads: list[Params], counts: Tensor, draw: Draw, G: Params, step: Step) -> Tensor:
        """CE(sum_k a_k(y) h_k(z), y) + diversity * sameness, at z = G(eps, y); a_k(y): k's share of class y."""
        drawn = draw(step)
        y, z = drawn["y"], generate(G, drawn["eps"][0], drawn["y"])  # (B,), (B, d)
        return cross_entropy(ensemble(heads, counts, z, y), y) + self.diversity * sameness(z, drawn["eps"][0])

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs under the mean head, with the terms of G once it is trained; keep the body, send the head."""
        model = client.models["model"]
        decay = torch.zeros(model.num_classes)  # 0 for a class that G does not know; in round 1 for all
        decay[list(msg.classes)] = self.decay ** (client.round - 1)
        frozen = {"G": msg.generator, "decay": {"of": decay}}
        draw = partial(draw_classes, msg.classes, self.noise_dim, client.rng)
        parts = self.predictor_parts(private, msg, client)
        fitted = yield from fit(client, parts, loss=self.loss, frozen=frozen, draw=draw)
        counts = client.train.labels.bincount(minlength=model.num_classes).to(decay.dtype)
        return self.Private(model.body(fitted.parts["model"])), self.Upload(model.head(fitted.parts["model"]), counts)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """CE(F(x), y) + decay^t (alpha CE(h(G(y')), y') + beta KL(h(G(y)) || F(x))); KL where G knows y."""
        (x, y), drawn, net, G = batch, nets["drawn"], nets["model"], nets["G"].params
        logits, decay = net(x), nets["decay"]["of"]  # (B, L), (L,)
        latent = cross_entropy(net.classify(generate(G, drawn["eps"][0], drawn["y"])), drawn["y"])
        target = net.classify(generate(G, drawn["eps"][1], y)).detach()
        known = (decay[y] > 0)[:, None]  # without logits both distributions are uniform, and their divergence is 0
        kl = kl_divergence(known * logits, known * target)
        return cross_entropy(logits, batch) + decay.max() * (self.alpha * latent + self.beta * kl)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The head, which is all that predicting takes."""
        return self.Broadcast(server.head, {}, ())

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> Parts:
        """The client's body under the mean head."""
        return {"model": client.models["model"].with_head(private.body, msg.head)}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """A head like the one that was sent, and L counts."""
        check_like("head", up.head, down.head)
        check_counts("counts", up.counts, task.num_classes)

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the own body under the mean head."""
        return {"local": nets["model"](x)}
