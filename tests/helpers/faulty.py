"""Algorithms with one fault each, of the kind that federated code really has; `test_faulty` shows which law sees it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.base.types import Params
from polyfed.blocks.aggregate import weighted_mean
from polyfed.blocks.losses import supervised
from polyfed.core.clients import Cohort, LocalClient
from polyfed.core.message import Message
from polyfed.core.requests import exchange, fit


@dataclass(frozen=True, kw_only=True)
class LastClient(FedAvg):
    """The mean and the last model are one mapping: what is averaged is the last client, n times."""

    def server_round(self, server, cohort):
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        mean = dict(server.model)
        for reply in replies:
            mean.update(reply.message.model)
        return self.Server(mean)


@dataclass(frozen=True, kw_only=True)
class LastButInOrder(LastClient):
    """The same, where the cohort is sorted first: only the answers tell."""

    def server_round(self, server, cohort):
        cohort = replace(cohort, clients=tuple(sorted(cohort, key=lambda client: client.id)))
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        last = max(replies, key=lambda reply: reply.client.id)
        return self.Server({**server.model, **last.message.model})


@dataclass(frozen=True, kw_only=True)
class SumNotMean(FedAvg):
    """Added up, never divided."""

    def server_round(self, server, cohort):
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        models = replies.all("model")
        return self.Server({n: torch.stack([m[n] for m in models]).sum(0).to(v.dtype) for n, v in models[0].items()})


@dataclass(frozen=True, kw_only=True)
class Unweighted(FedAvg):
    """Every client counts alike, although each says how many examples it has."""

    def server_round(self, server, cohort):
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        models = replies.all("model")
        means = {n: torch.stack([m[n] for m in models]).double().mean(0) for n in models[0]}
        return self.Server({n: value.to(server.model[n].dtype) for n, value in means.items()})


@dataclass(frozen=True, kw_only=True)
class InPlace(FedAvg):
    """Accumulates in the first client's upload."""

    def server_round(self, server, cohort):
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        total = float(sum(replies.all("num_examples")))
        first = replies[0].message
        for name, value in first.model.items():
            if value.is_floating_point():
                value.mul_(first.num_examples / total)
                for reply in replies[1:]:
                    value.add_(reply.message.model[name], alpha=reply.message.num_examples / total)
        return self.Server(first.model)


@dataclass(frozen=True, kw_only=True)
class ZeroWhereNobody(FedAvg):
    """A coordinate that nobody trained becomes 0: here those of the last layer that clients do not send."""

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Upload({n: v for n, v in fitted.parts["model"].items() if n != "fc.weight"}, 1)

    def server_round(self, server, cohort):
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        models = replies.all("model")
        zero = tree.map_leaves(torch.zeros_like, server.model)
        means = {n: torch.stack([m.get(n, zero[n]) for m in models]).double().mean(0) for n in server.model}
        return self.Server({n: value.to(server.model[n].dtype) for n, value in means.items()})


@dataclass(frozen=True, kw_only=True)
class Momentum(FedAvg):
    """One velocity for all clients, kept on the algorithm."""

    velocity: dict[str, Any] = field(default_factory=dict)

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        model = dict(fitted.parts["model"])
        for name, value in model.items():
            if value.is_floating_point():
                self.velocity[name] = 0.5 * self.velocity.get(name, torch.zeros_like(value)) + value - msg.model[name]
                model[name] = msg.model[name] + self.velocity[name]
        return private, self.Upload(model, len(client.train))


@dataclass(frozen=True, kw_only=True)
class GlobalDraws(FedAvg):
    """Noise from torch's global generator."""

    def client_round(self, private, msg, client: LocalClient):
        noisy = {n: v + 1e-3 * torch.randn_like(v) if v.is_floating_point() else v for n, v in msg.model.items()}
        fitted = yield from fit(client, {"model": noisy}, loss=supervised)
        return private, self.Upload(fitted.parts["model"], len(client.train))


@dataclass(frozen=True, kw_only=True)
class SendsItAll(Standalone):
    """The private model is in the upload, in one long row."""

    class Upload(Message):
        everything: Tensor

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=supervised)
        model = fitted.parts["model"]
        row = torch.cat([value.reshape(-1) for value in model.values() if value.is_floating_point()])
        return self.Private(model), self.Upload(row)


@dataclass(frozen=True, kw_only=True)
class Undriven(FedAvg):
    """A `yield from` is missing: nothing is ever sent, and nothing complains."""

    def server_round(self, server, cohort: Cohort):
        exchange(cohort, self.Broadcast(server.model))
        return server


@dataclass(frozen=True, kw_only=True)
class UndrivenFit(FedAvg):
    """A `yield from` is missing at the client."""

    def client_round(self, private, msg, client: LocalClient):
        if len(client.train) < 0:
            yield
        fitted: Any = fit(client, {"model": msg.model}, loss=supervised)
        return fitted, self.Upload(msg.model, len(client.train))


@dataclass(frozen=True, kw_only=True)
class Remembers(Standalone):
    """What a client learnt lies on the algorithm: in no checkpoint, and in no other process."""

    memory: dict[int, Any] = field(default_factory=dict)

    def client_round(self, private, msg, client: LocalClient):
        model = self.memory.get(client.info.id, private.model)
        fitted = yield from fit(client, {"model": model}, loss=supervised)
        self.memory[client.info.id] = fitted.parts["model"]
        return private, None

    def predictor_parts(self, private, msg, client: LocalClient):
        return {"model": self.memory.get(client.info.id, private.model)}


@dataclass(frozen=True, kw_only=True)
class BehindTheBack(FedAvg):
    """Clients leave their numbers of examples on the algorithm, where the server reads them."""

    counts: dict[int, int] = field(default_factory=dict)

    def server_round(self, server, cohort):
        replies = yield from exchange(cohort, self.Broadcast(server.model))
        return self.Server(weighted_mean(replies.all("model"), [self.counts.get(r.client.id, 1) for r in replies]))

    def client_round(self, private, msg, client: LocalClient):
        self.counts[client.info.id] = len(client.train)
        return super().client_round(private, msg, client)


@dataclass(frozen=True, kw_only=True)
class SharedPrivate(Standalone):
    """All clients' private models are views of one: whoever trains writes to everyone's."""

    shared: dict[str, Any] = field(default_factory=dict)

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=supervised)
        mine = self.shared.setdefault(client.info.architecture, fitted.parts["model"])
        for name, value in fitted.parts["model"].items():
            mine[name].copy_(value)
        return self.Private(mine), None


@dataclass(frozen=True, kw_only=True)
class Undeclared(FedAvg):
    """What a client receives depends on its number, and nobody is told."""

    def message_for(self, server, client):
        return self.Broadcast(tree.map_leaves(lambda value: value + client.id, server.model))


@dataclass(frozen=True, kw_only=True)
class MovesStatistics(FedAvg):
    """Predicts in training mode: BatchNorm's statistics move with every test."""

    def predict(self, nets, x):
        nets["model"].model.train(True)
        return super().predict(nets, x)


@dataclass(frozen=True, kw_only=True)
class UpdateLost(FedAvg):
    """Sends back what it received."""

    def client_round(self, private, msg, client: LocalClient):
        yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Upload(msg.model, len(client.train))


@dataclass(frozen=True, kw_only=True)
class CountsCalls(FedAvg):
    """A loss that is not pure: it grows with every call, and stacked clients make one call together."""

    calls: list[int] = field(default_factory=list)

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, {"model": msg.model}, loss=self.loss)
        return private, self.Upload(fitted.parts["model"], len(client.train))

    def loss(self, nets, batch):
        self.calls.append(1)
        return supervised(nets, batch) * (1 + 0.01 * len(self.calls))


@dataclass(frozen=True, kw_only=True)
class KnowsTheRound(FedAvg):
    """The loss reads a number that a round has left in the algorithm."""

    seen: dict[str, float] = field(default_factory=lambda: {"weight": 0.0}, compare=False)

    def client_round(self, private, msg, client):
        self.seen["weight"] = 1.0 / client.round
        fitted = yield from fit(client, {"model": msg.model}, loss=self.weighted)
        return private, self.Upload(fitted.parts["model"], len(client.train))

    def weighted(self, nets, batch):
        return self.seen["weight"] * supervised(nets, batch)


class Foreign(Message):
    """Like an upload of FedAvg."""

    model: Params
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class UndeclaredMessage(FedAvg):
    """Sends a message that is not among its own."""

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, Foreign(fitted.parts["model"], len(client.train))
