"""FedMRL with an adaptive d1: each client takes as much of the small model as its held-out examples show it needs.

    Beyond L. Yi et al.: FedMRL, NeurIPS 2024, https://arxiv.org/abs/2406.00488, and A. Kusupati et al.: Matryoshka
    Representation Learning, NeurIPS 2022, https://arxiv.org/abs/2205.13147.

A client at width d, a step of the ladder d_1 < ... < d_J = D, holds G up to the d-th coordinate of its representation:
the first d rows of the layer that makes it, the first d columns of the header. It trains at all m <= d at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import MessageError
from polyfed.base.ranges import NonNegative, Positive, Share
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.matryoshka import at_width, losses_at_widths, networks, ones_up_to, sums_at_widths, widths_up_to
from polyfed.blocks.submodel import leading, put, take
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Steps, each, exchange, fit, reduce
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class FedMRLAdaptive(Algorithm):
    """Hyper-parameters of FedMRL with an adaptive d1.

    Args:
        auxiliary: architecture of G.
        rep_dim: D, the widest d1, with which every client begins; at most d2, that of every private model.
        granularities: the narrower widths of the ladder; if none are given, a quarter, a half and three quarters of D.
        holdout: the share of a client's training examples that it chooses its width by.
        tolerance: a width will do if its validation loss is at most this much above the lowest, as a share of it.
        patience: how often in a row a client must need its width before it tries the next wider one.
    """

    name = "fedmrl-adaptive"
    tasks = ("classification", "regression")
    personal_message = True
    auxiliary: str = "cnn5"
    rep_dim: Positive = 100
    granularities: tuple[Positive, ...] = ()
    holdout: Share = 0.2
    tolerance: NonNegative = 0.02
    patience: Positive = 3

    class Server(State):
        """The small model, the shapes of its tensors at each width, and the width that each client asked for."""

        G: Params
        shapes: Mapping[int, Mapping[str, tuple[int, ...]]]
        widths: Mapping[int, int]

    class Private(State):
        """A client's model and projector, and how often in a row it needed its width."""

        F: Params
        P: Params
        needed: int

    class Broadcast(Message):
        """The small model up to a width."""

        G: Params
        width: int

    class Upload(Message):
        """The same as this client trained it, n_k, and the width at which it wants to take part next."""

        G: Params
        num_examples: int
        width: int

    @property
    def ladder(self) -> tuple[int, ...]:
        """d_1 < ... < d_J = D."""
        return widths_up_to(self.rep_dim, self.granularities)

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """G at width D, the client's F, and P: (D + d2) -> d2."""
        return networks(task, own, auxiliary=self.auxiliary, rep_dim=self.ladder[-1])

    def init_server(self, task: Task, rng: Rng) -> Server:
        """theta^0; nobody has asked for less than all of it."""
        G = {width: task.auxiliary(self.auxiliary, rep_dim=width).init(rng.at("G")) for width in self.ladder}
        return self.Server(G[self.rep_dim], {width: tree.shapes(at) for width, at in G.items()}, {})

    def init_client(self, client: LocalClient) -> Private:
        """A client's own draws."""
        return self.Private(*(client.models[part].init(client.rng.at(part)) for part in ("F", "P")), needed=0)

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Each client its width; each coordinate averaged by n_k over the clients that hold it; nobody's stay."""
        gather = {"G": CoverageMean(None, "num_examples", default=server.G), "width": each}
        got = yield from exchange(cohort, lambda client: self.message_for(server, client), gather=gather)
        return self.Server(got["G"], server.shapes, {**server.widths, **got["width"]})

    def check_upload(self, task: Task, client: ClientInfo, down: Broadcast, up: Upload) -> None:
        """What was sent, as a client may send it back; and a width that there is."""
        super().check_upload(task, client, down, up)
        if up.width not in self.ladder:
            raise MessageError(f"Upload.width is {up.width}; expected one of {self.ladder}")

    def client_round(self, private: Private, msg: Broadcast, client: LocalClient) -> Steps[ClientResult]:
        """Train G up to the width, F_k and P_k; then look at the held-out examples, and choose the next width."""
        parts = self.predictor_parts(private, msg, client)
        widths = {"widths": parts.pop("widths")}
        fitted = yield from fit(client, parts, loss=self.loss, frozen=widths)
        F, P, G = (fitted.parts[part] for part in ("F", "P", "G"))
        seen = yield from reduce(client, {**fitted.parts, **widths}, self.validation, held_out=True)
        width, needed = self.next_width(seen["V"].tolist(), private.needed)
        return self.Private(F, P, needed), self.Upload(take(G, leading(tree.shapes(msg.G))), len(client.train), width)

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """The mean over the widths m <= d of CE(y_G, y) + CE(y_F, y): with a ladder of one width, FedMRL's loss."""
        return losses_at_widths(nets, batch).mean()

    def validation(self, nets: Nets, batch: Batch) -> Params:
        """V(m), the sum over examples of the same at each width m <= d."""
        return {"V": sums_at_widths(nets, batch)}

    def next_width(self, losses: list[float], needed: int) -> tuple[int, int]:
        """The narrowest width that will do; after ``patience`` times in which only the widest would, one wider."""
        enough, last = (1 + self.tolerance) * min(losses), len(losses) - 1
        index = next((i for i, loss in enumerate(losses) if loss <= enough), last)
        needed = needed + 1 if index == last else 0
        wider = needed >= self.patience and last + 1 < len(self.ladder)
        return (self.ladder[last + 1], 0) if wider else (self.ladder[index], needed)

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast:
        """G up to the width that the client asked for."""
        width = server.widths.get(client.id, self.rep_dim)
        return self.Broadcast(take(server.G, leading(server.shapes[width])), width)

    def predictor_parts(self, private: Private, msg: Broadcast, client: LocalClient) -> dict[str, Params]:
        """G with zeros behind the width, the client's own F and P, and the widths that it can be used at."""
        widths = {"masks": ones_up_to([m for m in self.ladder if m <= msg.width], self.rep_dim)}
        return {"G": put(msg.G, None, client.models["G"].shapes), "F": private.F, "P": private.P, "widths": widths}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """FedMRL's fused inference modes at the client's width."""
        y_G, y_F = at_width(nets, nets["G"].represent(x), nets["F"].represent(x), nets["widths"]["masks"][-1])
        return {"mix-large": y_F, "mix-small": y_G}
