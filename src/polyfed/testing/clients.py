"""Clients of this process whose traffic is written down, or goes through bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from polyfed.base.types import ClientId, Parts
from polyfed.core.clients import Cohort, Replies, Reply
from polyfed.core.message import Message, Size, State, decode, encode, size
from polyfed.execute.cost import CostCounter, StepCost
from polyfed.execute.drivers import Calls, Driver, Outcome
from polyfed.rounds.clients import Down, LocalClients, Report
from polyfed.rounds.federation import Federation
from polyfed.rounds.scoring import Score
from polyfed.storage.state_store import Store
from polyfed.testing.compare import digest

_FREE = StepCost(**{field.name: 0 for field in fields(StepCost)})


class Unpriced(CostCounter):
    """Everything costs nothing: finding out takes longer than the laws' few steps."""

    def step(self, key: object, fit: Any, examples: int, due: bool) -> StepCost:
        """Nothing."""
        return _FREE

    def forward(self, key: object, run: Any, x: Tensor) -> StepCost:
        """Nothing."""
        return _FREE


@dataclass(frozen=True)
class Visit:
    """One client's part in one exchange.

    Args:
        round: from 1.
        client: its number.
        before: its private state when the message arrived.
        down: what it received.
        after: its private state when it answered.
        up: what it sent.
        report: what that cost.
        trained: what its last fit ended with.
        seen: the digests of ``before`` and ``down`` on arrival, and of ``after`` and ``up`` on departure.
    """

    round: int
    client: ClientId
    before: State
    down: Message | None
    after: State
    up: Message | None
    report: Report
    trained: Parts
    seen: tuple[str, str, str, str]

    def written(self) -> list[str]:
        """Which of the four values are no longer what they were."""
        values = {"private": self.before, "received": self.down, "kept": self.after, "sent": self.up}
        return [name for (name, value), was in zip(values.items(), self.seen, strict=True) if digest(value) != was]


class Watched(LocalClients):
    """Clients of this process; every visit is written down."""

    def __init__(self, federation: Federation, driver: Driver, store: Store) -> None:
        super().__init__(federation, driver, store)
        self.visits: list[Visit] = []
        self._trained: dict[ClientId, Parts] = {}

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run the clients and remember what their last fits ended with."""
        outcomes = super().play(calls)
        self._trained = {client: outcome.trained for client, outcome in outcomes.items()}
        return outcomes

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Pass the messages on and write down what came and what went."""
        before: dict[ClientId, Any] = {client: self.private(client) for client in down}
        arrived = {client: (digest(before[client]), digest(down[client])) for client in down}
        # What a client has not got in its store it would make anew for the round, and this one would not be the same
        # object: it could be written to unseen.
        self._kept = {client: (state, cohort.round) for client, state in before.items()} | self._kept
        replies, reports = super().exchange(cohort, down, score=score)
        for reply in replies:
            client = reply.client.id
            after = self.private(client)
            self.visits.append(
                Visit(
                    cohort.round,
                    client,
                    before[client],
                    down[client],
                    after,
                    reply.message,
                    reports[client],
                    self._trained[client],
                    (*arrived[client], digest(after), digest(reply.message)),
                )
            )
        return replies, reports


class Wired(LocalClients):
    """Clients of this process that are met through bytes only: each message is what `decode` makes of `encode`'s.

    Uploads are looked at as a deployed server does.
    """

    def __init__(self, federation: Federation, driver: Driver, store: Store) -> None:
        super().__init__(federation, driver, store)
        #: For each message: itself, its size as told, and its length as encoded.
        self.sizes: list[tuple[Message, Size, int]] = []

    def _through(self, message: Message | None) -> Message | None:
        if message is None:
            return None
        data = encode(message)
        self.sizes.append((message, size(message), len(data)))
        return decode(data, *self.federation.algorithm.messages)

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Encode and decode both ways."""
        came = {client: self._through(message) for client, message in down.items()}
        replies, reports = super().exchange(cohort, came, score=score)
        back = tuple(Reply(reply.client, self._through(reply.message)) for reply in replies)
        for reply in back:
            if reply.message is not None:
                task, received = self.federation.task, came[reply.client.id]
                self.federation.algorithm.check_upload(task, reply.client, received, reply.message)
        return Replies(back, replies.failed), reports

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Encode and decode what the clients predict with."""
        return super().evaluate(round_, {client: self._through(message) for client, message in down.items()})
