"""The parts that a client predicts with: assembled from the checkpoint, and kept where that takes the client's data."""

# Without postponed annotations: the types of a record's fields are checked when its class is made.

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from polyfed.base.types import ClientId, Parts
from polyfed.config import Config
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, LocalClient, NeedsDataError, NoData
from polyfed.core.message import Message, Nothing, Record, State, flatten
from polyfed.core.requests import drive
from polyfed.data.client import ClientData
from polyfed.rounds.federation import Federation, client_at_work
from polyfed.rounds.unit import parts_without_data
from polyfed.storage.state_store import Store

NAME = "assembled"


class Assembled(State):
    """A client's parts, without a copy of the tensors that its private state or its message holds.

    A tensor of a part is a tensor, or the number of a tensor of the private state and then the message, in the order
    of `flatten`; the private state of a client that has not trained has no copy in the run directory and counts for
    nothing.

    Args:
        round: the round of the checkpoint.
        parts: the tensors by part and name.
    """

    round: int
    parts: Mapping[str, Mapping[str, Tensor | int]]


def without_data(
    algorithm: Algorithm,
    task: Task,
    config: Config,
    info: ClientInfo,
    private: Any,
    message: Message | None,
    round_: int,
) -> Parts:
    """Return the parts with which a client predicts, without its data.

    Args:
        algorithm: the algorithm of the run.
        task: the common knowledge of server and clients.
        config: the configuration of the run.
        info: the server's knowledge of the client.
        private: its private state; None if it has not trained.
        message: the message from which it predicts.
        round_: the last round.

    Raises:
        NeedsDataError: that takes the client's data.
    """
    models = algorithm.models_at(task, task.build(config.clients.model(info.id)), info.capacity)

    def at_work(now: int) -> LocalClient:
        return client_at_work(info, models, cast(ClientData, NoData()), algorithm, config, now)

    state = first_state(algorithm, at_work) if private is None else private
    return parts_without_data(algorithm, state, message, at_work(round_))


def first_state(algorithm: Algorithm, at_work: Callable[[int], LocalClient]) -> Any:
    """Return the private state of a client before it first trains."""
    stateless = type(algorithm).init_client is Algorithm.init_client
    return Nothing() if stateless else algorithm.init_client(at_work(0))


class AssembledParts:
    """The kept parts of a run directory.

    Args:
        folder: the run directory, or the folder of a deployed client.
    """

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder / NAME, (Assembled,), resident=False)

    def begin(self) -> None:
        """Remove what is there."""
        self._store.restore()

    def put(self, client: ClientId, round_: int, parts: Parts, private: Any, message: Message | None) -> None:
        """Keep a client's parts; `end` is to follow.

        Raises:
            StorageError: the disk is full.
        """
        known = {id(tensor): number for number, tensor in enumerate(_tensors(private, message))}
        kept = {
            part: {name: known.get(id(tensor), tensor) for name, tensor in params.items()}
            for part, params in parts.items()
        }
        self._store.put(client, Assembled(round_, kept), round_)

    def end(self, round_: int) -> None:
        """Complete the file.

        Raises:
            StorageError: the disk is full.
        """
        self._store.save()
        self._store.prune(round_)

    def get(self, client: ClientId, round_: int, private: Any, message: Message | None) -> Parts | None:
        """Return a client's parts of a round, given the stored state and the message of then; None if none are kept.

        So it is for a message that lacks tensors of that one's.

        Raises:
            CheckpointError: the file is damaged.
        """
        found: Assembled | None = self._store.get(client)
        if found is None or found.round != round_:
            return None
        known = _tensors(private, message)
        if any(isinstance(v, int) and v >= len(known) for params in found.parts.values() for v in params.values()):
            return None
        return {
            part: {name: known[value] if isinstance(value, int) else value for name, value in params.items()}
            for part, params in found.parts.items()
        }


def _tensors(*records: Any) -> list[Tensor]:
    return [tensor for record in records if isinstance(record, Record) for _, tensor in flatten(record)[1]]


def keep_assembled(
    federation: Federation,
    server: State,
    stored: Callable[[ClientId], Any],
    round_: int,
    perform: Callable[[Any], Any],
    folder: Path,
) -> None:
    """Keep every client's parts if an algorithm needs the clients' data for them.

    Whether it does is found with one client of each kind, trained and untrained; an algorithm that needs no data
    leaves no file.

    Args:
        federation: the federation of the run.
        server: the server's state after the last round.
        stored: returns a client's private state; None if it has none.
        round_: the last round.
        perform: carries out a request of a client.
        folder: the run directory.

    Raises:
        StorageError: the disk is full.
    """
    algorithm, kinds = federation.algorithm, set[ClientInfo]()
    needed = False
    for client in range(federation.config.clients.count):
        info = federation.info(client)
        if (kind := replace(info, id=0)) not in kinds:
            kinds.add(kind)
            needed = needed or _needs_data(federation, info, stored(client), server, round_)
    if not needed:
        return
    kept = AssembledParts(folder)
    kept.begin()
    for client in range(federation.config.clients.count):
        local, state = federation.local(client, round_), stored(client)
        message = algorithm.message_for(server, local.info)
        with torch.no_grad():
            parts: Parts = drive(algorithm.predictor_parts(federation.private(client, state), message, local), perform)
        kept.put(client, round_, parts, state, message)
    kept.end(round_)


def _needs_data(federation: Federation, info: ClientInfo, private: Any, server: State, round_: int) -> bool:
    message = federation.algorithm.message_for(server, info)
    try:
        for state in (None,) if private is None else (private, None):
            without_data(federation.algorithm, federation.task, federation.config, info, state, message, round_)
    except NeedsDataError:
        return True
    return False
