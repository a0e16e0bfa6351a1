"""FedProx: FedAvg whose clients are pulled back to the model that they received.

    T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in Heterogeneous Networks.
    MLSys 2020. https://arxiv.org/abs/1812.06127

Server:  w <- sum_k (n_k / n) w_k over the clients of the round.
Client:  E epochs on cross-entropy + mu / 2 ||w - w_t||^2 from w_t, the model that it received.

The norm is over weights, not over BatchNorm's statistics. Known from a summary: docs/algorithms/fedprox.md.
"""

from dataclasses import dataclass
from typing import Any

import torch

from polyfed.base import tree
from polyfed.base.ranges import NonNegative
from polyfed.base.types import Params, Parts
from polyfed.blocks.layerwise import Layerwise
from polyfed.blocks.losses import supervised
from polyfed.core.clients import LocalClient
from polyfed.core.message import Message, Nothing
from polyfed.core.net import Batch, Grad, Nets
from polyfed.core.requests import ClientResult, Steps, fit


@dataclass(frozen=True, kw_only=True)
class FedProx(Layerwise):
    """Hyper-parameters, besides those of `Layerwise`.

    Args:
        mu: how strongly clients are pulled back; 0 is FedAvg.
    """

    name = "fedprox"
    numbers = 2
    mu: NonNegative = 0.01

    class Upload(Message):
        """w_k and n_k."""

        model: Params
        num_examples: int

    def client_round(self, private: Nothing, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """E epochs from w_t."""
        start = tree.pick(msg.model, client.models["model"].parameter_names)
        fitted = yield from fit(client, {"model": msg.model}, gradient=self.gradient, frozen={"start": start})
        return private, self.Upload(fitted.parts["model"], len(client.train))

    def gradient(self, grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        """That of the task's loss, and mu (w - w_t)."""
        w, start, gradient = nets["model"].params, nets["start"].params, grad(supervised)["model"]
        return {"model": {n: torch.add(g, w[n] - start[n], alpha=self.mu) for n, g in gradient.items()}}
