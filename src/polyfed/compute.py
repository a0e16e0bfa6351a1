"""The words of an algorithm: `fit`, `reduce` and `exchange`.

An algorithm is two coroutines. Between these words they are ordinary Python on immutable values; each word is a
request that they yield to whoever drives them, who decides where and how the work is done:

    fitted = yield from fit(client, parts, loss=self.loss)            # local training
    sums = yield from reduce(client, parts, self.class_sums)          # a sum over the client's data
    replies = yield from exchange(cohort, broadcast)                  # server only: a message to each client, and back

A forgotten ``yield from`` would be a silent no-op; `drive` refuses a coroutine that returns one undriven.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from torch import Tensor

from polyfed.message import Message
from polyfed.models.split import SplitModel, keep_statistics
from polyfed.plan import LocalSGD
from polyfed.rng import Rng
from polyfed.typing import ClientId, Params, Parts


T = TypeVar("T")

#: (x, y): inputs (B, ...) and labels (B,).
Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Net:
    """A model bound to weights, as a loss sees it; or, where a part has no model, the tensors alone."""

    model: SplitModel | None
    params: Params

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        return self.params[name]

    def _model(self) -> SplitModel:
        if self.model is None:
            raise TypeError("this part has tensors but no model: Algorithm.models() does not name it")
        return self.model

    def names(self, piece: Literal["extractor", "intermediate", "classifier"]) -> frozenset[str]:
        """The names of a piece's weights and buffers."""
        model = self._model()
        pieces = {"extractor": model.extractor_names, "intermediate": model.intermediate_names}
        return pieces.get(piece, model.classifier_names)

    def __call__(self, x: Tensor) -> Tensor:
        """The whole network: (B, ...) -> (B, L)."""
        return self._model()(self.params, x)

    def represent(self, x: Tensor) -> Tensor:
        """Everything before the classifier: (B, ...) -> (B, rep_dim)."""
        return self._model().represent(self.params, x)

    def classify(self, r: Tensor) -> Tensor:
        """The classifier: (B, rep_dim) -> (B, L)."""
        return self._model().classify(self.params, r)

    def still(self) -> Net:
        """The same weights, with running statistics of its own: a training-mode forward moves nobody else's."""
        return Net(self.model, keep_statistics(self._model(), self.params))

    def extract(self, x: Tensor) -> Tensor:
        """The extractor: (B, ...) -> s_in (B, ...)."""
        return self._model().extract(self.params, x)

    def intermediate(self, s_in: Tensor) -> Tensor:
        """What lies between extractor and classifier: s_in -> (B, rep_dim)."""
        return self._model().intermediate(self.params, s_in)


Nets: TypeAlias = Mapping[str, Net]
#: ``loss(nets, batch)`` -> scalar. Pure: the same for one client and, under vmap, for many.
Loss: TypeAlias = Callable[[Nets, Batch], Tensor]


class Grad(Protocol):
    """``grad(loss)``: the gradient of ``loss`` for every trainable part, at its current weights.

    ``grad(loss, model=w)`` takes it at the weights ``w`` of the part ``model`` instead. What a loss does not touch
    has gradient zero.
    """

    def __call__(self, loss: Loss, **replace: Params) -> dict[str, dict[str, Tensor]]: ...


#: ``gradient(grad, nets, batch, due)`` -> the gradients to step with. Pure, like a loss.
Gradient: TypeAlias = Callable[[Grad, Nets, Batch, bool], Parts]
Every: TypeAlias = Literal["never", "step", "epoch", "round"]


class ClientData(Protocol):
    """One client's examples: a view by index."""

    def __len__(self) -> int: ...
    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        ...

    def batch(self, positions: Tensor, *, generator: Any = None, dtype: Any = ..., device: Any = ...) -> Batch:
        """The examples at ``positions``; with a generator, augmented."""
        ...


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client.

    Args:
        id: its number.
        capacity: the fraction of a full-size model that it can hold, in (0, 1].
        architecture: the name of its network where the algorithm needs the server to know it, else "".
    """

    id: ClientId
    capacity: float = 1.0
    architecture: str = ""


@dataclass(frozen=True)
class LocalClient:
    """What a client knows of itself while it works on one round.

    Args:
        info: what the server knows of it.
        models: the networks that its parts run on, by part; `Algorithm.models` names them.
        train: its training examples.
        plan: how it trains.
        rng: randomness keyed by seed, round and client.
        round: the number of the round, from 1.
    """

    info: ClientInfo
    models: Mapping[str, SplitModel]
    train: ClientData
    plan: LocalSGD
    rng: Rng
    round: int = 0


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
    """A request: minimise ``loss`` over ``parts`` on the client's training data, as its plan says."""

    client: LocalClient
    parts: Parts
    gradient: Gradient
    loss: Loss | None
    frozen: Parts
    lr: Mapping[str, float]
    every: Every

    @property
    def identity(self) -> object:
        """Equal for two requests that compute the same function: one method of one algorithm."""
        source = self.loss if self.loss is not None else self.gradient
        return (getattr(source, "__func__", source), id(getattr(source, "__self__", None)))

    def due(self, index: int, in_epoch: int) -> bool:
        """Whether the step is one of those that ``every`` names."""
        return {"never": False, "step": True, "epoch": in_epoch == 0, "round": index == 0}[self.every]


@dataclass(frozen=True, eq=False)
class Reduce:
    """A request: the sum of ``fn`` over batches of the client's training data, in evaluation mode, not augmented."""

    client: LocalClient
    parts: Parts
    fn: Callable[[Nets, Batch], Params]
    rows: Tensor | None


@dataclass(frozen=True)
class Cohort:
    """The clients of one round, in order of id.

    Args:
        clients: what the server knows of each.
        round: the number of the round, from 1.
        rounds: how many rounds the run has.
        rng: randomness keyed by seed and round.
    """

    clients: tuple[ClientInfo, ...]
    round: int
    rounds: int
    rng: Rng

    def __iter__(self) -> Iterator[ClientInfo]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


@dataclass(frozen=True)
class Reply:
    """One client's answer."""

    client: ClientInfo
    message: Any


@dataclass(frozen=True)
class Replies(Sequence[Reply]):
    """The answers of a cohort in order of client id, and who failed to answer and why."""

    answered: tuple[Reply, ...]
    failed: Mapping[ClientId, str] = field(default_factory=dict[ClientId, str])

    def __getitem__(self, index: Any) -> Any:
        return self.answered[index]

    def __len__(self) -> int:
        return len(self.answered)

    def all(self, name: str) -> list[Any]:
        """The field ``name`` of every answer, in order."""
        return [getattr(reply.message, name) for reply in self.answered]


@dataclass(frozen=True, eq=False)
class Exchange:
    """A request: send each client its message, wait, and bring back the replies."""

    cohort: Cohort
    down: Mapping[ClientId, Message | None]


Request: TypeAlias = Fit | Reduce | Exchange
#: A coroutine that may ask for work and returns a T.
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
) -> Steps[Fitted]:
    """Train ``parts`` on the client's data.

    Args:
        client: whose data, plan and randomness.
        parts: what is trained, together; floating-point tensors that are not buffers of their model.
        loss: ``loss(nets, batch)`` -> scalar. Exactly one of ``loss`` and ``gradient``.
        gradient: ``gradient(grad, nets, batch, due)`` -> gradients, for methods whose step is not a loss's gradient.
        frozen: further parts that the loss reads and that are not trained.
        lr: learning rates of single parts, instead of the plan's.
        every: the steps at which ``gradient`` is told ``due = True``.

    Returns:
        The trained parts.
    """
    if (loss is None) == (gradient is None):
        raise TypeError("fit() takes exactly one of loss and gradient")

    def of_loss(grad: Grad, nets: Nets, batch: Batch, due: bool) -> Parts:
        assert loss is not None
        return grad(loss)

    return (yield Fit(client, parts, gradient or of_loss, loss, frozen or {}, lr or {}, every))


def reduce(
    client: LocalClient, parts: Parts, fn: Callable[[Nets, Batch], Params], *, rows: Tensor | None = None
) -> Steps[dict[str, Tensor]]:
    """The sum of ``fn(nets, batch)`` over the client's training data, or over its ``rows`` as one batch.

    Networks are in evaluation mode, nothing is augmented, no gradient is kept.
    """
    return (yield Reduce(client, parts, fn, rows))


def exchange(cohort: Cohort, down: Message | Callable[[ClientInfo], Message | None] | None) -> Steps[Replies]:
    """Send ``down``, or ``down(client)``, to each client of the cohort and wait for the replies; None sends nothing."""
    messages = {client.id: down(client) if callable(down) else down for client in cohort}
    return (yield Exchange(cohort, messages))


def drive(steps: Steps[T], perform: Callable[[Any], Any]) -> T:
    """Run a coroutine to its end, answering each request by ``perform(request)``.

    Raises:
        TypeError: it returned a coroutine that nobody drove: a ``yield from`` is missing.
    """
    if not isinstance(steps, GeneratorType):  # an algorithm's method without any yield returns its value at once
        return steps  # pyright: ignore[reportReturnType]
    answer: Any = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as stop:
            return finished(stop.value)
        answer = perform(request)


def finished(value: Any) -> Any:
    """``value``, unless it is or holds a coroutine that was never driven."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, GeneratorType):
            raise TypeError(f"a round returned the undriven coroutine {item.__qualname__}: a `yield from` is missing")
    return value
