"""The execution of each kind of client under ``driver = "auto"``: a rule on the configuration and the kind of device.

The rule uses neither a clock nor the free memory, so every CPU executes a configuration in the same way and gets the
same numbers, and so does every GPU. All executions agree up to rounding; the laws compare each with the sequential
driver. docs/performance.md has the measurements behind the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from polyfed.base.rng import Rng
from polyfed.core.clients import ClientInfo
from polyfed.core.plan import LocalSGD
from polyfed.models.flops import Flops
from polyfed.models.split import SplitModel

#: One client after another; the same with channels innermost; many clients at once.
ExecutionName: TypeAlias = Literal["sequential", "channels-last", "stacked"]


@dataclass(frozen=True)
class Rule:
    """The execution of a kind of network.

    Args:
        stacked_up_to: FLOPs of one client's training step up to which clients are stacked.
        least: average number of clients of the kind in a cohort from which they are stacked; fewer are faster in
            processes of their own.
        size: number of clients in a stack.
        layout: the execution of training above that limit, one client after another, and of all tests.
    """

    stacked_up_to: float
    least: int
    size: int
    layout: ExecutionName


#: By device and kind of network: "dense" networks multiply each example by each weight matrix once; "images" convolve
#: images; all others, such as convolutions over time, recurrence or attention.
RULES: Mapping[str, Mapping[str, Rule]] = {
    "cpu": {
        "dense": Rule(float("inf"), 2, 16, "sequential"),
        "images": Rule(5e7, 8, 32, "channels-last"),
        "other": Rule(5e7, 8, 16, "sequential"),
    },
    "cuda": {
        "dense": Rule(float("inf"), 2, 32, "sequential"),
        "images": Rule(float("inf"), 4, 32, "sequential"),
        "other": Rule(float("inf"), 2, 32, "sequential"),
    },
}


#: Bytes of weights that a stack may hold, by device: on a CPU the memory of its step should fit the caches.
STACK_BYTES = {"cpu": 16e6, "cuda": 1e9}


@dataclass(frozen=True)
class Chosen:
    """The chosen execution of a kind of client.

    Args:
        execution: the execution of its training.
        size: number of clients in a stack.
        layout: the layout of its testing.
        flops: counted FLOPs of one training step; None if they cannot be counted.
    """

    execution: ExecutionName = "sequential"
    size: int = 1
    layout: ExecutionName = "sequential"
    flops: float | None = None


def kind_of_network(models: Mapping[str, SplitModel], flops: float) -> str:
    """Return the kind of a client's networks, a key of `RULES` below a device.

    Args:
        models: the client's networks.
        flops: FLOPs of a forward pass over one example.
    """
    shapes = [shape for model in models.values() for shape in model.shapes.values()]
    if any(len(shape) == 4 for shape in shapes):
        return "images"
    weights = sum(shape.numel() for shape in shapes)
    return "dense" if all(len(shape) <= 2 for shape in shapes) and flops <= 2.1 * weights else "other"


def forward_flops(models: Mapping[str, SplitModel], input_shape: tuple[int, ...]) -> float | None:
    """Return the FLOPs of a forward pass over one example by all networks that take the data; None if it fails."""
    total = 0.0
    # A network with another input, such as a projector, is small beside the networks that make its input.
    for model in (model for model in models.values() if model.input_shape == tuple(input_shape)):
        try:
            model.train(False)
            weights = model.init(Rng((0,)))
            with Flops() as counter, torch.no_grad():
                model(weights, torch.zeros(2, *input_shape) if model.dtype is None else model.inputs(0))
        except Exception:  # your own network may not take a batch of zeros
            return None
        total += counter.total / 2
    return None if math.isnan(total) else total


def choose(
    models: Mapping[str, SplitModel],
    plan: LocalSGD,
    input_shape: tuple[int, ...],
    together: float,
    device: str = "cpu",
) -> Chosen:
    """Choose the execution of clients with these networks.

    Args:
        models: the networks by part.
        plan: the plan of their training.
        input_shape: shape of an example.
        together: average number of clients of this kind in a cohort.
        device: "cpu" or "cuda".
    """
    flops = forward_flops(models, input_shape)
    if flops is None:
        return Chosen()
    rule = RULES[device][kind_of_network(models, flops)]
    step = 3 * flops * plan.batch_size  # a backward pass costs about two forward passes
    alone = any(model.random or model.caches for model in models.values())  # `stacked.why_not` has the reasons
    weights = 4 * sum(shape.numel() for model in models.values() for shape in model.shapes.values())
    size = min(rule.size, int(STACK_BYTES[device] // max(1, weights)))
    if step <= rule.stacked_up_to and together >= rule.least and size >= 2 and not alone:
        return Chosen("stacked", size, rule.layout, step)
    return Chosen(rule.layout, 1, rule.layout, step)


def layout(models: Mapping[str, SplitModel], device: str) -> ExecutionName:
    """Return the layout in which networks are tested.

    Args:
        models: the networks by part.
        device: "cpu" or "cuda".
    """
    return RULES[device][kind_of_network(models, math.inf)].layout  # "dense" and "other" have the same layout


class ExecutionChoice:
    """The choices of a run, each made at the first client of its kind.

    Args:
        decide: chooses the execution of a client's kind.
        kind: returns a key that is equal for clients of one kind.
    """

    def __init__(
        self,
        decide: Callable[[ClientInfo], Chosen] = lambda client: Chosen(),
        kind: Callable[[ClientInfo], object] = lambda client: (client.architecture, client.capacity),
    ) -> None:
        self._decide, self._kind = decide, kind
        self._known: dict[object, Chosen] = {}

    def of(self, client: ClientInfo) -> Chosen:
        """Return the execution of this client."""
        kind = self._kind(client)
        if kind not in self._known:
            self._known[kind] = self._decide(client)
        return self._known[kind]
