"""FedAvg: one model for all; clients train it in turn and the server averages what they send.

    H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data. AISTATS 2017. https://arxiv.org/abs/1602.05629, Algorithm 1.

Server:  w <- sum_k (n_k / n) w_k over the clients of the round.
Client:  E epochs of SGD on cross-entropy from w.

All clients have one architecture. Beyond the paper, ``average`` permits several: a model for each, or one mean for each
layer over the clients whose networks have it. BatchNorm's statistics travel and are averaged like weights.
"""

from dataclasses import dataclass
from typing import Any

from polyfed.base.types import Params
from polyfed.blocks.layerwise import Layerwise
from polyfed.blocks.losses import supervised
from polyfed.core.clients import LocalClient
from polyfed.core.message import Message, Nothing
from polyfed.core.requests import ClientResult, Steps, fit


@dataclass(frozen=True, kw_only=True)
class FedAvg(Layerwise):
    """No hyper-parameters beyond the local training's and those of `Layerwise`."""

    name = "fedavg"

    class Upload(Message):
        """w_k and n_k."""

        model: Params
        num_examples: int

    def client_round(self, private: Nothing, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy from w."""
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Upload(fitted.parts["model"], len(client.train))
