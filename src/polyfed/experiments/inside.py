"""A look into the networks of a finished run, at the rounds that it kept (``run.keep_rounds``).

From a kept round some clients begin the next one, with the data, draws and functions of the run itself. What they make
is measured and thrown away: the run stays as it is. Their private states are new, as a run keeps none of an earlier
round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from polyfed.base.errors import ConfigError
from polyfed.base.types import ClientId
from polyfed.blocks.gradients import inner
from polyfed.blocks.in_training import InTraining
from polyfed.core.clients import Cohort
from polyfed.core.message import Message
from polyfed.core.net import Net
from polyfed.core.requests import Exchange, Fit
from polyfed.execute.drivers import Sequential
from polyfed.execute.local_training import Local, set_training
from polyfed.execute.placement import Placement
from polyfed.models.exits import stage_ends
from polyfed.models.split import SplitModel
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.gradient import first_request
from polyfed.trained.kept import KeptRound, kept_round

#: The last stage of a network; its output is the classifier's input.
LAST = "last"


class Inside:
    """A kept round of a finished run, from which clients can begin the next round.

    Args:
        folder: the run directory.
        round_: a round of its ``run.keep_rounds``.

    Raises:
        CheckpointError: the run does not keep that round.
    """

    def __init__(self, folder: Path, round_: int) -> None:
        self.kept: KeptRound = kept_round(folder, round_)
        self.placement = Placement.of("cpu", self.kept.config.run.precision)
        self.driver = Sequential(self.placement)

    @cached_property
    def federation(self) -> Federation:
        """The run's own data and splits."""
        return prepare(self.kept.config)

    def some(self, each: int) -> list[ClientId]:
        """The first ``each`` clients of each architecture and capacity, by number."""
        count = self.kept.config.clients.count
        kinds: dict[object, list[ClientId]] = {}
        for client in range(count):
            kinds.setdefault(self.federation.kind(client), []).append(client)
        return sorted(client for clients in kinds.values() for client in clients[:each])

    def tests(self, most: int, label: int | None = None) -> Tensor:
        """The inputs (n, ...) of the first ``most`` test rows of all clients, in the order of the data set.

        Args:
            most: their largest number.
            label: the class that they all have; None takes any.
        """
        data = self.federation.data.global_test(range(self.kept.config.clients.count))[0]
        rows = torch.arange(len(data))
        if label is not None:
            rows = rows[data.dataset.y[data.rows] == label]
        return self.placement.batch(data, rows[:most])[0]

    def trained(self, clients: Sequence[ClientId]) -> dict[ClientId, Net]:
        """The network of each client after its next local training."""
        with self.placement.defaults():
            found = self.driver.play({k: self._round(k, message) for k, message in self._down(clients).items()})
            nets = {k: Net(self._models(k)["model"], outcome.trained["model"]) for k, outcome in found.items()}
        return nets

    def uploads(self, clients: Sequence[ClientId]) -> dict[ClientId, Any]:
        """What each client sends in the next round."""
        with self.placement.defaults():
            found = self.driver.play({k: self._round(k, message) for k, message in self._down(clients).items()})
        return {k: outcome.upload for k, outcome in found.items()}

    def fits(self, clients: Sequence[ClientId]) -> dict[ClientId, Fit]:
        """The first training that each client requests in the next round."""
        with self.placement.defaults():
            asked = {
                k: first_request(self._round(k, message), Fit, self.driver.perform)
                for k, message in self._down(clients).items()
            }
        return {k: fit for k, fit in asked.items() if fit is not None}

    def _down(self, clients: Sequence[ClientId]) -> Mapping[ClientId, Message | None]:
        federation, after = self.federation, self.kept.round + 1
        rng = federation.rng.at("round", after, "inside")
        cohort = Cohort(tuple(map(federation.info, clients)), after, self.kept.config.run.rounds, rng)
        steps = self.kept.algorithm.server_round(self.kept.server, cohort)
        exchange = first_request(steps, Exchange, self.driver.perform)
        return {} if exchange is None else exchange.down

    def _round(self, client: ClientId, message: Message | None) -> Any:
        local = self.federation.local(client, self.kept.round + 1)
        return self.kept.algorithm.client_round(self.federation.private(client, None), message, local)

    def _models(self, client: ClientId) -> Mapping[str, SplitModel]:
        return self.federation.local(client, self.kept.round + 1).models


# ------------------------------------------------------------------------------------------------ stages


def stages(model: SplitModel) -> tuple[str, ...]:
    """The names of a network's stages: the submodules that they end with, and `LAST`."""
    return (*stage_ends(model), LAST)


@torch.no_grad()
def stage_outputs(net: Net, x: Tensor) -> dict[str, Tensor]:
    """The output (n, ...) of each stage in evaluation mode; that of the last is the classifier's input (n, rep_dim).

    Args:
        net: a network that is cut at its classifier.
        x: inputs (n, ...).
    """
    assert net.model is not None
    model, outputs = net.model, dict[str, Tensor]()
    module = model.new_module().to(x.dtype).eval()
    for name in stage_ends(model):
        module.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    functional_call(module, {**model.constants, **net.params}, (x,))
    with net.evaluating():
        outputs[LAST] = net.represent(x)
    return {name: outputs[name] for name in stages(model)}


def stage_of(name: str, model: SplitModel) -> str:
    """The stage that a tensor of intermediate layers belongs to; what is in no other is in the last."""
    return next((end for end in stage_ends(model) if name.startswith(f"{end}.")), LAST)


# ------------------------------------------------------------------------------------------------ measures


def linear_cka(x: Tensor, y: Tensor) -> float:
    """||Y^T H X||_F^2 / (||X^T H X||_F ||Y^T H Y||_F), H centring; in [0, 1], and 0 where either is constant.

    Neither an orthogonal map nor a scale of the features of x or y changes it (Kornblith et al., ICML 2019,
    https://arxiv.org/abs/1905.00414). It is computed from the inner products of the examples, in float64, at a cost of
    n^2 times the number of features.

    Args:
        x: features (n, ...) of n examples; all dimensions but the first are flattened.
        y: features (n, ...) of the same examples.
    """
    k, m = (centred @ centred.T for centred in (v.double().flatten(1) - v.double().flatten(1).mean(0) for v in (x, y)))
    scale = float(k.norm() * m.norm())
    return float((k * m).sum()) / scale if scale else 0.0


@torch.no_grad()
def conflicts(fit: Fit, algorithm: InTraining, placement: Placement, most: int) -> dict[str, list[float]]:
    """B / a of every weight that IN training moves, by stage: b = <g_IN, g_loc>, a = ||g_loc||^2, of one batch.

    g_loc is the gradient of L_loc on a batch of the client's own examples, g_IN that of L_IN on the pairs that
    it was dealt, both at the weights that it received. b < 0 is a conflict. A weight whose g_loc is 0 is left out.

    Args:
        fit: the training that the client requests; empty result where it was dealt no pairs.
        algorithm: what computes the two gradients.
        placement: device and precision.
        most: the largest number of batches, each of ``train.batch_size`` examples.
    """
    found: dict[str, list[float]] = {}
    if "pair" not in fit.frozen:
        return found
    client, model = fit.client, fit.client.models["model"]
    set_training(client.models, True)
    local = Local(fit, placement)
    batches = torch.arange(len(client.train)).split(client.plan.batch_size)[:most]
    for rows in (rows for rows in batches if len(rows) > 1):  # BatchNorm cannot normalise a single example
        batch = client.weigh(placement.batch(client.train, rows))
        own, foreign = (local.grad(batch, loss)["model"] for loss in (algorithm.local_loss, algorithm.in_loss))
        for name, g in algorithm.taught(own, model.intermediate_names).items():
            if a := float(inner(g, g)):
                found.setdefault(stage_of(name, model), []).append(float(inner(foreign[name], g)) / a)
    return found


def needs_tsne() -> Any:
    """Return scikit-learn's class ``TSNE``.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ConfigError("the view tsne needs scikit-learn; run: pip install 'polyfed[tsne]'") from error
    return cast("Any", TSNE)


def embedded(points: Tensor) -> Tensor:
    """t-SNE of points (n, d) in the plane, (n, 2), from their principal components, with a fixed seed."""
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = needs_tsne()(n_components=2, init="pca", perplexity=perplexity, random_state=0)
    return torch.as_tensor(tsne.fit_transform(points.double().numpy()))


def mixing(points: Tensor, owners: Tensor, neighbours: int = 10) -> float:
    """The mean share of a point's nearest neighbours that another client made.

    Args:
        points: (n, d).
        owners: (n,), the client of each point.
        neighbours: how many neighbours count.
    """
    distances = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf)
    near = distances.topk(min(neighbours, len(points) - 1), largest=False).indices
    return float((owners[near] != owners[:, None]).double().mean())
