"""FedKD: a private teacher and a small shared student teach each other; the student's updates travel at low rank.

    C. Wu, F. Wu, L. Lyu, Y. Huang, X. Xie: Communication-efficient federated learning via knowledge distillation.
    Nature Communications 13, 2032 (2022). https://doi.org/10.1038/s41467-022-29763-x

Client k keeps a network F_k of any architecture, the teacher, and a linear map W_k between hidden widths; all share the
student G. The worse both predict, the less they teach each other. What clients send, and what comes back, are updates
of G, every matrix cut to the singular values that hold a share of its energy; the share grows over the rounds. Unlike
in the paper, who missed a round gets the student whole, and n_k weighs updates; more is in docs/algorithms/fedkd.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import MessageError
from polyfed.base.ranges import Portion, Positive
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.losses import cross_entropy, kl_divergence, mean_squared_error
from polyfed.blocks.lowrank import LowRank
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.checks import check_like
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FedKD(Algorithm):
    """Hyper-parameters of FedKD.

    Args:
        auxiliary: architecture of the student G.
        energy: T_start and T_end: the share of a matrix's energy that is sent, before round 1 and from round T on.
        horizon: T, the round at which the share has reached T_end; None is the number of rounds.
    """

    name = "fedkd"
    trains = ("W",)
    uses_rounds = True
    auxiliary: str = "cnn5"
    energy: tuple[Portion, Portion] = (0.95, 0.98)
    horizon: Positive | None = None

    class Server(State):
        """The student, the update that led to it, and the round in which those who lack only that took part."""

        G: Params
        update: LowRank
        current: Mapping[int, int]

    class Private(State):
        """A client's teacher and map, and the student with which it began the round in which it last took part."""

        public = ("G",)

        F: Params
        W: Params
        G: Params
        round: int

    class Broadcast(Message):
        """The last update of the student for who began the round ``since`` with it, else the student; and T(t)."""

        update: LowRank | None
        student: Params
        since: int
        energy: float

    class Upload(Message):
        """The update of the student, and n_k."""

        update: LowRank
        num_examples: int

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """Teacher and student; ModelError where nothing says what the representations are between which W maps."""
        nets = {"F": own, "G": task.auxiliary(self.auxiliary)}
        _ = [net.rep_dim for net in nets.values()]  # raises
        return nets

    def init_server(self, task: Task, rng: Rng) -> Server:
        """The first student; it has no update, and nobody has it."""
        G = task.auxiliary(self.auxiliary).init(rng.at("G"))
        return self.Server(G, LowRank.of(tree.map_leaves(torch.zeros_like, G), self.energy[0]), {})

    def init_client(self, client: LocalClient) -> Private:
        """A teacher of the client's own, and W_k (d_teacher, d_student), drawn as torch draws a linear layer."""
        F, d_t, d_s = client.models["F"], client.models["F"].rep_dim, client.models["G"].rep_dim
        W = (2 * torch.rand(d_t, d_s, generator=client.rng.at("W").torch()) - 1) / d_s**0.5
        return self.Private(F.init(client.rng.at("F")), {"weight": W}, {}, 0)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Send the last update, average what comes back, compress the mean, and add it to the student."""
        T = self.horizon or cohort.rounds
        energy = self.energy[0] + (self.energy[1] - self.energy[0]) * min(cohort.round, T) / T  # T(t)
        news = self.Broadcast(server.update, {}, max(server.current.values(), default=0), energy)
        whole = self.Broadcast(None, server.G, 0, energy)
        down = {client.id: news if client.id in server.current else whole for client in cohort}
        got = yield from exchange(cohort, down, gather={"update": Mean("num_examples", of=lambda u: u.full(server.G))})
        update = LowRank.of(got["update"], energy)
        G = tree.add(server.G, update.full(server.G))  # what clients will make of it, not what was averaged
        return self.Server(G, update, {client.id: cohort.round for client in got.clients})

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """An update of the student."""
        like = task.auxiliary(self.auxiliary).init(Rng((0,)))
        check_like("Upload.update", up.update.full(like), like)

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Bring the student up to date, train teacher, student and map together, send the student's update."""
        if msg.update is not None and msg.since != private.round:
            raise MessageError(f"an update for who took part in round {msg.since}; this client did in {private.round}")
        G = msg.student if msg.update is None else tree.add(private.G, msg.update.full(private.G))
        fitted = yield from fit(client, {"F": private.F, "G": G, "W": private.W}, loss=self.loss)
        update = LowRank.of(tree.sub(fitted.parts["G"], G), msg.energy)
        kept = self.Private(fitted.parts["F"], fitted.parts["W"], G, client.round)
        return kept, self.Upload(update, len(client.train))

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """The teacher's CE(z) + L_d_t + L_h and the student's CE(g) + L_d_s + L_h, each network descending its own."""
        h_t, h_s = nets["F"].represent(batch[0]), nets["G"].represent(batch[0])  # (B, d_t), (B, d_s)
        z, g = nets["F"].classify(h_t), nets["G"].classify(h_s)  # (B, L), (B, L)
        tasks = cross_entropy(z, batch) + cross_entropy(g, batch)
        s = tasks.detach()  # a number: with a gradient, raising both cross-entropies would lower the rest
        L_d = kl_divergence(z, g.detach()) + kl_divergence(g, z.detach())  # KL(p(g) || p(z)) + KL(p(z) || p(g))
        L_h = mean_squared_error(h_t, h_s @ nets["W"]["weight"].T)
        return tasks + (L_d + L_h) / s

    def message_for(self, server: Server, client: ClientInfo) -> None:
        """The teacher predicts: nothing is needed."""

    def predictor_parts(self, private: Private, msg: None, client: LocalClient) -> Parts:
        """The client's own network."""
        return {"F": private.F}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The teacher's logits; the student's where it is at hand, at the server and while clients train."""
        return {name: nets[part](x) for name, part in (("teacher", "F"), ("student", "G")) if part in nets}

    def global_nets(self, server: Server, task: Task) -> Mapping[str, Nets]:
        """The student."""
        return {"student": {"G": Net(task.auxiliary(self.auxiliary), server.G)}}
