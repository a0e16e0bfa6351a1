"""The clients as the server meets them: messages go in, replies come out. Here they live in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from inspect import isgeneratorfunction
from typing import Any, Protocol

from polyfed.base.errors import PolyfedError
from polyfed.base.types import ClientId, Parts
from polyfed.core.clients import Cohort, Replies, Reply
from polyfed.core.message import Message, Nothing, Size, State, compact, size
from polyfed.core.requests import drive
from polyfed.execute.drivers import Calls, Driver, Outcome, Work
from polyfed.execute.local_training import bind, tree_to
from polyfed.rounds.federation import Federation
from polyfed.rounds.scoring import Score, Scorer

#: Messages by client; None sends nothing.
Down = Mapping[ClientId, Message | None]


@dataclass(frozen=True)
class Report:
    """What a client's part of one exchange cost.

    Args:
        work: computing.
        down: bytes that it received.
        up: bytes that it sent.
        score: its test just after its training, before aggregation, if that was asked for.
    """

    work: Work
    down: Size
    up: Size
    score: Score | None = None


class TooFewRepliesError(PolyfedError):
    """A round ended with fewer good replies than ``min_replies``: it is void."""


class Clients(Protocol):
    """Where the server's messages go."""

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Send each client its message and bring back the replies; with ``score``, have them tested, too."""
        ...

    def commit(self) -> None:
        """The round is complete: what the clients of it keep becomes their state."""
        ...

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Send each client what it needs to predict and have it tested on its own test data."""
        ...


class Simulated(Clients, Protocol):
    """Clients of a simulation: whoever plays it may look at what they keep."""

    @property
    def federation(self) -> Federation:
        """Whose clients."""
        ...

    @property
    def driver(self) -> Driver:
        """Who works in this process."""
        ...

    def private(self, client: ClientId) -> Any:
        """A client's state, made (and not kept) if it has none."""
        ...

    def discard(self, clients: Iterable[ClientId]) -> object:
        """Take back the last exchange of some clients: nobody had their replies."""
        ...

    def discard_round(self) -> None:
        """Take back the whole round: it is void."""
        ...

    def flush(self) -> None:
        """Put into the store what only others know, before a checkpoint."""
        ...


class States(Protocol):
    """Where private states are kept; see `polyfed.storage.state_store.Store`."""

    def get(self, client: ClientId) -> Any:
        """A client's state, or None."""
        ...

    def put(self, client: ClientId, state: State, round_: int) -> None:
        """Keep a client's state as of the end of ``round_``."""
        ...


class LocalClients:
    """Clients of this process, run by a driver.

    What they keep becomes their state only when the whole round is complete, so that a round that fails can be
    played again from the state of before.
    """

    def __init__(self, federation: Federation, driver: Driver, store: States) -> None:
        self.federation, self.driver, self.store = federation, driver, store
        self.scorer = Scorer(federation.algorithm, driver.placement, driver.costs)
        self._kept: dict[ClientId, tuple[State, int]] = {}
        self._before: dict[ClientId, tuple[State, int] | None] = {}  # of those of the last exchange, what was kept then

    def private(self, client: ClientId) -> Any:
        """A client's state, made (and not kept) if it has none."""
        if client in self._kept:
            return self._kept[client][0]
        state = self.store.get(client)
        return self.federation.first_state(client) if state is None else state

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run the coroutines of clients to their ends."""
        return self.driver.play(calls)

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Run the client's side of the round for each message."""
        algorithm = self.federation.algorithm
        calls = {
            client: algorithm.client_round(self.private(client), msg, self.federation.local(client, cohort.round))
            for client, msg in down.items()
        }
        outcomes = self.play(calls)
        replies = tuple(Reply(info, outcomes[info.id].upload) for info in cohort if info.id in outcomes)
        self._before = {client: self._kept.get(client) for client in outcomes}
        # What was trained in a stack is a view of all of it.
        self._kept |= {client: (compact(outcome.private), cohort.round) for client, outcome in outcomes.items()}
        different = {id(message): message for message in down.values()}
        received = {key: measure(message) for key, message in different.items()}
        reports = {
            client: Report(
                outcome.work,
                received[id(down[client])],
                measure(outcome.upload),
                self._score(client, cohort.round, outcome.trained) if score and outcome.trained else None,
            )
            for client, outcome in outcomes.items()
        }
        return Replies(replies), reports

    def discard(self, clients: Iterable[ClientId]) -> list[ClientId]:
        """Take back the last exchange of some clients: nobody had their replies.

        Returns:
            Those of which now nothing of this round is kept.
        """
        clients = list(clients)
        for client in clients:
            before = self._before[client]
            if before is None:
                del self._kept[client]
            else:
                self._kept[client] = before
        return [client for client in clients if client not in self._kept]

    def discard_round(self) -> None:
        """Take back the whole round: it is void."""
        self._kept.clear()

    def commit(self) -> None:
        """Put the states of the round into the store."""
        for client, (state, round_) in self._kept.items():
            self.store.put(client, state, round_)
        self._kept.clear()

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Test each client on its own test data, with what it keeps and what it receives."""
        shared: dict[object, Parts] = {}
        out: dict[ClientId, Score] = {}
        for client, message in down.items():
            private, local = self.private(client), self.federation.local(client, round_)
            # Clients that keep nothing and receive the same message have the same model, unless it takes their data.
            same = isinstance(private, Nothing) and not isgeneratorfunction(self.federation.algorithm.predictor_parts)
            kind = (id(message), replace(local.info, id=0)) if same else client
            work = Work()
            if kind not in shared:
                shared = {} if kind is client else shared
                steps = self.federation.algorithm.predictor_parts(private, message, local)
                made: Parts = drive(steps, lambda request, work=work: self.driver.perform(request, work))
                shared[kind] = tree_to(made, self.driver.testing(local.info))
            score = out[client] = self._score(client, round_, shared[kind])
            score.flops_parts = work.flops
            score.seconds += work.seconds
        return out

    def flush(self) -> None:
        """Put into the store what only others know: here, nothing."""

    def _score(self, client: ClientId, round_: int, parts: Parts) -> Score:
        local = self.federation.local(client, round_)
        place = self.driver.testing(local.info)
        return self.scorer.score(bind(local.models, tree_to(parts, place)), self.federation.data.test(client), place)


def measure(message: Message | None) -> Size:
    """The bytes of a message; nothing sent is no bytes."""
    return Size() if message is None else size(message)
