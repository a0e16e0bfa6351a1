"""Training of intermediate layers (IN) on another client's features, and how it joins a client's local training."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

from polyfed.base import tree
from polyfed.base.ranges import NonNegative
from polyfed.base.types import Params, Parts
from polyfed.blocks.gradients import Align, Granularity, combine_all
from polyfed.blocks.losses import Distance
from polyfed.core.clients import LocalClient
from polyfed.core.net import Batch, Grad, Nets
from polyfed.core.requests import Every, Steps, fit


@dataclass(frozen=True, kw_only=True)
class InTraining(ABC):
    """How the two trainings become one.

    Args:
        align: how the two gradients of intermediate weights become one step; see `polyfed.blocks.gradients.combine`.
        level: what is combined: the gradients of a step, or the changes of weights that the two trainings, each from
            the received weights, make in a round.
        granularity: what is one vector of the combination; see `polyfed.blocks.gradients.Granularity`.
        vectors: whether biases and normalisation layers are combined, too, or keep what local training gives.
        weight: lambda, of the IN gradient.
        every: when a client takes an IN step; ``"never"``: not at all.
        norm: whether BatchNorm in an IN step has the batch's statistics, or the running ones, as in evaluation.
        distance: of m(s_in) from s_out; see `polyfed.blocks.losses.feature_distance`.
    """

    align: Align = "in_primary_sum"
    level: Literal["step", "round"] = "step"
    granularity: Granularity = "tensor"
    vectors: bool = False
    weight: NonNegative = 1.0
    every: Every = "epoch"
    norm: Literal["batch", "running"] = "batch"
    distance: Distance = "mse"

    @abstractmethod
    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """The local gradient, or at an IN step `combined` with the IN one, of a part ``model``."""

    @abstractmethod
    def local_loss(self, nets: Nets, batch: Batch) -> Any:
        """L_loc, of the client's own batch."""

    @abstractmethod
    def in_loss(self, nets: Nets, batch: Batch) -> Any:
        """L_IN, of the features in the part ``pair``."""

    def trained(self, client: LocalClient, start: Params, pair: Params) -> Steps[Params]:
        """The weights ``start`` after local training and, where there is a pair, IN training.

        At the level of a round IN training takes as many steps as are due, with an optimizer of its own and without
        weight decay, which local training has already. It costs a second copy of the weights.
        """
        frozen = {"pair": pair} if pair else {}
        if not pair or self.level == "step":
            fitted = yield from fit(client, {"model": start}, gradient=self.gradient, frozen=frozen, every=self.every)
            return fitted.parts["model"]
        steps = client.plan.due(self.every, len(client.train))
        alone = replace(client, plan=replace(client.plan, epochs=None, steps=steps, weight_decay=0.0))
        foreign = yield from fit(alone, {"model": start}, gradient=self.in_gradient, frozen=frozen)
        local = yield from fit(client, {"model": start}, gradient=self.gradient)  # last: its loss is the client's
        changed, learnt = (tree.sub(ended.parts["model"], start) for ended in (local, foreign))
        model = client.models["model"]
        moved = self.combined(changed, learnt, model.intermediate_names & model.parameter_names)
        return {**local.parts["model"], **tree.add(tree.pick(start, moved), moved)}

    def in_gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """The gradient of L_IN alone; of the batch it uses nothing."""
        return {"model": self.taught(grad(self.in_loss)["model"], nets["model"].names("intermediate"))}

    def combined(self, local: Params, foreign: Params, inner: frozenset[str]) -> Params:
        """The step, or the change, of what IN training moves; ``inner`` are the names of the intermediate layers."""
        return combine_all(self.taught(local, inner), foreign, self.align, self.weight, self.granularity)

    def taught(self, params: Params, inner: frozenset[str]) -> Params:
        """What IN training moves of ``params``: of ``inner`` the weights, and with ``vectors`` biases and norms."""
        return {n: g for n, g in params.items() if n in inner and (g.dim() > 1 or self.vectors)}
