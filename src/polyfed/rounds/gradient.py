"""The gradient of the whole local model, measured between two rounds; theorems about convergence bound its norm.

The measurement takes no step. A sample of clients begins the next round, up to the first training that each client
requests. The gradient is that of the loss of this training, over all training examples at once and for all parts that
would be trained, private and shared. Weight decay and clipping belong to the optimizer and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import GeneratorType
from typing import Any

import torch

from polyfed.base.types import ClientId
from polyfed.core.clients import Cohort
from polyfed.core.message import Message
from polyfed.core.plan import Step
from polyfed.core.requests import Exchange, Fit
from polyfed.execute.local_training import EVAL_BATCH, Local, set_training
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import SimulatedClients
from polyfed.rounds.selection import sample


def gradient_squared(server: Any, clients: SimulatedClients, round_: int) -> float | None:
    """Return the mean squared norm over ``run.gradient_clients`` clients; None if no client trains.

    Args:
        server: the state after ``round_``.
        clients: the clients, with their private states and data.
        round_: the last round that was played.
    """
    federation = clients.federation
    chosen = sample(federation, federation.config.run.gradient_clients, round_, "gradient")
    rng = federation.rng.at("round", round_, "gradient")
    cohort = Cohort(tuple(map(federation.info, chosen)), round_ + 1, federation.config.run.rounds, rng.at("server"))
    perform = clients.driver.perform
    exchange = first_request(federation.algorithm.server_round(server, cohort), Exchange, perform)
    down: Mapping[ClientId, Message | None] = {} if exchange is None else exchange.down
    squares: list[float] = []
    for client, message in down.items():
        local = federation.local(client, round_ + 1)
        fit = first_request(federation.algorithm.client_round(clients.private(client), message, local), Fit, perform)
        if fit is not None:
            with rng.at("layers").fork():
                squares.append(squared_norm(fit, clients.driver.placement))
    return sum(squares) / len(squares) if squares else None


def first_request(steps: Any, kind: type[Any], perform: Callable[[Any], Any]) -> Any:
    """Return the first request of a kind from a coroutine, and end the coroutine; None if it makes no such request.

    Args:
        steps: the coroutine.
        kind: the class of the request.
        perform: answers each request before that one.
    """
    if not isinstance(steps, GeneratorType):
        return None
    try:
        request = next(steps)
        while not isinstance(request, kind):
            request = steps.send(perform(request))
    except StopIteration:
        return None
    steps.close()
    return request


def squared_norm(fit: Fit, placement: Placement) -> float:
    """Return the squared norm, over all trained parts, of the gradient on all examples at once."""
    return float(sum(g.square().sum() for g in full_gradient(fit, placement).values()))


def full_gradient(fit: Fit, placement: Placement) -> dict[tuple[str, str], torch.Tensor]:
    """Return the gradient on all examples at once, by trained part and name, in float64; batches have `EVAL_BATCH`."""
    client = fit.client
    set_training(client.models, True)
    local = Local(fit, placement)
    count = len(client.train)
    sums: dict[tuple[str, str], torch.Tensor] = {}
    for index, rows in enumerate(torch.arange(count).split(EVAL_BATCH)):
        batch = client.weigh(placement.batch(client.train, rows))
        local.see(fit.drawn(Step(rows, index, index)))
        with torch.no_grad():  # a gradient that is a function of the weights, such as FIARSE's, would hold their graph
            grads = fit.gradient(partial(local.grad, batch), local.nets, batch, False)
        for part, params in grads.items():
            for name, g in params.items():
                share = g.double() * (len(rows) / count)  # a loss is the mean over its batch
                sums[part, name] = sums[part, name] + share if (part, name) in sums else share
    return sums
