"""FedIN: models of different depth learn from each other's features. A reconstruction.

    Y.-H. Chan, Z. Jiang, J. Deng, E. C.-H. Ngai: FedIN: Federated Intermediate Layers Learning for Model
    Heterogeneity. 2023. https://arxiv.org/abs/2304.00759

Known from its abstracts and the same group's InCo Aggregation (ICLR 2024) only: every choice that fills a gap is a
parameter or stands in docs/algorithms/fedin.md. Do not quote these results as the paper's.

A network is extractor | intermediate | classifier; only the depth of the intermediate layers differs. A client sends
one batch of pairs (s_in, s_out), the extractor's output and the classifier's input; another trains its intermediate
layers to map the one to the other (IN training), without opposing its own loss. Layers are averaged by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyfed import tree
from polyfed.aggregate import by_name_mean
from polyfed.algorithm import Algorithm, Task
from polyfed.align import Align, combine
from polyfed.compute import Batch, ClientInfo, Cohort, Every, Grad, LocalClient, Net, Nets, Steps, exchange, fit, reduce
from polyfed.losses import cross_entropy, mean_squared_error
from polyfed.message import Message, Nothing, Record, State
from polyfed.models.split import check_cuts_fit
from polyfed.rng import Rng
from polyfed.typing import Params, Parts


class Features(Record):
    """One batch of pairs: s_in (B_f, ...), s_out (B_f, rep_dim), and the round in which they were made."""

    s_in: Tensor
    s_out: Tensor
    round: int


@dataclass(frozen=True, kw_only=True)
class FedIN(Algorithm):
    """Hyper-parameters of FedIN.

    Args:
        align: how the two gradients of an intermediate tensor become one step; see `combine`.
        weight: lambda, of the IN gradient.
        every: how often a local training takes an IN step: at each ``"step"``, ``"epoch"`` or ``"round"``, or
            ``"never"``, which is layer-wise averaging alone.
        feature_batch: B_f, examples in the pair that a client sends.
        max_age: rounds after which a pair leaves the server's bank.
        weighting: of clients when layers are averaged: by numbers of examples, or all alike.
    """

    name = "fedin"
    summary = "models of different depth learn from each other's features (a reconstruction)"

    align: Align = "in_primary_sum"
    weight: float = 1.0
    every: Every = "epoch"
    feature_batch: int = 64
    max_age: int = 10
    weighting: Literal["examples", "uniform"] = "examples"

    class Server(State):
        """All layers by name, the names that each architecture has, and the latest pairs of each client."""

        layers: Params
        owns: Mapping[str, tuple[str, ...]]
        bank: Mapping[int, Features]

    class Broadcast(Message):
        """The layers that the client's network has, and another client's pairs if there are any."""

        layers: Params
        pairs: tuple[Features, ...]

    class Upload(Message):
        """The layers as trained, this client's pairs, and n_k."""

        layers: Params
        pairs: Features
        num_examples: int

    def check(self, task: Task) -> None:
        """Networks whose cuts fit."""
        check_cuts_fit(task.family())

    def init_server(self, task: Task, rng: Rng) -> Server:
        """Every layer from the initialisation of the largest network that has it."""
        family = sorted(task.family().items(), key=lambda item: sum(s.numel() for s in item[1].shapes.values()))
        layers: dict[str, Tensor] = {}
        for _, model in family:  # ascending, so that the largest has the last word
            layers |= model.init(rng.at("layers"))
        return self.Server(layers, {name: tuple(model.shapes) for name, model in family}, {})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Deal layers and foreign pairs, exchange, average layer by layer over their owners, renew the bank."""
        replies = yield from exchange(
            cohort, lambda client: self.Broadcast(self.own(server, client), self.draw(server, client, cohort))
        )
        weights = replies.all("num_examples") if self.weighting == "examples" else [1] * len(replies)
        layers = by_name_mean(replies.all("layers"), weights, default=server.layers)
        bank = {**server.bank, **{reply.client.id: reply.message.pairs for reply in replies}}
        bank = {k: pairs for k, pairs in bank.items() if cohort.round - pairs.round < self.max_age}
        return self.Server(layers, server.owns, bank)

    def own(self, server: Server, client: ClientInfo) -> dict[str, Tensor]:
        """The layers of the client's architecture."""
        return tree.pick(server.layers, server.owns[client.architecture])

    def draw(self, server: Server, client: ClientInfo, cohort: Cohort) -> tuple[Features, ...]:
        """The pairs of one other client, uniformly; none while there are none, or none are used."""
        others = sorted(k for k in server.bank if k != client.id)
        if not others or self.every == "never":
            return ()
        return (server.bank[others[int(cohort.rng.at("pair", client.id).numpy().integers(len(others)))]],)

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[tuple[State, Message]]:
        """Local training with IN steps in between; then capture one batch of pairs, unaugmented, in eval mode."""
        pair = {"pair": {"s_in": p.s_in, "s_out": p.s_out} for p in msg.pairs}
        every = self.every if pair else "never"
        fitted = yield from fit(client, {"model": msg.layers}, gradient=self.gradient, frozen=pair, every=every)
        order = torch.randperm(len(client.train), generator=client.rng.at("features").torch())
        pairs = yield from reduce(client, fitted.parts, self.capture, rows=order[: self.feature_batch])
        features = Features(pairs["s_in"], pairs["s_out"], client.round)
        return private, self.Upload(fitted.parts["model"], features, len(client.train))

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """The gradient of the local loss; at an IN step, combined with that of the IN loss where both reach.

        Norm layers and biases keep the local gradient: they have one number per channel and no direction to align.
        """
        local = grad(self.local_loss)
        if not due:
            return local
        foreign = grad(self.in_loss)["model"]
        inner = nets["model"].names("intermediate")
        step = dict(local["model"])
        for name, g in step.items():
            if name in inner and g.dim() > 1:
                step[name] = combine(g, foreign[name], self.align, self.weight)
        return {"model": step}

    def local_loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L_loc: cross-entropy of the whole network."""
        x, y = batch
        return cross_entropy(nets["model"](x), y)

    def in_loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L_IN = mean ||m(s_in) - s_out||^2 with batch statistics, leaving the running ones alone."""
        pair = nets["pair"]
        return mean_squared_error(nets["model"].still().intermediate(pair["s_in"]), pair["s_out"])

    def capture(self, nets: Nets, batch: Batch) -> Params:
        """The extractor's output and the classifier's input."""
        s_in = nets["model"].extract(batch[0])
        return {"s_in": s_in, "s_out": nets["model"].intermediate(s_in)}

    def broadcast(self, server: Server, client: ClientInfo) -> Broadcast:
        """The layers alone: predicting needs no features."""
        return self.Broadcast(self.own(server, client), ())

    def parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The network made of the received layers."""
        return {"model": msg.layers}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """One network of each architecture."""
        family = task.family().items()
        return {name: {"model": Net(model, tree.pick(server.layers, server.owns[name]))} for name, model in family}
