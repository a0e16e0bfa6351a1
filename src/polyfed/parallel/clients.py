"""Clients that worker processes train and test; this process keeps their states and sends a worker those of its unit.

Each unit goes to the next free worker, the longest unit first; the results do not depend on that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch

from polyfed.base.types import ClientId
from polyfed.config import Config
from polyfed.core.message import Message, Pieces, State, assemble, disassemble
from polyfed.execute.drivers import Sequential
from polyfed.execute.placement import Placement
from polyfed.parallel.pool import Job, Pool, most_files
from polyfed.parallel.transfer import pack, unpack
from polyfed.rounds.clients import SimulatedClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Down, Finished, Report, UnitRunner
from polyfed.storage.state_store import Store

#: Clients that a worker tests at a time; their states are in memory together.
TESTED = 8

#: The most states that stay in the files in which they came, ready to be sent again. Each is an open file, so there are
#: at most a quarter of what the system allows.
PARCELS = 256
#: A client's private state, in a parcel, and upload, in pieces, and its report.
Packed: TypeAlias = tuple[Any, Pieces | None, Any]


class Worker:
    """The side of a worker process.

    Args:
        source: the federation, or the configuration to prepare it from.
        make_driver: makes the driver that runs the clients.
    """

    def __init__(self, source: Federation | Config, make_driver: Callable[[Federation], Sequential]) -> None:
        federation = source if isinstance(source, Federation) else prepare(source)
        driver = make_driver(federation)
        driver.placement.settle()
        self.runner = UnitRunner(resident(federation, driver.placement), driver)
        self._messages: dict[int, Message] = {}  # messages of the exchange that several clients receive
        self._exchange = -1

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """Return the function for each request, by name; it returns the answer, and the seconds of counting costs."""
        return {"train": partial(self._counting, self.train), "test": partial(self._counting, self.test)}

    def _counting(self, answer: Callable[..., Any], *request: Any) -> tuple[Any, float]:
        """Return the answer to a request, and the seconds spent on counting costs."""
        costs = self.runner.driver.costs
        before = costs.seconds
        return answer(*request), costs.seconds - before

    def _read(
        self, exchange: int, messages: Mapping[int, Pieces], which: Mapping[ClientId, int | None], keep: Sequence[int]
    ) -> Down:
        if exchange != self._exchange:
            self._messages, self._exchange = {}, exchange
        kinds = self.runner.federation.algorithm.messages
        made = {number: assemble(data, *kinds) for number, data in messages.items()}
        self._messages |= {number: made[number] for number in keep}
        known = {**self._messages, **made}
        return {client: None if number is None else known[number] for client, number in which.items()}

    def _states(self, states: Mapping[ClientId, Any]) -> Callable[[ClientId], Any]:
        return {
            client: assemble(unpack(data), *self.runner.federation.algorithm.states) for client, data in states.items()
        }.get

    def train(self, round_: int, mail: Any, states: Any, score: bool) -> dict[ClientId, Packed]:
        """Train a unit; return the result of each client."""
        finished = self.runner.train(round_, self._read(*mail), self._states(states), score=score)
        return {
            client: (
                pack(disassemble(end.private)),
                None if end.upload is None else disassemble(end.upload),
                end.report,
            )
            for client, end in finished.items()
        }

    def test(self, round_: int, mail: Any, states: Any, final: bool) -> dict[ClientId, Score]:
        """Test clients; return their scores."""
        return self.runner.test(round_, self._read(*mail), self._states(states), final=final)


def resident(federation: Federation, placement: Placement) -> Federation:
    """Return the federation with its examples on the GPU, as bytes, if they take at most half of its memory."""
    dataset, device = federation.dataset, placement.device
    if device.type != "cuda" or dataset.x.nbytes > torch.cuda.get_device_properties(device).total_memory // 2:
        return federation
    return replace(federation, dataset=dataset.to(device))


class WorkerClients(SimulatedClients):
    """Clients of a run, which the processes of a pool train and test.

    Args:
        federation: the federation of these clients.
        driver: the driver of this process. Its seconds of counting costs grow by those of the slowest worker, as
            workers count at the same time.
        store: the private states.
        pool: the processes; each answers by a `Worker`.
        scratch: a folder on the disk where replies and states wait.
    """

    def __init__(
        self, federation: Federation, driver: Sequential, store: Store, pool: Pool, scratch: Path | None = None
    ) -> None:
        super().__init__(federation, driver, store, scratch)
        self.pool = pool
        self._exchanges = count(1)
        self._parcels: dict[ClientId, tuple[State, Any]] = {}  # a client's last state, and what it came in

    def _train(self, round_: int, units: Sequence[Down], *, score: bool) -> Iterator[dict[ClientId, Finished]]:
        mail = _Mail(next(self._exchanges), units)
        jobs = (
            self._job("train", round_, mail, unit, score)
            for unit in sorted(units, key=lambda unit: -sum(map(self._length, unit)))
        )
        algorithm = self.federation.algorithm

        def unpacked(client: ClientId, private: Any, upload: Pieces | None, report: Report) -> Finished:
            state = assemble(unpack(private), *algorithm.states)
            self._parcels.pop(client, None)
            if self.store.resident and len(self._parcels) < min(PARCELS, most_files() // 4):
                self._parcels[client] = (state, private)
            if report.score is not None:  # wall-clock seconds: processes test beside each other
                share = report.score.seconds / min(len(self.pool), len(units))
                report = replace(report, score=replace(report.score, seconds=share))
            return Finished(state, None if upload is None else assemble(upload, *algorithm.messages), report)

        for packed in self._answers(jobs):
            yield {client: unpacked(client, *packed.pop(client)) for client in list(packed)}

    def _test(self, round_: int, down: Down, *, final: bool) -> Iterator[dict[ClientId, Score]]:
        clients = sorted(down)
        units = [{k: down[k] for k in clients[start : start + TESTED]} for start in range(0, len(clients), TESTED)]
        mail = _Mail(next(self._exchanges), units)
        yield from self._answers(self._job("test", round_, mail, unit, final) for unit in units)

    def _answers(self, jobs: Iterator[Job]) -> Iterator[Any]:
        seconds = Counter[int]()
        for worker, found in self.pool.each(jobs):
            seconds[worker] += found[1]
            yield found[0]
            del found  # the next answer may take long
        self.driver.costs.seconds += max(seconds.values(), default=0.0)

    def _job(self, name: str, round_: int, mail: _Mail, unit: Down, *more: Any) -> Job:
        """Return the request for a unit; it is made when a worker is free, so only states in use are in memory."""

        def request(worker: int) -> tuple[Any, ...]:
            states = ((client, self._state(client)) for client in unit)
            packed = {client: self._packed(client, state) for client, state in states if state is not None}
            return (name, round_, mail.to(worker, unit), packed, *more)

        return request

    def discard(self, clients: Iterable[ClientId]) -> None:
        """Discard the last exchange of these clients, and the files of their states."""
        for client in clients:
            super().discard([client])
            self._parcels.pop(client, None)

    def discard_round(self) -> None:
        """Discard the whole round, and the files of all states."""
        super().discard_round()
        self._parcels.clear()

    def _packed(self, client: ClientId, state: State) -> Any:
        last, parcel = self._parcels.get(client, (None, None))
        return parcel if last is state else disassemble(state)

    def _length(self, client: ClientId) -> float:
        """Return the relative duration of a client's training: examples times weights."""
        return float(
            self.federation.data.train_size(client)
            * sum(shape.numel() for shape in self.federation.own(client).shapes.values())
        )


class _Mail:
    """The messages of one exchange; a message that several clients receive goes to each worker once.

    Args:
        exchange: the number of the exchange; a new number lets a worker drop the messages of the exchange before.
        units: the message of each client, unit by unit.
    """

    def __init__(self, exchange: int, units: Sequence[Down]) -> None:
        self._number = exchange
        counts = Counter(id(message) for unit in units for message in unit.values() if message is not None)
        self._shared = {key for key, count in counts.items() if count > 1}
        self._known: dict[int, set[int]] = {}  # worker -> messages that it has

    def to(self, worker: int, unit: Down) -> tuple[int, dict[int, Pieces], dict[ClientId, int | None], list[int]]:
        """Return for a worker the exchange, the messages that it lacks, each client's message, and those to keep."""
        known = self._known.setdefault(worker, set())
        new = {id(message): message for message in unit.values() if message is not None and id(message) not in known}
        keep = [key for key in new if key in self._shared]
        known.update(keep)
        which = {client: None if message is None else id(message) for client, message in unit.items()}
        return self._number, {key: disassemble(message) for key, message in new.items()}, which, keep
