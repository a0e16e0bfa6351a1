"""FedIN: models of different depth learn from each other's features. A reconstruction.

    Y.-H. Chan, Z. Jiang, J. Deng, E. C.-H. Ngai: FedIN: Federated Intermediate Layers Learning for Model
    Heterogeneity. 2023. https://arxiv.org/abs/2304.00759

Known only from abstracts and a sibling paper (docs/algorithms/fedin.md). What lies between extractor and classifier
differs; it also learns to map another client's s_in, the extractor's output, to its s_out, the classifier's input (IN).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.ranges import NonNegative, Positive
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.gradients import Align, combine
from polyfed.blocks.layerwise import first_layers, held
from polyfed.blocks.losses import mean_squared_error, supervised
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_features
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, Record, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Every, Steps, each, exchange, fit, reduce
from polyfed.models.compatibility import check_layers_fit


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
        every: when a client takes an IN step; ``"never"`` is layer-wise averaging alone.
        feature_batch: B_f, examples in the pair that a client sends.
        max_age: rounds after which a pair leaves the server's bank.
        weighting: of clients when layers are averaged.
    """

    name = "fedin"
    tasks = ("classification", "regression")
    align: Align = "in_primary_sum"
    weight: NonNegative = 1.0
    every: Every = "epoch"
    feature_batch: Positive = 64
    max_age: Positive = 10
    weighting: Literal["examples", "uniform"] = "examples"

    class Server(State):
        """All layers by name, the names that each architecture owns, and each client's latest pairs."""

        layers: Params
        owns: Mapping[str, tuple[str, ...]]
        bank: Mapping[int, Features]

    class Broadcast(Message):
        """The layers that the client's network has, and another client's pairs if there are any."""

        layers: Params
        pairs: tuple[Features, ...]

    class Upload(Message):
        """The layers as trained, this client's pairs (none if no IN steps are taken), and n_k."""

        layers: Params
        pairs: tuple[Features, ...]
        num_examples: int

    def check(self, task: Task) -> None:
        """Networks whose cuts fit and whose layers of one name have one shape."""
        check_layers_fit(task.family())

    def init_server(self, task: Task, rng: Rng) -> Server:
        """Every layer from the initialisation of the largest network that has it."""
        layers = first_layers(task.family(), rng.at("layers"))
        return self.Server(layers, {name: tuple(model.shapes) for name, model in task.family().items()}, {})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Deal layers and foreign pairs, exchange, average each layer over its owners, renew the bank."""
        mean = MeanByName("num_examples" if self.weighting == "examples" else None, default=server.layers)
        down = {c.id: replace(self.message_for(server, c), pairs=self.draw(server, c, cohort)) for c in cohort}
        got = yield from exchange(cohort, down, gather={"layers": mean, "pairs": each})
        fresh = {k: replace(p, round=cohort.round) for k, pairs in got["pairs"].items() for p in pairs}
        bank = {k: p for k, p in {**server.bank, **fresh}.items() if cohort.round - p.round < self.max_age}
        return self.Server(got["layers"], server.owns, bank)

    def draw(self, server: Server, client: ClientInfo, cohort: Cohort) -> tuple[Features, ...]:
        """The pairs of one other client, uniformly; none while there are none."""
        others = sorted(server.bank.keys() - {client.id})
        return tuple(server.bank[int(k)] for k in cohort.rng.at("pair", client.id).numpy().permutation(others)[:1])

    def client_round(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Local training with IN steps in between; then capture one batch of pairs, unaugmented, in eval mode."""
        pair = {"pair": {"s_in": msg.pairs[0].s_in, "s_out": msg.pairs[0].s_out}} if msg.pairs else {}
        fitted = yield from fit(client, {"model": msg.layers}, gradient=self.gradient, frozen=pair, every=self.every)
        if self.every == "never":
            return private, self.Upload(fitted.parts["model"], (), len(client.train))
        order = torch.randperm(len(client.train), generator=client.rng.at("features").torch())
        made = yield from reduce(client, fitted.parts, self.capture, rows=order[: self.feature_batch])
        return private, self.Upload(fitted.parts["model"], (Features(**made, round=client.round),), len(client.train))

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """The local gradient; at an IN step, aligned with the IN one in intermediate weights (norms, biases apart)."""
        local = grad(supervised)  # L_loc
        if not due or "pair" not in nets:
            return local
        foreign, inner = grad(self.in_loss)["model"], nets["model"].names("intermediate")
        both = {n: (g, foreign[n]) for n, g in local["model"].items() if n in inner and g.dim() > 1}
        return {"model": {**local["model"], **{n: combine(*pair, self.align, self.weight) for n, pair in both.items()}}}

    def in_loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L_IN = mean ||m(s_in) - s_out||^2 with batch statistics, leaving the running ones alone."""
        return mean_squared_error(nets["model"].still().intermediate(nets["pair"]["s_in"]), nets["pair"]["s_out"])

    def capture(self, nets: Nets, batch: Batch) -> Params:
        """The extractor's output and the classifier's input."""
        s_in, dtype = nets["model"].extract(batch[0]), torch.get_default_dtype()
        return {"s_in": s_in.to(dtype), "s_out": nets["model"].intermediate(s_in).to(dtype)}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Layers as they were sent; features as every network makes and takes them, or other clients would fail."""
        super().check_upload(task, client, down, replace(up, pairs=()))
        check_features(task.build(client.architecture), [(p.s_in, p.s_out) for p in up.pairs], self.feature_batch)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The layers alone: predicting needs no features."""
        return self.Broadcast(held(server.layers, server.owns, client.architecture), ())

    def predictor_parts(self, private: Nothing, msg: Broadcast, client: LocalClient) -> Parts:
        """The received layers."""
        return {"model": msg.layers}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """One network of each architecture."""
        return {k: {"model": Net(m, tree.pick(server.layers, m.shapes))} for k, m in task.family().items()}
