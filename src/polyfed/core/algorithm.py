"""The interface of an algorithm: two coroutines, their states and messages, and the prediction of its models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyfed.base.errors import ConfigError, ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId, Parts
from polyfed.core.checks import check_counterparts
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.net import Nets
from polyfed.core.requests import ClientResult, Steps
from polyfed.metrics.catalogue import TaskKind
from polyfed.models.catalogue import ModelSpec, Option
from polyfed.models.compatibility import check_cuts_fit, check_head_linear, check_heads_fit
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


@dataclass(frozen=True)
class Task:
    """The common knowledge of the server and all clients.

    Args:
        input_shape: shape of one example, such as (3, 32, 32).
        num_classes: number of classes, L.
        num_clients: number of clients, N.
        rounds: number of rounds, T.
        architectures: the clients' networks if they are public; empty if they are private.
        capacities: the capacities that occur, descending.
        kind: "classification", or "regression" with ``num_classes`` 1: the one output.
        dtype: type of the input: int64 for tokens; None for numbers.
        counts: how many clients have each of the architectures; empty where that is not known.
        columns: name and number of features of each column of a table, in order; empty for other data.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    num_clients: int = 1
    rounds: int = 1
    architectures: tuple[ModelSpec, ...] = ()
    capacities: tuple[float, ...] = (1.0,)
    kind: TaskKind = "classification"
    dtype: torch.dtype | None = None
    counts: tuple[int, ...] = ()
    columns: tuple[tuple[str, int], ...] = ()

    def build(self, spec: ModelSpec | str, *, empty: bool = False) -> SplitModel:
        """Build the network ``spec`` for this input and these classes; ``empty``: without values, to be sliced."""
        spec, shape, classes = ModelSpec.parse(spec).reading(self.columns), self.input_shape, self.num_classes
        return build(spec, input_shape=shape, num_classes=classes, dtype=self.dtype, empty=empty)

    def auxiliary(self, text: str, **options: Option) -> SplitModel:
        """Build the network of an algorithm's key ``auxiliary``, with options added or replaced.

        Raises:
            ModelError: the network does not take such inputs; the text names the key.
        """
        spec = ModelSpec.parse(text).having(**options)
        try:
            return self.build(spec)
        except ModelError as error:
            such = "text-transformer" if self.dtype == torch.int64 else "mlp"
            raise ModelError(
                f'algorithm.auxiliary = "{spec}": {error}; name another network, such as "{such}"'
            ) from error

    def family(self) -> dict[str, SplitModel]:
        """Return the clients' networks by name."""
        return {str(spec): self.build(spec) for spec in self.architectures}

    def common(self, algorithm: str, otherwise: str = "") -> SplitModel:
        """Return the common network of all clients.

        Args:
            algorithm: its name, for the message.
            otherwise: what a user could do who wants several, for the message.

        Raises:
            ModelError: the clients' networks differ, or are private.
        """
        if len(self.architectures) != 1:
            got = ", ".join(map(str, self.architectures)) or "private networks"
            text = f"{algorithm} needs one architecture for all clients; clients.models gives {got}; give one model"
            raise ModelError(f"{text}, {otherwise}" if otherwise else text)
        return self.build(self.architectures[0])

    def common_head(self, algorithm: str, *, linear: bool = False) -> SplitModel:
        """Return a network whose classifier equals that of every client, wherever it is in the network.

        With ``linear`` every classifier must be a single linear layer: a server that works with heads has no networks
        to run them in, and computes ``r @ weight.T + bias``.

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
        """Return d, the width of every client's representation.

        Raises:
            ModelError: the widths differ, or the clients' networks are private.
        """
        family = self.family()
        if not family:
            raise ModelError(f"{algorithm} needs networks whose width the server knows; these are private")
        check_cuts_fit(family, extractor=False, classifier=False)
        return next(iter(family.values())).rep_dim


def raise_idle(algorithm: object, *rules: tuple[bool, str, Iterable[str]]) -> None:
    """Raise ConfigError for all keys of which `idle_keys` tells; for ``__post_init__``."""
    if faults := idle_keys(algorithm, *rules):
        raise ConfigError(*faults)


def idle_keys(algorithm: object, *rules: tuple[bool, str, Iterable[str]]) -> list[str]:
    """One sentence for each key of an algorithm that has not its default although it has no effect.

    Args:
        algorithm: a dataclass.
        rules: whether the rule holds; the setting that makes keys idle, and why; the names of the keys. Where
            several rules hold for a key, the last one gives the reason.
    """
    default = {field.name: field.default for field in fields(algorithm)}  # pyright: ignore[reportArgumentType]
    reasons = {key: why for holds, why, keys in rules if holds for key in sorted(keys)}
    return [
        f"{key}: got {value!r}, which has no effect: {why}; leave it at {default[key]!r}"
        for key, why in reasons.items()
        if (value := getattr(algorithm, key)) != default[key]
    ]


class Algorithm(ABC):
    """A federated algorithm: a frozen dataclass of hyper-parameters; all state is in the values that it returns.

    A subclass states its equations, its source, and every difference from the paper and from released code. It
    declares its messages as nested `Message` classes and the states of server and clients as `State` classes.
    """

    #: Lower-case name for configuration and results.
    name: ClassVar[str]
    #: To be raised by 1 when a changed default or arithmetic of this file gives other numbers for an unchanged
    #: configuration: older runs are then neither resumed nor reused (`polyfed.rounds.identity`).
    numbers: ClassVar[int] = 1
    #: The tasks that it can train. Equations that use classes, or probabilities of classes, have no regression.
    tasks: ClassVar[tuple[TaskKind, ...]] = ("classification",)
    #: Parts that a fit trains and that have no network, such as a matrix; ``train.parts`` may name them.
    trains: ClassVar[tuple[str, ...]] = ()
    #: Laws of `polyfed.testing` that do not apply, each with the reason.
    exempt: ClassVar[Mapping[str, str]] = {}
    #: Whether a client's private state, where it has one, has a network of its own, which may start with given weights.
    own_networks: ClassVar[bool] = True
    #: Whether a client can predict with the parts of its last fit. Where predictors take more, such as a pass over its
    #: data, it is not tested before aggregation.
    fit_predicts: ClassVar[bool] = True
    #: Whether training reads labels; else ``train.class_weights`` and ``train.label_smoothing`` get a note, and rows
    #: may have no label: -1 in a batch.
    reads_labels: ClassVar[bool] = True
    #: Whether the softmax of its predictors' scores estimates probabilities; else metrics of these are refused.
    probabilities: ClassVar[bool] = True
    #: Whether its loss compares the examples of a batch, so that a batch of one teaches nothing and is refused.
    compares: ClassVar[bool] = False
    #: Whether clients of other capacities hold other weights of the same networks; `models_at` says it of networks.
    masks: ClassVar[bool] = False
    #: Whether `message_for` depends on the client's id, not only on its capacity and architecture.
    personal_message: ClassVar[bool] = False
    #: The share of each client's training examples, in [0, 1), that it never trains on: its ``client.held_out``, for
    #: choosing a setting. ``client.train`` and its length exclude them. A field of this name makes it a key.
    holdout: float = 0.0
    #: Whether its numbers depend on the number of rounds, `Task.rounds` and ``Cohort.rounds``: such a run does not go
    #: on after its end, unless a field ``horizon`` takes their place.
    uses_rounds: ClassVar[bool] = False
    #: The number of rounds that a schedule of the algorithm is made for. A field of this name with the default None
    #: makes it a key, which a run sets to its ``run.rounds`` when it begins, and keeps when it goes on after its end.
    horizon: int | None = None
    #: The seconds that a client is to take for a round, for an algorithm that reads `Gathered.seconds`. A field of this
    #: name with the default None makes it a key; where it is given, a simulation needs ``[devices]``.
    deadline: float | None = None
    #: The message classes that may travel.
    messages: ClassVar[tuple[type[Message], ...]] = ()
    #: The state classes that may be checkpointed.
    states: ClassVar[tuple[type[State], ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        nested = [value for value in vars(cls).values() if isinstance(value, type)]
        cls.messages += tuple(value for value in nested if issubclass(value, Message))
        cls.states = tuple(
            dict.fromkeys((*cls.states, *(value for value in nested if issubclass(value, State)), Nothing))
        )

    @property
    def shared_networks(self) -> bool:
        """Whether clients predict with the server's networks and have none of their own, though they may remember."""
        return type(self).init_client is Algorithm.init_client or not self.own_networks

    def check(self, task: Task) -> None:  # noqa: B027 - no requirement is the usual case
        """Raise ModelError if the algorithm cannot train these networks or capacities."""

    def models(self, task: Task, own: SplitModel) -> Mapping[str, SplitModel]:
        """Return the networks of a client's parts; ``own`` is its private network."""
        return {"model": own}

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """Return the networks of the parts of a client of some capacity, where these are smaller at smaller ones."""
        return self.models(task, own)

    @abstractmethod
    def init_server(self, task: Task, rng: Rng) -> State:
        """Return the server's state before round 1."""

    def init_client(self, client: LocalClient) -> State:
        """Return a client's private state before it first trains."""
        return Nothing()

    @abstractmethod
    def server_round(self, server: Any, cohort: Cohort) -> Steps[State]:
        """Run one round at the server: usually broadcast, `exchange`, aggregate. Return the new state."""

    def void_round(self, server: Any, cohort: Cohort, seconds: Mapping[ClientId, float]) -> State:
        """Return the state after a round that too few clients answered; by default as it was.

        Args:
            server: the state before the round.
            cohort: the clients that were asked.
            seconds: as `Gathered.seconds` of the exchange that was void; no reply counts, in time or not.
        """
        return server

    @abstractmethod
    def client_round(self, private: Any, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """Run one round at a client. Return the state that it keeps and the message that it sends, or None."""

    @abstractmethod
    def message_for(self, server: Any, client: ClientInfo) -> Message | None:
        """Return the message from which a client predicts after this round; None if it needs no message."""

    @abstractmethod
    def predictor_parts(self, private: Any, msg: Any, client: LocalClient) -> Parts | Steps[Parts]:
        """Return the parts with which a client predicts, from its private state and the message that it received.

        It may use the client's data: as a coroutine it may request `reduce`. It keeps no state. Clients without state
        that receive the same message are tested with the same parts if they can be made without data.
        """

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """Return the logits (B, L) of each predictor by name; the first is the default, the headline accuracy.

        For a regression: the predictions (B, 1).
        """
        return {"model": nets["model"](x)}

    def check_upload(self, task: Task, client: ClientInfo, down: Any, up: Any) -> None:
        """Raise MessageError if an upload would harm the server or other clients; called for each as it arrives.

        At this point the fields have their declared types and the numbers are finite. This default requires every
        tensor to be in a mapping with the names, shapes and types of a mapping that the client received. An algorithm
        with other uploads overrides it with its own checks, with the help of `polyfed.core.checks`.

        Args:
            task: the common knowledge of server and clients.
            client: the sender.
            down: the message that it received.
            up: the message that it sent.
        """
        check_counterparts(down, up)

    def global_nets(self, server: Any, task: Task) -> Mapping[str, Nets]:
        """Return the models that the server can make by itself, by name, for tests on all clients' test data."""
        return {}

    def facts(self, server: Any) -> Mapping[str, Any]:
        """Return what the line of a round in rounds.jsonl is to say of the server's state, under ``algorithm``."""
        return {}
