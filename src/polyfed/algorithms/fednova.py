"""FedNova: clients that take unlike numbers of steps pull the model in the direction of their mean step.

    J. Wang, Q. Liu, H. Liang, G. Joshi, H. V. Poor: Tackling the Objective Inconsistency Problem in Heterogeneous
    Federated Optimization. NeurIPS 2020. https://arxiv.org/abs/2007.07481

Client:  tau steps from w;  d_k = (w - w_k) / a_k. With SGD's momentum rho, what a gradient moves adds up to
         a_k = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), which without momentum is tau.
Server:  w <- w - (sum_k p_k a_k) sum_k p_k d_k, with p_k = n_k / n over those clients of the round that own the tensor.

With Adam a_k = tau, which no theory covers. BatchNorm's statistics are averaged as in FedAvg. Known from a summary;
differences: docs/algorithms/fednova.md.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from polyfed.base import tree
from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.blocks.layerwise import Layerwise, MeanByKey, by_architecture
from polyfed.blocks.losses import supervised
from polyfed.core.algorithm import Task
from polyfed.core.checks import check_like
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.plan import LocalSGD
from polyfed.core.requests import ClientResult, Steps, exchange, fit


def effective_steps(plan: LocalSGD, steps: int) -> float:
    """a_k of so many steps: by how much they move the weights along gradients that stay the same, over lr."""
    rho, tau = plan.momentum if plan.optimizer == "sgd" else 0.0, max(1, steps)
    return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)


@dataclass(frozen=True, kw_only=True)
class FedNova(Layerwise):
    """No hyper-parameters beyond the local training's and those of `Layerwise`."""

    name = "fednova"

    class Upload(Message):
        """d_k of weights, buffers as trained, a_k, and n_k."""

        direction: Params
        buffers: Params
        steps: float
        num_examples: int

    def server_round(self, server: Any, cohort: Cohort) -> Steps[State]:
        """Step along the mean direction; p_k and the coefficient of a tensor are of the clients that own it."""
        down = by_architecture(cohort, lambda client: self.message_for(server, client))
        mean = MeanByKey("num_examples", {}, server.owns)
        gather = {"direction": (mean, replace(mean, of=self.lengths)), "buffers": mean}
        got = yield from exchange(cohort, down, gather=gather)
        direction, length = got["direction"]
        moved = {n: server.model[n] - length[n] * d for n, d in direction.items()}
        return self.moved(server, {**server.model, **got["buffers"], **moved})

    def lengths(self, upload: Upload) -> Params:
        """a_k for each weight, in double precision."""
        return dict.fromkeys(upload.direction, torch.tensor(upload.steps, dtype=torch.float64))

    def client_round(self, private: Nothing, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy from w."""
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        names, a = client.models["model"].parameter_names, effective_steps(client.plan, fitted.steps)
        moved = tree.sub(tree.pick(msg.model, names), fitted.parts["model"])
        direction = tree.map_leaves(lambda value: value / a, moved)
        return private, self.Upload(direction, tree.drop(fitted.parts["model"], names), a, len(client.train))

    def check_upload(self, task: Task, client: ClientInfo, down: Any, up: Upload) -> None:
        """Directions of all weights, all buffers, and a positive number of steps."""
        names = task.build(client.architecture).parameter_names
        check_like("direction", up.direction, tree.pick(down.model, names))
        check_like("buffers", up.buffers, tree.drop(down.model, names))
        if up.steps <= 0:
            raise MessageError(f"steps is {up.steps}; expected a positive number of effective steps")
