"""The clients as the server meets them: messages go in, replies come out. Here they live in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from polyfed.execute.drivers import Driver, Work
from polyfed.message import Message, Size, State, size
from polyfed.parties import Cohort, Replies, Reply
from polyfed.runtime.federation import Federation
from polyfed.runtime.store import Store
from polyfed.typing import ClientId


@dataclass(frozen=True)
class Report:
    """What a client's part of one exchange cost.

    Args:
        work: computing.
        down: bytes that it received.
        up: bytes that it sent.
    """

    work: Work
    down: Size
    up: Size


class Clients(Protocol):
    """Where messages of the server go."""

    def exchange(
        self, cohort: Cohort, down: Mapping[ClientId, Message | None]
    ) -> tuple[Replies, dict[ClientId, Report]]:
        """Send each client its message and bring back the replies."""
        ...

    def commit(self) -> None:
        """The round is complete: what the clients of it keep becomes their state."""
        ...

    def private(self, client: ClientId) -> State:
        """A client's state, made if it has none."""
        ...


class LocalClients:
    """Clients of this process, run by a driver.

    What they keep becomes their state only when the whole round is complete, so that a round that fails can be
    played again from the state of before.
    """

    def __init__(self, federation: Federation, driver: Driver, store: Store) -> None:
        self.federation, self.driver, self.store = federation, driver, store
        self._kept: dict[ClientId, tuple[State, int]] = {}

    def private(self, client: ClientId) -> Any:
        """A client's state, made (and not kept) if it has none."""
        if client in self._kept:
            return self._kept[client][0]
        state = self.store.get(client)
        return self.federation.algorithm.init_client(self.federation.local(client, 0)) if state is None else state

    def exchange(
        self, cohort: Cohort, down: Mapping[ClientId, Message | None]
    ) -> tuple[Replies, dict[ClientId, Report]]:
        """Run the client's side of the round for each message."""
        algorithm = self.federation.algorithm
        calls = {
            client: algorithm.client_round(self.private(client), msg, self.federation.local(client, cohort.round))
            for client, msg in down.items()
        }
        outcomes = self.driver.play(calls)
        replies = tuple(Reply(info, outcomes[info.id].upload) for info in cohort if info.id in outcomes)
        self._kept |= {client: (outcome.private, cohort.round) for client, outcome in outcomes.items()}
        reports = {
            client: Report(outcome.work, measure(down[client]), measure(outcome.upload))
            for client, outcome in outcomes.items()
        }
        return Replies(replies), reports

    def commit(self) -> None:
        """Put the states of the round into the store."""
        for client, (state, round_) in self._kept.items():
            self.store.put(client, state, round_)
        self._kept.clear()


def measure(message: Message | None) -> Size:
    """The bytes of a message; nothing sent is no bytes."""
    return Size() if message is None else size(message)
