"""What a server trains by itself: a small model, from what its clients sent, on the CPU.

A server's coroutine computes between its requests as ordinary Python does, so this is a function and no request. Its
time is in the round's ``seconds``; ``flops`` count what clients compute, and nothing here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from polyfed.base import tree
from polyfed.base.errors import DivergedError
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.core.clients import Cohort
from polyfed.core.plan import LocalSGD, Step


def train_at_server(
    weights: Params, loss: Callable[[Params, Step], Tensor], plan: LocalSGD, examples: int, cohort: Cohort
) -> dict[str, Tensor]:
    """``weights`` after the plan's steps down the gradient of ``loss``, with an optimizer of their own.

    Args:
        weights: floating-point tensors; they are cloned, and all of them are trained.
        loss: ``loss(weights, step)`` -> scalar; ``step.rows`` are positions among the examples, (B,) int64.
        plan: epochs or steps, batch size, optimizer, its rates and clipping (of all weights together).
        examples: how many there are.
        cohort: whose randomness orders the examples; a round trains once.

    Raises:
        DivergedError: a weight became NaN or infinite.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    lr, decay = plan.lr * plan.factor, plan.weight_decay
    optimizer = {
        "sgd": lambda: torch.optim.SGD(leaves.values(), lr=lr, momentum=plan.momentum, weight_decay=decay),
        "adam": lambda: torch.optim.Adam(leaves.values(), lr=lr, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(leaves.values(), lr=lr, weight_decay=decay),
    }[plan.optimizer]()
    with torch.enable_grad():
        for step in plan.schedule(examples, cohort.rng.at("training")):
            optimizer.zero_grad()
            loss(leaves, step).backward()
            if plan.clip:
                nn.utils.clip_grad_norm_(leaves.values(), plan.clip)
            optimizer.step()
    trained = tree.map_leaves(Tensor.detach, leaves)
    bad = tree.first_not_finite({"server": trained})
    if bad is not None:
        raise DivergedError(
            f"round {cohort.round}: tensor {bad!r} is not finite after the server's training; lower "
            "algorithm.server_lr, or train.lr if what the clients send grows without bound"
        )
    return trained


def two_layers(d_in: int, hidden: int, d_out: int, rng: Rng) -> dict[str, Tensor]:
    """Fresh weights, torch's defaults, of a small network that `run_two_layers` runs."""
    with rng.fork():
        layers = {"fc1": nn.Linear(d_in, hidden), "fc2": nn.Linear(hidden, d_out)}
    return {f"{layer}.{name}": p.detach() for layer, net in layers.items() for name, p in net.named_parameters()}


def run_two_layers(weights: Params, x: Tensor) -> Tensor:
    """(B, d_in) -> (B, d_out): linear, ReLU, linear. Other entries of ``weights`` are passed over."""
    inner = linear(x, weights["fc1.weight"], weights["fc1.bias"]).relu()
    return linear(inner, weights["fc2.weight"], weights["fc2.bias"])
