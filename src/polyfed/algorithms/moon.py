"""MOON: representations are drawn to those of the received model, and away from those of the client's last one.

    Q. Li, B. He, D. Song: Model-Contrastive Federated Learning. CVPR 2021. https://arxiv.org/abs/2103.16257

Server:  w <- sum_k (n_k / n) w_k over the clients of the round.
Client:  E epochs on cross-entropy + mu l_con from w_t, the model that it received. With s = cos(., .) / T and with z,
         z_glob, z_prev the representations by the model in training, by w_t and by the client's model after its last
         round,

         l_con = -log(exp s(z, z_glob) / (exp s(z, z_glob) + exp s(z, z_prev))),

         and 0 while the client has no last model. Only z is differentiated.

Known from a summary; differences: docs/algorithms/moon.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyfed.base.ranges import NonNegative, Rate
from polyfed.base.types import Params
from polyfed.blocks.layerwise import Layerwise
from polyfed.blocks.losses import supervised, task_loss
from polyfed.core.algorithm import Task
from polyfed.core.clients import LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import ClientResult, Steps, fit


@dataclass(frozen=True, kw_only=True)
class Moon(Layerwise):
    """Hyper-parameters, besides those of `Layerwise`.

    Args:
        mu: weight of l_con; 0 is FedAvg.
        temperature: T.
    """

    name = "moon"
    mu: NonNegative = 1.0
    temperature: Rate = 0.5

    class Private(State):
        """The client's model after its last round, which it has sent; empty before the first."""

        public = ("previous",)
        previous: Params

    class Upload(Message):
        """w_k and n_k."""

        model: Params
        num_examples: int

    def check(self, task: Task) -> None:
        """Networks that `Layerwise` can average, with a cut before the classifier."""
        super().check(task)
        for model in task.family().values():
            _ = model.rep_dim

    def init_client(self, client: LocalClient) -> Private:
        """No model yet."""
        return self.Private({})

    def client_round(self, private: Private, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """E epochs from w_t; keep what comes of them, and send it."""
        loss, frozen = supervised, dict[str, Params]()
        if private.previous and self.mu:
            loss, frozen = self.loss, {"received": msg.model, "previous": private.previous}
        fitted = yield from fit(client, {"model": msg.model}, loss=loss, frozen=frozen)
        return self.Private(fitted.parts["model"]), self.Upload(fitted.parts["model"], len(client.train))

    def loss(self, nets: Nets, batch: Batch) -> Tensor:
        """The task's loss + mu l_con; of frozen models with the statistics of the batch, as of the one in training."""
        own = nets["model"]
        z = own.represent(batch[0])  # (B, d)
        near, far = (
            functional.cosine_similarity(z, Net(own.model, nets[part].params).still().represent(batch[0]), dim=1)
            for part in ("received", "previous")
        )
        contrast = -functional.log_softmax(torch.stack([near, far], 1) / self.temperature, dim=1)[:, 0].mean()
        return task_loss(own.classify(z), batch) + self.mu * contrast
