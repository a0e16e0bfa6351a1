"""FedIN: models of different depth learn from each other's features. A reconstruction.

    Y.-H. Chan, Z. Jiang, J. Deng, E. C.-H. Ngai: FedIN: Federated Intermediate Layers Learning for Model
    Heterogeneity. 2023. https://arxiv.org/abs/2304.00759

Known only from abstracts and a sibling paper (docs/algorithms/fedin.md). What lies between extractor and classifier
differs; it also learns to map another client's s_in, the extractor's output, to its s_out, the classifier's input (IN).
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.features import FeatureExchange, Features, Pinned, renewed
from polyfed.blocks.in_training import InTraining
from polyfed.blocks.inco import InCo
from polyfed.blocks.layerwise import first_layers, held
from polyfed.blocks.losses import feature_distance
from polyfed.core.algorithm import Algorithm, Task, raise_idle
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Grad, Net, Nets
from polyfed.core.requests import ClientResult, Steps, each, exchange, reduce
from polyfed.models.compatibility import check_layers_fit

#: Keys that one file may set although another of its runs switches IN training off.
_SWITCHED = {"every", "feature_batch", "max_age"}


@dataclass(frozen=True, kw_only=True)
class FedIN(FeatureExchange, InTraining, InCo, Algorithm):
    """Hyper-parameters beside those of `InTraining`, `FeatureExchange` and `InCo`; no IN steps is layer-wise averaging.

    Args:
        weighting: of clients when layers are averaged.
    """

    name = "fedin"
    tasks = ("classification", "regression")
    states = (Pinned,)
    weighting: Literal["examples", "uniform"] = "examples"

    class Server(State):
        """All layers, who owns which, latest pairs, ages of the last round's, what InCo mixes, clients' networks."""

        layers: Params
        owns: Mapping[str, tuple[str, ...]]
        bank: Mapping[int, Features]
        ages: Mapping[int, int] = field(default_factory=dict[int, int])
        mixes: Mapping[str, str] = field(default_factory=dict[str, str])
        architectures: Mapping[int, str] = field(default_factory=dict[int, str])

    class Broadcast(Message):
        """The layers that the client's network has, and another client's pairs if there are any."""

        layers: Params
        pairs: tuple[Features, ...]

    class Upload(Broadcast):
        """The layers as trained, this client's pairs (none if no IN steps are taken), and n_k."""

        num_examples: int

    def __post_init__(self) -> None:
        """No key without an effect."""
        own = {f.name for kind in (InTraining, FeatureExchange) for f in fields(kind)}
        raise_idle(
            self,
            (self.every == "never", "every = 'never' takes no IN steps", own - _SWITCHED),
            (self.align == "none", "align = 'none' adds number by number", {"granularity"}),
            (self.align in ("local_primary", "always"), f"align = {self.align!r} does not use lambda", {"weight"}),
            (self.donor == "own", "donor = 'own' has no other donors", {"donor_architecture", "mix"}),
            self.inco_is_idle,
        )

    def check(self, task: Task) -> None:
        """Networks whose cuts fit, whose layers of one name have one shape, and whose features can be pooled."""
        check_layers_fit(task.family())
        self.check_features(task.family().values(), batch_statistics=self.norm == "batch")
        _ = self.mixes(task.family())

    def init_server(self, task: Task, rng: Rng) -> Server:
        """Every layer from the initialisation of the largest network that has it."""
        layers = first_layers(task.family(), rng.at("layers"))
        owns = {name: tuple(model.shapes) for name, model in task.family().items()}
        return self.Server(layers, owns, {}, {}, self.mixes(task.family()))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Deal layers and foreign pairs, exchange, average each layer over its owners, renew the bank."""
        mean = MeanByName("num_examples" if self.weighting == "examples" else None, default=server.layers)
        down = {c.id: replace(self.message_for(server, c), pairs=self.draw(server, c, cohort)) for c in cohort}
        got = yield from exchange(cohort, down, gather={"layers": mean, "pairs": each})
        bank = renewed(server.bank, got["pairs"], cohort.round, self.max_age)
        ages = {k: cohort.round - pair.round for k, message in down.items() for pair in message.pairs}
        layers = self.incorporated(server.layers, got["layers"], server.mixes)
        known = self.noted(server.architectures, cohort)
        return replace(server, layers=layers, bank=bank, ages=ages, architectures=known)

    def client_round(self, private: State, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Local and IN training; then capture one batch of pairs, unaugmented, in eval mode."""
        w = yield from self.trained(client, msg.layers, self.read(msg.pairs, client.models["model"]))
        if self.every == "never":
            return private, self.Upload(w, (), len(client.train))
        made = yield from reduce(client, {"model": w}, self.capture, rows=(rows := self.rows(private, client)))
        upload = self.Upload(w, (self.veiled(made, client),), len(client.train))
        return Pinned(rows) if self.pin else private, upload

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """The local gradient; at an IN step, combined with the IN one in intermediate weights."""
        local = grad(self.local_loss)  # L_loc
        if not due or "pair" not in nets:
            return local
        g, foreign, inner = local["model"], grad(self.in_loss)["model"], nets["model"].names("intermediate")
        return {"model": {**g, **self.combined(g, foreign, inner)}}

    def in_loss(self, nets: Nets, batch: Batch) -> Tensor:
        """L_IN = mean ||m(s_in) - s_out||^2 by default; it leaves the running statistics alone."""
        net, pair = nets["model"].still(), nets["pair"]
        with net.evaluating() if self.norm == "running" else nullcontext():
            return feature_distance(net.intermediate(pair["s_in"]), pair["s_out"], self.distance)

    def capture(self, nets: Nets, batch: Batch) -> Params:
        """The extractor's output and the classifier's input."""
        s_in, dtype = nets["model"].extract(self.whole(batch[0], nets["model"])), torch.get_default_dtype()
        return {"s_in": s_in.to(dtype), "s_out": nets["model"].intermediate(s_in).to(dtype)}

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """Layers as they were sent; features as every network makes and takes them, or other clients would fail."""
        super().check_upload(task, client, down, replace(up, pairs=()))
        self.check_pairs(task.build(client.architecture), up.pairs)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """The layers alone: predicting needs no features."""
        return self.Broadcast(held(server.layers, server.owns, client.architecture), ())

    def predictor_parts(self, private: State, msg: Broadcast, client: LocalClient) -> Parts:
        """The received layers."""
        return {"model": msg.layers}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """One network of each architecture."""
        return {k: {"model": Net(m, tree.pick(server.layers, m.shapes))} for k, m in task.family().items()}
