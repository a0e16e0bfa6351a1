"""FedMRL without labels: its fusion and its two nested granularities under a self-supervised loss.

    Beyond L. Yi et al.: FedMRL, NeurIPS 2024, https://arxiv.org/abs/2406.00488. The losses are of T. Chen et al.:
    SimCLR, ICML 2020, https://arxiv.org/abs/2002.05709, and J. Zbontar et al.: Barlow Twins, ICML 2021,
    https://arxiv.org/abs/2103.03230. Unpublished: docs/algorithms/fedmrl-ssl.md has what is chosen here.

G's header maps the first d1 fused numbers to p numbers in place of classes, a private head H_k all d2; the loss
compares two random views of each example at both. Only G travels. Training reads no label: a client predicts by a
linear probe of each prefix, fitted to its labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from polyfed.base.ranges import NonNegative, Positive, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import Mean
from polyfed.blocks.linear_probe import moments, ridge
from polyfed.blocks.losses import view_loss
from polyfed.blocks.matryoshka import fuse, networks
from polyfed.blocks.views import Views, draw_views, two_views
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit, reduce
from polyfed.models.split import SplitModel
from polyfed.models.zoo import projector


@dataclass(frozen=True, kw_only=True)
class FedMRLSSL(Views, Algorithm):
    """Hyper-parameters of FedMRL without labels, beside those of `Views`.

    Args:
        auxiliary, rep_dim, weights, share: as FedMRL's.
        head_dim: p, the outputs of G's header and of H, both linear.
        penalty: of the probes' ridge regression, as a share of the mean variance of a representation's numbers.
    """

    name = "fedmrl-ssl"
    fit_predicts, reads_labels, probabilities, compares = False, False, False, True
    exempt: ClassVar[Mapping[str, str]] = {
        "labels_are_weighed": "it learns from no label",
        "learns": "a linear probe of random features is far above chance",
    }
    auxiliary: str = "cnn5"
    rep_dim: Positive = 100
    weights: tuple[NonNegative, NonNegative] = (1.0, 1.0)
    share: bool = True
    head_dim: Positive = 64
    penalty: Rate = 0.01

    class Server(State):
        """The small network, as much of it as travels."""

        G: Params

    class Private(State):
        """A client's network, projector and head; and G where nothing travels."""

        F: Params
        P: Params
        H: Params
        G: Params

    class Broadcast(Message):
        """The small network."""

        G: Params

    class Upload(Message):
        """The small network as this client trained it, and n_k."""

        G: Params
        num_examples: int

    def check(self, task: Task) -> None:
        """Images and signals have views."""
        self.check_views(self.name, task)

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """G with p outputs, the client's F, P: (d1 + d2) -> d2, and H: d2 -> p."""
        small = replace(task, num_classes=self.head_dim)
        three = networks(small, own, auxiliary=self.auxiliary, rep_dim=self.rep_dim)
        return three | {"H": projector(own.rep_dim, self.head_dim)}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """theta^0; nothing where nothing travels."""
        G = replace(task, num_classes=self.head_dim).auxiliary(self.auxiliary, rep_dim=self.rep_dim)
        return self.Server(G.init(rng.at("G")) if self.share else {})

    def init_client(self, client: LocalClient) -> Private:
        """A client's own draws; what arrives as G later takes the place of this one."""
        return self.Private(**{part: client.models[part].init(client.rng.at(part)) for part in ("F", "P", "H", "G")})

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Broadcast theta^(t-1), then theta^t = sum_k (n_k / n) theta_k^t over the clients of the round."""
        gather = {"G": Mean("num_examples")} if self.share else {}
        got = yield from exchange(cohort, self.Broadcast(server.G) if self.share else None, gather=gather)
        return self.Server(got["G"]) if self.share else server

    def client_round(self, private: Private, msg: Broadcast | None, client: LocalClient) -> Steps[ClientResult]:
        """Train G, F_k, P_k and H_k together on two views of each example; keep F_k, P_k and H_k, send G."""
        draw = partial(draw_views, self, client.models["F"].input_shape, client.rng)
        parts = self.with_received(private, msg) | {"H": private.H}
        fitted = yield from fit(client, parts, loss=self.loss, draw=draw, pairwise=self.contrast == "simclr")
        F, P, H, G = (fitted.parts[part] for part in ("F", "P", "H", "G"))
        home, up = ({}, self.Upload(G, len(client.train))) if msg else (G, None)
        return self.Private(F, P, H, home), up

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """m_G * l(G_hd(R~[:d1])) + m_F * l(H(R~)), where R~ (2B, d2) is of both views of each example."""
        small, _, fused = fuse(nets, two_views(self, batch[0], nets["drawn"].params))
        projected = nets["G"].classify(fused[:, : small.shape[1]]), nets["H"](fused)  # (2B, p) each
        coarse, fine = (view_loss(z, self.contrast, self.temperature, self.redundancy) for z in projected)
        return self.weights[0] * coarse + self.weights[1] * fine

    def message_for(self, server: Server, client: ClientInfo) -> Broadcast | None:
        """G, to train or to predict with."""
        return self.Broadcast(server.G) if self.share else None

    def with_received(self, private: Private, msg: Broadcast | None) -> dict[str, Params]:
        """G as received, with the client's own F and P."""
        return {"G": msg.G if msg else private.G, "F": private.F, "P": private.P}

    def predictor_parts(self, private: Private, msg: Broadcast | None, client: LocalClient) -> Steps[Parts]:
        """The same, and probes of R~[:d1] and R~ on the client's training examples: labels count here alone."""
        parts, F = self.with_received(private, msg), client.models["F"]
        sums = yield from reduce(client, parts, lambda nets, b: moments(fuse(nets, b[0])[2], b[1], F.num_classes))
        small, large = (ridge(sums, width, self.penalty) for width in (self.rep_dim, F.rep_dim))
        return parts | {"probe-large": large, "probe-small": small}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The scores of both probes, W z + b."""
        fused = fuse(nets, x)[2]
        probes = {name: nets[name] for name in ("probe-large", "probe-small")}
        return {name: linear(fused[:, : p["W"].shape[1]], p["W"], p["b"]) for name, p in probes.items()}
