"""Algorithms with one fault each, of the kind that federated code really has; `test_faulty` shows which law sees it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.base.types import Params
from polyfed.blocks.aggregate import Mean, MeanByName
from polyfed.blocks.losses import cross_entropy, supervised, total_weight
from polyfed.core.clients import Cohort, LocalClient
from polyfed.core.gather import Gather, each
from polyfed.core.message import Message
from polyfed.core.requests import exchange, fit


@dataclass(frozen=True, kw_only=True)
class LastClient(FedAvg):
    """The mean and the last model are one mapping: what is averaged is the client that is listed last, n times."""

    def server_round(self, server, cohort):
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": each})
        mean = dict(server.model)
        for client in cohort:
            mean.update(got["model"][client.id])
        return self.Server(mean)


class TheLast(Gather):
    """The total is the upload that came last."""

    def init(self):
        return {}

    def add(self, total, client, value, upload):
        return {**total, **value}

    def finish(self, total):
        return total


@dataclass(frozen=True, kw_only=True)
class LastButInOrder(FedAvg):
    """The same in a sum, which always runs in order of id: only the answers tell."""

    def server_round(self, server, cohort):
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": TheLast()})
        return self.Server(got["model"])


class Sum(Gather):
    """Added up, never divided."""

    def init(self):
        return {}

    def add(self, total, client, value, upload):
        return {name: total.get(name, 0) + tensor for name, tensor in value.items()}

    def finish(self, total):
        return total


@dataclass(frozen=True, kw_only=True)
class SumNotMean(FedAvg):
    """The server's model is a sum."""

    def server_round(self, server, cohort):
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": Sum()})
        return self.Server(got["model"])


class ForgetsWeights(Mean):
    """A mean of uploads that weigh alike, whatever it was told."""

    def add(self, total, client, value, upload):
        return super().add(total, client, value, replace(upload, num_examples=1))


@dataclass(frozen=True, kw_only=True)
class Unweighted(FedAvg):
    """Every client counts alike, although each says how many examples it has."""

    def server_round(self, server, cohort):
        got = yield from exchange(
            cohort, self.Broadcast(server.model), gather={"model": ForgetsWeights("num_examples")}
        )
        return self.Server(got["model"])


class FirstUpload(Gather):
    """Accumulates in the first client's upload."""

    def init(self):
        return None

    def add(self, total, client, value, upload):
        if total is None:
            for tensor in value.values():
                tensor.mul_(upload.num_examples)
            return value, upload.num_examples
        first, examples = total
        for name, tensor in first.items():
            tensor.add_(value[name], alpha=upload.num_examples)
        return first, examples + upload.num_examples

    def finish(self, total):
        first, examples = total
        return {name: (tensor / examples).to(tensor.dtype) for name, tensor in first.items()}


@dataclass(frozen=True, kw_only=True)
class InPlace(FedAvg):
    """Its sum writes into an upload."""

    def server_round(self, server, cohort):
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": FirstUpload()})
        return self.Server(got["model"])


@dataclass(frozen=True)
class InTheModel(Gather):
    """Moves the model that it is given a little towards each upload, as asynchronous servers do."""

    model: Params

    def init(self):
        return self.model

    def add(self, total, client, value, upload):
        for name, tensor in total.items():
            if tensor.is_floating_point():
                tensor.lerp_(value[name], 0.5)
        return total

    def finish(self, total):
        return tree.map_leaves(torch.clone, total)


@dataclass(frozen=True, kw_only=True)
class AtOnce(FedAvg):
    """Its sum writes into the message, which clients that have not trained yet are still to receive."""

    def server_round(self, server, cohort):
        model = tree.map_leaves(torch.clone, server.model)
        got = yield from exchange(cohort, self.Broadcast(model), gather={"model": InTheModel(model)})
        return self.Server(got["model"])


@dataclass(frozen=True, kw_only=True)
class ZeroWhereNobody(FedAvg):
    """A coordinate that nobody trained becomes 0: here those of the last layer that clients do not send."""

    def client_round(self, private, msg, client: LocalClient):
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Upload({n: v for n, v in fitted.parts["model"].items() if n != "fc.weight"}, 1)

    def server_round(self, server, cohort):
        zeros = MeanByName(default=tree.map_leaves(torch.zeros_like, server.model))
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": zeros})
        return self.Server(got["model"])


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


@dataclass(frozen=True)
class WeighsByCounts(Mean):
    """A mean whose weights do not come from the uploads."""

    counts: dict[int, int] = field(default_factory=dict)

    def add(self, total, client, value, upload):
        return super().add(total, client, value, replace(upload, num_examples=self.counts.get(client.id, 1)))


@dataclass(frozen=True, kw_only=True)
class BehindTheBack(FedAvg):
    """Clients leave their numbers of examples on the algorithm, where the server reads them."""

    counts: dict[int, int] = field(default_factory=dict)

    def server_round(self, server, cohort):
        gather = {"model": WeighsByCounts("num_examples", counts=self.counts)}
        got = yield from exchange(cohort, self.Broadcast(server.model), gather=gather)
        return self.Server(got["model"])

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
class Fades(FedAvg):
    """The server moves less and less towards the end, and nobody is told."""

    def server_round(self, server, cohort):
        new = yield from super().server_round(server, cohort)
        share = 1 - cohort.round / (2 * cohort.rounds)
        return self.Server({name: old + share * (new.model[name] - old) for name, old in server.model.items()})


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


@dataclass(frozen=True, kw_only=True)
class ReadsANumber(FedAvg):
    """The loss takes a number out of a tensor: no stack of clients can run it."""

    def client_round(self, private, msg, client):
        fitted = yield from fit(client, {"model": msg.model}, loss=self.scaled)
        return private, self.Upload(fitted.parts["model"], len(client.train))

    def scaled(self, nets, batch):
        return supervised(nets, batch) * (1 + 0.01 * batch[1].sum().item())


@dataclass(frozen=True, kw_only=True)
class SharpensWithTraining(FedAvg):
    """Predicts by a temperature that training left on the algorithm: no run directory has it."""

    left: dict[str, float] = field(default_factory=dict, compare=False)

    def client_round(self, private, msg, client):
        self.left["sharper"] = 1.0 + 0.05 * client.round
        return super().client_round(private, msg, client)

    def predict(self, nets, x):
        return {name: logits * self.left.get("sharper", 1.0) for name, logits in super().predict(nets, x).items()}


@dataclass(frozen=True, kw_only=True)
class LabelsAlone(FedAvg):
    """Gives its loss the labels, without the client's weights of them."""

    def client_round(self, private, msg, client):
        fitted = yield from fit(client, {"model": msg.model}, loss=self.loss)
        return private, self.Upload(fitted.parts["model"], len(client.train))

    def loss(self, nets, batch):
        x, y = batch
        return cross_entropy(nets["model"](x), y)


@dataclass(frozen=True, kw_only=True)
class WeightedSum(LabelsAlone):
    """Divides by the number of examples, not by their weights."""

    def loss(self, nets, batch):
        return cross_entropy(nets["model"](batch[0]), batch) * total_weight(batch) / len(batch[1])


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
