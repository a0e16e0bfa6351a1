"""The clients as the server meets them: messages go out, and what the replies add up to comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from polyfed.base.errors import PolyfedError
from polyfed.base.types import ClientId
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Gathered
from polyfed.core.message import Message
from polyfed.core.requests import Exchange
from polyfed.execute.drivers import Driver
from polyfed.execute.placement import threads
from polyfed.rounds.federation import Federation
from polyfed.rounds.gathering import Gathering
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Down, Finished, Report, UnitRunner
from polyfed.storage.spool import PendingStates, Spool
from polyfed.storage.state_store import Store


class TooFewRepliesError(PolyfedError):
    """A round ended with fewer good replies than ``min_replies``: it is void."""


class Clients(Protocol):
    """Where the server's messages go."""

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Send each client its message and bring back the totals; with ``score``, have the clients tested, too."""
        ...

    def commit(self) -> None:
        """The round is complete: what the clients of it keep becomes their state."""
        ...

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Send each client what it needs to predict and have it tested on its own test data."""
        ...


class SimulatedClients(ABC):
    """Clients of a simulation, whose states the simulation keeps.

    What they keep becomes their state only when the whole round is complete, so that a round that fails can be played
    again from the state of before.

    Args:
        federation: whose clients.
        driver: of this process.
        store: their private states.
        scratch: on whose disk replies and states wait.
    """

    def __init__(self, federation: Federation, driver: Driver, store: Store, scratch: Path | None = None) -> None:
        self.federation, self.driver, self.store, self.scratch = federation, driver, store, scratch
        spool = None if store.resident else Spool(scratch)
        self._pending = PendingStates(federation.algorithm.states, spool)
        self._round = 0

    # ------------------------------------------------------------------------------------- what a process does

    @abstractmethod
    def _train(self, round_: int, units: Sequence[Down], *, score: bool) -> Iterator[dict[ClientId, Finished]]:
        """Train unit by unit, in any order; one unit at a time comes back."""

    @abstractmethod
    def _test(self, round_: int, down: Down) -> Iterator[dict[ClientId, Score]]:
        """Test the clients, some at a time, in any order."""

    # ----------------------------------------------------------------------------------------------- a round

    def work(self, request: Exchange, *, score: bool) -> Iterator[tuple[ClientInfo, Message | None, Report]]:
        """Run the clients' side of an exchange; each reply as its client is done."""
        infos = {info.id: info for info in request.cohort}
        self._round = request.cohort.round
        self._pending.begin()
        for finished in self._train(self._round, self._units(infos.values(), request.down), score=score):
            for client in sorted(finished):
                end = finished.pop(client)  # nobody else holds on to an upload
                self._pending.put(client, end.private)
                yield infos[client], end.upload, end.report
                del end

    def gathering(self, request: Exchange, counted: Iterable[ClientId] | None = None) -> Gathering:
        """Where the replies to a request are added up."""
        return Gathering(request.gather, self.federation.algorithm.messages, self.scratch, counted)

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Run the clients' side of the exchange; everyone who is asked replies, and counts."""
        reports: dict[ClientId, Report] = {}
        with self.gathering(request, request.down) as gathering:
            for info, upload, report in self.work(request, score=score):
                gathering.put(info, upload)
                reports[info.id] = report
                del upload
            return gathering.settle(request.down, {}), dict(sorted(reports.items()))

    def private(self, client: ClientId) -> Any:
        """A client's state, made (and not kept) if it has none."""
        state = self._state(client)
        return self.federation.first_state(client) if state is None else state

    def _state(self, client: ClientId) -> Any:
        return self._pending.get(client) if client in self._pending else self.store.get(client)

    def discard(self, clients: Iterable[ClientId]) -> None:
        """Take back the last exchange of some clients: nobody had their replies."""
        for client in clients:
            self._pending.discard(client)

    def discard_round(self) -> None:
        """Take back the whole round: it is void."""
        self._pending.clear()

    def commit(self) -> None:
        """Put the states of the round into the store."""
        for client in self._pending:
            self.store.put(client, self._pending.get(client), self._round)
        self._pending.clear()

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Test each client on its own test data, with what it keeps and what it receives."""
        scores: dict[ClientId, Score] = {}
        for found in self._test(round_, down):
            scores |= found
        return {client: scores[client] for client in down}

    def _units(self, infos: Iterable[ClientInfo], down: Down) -> list[Down]:
        """The clients that are asked, unit by unit, in order of the units' first clients.

        A unit is clients of one kind in order of id, as many as are stacked at once; so units, and with them every bit
        of a result, follow from the cohort and not from how many processes there are.
        """
        units: list[list[ClientId]] = []
        last: dict[object, list[ClientId]] = {}
        for info in sorted(infos, key=lambda info: info.id):
            if info.id not in down:
                continue
            kind = (info.architecture, info.capacity)
            unit = last.get(kind)
            if unit is None or len(unit) >= self.driver.unit(info):
                unit = last[kind] = []
                units.append(unit)
            unit.append(info.id)
        return [{client: down[client] for client in unit} for unit in units]


class LocalClients(SimulatedClients):
    """Clients of this process."""

    def __init__(self, federation: Federation, driver: Driver, store: Store, scratch: Path | None = None) -> None:
        super().__init__(federation, driver, store, scratch)
        self.runner = UnitRunner(federation, driver)
        self._threads = federation.config.run.threads or torch.get_num_threads()

    def _train(self, round_: int, units: Sequence[Down], *, score: bool) -> Iterator[dict[ClientId, Finished]]:
        for unit in units:
            with threads(self._threads):
                finished = self.runner.train(round_, unit, self._state, score=score)
            yield finished

    def _test(self, round_: int, down: Down) -> Iterator[dict[ClientId, Score]]:
        with threads(self._threads):
            scores = self.runner.test(round_, down, self._state)
        yield scores
