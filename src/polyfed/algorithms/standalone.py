"""Standalone: every client trains its own model on its own data, in the rounds in which it is drawn.

What any way of training together has to beat. On clients with few classes it often is the strongest baseline, which
is why it stands in every table. Nothing travels. Under participation C a client trains in about C*T of T rounds, as
under every other algorithm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.losses import supervised
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Nothing, State
from polyfed.core.net import Nets
from polyfed.core.requests import ClientResult, Steps, exchange, fit


@dataclass(frozen=True, kw_only=True)
class Standalone(Algorithm):
    """No hyper-parameters beyond the local training's."""

    name = "standalone"
    tasks = ("classification", "regression")

    class Private(State):
        """The client's model."""

        model: Params

    def init_server(self, task: Task, rng: Rng) -> Nothing:
        """The server knows nothing."""
        return Nothing()

    def init_client(self, client: LocalClient) -> Private:
        """A model of the client's own."""
        return self.Private(client.models["model"].init(client.rng.at("model")))

    def server_round(self, server: Nothing, cohort: Cohort) -> Steps[State]:
        """Wake the cohort; nothing is sent and nothing comes back."""
        yield from exchange(cohort, None)
        return server

    def client_round(self, private: Private, msg: None, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy."""
        fitted = yield from fit(client, self.predictor_parts(private, msg, client), loss=supervised)
        return self.Private(fitted.parts["model"]), None

    def message_for(self, server: Nothing, client: ClientInfo) -> None:
        """Nothing is needed to predict."""

    def predictor_parts(self, private: Private, msg: Any, client: LocalClient) -> Parts:
        """The client's own model."""
        return {"model": private.model}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The model's logits."""
        return {"local": nets["model"](x)}
