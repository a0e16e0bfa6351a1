"""SCAFFOLD: control variates take the difference between a client's direction and that of all out of its steps.

    S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh: SCAFFOLD: Stochastic Controlled
    Averaging for Federated Learning. ICML 2020. https://arxiv.org/abs/1910.06378

Client:  n steps from w_t; after each one w <- w - lr (c - c_k). Then c_k+ = c_k - c + (w_t - w_k) / (n lr).
Server:  w <- sum_k (n_k / n) w_k;  c <- c + 1 / K sum_k (c_k+ - c_k), with K = all clients that own the tensor.

All c begin at 0; BatchNorm's statistics have none. The correction stands beside whatever the optimizer does: with plain
SGD that is the paper's step. Known from a summary; differences: docs/algorithms/scaffold.md.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from polyfed.base import tree
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.blocks.layerwise import Layerwise, MeanByKey, by_architecture, counted, held, keys
from polyfed.blocks.losses import supervised
from polyfed.core.algorithm import Task
from polyfed.core.checks import check_like
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class Scaffold(Layerwise):
    """No hyper-parameters beyond the local training's and those of `Layerwise`."""

    name = "scaffold"
    exempt = dict.fromkeys(("equal_answers_count_once", "examples_weigh"), "c is a sum of changes over all K clients")

    class Server(Layerwise.Server):
        """The tensors, c by key, and K of each key of c."""

        control: Params = field(default_factory=dict[str, torch.Tensor])
        clients: Mapping[str, int] = field(default_factory=dict[str, int])

    class Private(State):
        """c_k, which the server could add up from the changes that it gets."""

        public = ("control",)
        control: Params

    class Broadcast(Layerwise.Broadcast):
        """The client's network, and c of its weights; without c where the client only predicts."""

        control: Params

    class Upload(Message):
        """The network as this client trained it, n_k, and c_k+ - c_k."""

        model: Params
        num_examples: int
        control: Params

    def init_server(self, task: Task, rng: Rng) -> State:
        """The networks, and c = 0."""
        (model, owns, mixes), family = self.first(task, rng), task.family()
        own = {keys(owns, k).get(name, name) for k, net in family.items() for name in net.parameter_names}
        zeros = tree.map_leaves(torch.zeros_like, tree.pick(model, own))
        counts = dict(zip(family, task.counts, strict=True))
        return self.Server(model, owns, mixes, zeros, counted(zeros, owns, counts))

    def init_client(self, client: LocalClient) -> Private:
        """c_k = 0."""
        model = client.models["model"]
        return self.Private({n: torch.zeros(shape) for n, shape in model.shapes.items() if n in model.parameter_names})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send networks with c; average networks by examples, and add to c the changes of the c_k over K."""

        def message(client: ClientInfo) -> Message:
            control = held(server.control, server.owns, client.architecture)
            return replace(self.message_for(server, client), control=control)

        mean = MeanByKey("num_examples", server.model, server.owns)
        change = MeanByKey(None, {}, server.owns)
        got = yield from exchange(cohort, by_architecture(cohort, message), gather={"model": mean, "control": change})
        here = counted(server.control, server.owns, Counter(client.architecture for client in got.clients))
        change = {n: here[n] / server.clients[n] * mean for n, mean in got["control"].items()}
        return replace(self.moved(server, got["model"]), control={**server.control, **tree.add(change, server.control)})

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The network alone: predicting needs no c."""
        return self.Broadcast(held(server.model, server.owns, client.architecture), {})

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """E epochs, each step corrected by c - c_k; keep c_k+, send by how much it changed."""
        c, c_k = msg.control, private.control
        correction = {"model": tree.sub(c, c_k)}
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised, correction=correction)
        w, reach = fitted.parts["model"], max(1, fitted.steps) * client.plan.rate("model")
        new = {n: own - c[n] + (msg.model[n] - w[n]) / reach for n, own in c_k.items()}
        return self.Private(new), self.Upload(w, len(client.train), tree.sub(new, c_k))

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """The whole network, and a change of c for each of its weights."""
        check_like("model", up.model, down.model)
        check_like("control", up.control, tree.pick(down.model, task.build(client.architecture).parameter_names))
