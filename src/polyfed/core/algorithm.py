"""What an algorithm is: two coroutines, their states and messages, and how its models predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Parts
from polyfed.core.checks import check_counterparts
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Nets
from polyfed.core.requests import ClientResult, Steps
from polyfed.models.catalogue import ModelSpec
from polyfed.models.compatibility import check_cuts_fit, check_head_linear, check_heads_fit
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


@dataclass(frozen=True)
class Task:
    """What the server and all clients know of the training.

    Args:
        input_shape: of one example, such as (3, 32, 32).
        num_classes: L.
        num_clients: N.
        rounds: T.
        architectures: the clients' networks, where they are public; empty where they are private.
        capacities: the capacities that occur, descending.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    num_clients: int = 1
    rounds: int = 1
    architectures: tuple[ModelSpec, ...] = ()
    capacities: tuple[float, ...] = (1.0,)

    def build(self, spec: ModelSpec | str) -> SplitModel:
        """The network called ``spec``, for this input and these classes."""
        return build(spec, input_shape=self.input_shape, num_classes=self.num_classes)

    def auxiliary(self, spec: ModelSpec) -> SplitModel:
        """The network of an algorithm's key ``auxiliary``.

        Raises:
            ModelError: it does not take such inputs; names the key.
        """
        try:
            return self.build(spec)
        except ModelError as error:
            raise ModelError(f'algorithm.auxiliary = "{spec}": {error}; name another one, such as "mlp"') from error

    def family(self) -> dict[str, SplitModel]:
        """The clients' networks by name."""
        return {str(spec): self.build(spec) for spec in self.architectures}

    def common(self, algorithm: str) -> SplitModel:
        """The one network of all clients.

        Raises:
            ModelError: the clients' networks differ, or are private.
        """
        if len(self.architectures) != 1:
            got = ", ".join(map(str, self.architectures)) or "private networks"
            raise ModelError(f"{algorithm} needs one architecture for all clients; clients.models gives {got}")
        return self.build(self.architectures[0])

    def common_head(self, algorithm: str, *, linear: bool = False) -> SplitModel:
        """A network whose classifier is like that of every client's, wherever it sits.

        With ``linear`` all of them have to be one linear layer: a server that works with heads has no networks to run
        them on, and computes ``r @ weight.T + bias``.

        Raises:
            ModelError: the clients' classifiers differ, or are not linear, or their networks are private.
        """
        family = self.family()
        if not family:
            raise ModelError(f"{algorithm} needs networks whose classifiers the server knows; these are private")
        check_heads_fit(family)
        for model in family.values() if linear else ():
            check_head_linear(model)
        return next(iter(family.values()))

    def common_width(self, algorithm: str) -> int:
        """d, the width of every client's representation.

        Raises:
            ModelError: the widths differ, or the clients' networks are private.
        """
        family = self.family()
        if not family:
            raise ModelError(f"{algorithm} needs networks whose width the server knows; these are private")
        check_cuts_fit(family, extractor=False, classifier=False)
        return next(iter(family.values())).rep_dim


class Algorithm(ABC):
    """A way to train together. A frozen dataclass of hyper-parameters; all state is in the values it returns.

    A subclass states its equations, its source, and every difference from the paper and from released code. It
    declares its messages as nested `Message` classes and what server and clients keep as `State` classes.
    """

    #: Lower-case name for configuration and results.
    name: ClassVar[str]
    #: Raised whenever a default or the arithmetic of this file gives other numbers for an unchanged configuration: runs
    #: of before are then neither resumed nor taken for the same (`polyfed.rounds.identity`).
    numbers: ClassVar[int] = 1
    #: Laws of `polyfed.testing` that do not apply, each with the reason.
    exempt: ClassVar[Mapping[str, str]] = {}
    #: Whether `message_for` depends on the client's id, not only on its capacity and architecture.
    personal_message: ClassVar[bool] = False
    #: The share of each client's training examples, in [0, 1), that it never trains on: its ``client.held_out``, to
    #: choose something by. ``client.train`` and its length are without them. A field of this name makes it a key.
    holdout: float = 0.0
    #: The message classes that may travel.
    messages: ClassVar[tuple[type[Message], ...]] = ()
    #: The state classes that may be checkpointed.
    states: ClassVar[tuple[type[State], ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        nested = [value for value in vars(cls).values() if isinstance(value, type)]
        cls.messages += tuple(value for value in nested if issubclass(value, Message))
        cls.states += tuple(value for value in nested if issubclass(value, State))
        cls.states = tuple(dict.fromkeys((*cls.states, Nothing)))

    def check(self, task: Task) -> None:  # noqa: B027 - no requirement is the usual case
        """Raise ModelError where these networks or capacities cannot be trained this way."""

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """The networks that a client's parts run on; ``own`` is its private one."""
        return {"model": own}

    @abstractmethod
    def init_server(self, task: Task, rng: Rng) -> State:
        """The server's state before round 1."""

    def init_client(self, client: LocalClient) -> State:
        """A client's private state before it first trains."""
        return Nothing()

    @abstractmethod
    def server_round(self, server: Any, cohort: Cohort) -> Steps[State]:
        """One round at the server: usually broadcast, `exchange`, aggregate. Returns the new state."""

    @abstractmethod
    def client_round(self, private: Any, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """One round at a client. Returns what it keeps, first, and what it sends; None sends nothing."""

    @abstractmethod
    def message_for(self, server: Any, client: ClientInfo) -> Message | None:
        """What a client receives in order to predict after this round; None if it needs nothing."""

    @abstractmethod
    def predictor_parts(self, private: Any, msg: Any, client: LocalClient) -> Parts | Steps[Parts]:
        """What a client predicts with: its private state put together with what it received.

        A coroutine where that takes a look at the client's data; it may ask for `reduce`, and keeps nothing.
        """

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """Logits (B, L) of each predictor by name; the first is the default, the headline accuracy."""
        return {"model": nets["model"](x)}

    def check_upload(self, task: Task, client: ClientInfo, down: Any, up: Any) -> None:
        """Raise MessageError where an upload would harm the server or other clients; asked of each as it arrives.

        By then its fields are of their declared types and its numbers finite. This rule wants every tensor in a
        mapping that has the names, shapes and types of one that the client received. An algorithm with other uploads
        says here what it expects of them, with the help of `polyfed.core.checks`.

        Args:
            task: what all know.
            client: who sent it.
            down: what it received.
            up: what it sent.
        """
        check_counterparts(down, up)

    def global_nets(self, server: Any, task: Task) -> Mapping[str, Nets]:
        """Models that the server can make by itself, by name, to be tested on all clients' test data."""
        return {}
