"""The requests of an algorithm: `fit`, `reduce` and `exchange`.

An algorithm is two coroutines. Between requests they are ordinary Python on immutable values; they yield each request
to the driver, which decides where and how the work is done:

    fitted = yield from fit(client, parts, loss=supervised)           # local training
    sums = yield from reduce(client, parts, self.class_sums)          # a sum over the client's data
    got = yield from exchange(cohort, message, gather={"model": Mean()})   # server only: a message to each, and back

A forgotten ``yield from`` would be a silent no-op; `drive` refuses a coroutine that returns one undriven.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from polyfed.base.types import ClientId, Params, Parts
from polyfed.core.clients import ClientInfo, Cohort, Examples, LocalClient
from polyfed.core.gather import Declared, Each, Gathered, each
from polyfed.core.message import Message, State
from polyfed.core.net import Batch, Grad, Gradient, Loss, Nets
from polyfed.core.plan import Every, Step, is_due

__all__ = [
    "ClientResult",
    "Draw",
    "Each",
    "Every",
    "Exchange",
    "Fit",
    "Fitted",
    "Moves",
    "Reduce",
    "Steps",
    "drive",
    "each",
    "exchange",
    "finished",
    "fit",
    "reduce",
]

T = TypeVar("T")
#: ``draw(step)`` -> tensors by name that a step needs beside its batch, such as noise.
Draw: TypeAlias = Callable[[Step], Params]
#: ``moves(nets)`` -> by part and name one bool for each coordinate: whether it may move in the step.
Moves: TypeAlias = Callable[[Nets], Parts]


@dataclass(frozen=True)
class Fitted:
    """The outcome of `fit`.

    Args:
        parts: the trained parts, buffers included.
        steps: optimizer steps taken.
        loss: mean of the loss over the steps.
    """

    parts: dict[str, dict[str, Tensor]]
    steps: int
    loss: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A request: minimise ``loss`` over ``parts`` on the client's training data, by its plan."""

    client: LocalClient
    parts: Parts
    gradient: Gradient
    loss: Loss | None
    frozen: Parts
    lr: Mapping[str, float]
    every: Every
    draw: Draw | None = None
    moves: Moves | None = None
    correction: Parts = field(default_factory=dict[str, Params])
    within: Parts = field(default_factory=dict[str, Params])
    pairwise: bool = False

    @property
    def identity(self) -> object:
        """A key that is equal for requests of the same function, such as the same method of the same algorithm."""
        source = self.loss if self.loss is not None else self.gradient
        return (getattr(source, "__func__", source), id(getattr(source, "__self__", None)))

    def due(self, index: int, in_epoch: int) -> int:
        """Return whether ``every`` selects the step; where it is a function, what it returns."""
        return is_due(self.every, index, in_epoch)

    def drawn(self, step: Step) -> Params:
        """Return the tensors that ``draw`` gives for the step; empty without ``draw``."""
        return {} if self.draw is None else self.draw(step)


@dataclass(frozen=True, eq=False)
class Reduce:
    """A request: the sum of ``fn`` over batches of a client's examples, in evaluation mode, not augmented."""

    client: LocalClient
    parts: Parts
    fn: Callable[[Nets, Batch], Params]
    rows: Tensor | None
    held_out: bool = False

    @property
    def data(self) -> Examples:
        """The examples of the sum: the held-out examples, or the training examples."""
        data = self.client.held_out if self.held_out else self.client.train
        if data is None:
            raise TypeError("reduce(held_out=True) needs held-out examples, but this algorithm's holdout is 0")
        return data


@dataclass(frozen=True, eq=False)
class Exchange:
    """A request: send each client its message, wait, and return the totals of the replies."""

    cohort: Cohort
    down: Mapping[ClientId, Message | None]
    gather: Mapping[str, Declared] = field(default_factory=dict[str, Declared])


Request: TypeAlias = Fit | Reduce | Exchange
#: The state that a client keeps, and the message that it sends.
ClientResult: TypeAlias = tuple[State, Message | None]
#: A coroutine that may yield requests and returns a T.
Steps: TypeAlias = Generator[Request, Any, T]


def fit(
    client: LocalClient,
    parts: Parts,
    *,
    loss: Loss | None = None,
    gradient: Gradient | None = None,
    frozen: Parts | None = None,
    lr: Mapping[str, float] | None = None,
    every: Every = "never",
    draw: Draw | None = None,
    moves: Moves | None = None,
    correction: Parts | None = None,
    within: Parts | None = None,
    pairwise: bool = False,
) -> Steps[Fitted]:
    """Train ``parts`` on the client's data.

    Args:
        client: the client, whose data, plan and randomness are used.
        parts: the parts to train together; floating-point tensors that are not buffers are trained.
        loss: ``loss(nets, batch)`` -> scalar. Exactly one of ``loss`` and ``gradient``.
        gradient: ``gradient(grad, nets, batch, due)`` -> gradients, for methods whose step is not a loss's gradient.
            A tensor that it leaves out does not move in that step.
        frozen: further parts that the loss reads and that are not trained.
        lr: learning rates of single parts, instead of the plan's.
        every: the steps at which ``gradient`` receives ``due = True``; or a function of the number of the step, whose
            whole number ``gradient`` receives as ``due``. Unlike a drawn tensor that may choose what is computed: steps
            of different numbers are stacked, traced and counted apart. It is called several times for a step.
        draw: ``draw(step)`` -> tensors that the loss sees at that step as the part ``drawn``. It runs outside vmap, so
            it may use a generator: of ``client.rng`` keyed by ``step.index``, as a step may be drawn twice.
        moves: ``moves(nets)`` -> one bool for each coordinate of some tensors of the trained parts. It sees the weights
            before a step; where it is False, the step leaves a weight bit by bit as it was, whatever momentum and
            weight decay do. It costs a copy of these tensors. A method of the algorithm, as `gradient` is.
        correction: tensors of ``parts`` that every step takes off the weights after the optimizer's update, times the
            part's learning rate: ``w <- w - lr * correction``. Clip, decay, momentum and moments do not see it. It
            costs a client these tensors once more in memory.
        within: masks, one bool for each coordinate of some tensors of ``parts``. Only coordinates that are True are
            trained: gradient, clip, optimizer and ``moves`` work on their values alone, in one dimension, and that is
            the form in which ``gradient`` and ``moves`` see these tensors in ``nets``, and ``grad(loss, model=w)``
            takes and returns them. A loss sees whole tensors. Not beside ``correction``.
        pairwise: whether the loss multiplies examples of a batch with one another. FLOPs are then counted at every size
            of a batch, not at two, from which the others would follow.

    Returns:
        The trained parts, at full shape.
    """
    if (loss is None) == (gradient is None):
        raise TypeError("fit() takes exactly one of loss and gradient")
    if within and correction:
        raise TypeError("fit() takes within or correction, not both: a correction has the shape of the whole tensors")
    for part, own in (within or {}).items():
        for name, mask in own.items():
            whole = tuple(parts[part][name].shape)
            if mask.dtype != torch.bool or mask.shape != whole:
                raise TypeError(
                    f"fit(within=...): the mask of {name!r} has shape {tuple(mask.shape)} and type {mask.dtype}; "
                    f"expected one bool for each coordinate, {whole}"
                )

    def of_loss(grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        assert loss is not None
        return grad(loss)

    asked = gradient or of_loss
    last = (correction or {}, within or {}, pairwise)
    return (yield Fit(client, parts, asked, loss, frozen or {}, lr or {}, every, draw, moves, *last))


def reduce(
    client: LocalClient,
    parts: Parts,
    fn: Callable[[Nets, Batch], Params],
    *,
    rows: Tensor | None = None,
    held_out: bool = False,
) -> Steps[dict[str, Tensor]]:
    """Return the sum of ``fn(nets, batch)`` over the client's training data, or over its ``rows`` as one batch.

    Networks are in evaluation mode, without augmentation and without gradients. With ``held_out`` the sum is over the
    examples that `Algorithm.holdout` took out of the training data instead.
    """
    return (yield Reduce(client, parts, fn, rows, held_out))


def exchange(
    cohort: Cohort,
    down: Message | Mapping[ClientId, Message | None] | Callable[[ClientInfo], Message | None] | None,
    *,
    gather: Mapping[str, Declared] | None = None,
) -> Steps[Gathered]:
    """Send each client of the cohort a message, wait for the replies, and add them up.

    Args:
        cohort: the clients that are asked.
        down: the message for all clients, a message by client id, or ``down(client)``; None sends no message.
        gather: by the name of a field of the upload, the declaration of its total; other fields are dropped.

    Returns:
        The totals by field, and the clients that replied.
    """
    if not isinstance(down, Mapping):
        down = {client.id: down(client) if callable(down) else down for client in cohort}
    return (yield Exchange(cohort, down, gather or {}))


def drive(steps: Steps[T] | T, perform: Callable[[Any], Any]) -> T:
    """Run a coroutine to its end, answering each request by ``perform(request)``.

    Raises:
        TypeError: the result is a coroutine that was never driven: a ``yield from`` is missing.
    """
    if not isinstance(steps, GeneratorType):  # an algorithm's method without any yield returns its value at once
        return finished(steps)
    answer: Any = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as stop:
            return finished(stop.value)
        answer = perform(request)


def finished(value: Any) -> Any:
    """Return ``value``; raise TypeError if it is or holds a coroutine that was never driven."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, GeneratorType):
            raise TypeError(f"a round returned the undriven coroutine {item.__qualname__}: a `yield from` is missing")
    return value
