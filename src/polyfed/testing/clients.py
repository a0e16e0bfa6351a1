"""Clients of this process whose traffic is written down, or goes through bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from polyfed.base.types import ClientId, Parts
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Gathered
from polyfed.core.message import Message, Size, State, decode, encode, size
from polyfed.core.requests import Exchange
from polyfed.execute.cost import CostCounter
from polyfed.execute.drivers import Calls, Outcome, Sequential
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Down, Finished, Report, UnitRunner
from polyfed.storage.state_store import Store
from polyfed.testing.compare import digest


class Unpriced(CostCounter):
    """Everything costs nothing: finding out takes longer than the laws' few steps."""

    def step(self, key: object, fit: Any, examples: int, due: int) -> int:
        """Nothing."""
        return 0

    peak = step

    def forward(self, key: object, run: Any, x: Tensor) -> int:
        """Nothing."""
        return 0


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


class Remembering(UnitRunner):
    """Runs units and remembers what the last fit of each client ended with."""

    def __init__(self, federation: Federation, driver: Sequential) -> None:
        super().__init__(federation, driver)
        self.trained: dict[ClientId, Parts] = {}

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run the clients."""
        outcomes = super().play(calls)
        self.trained |= {client: outcome.trained for client, outcome in outcomes.items()}
        return outcomes


class Watched(LocalClients):
    """Clients of this process; every visit is written down."""

    def __init__(self, federation: Federation, driver: Sequential, store: Store) -> None:
        super().__init__(federation, driver, store)
        self.runner = self._remembering = Remembering(federation, driver)
        self.visits: list[Visit] = []

    def work(self, request: Exchange, *, score: bool) -> Iterator[tuple[ClientInfo, Message | None, Report]]:
        """Pass the messages on and write down what came and what went."""
        down = request.down
        before: dict[ClientId, Any] = {client: self.private(client) for client in down}
        arrived = {client: (digest(before[client]), digest(down[client])) for client in down}
        # What a client has not got in its store it would make anew for the round, and this one would not be the same
        # object: it could be written to unseen.
        for client, state in before.items():
            self._pending.put(client, state)
        for info, upload, report in super().work(request, score=score):
            after = self.private(info.id)
            self.visits.append(
                Visit(
                    request.cohort.round,
                    info.id,
                    before[info.id],
                    down[info.id],
                    after,
                    upload,
                    report,
                    self._remembering.trained[info.id],
                    (*arrived[info.id], digest(after), digest(upload)),
                )
            )
            yield info, upload, report


class Wired(LocalClients):
    """Clients of this process that are met through bytes only: each message is what `decode` makes of `encode`'s.

    Uploads are looked at as a deployed server does.
    """

    def __init__(self, federation: Federation, driver: Sequential, store: Store) -> None:
        super().__init__(federation, driver, store)
        #: For each message: itself, its size as told, and its length as encoded.
        self.sizes: list[tuple[Message, Size, int]] = []

    def _through(self, message: Message | None) -> Message | None:
        if message is None:
            return None
        data = encode(message)
        self.sizes.append((message, size(message), len(data)))
        return decode(data, *self.federation.algorithm.messages)

    def work(self, request: Exchange, *, score: bool) -> Iterator[tuple[ClientInfo, Message | None, Report]]:
        """Encode and decode both ways."""
        came = {client: self._through(message) for client, message in request.down.items()}
        for info, upload, report in super().work(replace(request, down=came), score=score):
            back = self._through(upload)
            if back is not None:
                self.federation.algorithm.check_upload(self.federation.task, info, came[info.id], back)
            yield info, back, report

    def evaluate(self, round_: int, down: Down, *, final: bool = False) -> dict[ClientId, Score]:
        """Encode and decode what the clients predict with."""
        came = {client: self._through(message) for client, message in down.items()}
        return super().evaluate(round_, came, final=final)


class Backwards(LocalClients):
    """Clients of this process that run in descending order: with `Sequential`, of their ids."""

    def _train(self, round_: int, units: Sequence[Down], *, score: bool) -> Iterator[dict[ClientId, Finished]]:
        return super()._train(round_, units[::-1], score=score)


class Shuffled(LocalClients):
    """Clients of this process whose replies come in descending order of id, and are folded when all are there."""

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Let every reply wait on disk."""
        arrived = sorted(self.work(request, score=score), key=lambda reply: reply[0].id)
        with self.gathering(request) as gathering:
            for info, upload, _ in reversed(arrived):
                gathering.put(info, upload)
            return gathering.settle(request.down, {}), {info.id: report for info, _, report in arrived}
