"""Clients dealt to worker processes: the same `LocalClients`, several times over.

A message is packed once and unpacked where it is used. With ``run.store = "memory"`` a private state stays with the
worker that trained it and comes home at a checkpoint, or when its client is dealt to another worker; with ``"disk"`` it
comes home after each round, and workers keep nothing. Who does what is a pure function of the cohort and of what
`ExecutionChoice` knows, never of the clock, so a run repeats itself bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from polyfed.base.types import ClientId
from polyfed.config import Config
from polyfed.core.clients import Cohort, Replies, Reply
from polyfed.core.message import Message, Nothing, Pieces, State, assemble, disassemble
from polyfed.execute.choice import ExecutionChoice, kind_of_client
from polyfed.execute.drivers import Driver, make_driver
from polyfed.execute.placement import Placement
from polyfed.parallel.pool import Pool, WorkerError
from polyfed.rounds.clients import Down, LocalClients, Report
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.scoring import Score
from polyfed.storage.state_store import Store

#: A client goes to worker ``id % workers``, where its state is, unless that one is behind by this share of its work.
PATIENCE = 0.25


@dataclass
class Held:
    """The private states that a worker keeps: a store that is never written."""

    states: dict[ClientId, State] = field(default_factory=dict[ClientId, State])

    def get(self, client: ClientId) -> Any:
        """A client's state, or None."""
        return self.states.get(client)

    def put(self, client: ClientId, state: State, round_: int) -> None:
        """Keep a client's state."""
        if not isinstance(state, Nothing):
            self.states[client] = state


class Worker:
    """What a worker answers requests with.

    Args:
        source: the federation, or its configuration where the worker has to make it anew.
        placement: device and precision.
        driver: a name of `make_driver`.
        memory: bytes that a stack of clients may take.
    """

    def __init__(self, source: Federation | Config, placement: Placement, driver: str, memory: int | None) -> None:
        self.federation = resident(source if isinstance(source, Federation) else prepare(source), placement)
        placement.settle()
        self.choice = ExecutionChoice()
        self.driver = make_driver(driver, placement, choice=self.choice, memory=memory)
        self.held = Held()
        self.clients = LocalClients(self.federation, self.driver, self.held)

    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """Each request by name."""
        return {
            "exchange": self.exchange,
            "discard": self.clients.discard,
            "discard_round": self.clients.discard_round,
            "commit": self.commit,
            "evaluate": self.evaluate,
            "give": self.give,
            "drop": self._drop,
            "private": self.private,
        }

    def _take(self, states: Mapping[ClientId, Pieces]) -> None:
        for client, data in states.items():
            self.held.states[client] = assemble(data, *self.federation.algorithm.states)

    def _read(self, messages: Mapping[int, Pieces], down: Mapping[ClientId, int | None]) -> Down:
        kinds = self.federation.algorithm.messages
        made = {number: assemble(data, *kinds) for number, data in messages.items()}
        return {client: None if number is None else made[number] for client, number in down.items()}

    def exchange(
        self,
        cohort: Cohort,
        messages: Mapping[int, Pieces],
        down: Mapping[ClientId, int | None],
        states: Mapping[ClientId, Pieces],
        choice: ExecutionChoice,
        score: bool,
        keep: bool,
    ) -> tuple[dict[ClientId, tuple[Pieces | None, Report]], float]:
        """Play the client's side of the round; uploads and costs by client, and the seconds of counting."""
        self._take(states)
        self._learn(choice)
        counting = self.driver.costs.seconds
        replies, reports = self.clients.exchange(cohort, self._read(messages, down), score=score)
        out: dict[ClientId, tuple[Pieces | None, Report]] = {}
        for reply in replies:
            client, report = reply.client.id, reports[reply.client.id]
            upload = None if reply.message is None else disassemble(reply.message)
            out[client] = (upload, report)
        self._drop(() if keep else states)
        return out, self.driver.costs.seconds - counting

    def _learn(self, choice: ExecutionChoice) -> None:
        self.choice.by_kind.update(choice.by_kind)
        self.choice.stack.update(choice.stack)

    def _drop(self, clients: Iterable[ClientId]) -> None:
        for client in clients:
            self.held.states.pop(client, None)

    def private(self, client: ClientId) -> Pieces:
        """A client's state as this round has it so far."""
        return disassemble(self.clients.private(client))

    def commit(self, clients: Iterable[ClientId], keep: bool) -> Mapping[ClientId, Pieces | None]:
        """Make the states of a complete round final; unless they are kept here (None), give them away."""
        self.clients.commit()
        if keep:
            return dict.fromkeys(client for client in clients if client in self.held.states)
        found = self.give(clients)
        self._drop(found)
        return found

    def give(self, clients: Iterable[ClientId]) -> dict[ClientId, Pieces]:
        """The states of clients."""
        found = {client: self.held.states[client] for client in clients if client in self.held.states}
        return {client: disassemble(state) for client, state in found.items()}

    def evaluate(
        self,
        round_: int,
        messages: Mapping[int, Pieces],
        down: Mapping[ClientId, int | None],
        states: Mapping[ClientId, Pieces],
        choice: ExecutionChoice,
        keep: bool,
    ) -> tuple[dict[ClientId, Score], float]:
        """Test clients; the seconds of counting beside their scores."""
        counting = self.driver.costs.seconds
        self._take(states)
        self._learn(choice)
        scores = self.clients.evaluate(round_, self._read(messages, down))
        self._drop(() if keep else states)
        return scores, self.driver.costs.seconds - counting


def resident(federation: Federation, placement: Placement) -> Federation:
    """The same with its examples on the GPU, as bytes, if they take at most half of what is free there."""
    dataset = federation.dataset
    if placement.device.type != "cuda" or dataset.x.nbytes > torch.cuda.mem_get_info(placement.device)[0] // 2:
        return federation
    return replace(federation, dataset=dataset.to(placement.device))


class WorkerClients:
    """Clients of a run, dealt to the processes of a pool.

    Args:
        federation: whose clients.
        pool: the processes; each answers with a `Worker`.
        store: private states, as far as they are here.
        choice: how each kind of client is trained, and how long that takes.
        driver: of this process, whose clock of finding out goes on: workers find out beside each other, so the slowest
            counts.
        resident: whether states stay with the workers until `flush`.
    """

    def __init__(
        self,
        federation: Federation,
        pool: Pool,
        store: Store,
        choice: ExecutionChoice,
        driver: Driver,
        *,
        resident: bool,
    ) -> None:
        self.federation, self.pool, self.store, self.choice, self.resident = federation, pool, store, choice, resident
        self.driver = driver
        self._home: dict[ClientId, int] = {}  # which worker holds a client's state
        self._round: dict[ClientId, int] = {}  # clients whose state moved since it was last in the store, and when
        self._dealt: dict[ClientId, int] = {}  # who is trained where, in the round that is not complete
        self._now = 0

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Run the client's side of the round for each message."""
        shares = self.deal(down)
        states = self._move(shares)
        requests = {
            worker: (
                "exchange",
                replace(cohort, clients=tuple(info for info in cohort if info.id in mine)),
                *_packed(mine),
                states[worker],
                self.choice,
                score,
                self.resident,
            )
            for worker, mine in shares.items()
        }
        answers = self.pool.ask(requests)
        self._arrived(shares, states)
        kinds = self.federation.algorithm.messages
        found = {client: answer for shared, _ in answers.values() for client, answer in shared.items()}
        self.driver.costs.seconds += max((counting for _, counting in answers.values()), default=0.0)
        self._dealt |= {client: worker for worker, mine in shares.items() for client in mine}
        self._now = cohort.round
        replies = tuple(
            Reply(info, None if found[info.id][0] is None else assemble(found[info.id][0], *kinds))
            for info in cohort
            if info.id in found
        )
        return Replies(replies), {client: report for client, (_, report) in sorted(found.items())}

    def discard(self, clients: Iterable[ClientId]) -> None:
        """Take back the last exchange of some clients: nobody had their replies."""
        for gone in self.pool.ask({k: ("discard", mine) for k, mine in self._where(clients).items()}).values():
            for client in gone:
                del self._dealt[client]

    def discard_round(self) -> None:
        """Take back the whole round: it is void."""
        self.pool.ask({worker: ("discard_round",) for worker in set(self._dealt.values())})
        self._dealt.clear()

    def _where(self, clients: Iterable[ClientId]) -> dict[int, list[ClientId]]:
        """Who of them is at work where."""
        found: dict[int, list[ClientId]] = {}
        for client in clients:
            found.setdefault(self._dealt[client], []).append(client)
        return found

    def private(self, client: ClientId) -> Any:
        """A client's state as this round has it so far, made (and not kept) if it has none."""
        worker = self._dealt.get(client, self._home.get(client))
        if worker is not None:
            (found,) = self.pool.ask({worker: ("private", client)}).values()
            return assemble(found, *self.federation.algorithm.states)
        state = self.store.get(client)
        return self.federation.first_state(client) if state is None else state

    def commit(self) -> None:
        """The round is complete: its states are final where they are, or come home."""
        requests = {worker: ("commit", mine, self.resident) for worker, mine in self._where(self._dealt).items()}
        answers = self.pool.ask(requests)
        for worker, found in answers.items():
            for client, data in found.items():
                if data is None:
                    self._home[client], self._round[client] = worker, self._now
                else:
                    self._store(client, data, self._now)
        self._dealt.clear()

    def _store(self, client: ClientId, data: Pieces, round_: int) -> None:
        self.store.put(client, assemble(data, *self.federation.algorithm.states), round_)

    def flush(self) -> None:
        """Put into the store what only workers know.

        Raises:
            WorkerError: a state is with no worker any more.
        """
        wanted: dict[int, list[ClientId]] = {}
        for client in sorted(self._round):
            wanted.setdefault(self._home[client], []).append(client)
        answers = self.pool.ask({worker: ("give", clients) for worker, clients in wanted.items()})
        for worker, clients in wanted.items():
            lost = [client for client in clients if client not in answers[worker]]
            if lost:
                raise WorkerError(f"the private state of client {lost[0]} is with no worker any more")
        for found in answers.values():
            for client, data in found.items():
                self._store(client, data, self._round[client])
                del self._round[client]  # only now: who is interrupted in between settles again

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Test each client on its own test data, with what it keeps and what it receives."""
        shares = self.deal(down, training=False)
        states = self._move(shares)
        requests = {
            worker: ("evaluate", round_, *_packed(mine), states[worker], self.choice, self.resident)
            for worker, mine in shares.items()
        }
        answers = self.pool.ask(requests)
        self._arrived(shares, states)
        self.driver.costs.seconds += max((counting for _, counting in answers.values()), default=0.0)
        scores = {client: score for found, _ in answers.values() for client, score in found.items()}
        return {client: scores[client] for client in down}

    def deal(self, down: Down, *, training: bool = True) -> dict[int, dict[ClientId, Message | None]]:
        """Who does whom: the longest work first, each to the worker with the least, or to the one that knows it."""
        costs = {client: self._cost(client, training) for client in down}
        loads = [0.0] * len(self.pool)
        shares: dict[int, dict[ClientId, Message | None]] = {}
        for client in sorted(down, key=lambda client: (-costs[client], client)):
            least, known = min(range(len(loads)), key=loads.__getitem__), client % len(loads)
            worker = known if loads[known] - loads[least] <= PATIENCE * costs[client] else least
            worker = self._dealt.get(client, worker)  # a second exchange of the round finds the client at work
            loads[worker] += costs[client]
            shares.setdefault(worker, {})[client] = down[client]
        return {worker: {k: shares[worker][k] for k in down if k in shares[worker]} for worker in sorted(shares)}

    def _cost(self, client: ClientId, training: bool) -> float:
        """Work of a client in units that only compare with each other."""
        data, info = self.federation.data, self.federation.info(client)
        examples = data.train_size(client) if training else len(self.federation.partition.test(client))
        speed = self.choice.seconds.get(kind_of_client(info))
        if not speed:  # nothing was timed: then by the number of weights
            speed = sum(shape.numel() for shape in self.federation.own(client).shapes.values())
        return speed * examples

    def _move(self, shares: Mapping[int, Mapping[ClientId, Any]]) -> dict[int, dict[ClientId, Pieces]]:
        """Bring to each worker the states that it lacks: from another worker, or from the store."""
        wanted: dict[int, list[ClientId]] = {}
        for worker, clients in shares.items():
            for client in clients:
                if self._home.get(client, worker) != worker:
                    wanted.setdefault(self._home[client], []).append(client)
        moved: dict[ClientId, Pieces] = {}
        for found in self.pool.ask({worker: ("give", clients) for worker, clients in wanted.items()}).values():
            moved |= found
        states: dict[int, dict[ClientId, Pieces]] = {worker: {} for worker in shares}
        for worker, clients in shares.items():
            for client in clients:
                if client in moved:
                    states[worker][client] = moved[client]
                elif client not in self._home and (state := self.store.get(client)) is not None:
                    states[worker][client] = disassemble(state)
        return states

    def _arrived(self, shares: Mapping[int, Mapping[ClientId, Any]], states: Mapping[int, Iterable[ClientId]]) -> None:
        """States have a new home once it has answered; until then the old one keeps them, should it never answer."""
        if not self.resident:
            return
        left: dict[int, list[ClientId]] = {}
        for worker in shares:
            for client in states[worker]:
                if (old := self._home.get(client)) is not None:
                    left.setdefault(old, []).append(client)
                self._home[client] = worker
        self.pool.ask({worker: ("drop", clients) for worker, clients in left.items()})


def _packed(down: Down) -> tuple[dict[int, Pieces], dict[ClientId, int | None]]:
    """Every different message once, in pieces, and who gets which."""
    numbers: dict[int, int] = {}
    messages: dict[int, Pieces] = {}
    which: dict[ClientId, int | None] = {}
    for client, message in down.items():
        if message is None:
            which[client] = None
            continue
        number = numbers.setdefault(id(message), len(numbers))
        if number not in messages:
            messages[number] = disassemble(message)
        which[client] = number
    return messages, which
