"""The clients as the server sees them: it sends messages and receives the totals of the replies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from polyfed.base.errors import PolyfedError
from polyfed.base.types import ClientId
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Gathered
from polyfed.core.message import Message
from polyfed.core.requests import Exchange
from polyfed.execute.drivers import Sequential
from polyfed.execute.placement import threads
from polyfed.rounds.federation import Federation
from polyfed.rounds.gathering import Gathering
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Down, Finished, Report, UnitRunner
from polyfed.storage.spool import PendingStates, Spool
from polyfed.storage.state_store import StatesOf, Store


class TooFewRepliesError(PolyfedError):
    """A round ended with fewer good replies than ``min_replies``: it is void.

    Args:
        text: the message.
        seconds: as of `polyfed.core.gather.Gathered`.
    """

    def __init__(self, text: str, seconds: Mapping[ClientId, float] | None = None) -> None:
        super().__init__(text)
        self.seconds: Mapping[ClientId, float] = seconds or {}


class Clients(Protocol):
    """The receivers of the server's messages."""

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Send each client its message and return the totals; with ``score``, test the clients, too."""
        ...

    def commit(self) -> None:
        """Complete the round: the states that its clients kept become their private states."""

    def evaluate(self, round_: int, down: Down, *, final: bool = False) -> dict[ClientId, Score]:
        """Send each client the message from which it predicts, and test it on its own data.

        Args:
            round_: number of the round.
            down: the message of each client.
            final: whether the evaluation reports the run's result; see `Partition.evaluated`.
        """
        ...


class SimulatedClients(ABC):
    """Clients of a simulation, which stores their states.

    A state that a client keeps becomes its private state only when the whole round is complete, so that a round that
    fails can be played again from the old states.

    Args:
        federation: the federation of these clients.
        driver: the driver of this process.
        store: the private states.
        scratch: a folder on the disk where replies and states wait.
    """

    def __init__(self, federation: Federation, driver: Sequential, store: Store, scratch: Path | None = None) -> None:
        self.federation, self.driver, self.store, self.scratch = federation, driver, store, scratch
        self._states: StatesOf = store
        self._pending = PendingStates(federation.algorithm.states, None if store.resident else Spool(scratch))
        self._round = 0

    # ------------------------------------------------------------------------------------- what a process does

    @abstractmethod
    def _train(self, round_: int, units: Sequence[Down], *, score: bool) -> Iterator[dict[ClientId, Finished]]:
        """Train unit by unit, in any order; yield the results of one unit at a time."""

    @abstractmethod
    def _test(self, round_: int, down: Down, *, final: bool) -> Iterator[dict[ClientId, Score]]:
        """Test the clients in groups, in any order; yield the scores of one group at a time."""

    # ----------------------------------------------------------------------------------------------- a round

    def work(self, request: Exchange, *, score: bool) -> Iterator[tuple[ClientInfo, Message | None, Report]]:
        """Run the clients' side of an exchange; yield each reply when its client is done."""
        infos = {info.id: info for info in request.cohort}
        self._round = request.cohort.round
        self._pending.begin()
        for finished in self._train(self._round, self._units(infos.values(), request.down), score=score):
            for client in sorted(finished):
                end = finished.pop(client)  # no other reference keeps the upload alive
                self._pending.put(client, end.private)
                yield infos[client], end.upload, end.report
                del end

    def gathering(self, request: Exchange, counted: Iterable[ClientId] | None = None) -> Gathering:
        """Return the `Gathering` that adds up the replies to a request."""
        return Gathering(request.gather, self.federation.algorithm.messages, self.scratch, counted)

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Run the clients' side of the exchange; every client that is asked replies, and counts."""
        with self.gathering(request, request.down) as gathering:
            reports = self.gather(gathering, request, score=score)
            return gathering.settle(request.down, {}), reports

    def gather(self, gathering: Gathering, request: Exchange, *, score: bool) -> dict[ClientId, Report]:
        """Put each reply into ``gathering`` when it comes; return the reports in order of client id."""
        reports: dict[ClientId, Report] = {}
        for info, upload, report in self.work(request, score=score):
            gathering.put(info, upload)
            reports[info.id] = report
            del upload
        return dict(sorted(reports.items()))

    def private(self, client: ClientId) -> Any:
        """Return a client's state; if it has none, make its first state without storing it."""
        return self.federation.private(client, self._state(client))

    def _state(self, client: ClientId) -> Any:
        return self._pending.get(client) if client in self._pending else self._states.get(client)

    def discard(self, clients: Iterable[ClientId]) -> None:
        """Discard the last exchange of these clients: their replies do not count."""
        for client in clients:
            self._pending.discard(client)

    def discard_round(self) -> None:
        """Discard the whole round: it is void."""
        self._pending.clear()

    def commit(self) -> None:
        """Put the states of the round into the store."""
        for client in self._pending:
            self.store.put(client, self._pending.get(client), self._round)
        self._pending.clear()

    def evaluate(self, round_: int, down: Down, *, final: bool = False) -> dict[ClientId, Score]:
        """Test each client on its own data, with its private state and the message that it receives."""
        scores = {client: score for found in self._test(round_, down, final=final) for client, score in found.items()}
        return {client: scores[client] for client in down}

    @contextmanager
    def reading(self, states: StatesOf) -> Generator[None]:
        """Within the block the clients' private states are those of an earlier round, and no round is played."""
        self._states = states
        try:
            yield
        finally:
            self._states = self.store

    def _units(self, infos: Iterable[ClientInfo], down: Down) -> list[Down]:
        """Divide the clients that are asked into units, in order of the units' first clients.

        A unit is a group of clients of one kind in order of id, as many as are stacked at once; so units, and with them
        every bit of a result, depend on the cohort and not on the number of processes.
        """
        units: list[list[ClientId]] = []
        last: dict[object, list[ClientId]] = {}
        for info in sorted((info for info in infos if info.id in down), key=lambda info: info.id):
            kind = self.federation.kind(info.id)
            if kind not in last or len(last[kind]) >= self.driver.unit(info):
                last[kind] = []
                units.append(last[kind])
            last[kind].append(info.id)
        return [{client: down[client] for client in unit} for unit in units]


class LocalClients(SimulatedClients):
    """Clients of this process."""

    def __init__(self, federation: Federation, driver: Sequential, store: Store, scratch: Path | None = None) -> None:
        super().__init__(federation, driver, store, scratch)
        self.runner = UnitRunner(federation, driver)
        self._threads = federation.config.run.threads or torch.get_num_threads()

    def _train(self, round_: int, units: Sequence[Down], *, score: bool) -> Iterator[dict[ClientId, Finished]]:
        for unit in units:
            with threads(self._threads):
                finished = self.runner.train(round_, unit, self._state, score=score)
            yield finished

    def _test(self, round_: int, down: Down, *, final: bool) -> Iterator[dict[ClientId, Score]]:
        with threads(self._threads):
            scores = self.runner.test(round_, down, self._state, final=final)
        yield scores
