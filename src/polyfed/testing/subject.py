"""A small federation for an algorithm under test, and runs of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from polyfed.base.errors import ModelError
from polyfed.base.tree import map_parts
from polyfed.base.types import ClientId
from polyfed.config import Config, algorithm_class
from polyfed.core.algorithm import Algorithm
from polyfed.core.message import State
from polyfed.core.requests import Fit, Fitted, drive
from polyfed.data.readers.digits import load_digits
from polyfed.execute.choice import Chosen, ExecutionChoice
from polyfed.execute.drivers import Auto, Batched, Calls, Outcome, Sequential, Work
from polyfed.execute.placement import Placement, Precision, threads
from polyfed.execute.stacked import StackRule
from polyfed.parallel.clients import Worker, WorkerClients
from polyfed.parallel.pool import Pool
from polyfed.rounds.clients import Clients, LocalClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store
from polyfed.testing.clients import Unpriced, Watched
from polyfed.testing.compare import digest
from polyfed.testing.process import Child, ProcessClients
from polyfed.testing.settings import (
    BASE,
    CALM,
    CAPACITIES,
    FAMILIES,
    FEW,
    KEYS,
    LEARNERS,
    LEARNING,
    MORE,
    Tables,
    merged,
)

C = TypeVar("C", bound=Clients)


class Idle(Sequential):
    """Clients go through their rounds, and training moves nothing."""

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run each to its end; a fit ends with what it began with."""
        return {client: Outcome(*drive(calls[client], self._idle), Work()) for client in sorted(calls)}

    def _idle(self, request: Any) -> Any:
        if isinstance(request, Fit):
            return Fitted(map_parts(torch.clone, request.parts), 0, 0.0)
        return self.perform(request)


_DRIVERS: Mapping[str, Callable[[Placement], Sequential]] = {
    # The channels of images are innermost, whether or not it pays.
    "channels-last": partial(Auto, choice=ExecutionChoice(lambda _: Chosen("channels-last", 1, "channels-last"))),
    "sequential": Sequential,
    "batched": Batched,
    # Every step of a stack is replayed from a trace, whatever the networks are and from the first step on.
    "replayed": partial(Batched, rule=StackRule(sizes=range(2, 10), after=0, images=True)),
    "idle": Idle,
}


def make_driver(name: str, precision: Precision) -> Sequential:
    """One of `_DRIVERS` on the CPU, which counts no costs."""
    driver = _DRIVERS[name](Placement.of("cpu", precision))
    driver.costs = Unpriced(driver.placement)
    return driver


@dataclass(frozen=True)
class Run(Generic[C]):
    """What a few rounds led to.

    Args:
        federation: what was run.
        driver: by what.
        clients: where.
        servers: the server's states, the initial one first.
        seen: their digests when they were made.
    """

    federation: Federation
    driver: Sequential
    clients: C
    servers: tuple[State, ...]
    seen: tuple[str, ...]

    @cached_property
    def privates(self) -> dict[ClientId, State]:
        """Every client's private state at the end, where it is at hand."""
        if not isinstance(self.clients, LocalClients | WorkerClients):
            raise TypeError("these clients' states stay in another process; ask for their digests")
        with self.driver.placement.defaults():
            return {client: self.clients.private(client) for client in range(self.federation.config.clients.count)}


def play(
    federation: Federation,
    clients: Callable[[Federation, Sequential], C],
    *,
    rounds: int = 3,
    driver: str = "sequential",
    precision: Precision = "fp32",
) -> Run[C]:
    """The first rounds of a run on one thread, without its directory and its evaluations."""
    works = make_driver(driver, precision)
    met = clients(federation, works)
    with threads(1), works.placement.defaults():
        servers = [federation.algorithm.init_server(federation.task, federation.rng.at("server"))]
        seen = [digest(servers[0])]
        for round_ in range(1, rounds + 1):
            servers.append(play_round(federation, servers[-1], draw_cohort(federation, round_), met, works).server)
            seen.append(digest(servers[-1]))
            met.commit()
    return Run(federation, works, met, tuple(servers), tuple(seen))


def memory(federation: Federation) -> Store:
    """A store that never writes."""
    return Store(Path("never-written"), federation.algorithm.states, resident=True)


def here(kind: Callable[[Federation, Sequential, Store], C]) -> Callable[[Federation, Sequential], C]:
    """Clients of this process and of this kind, such as `LocalClients`, for `play`."""
    return lambda federation, driver: kind(federation, driver, memory(federation))


def elsewhere(child: Child, folder: Path) -> Callable[[Federation, Sequential], ProcessClients]:
    """Clients in another process, for `play`."""
    return lambda federation, _: ProcessClients(child, federation, folder)


@contextmanager
def workers(count: int) -> Generator[Callable[[Federation, Sequential], WorkerClients]]:
    """Clients dealt to processes that end with the block, for `play`."""
    with ExitStack() as pools:

        def made(federation: Federation, driver: Sequential) -> WorkerClients:
            pool = Pool([partial(_worker, federation, driver.placement) for _ in range(count)])
            pools.callback(pool.close)
            return WorkerClients(federation, driver, memory(federation), pool)

        yield made


def _worker(federation: Federation, placement: Placement) -> Any:
    return Worker(federation, lambda _: Sequential(placement)).methods()


class Subject:
    """An algorithm under test: its small federation, and runs of it that several laws look at.

    Args:
        name: of the catalogue, or "package.module:Class".
        folder: for the pictures and for run directories.
        given: tables of a configuration that go on top of everything, as ``--law-config`` reads them.

    Raises:
        ModelError: the algorithm takes none of the networks; says why, for each.
    """

    def __init__(self, name: str, folder: Path, given: Tables | None = None) -> None:
        self.name, self.folder = name, folder
        self.cls: type[Algorithm] = algorithm_class(name)
        self._given = merged({"algorithm": {"name": name, **KEYS.get(name, {})}}, given or {})
        self._runs: dict[object, Run[Any]] = {}

    @cached_property
    def _small(self) -> Tables:
        return self._accepted(FAMILIES, FEW)

    @cached_property
    def _calm(self) -> Tables:
        return self._accepted(CALM, FEW)

    def _accepted(self, families: Sequence[Tables], pictures: int, *layers: Tables) -> Tables:
        """The layers with the first of the families that the algorithm takes."""
        refused: dict[str, None] = {}
        for family, capacities in itertools.product(families, CAPACITIES):
            tables = merged(*layers, family, {"clients": {"capacities": capacities}})
            try:
                prepare(self._config(pictures, tables))
            except ModelError as error:
                refused[str(error)] = None
            else:
                return tables
        raise ModelError(
            f"{self.name} takes none of the laws' networks; name some in a file for --law-config:\n  "
            + "\n  ".join(refused)
        )

    def _config(self, pictures: int, *layers: Tables) -> Config:
        path = self.folder / f"digits-{pictures}.npz"
        if not path.exists():
            digits = load_digits(16)
            x, y = digits.x[:pictures].numpy(), digits.y[:pictures].numpy()
            if pictures == FEW:
                # Grain, for the laws that compare numbers: on an even background many activations are equal, and a
                # rounding error that takes them over a ReLU's edge takes them all.
                x = np.maximum(x, np.random.default_rng(0).integers(0, 64, x.shape, dtype=np.uint8))
            np.savez(path, x=x, y=y)
        tables = merged(BASE, {"data": {"path": str(path)}}, *layers, self._given)
        # None is how a layer takes a key away.
        kept = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in tables.items()}
        return Config.parse(kept, source="the laws' configuration")

    def config(self, *layers: Tables) -> Config:
        """The laws' configuration for this algorithm, with ``layers`` of changes."""
        return self._config(FEW, self._small, *layers)

    def federation(self, *layers: Tables) -> Federation:
        """A federation of new objects."""
        return prepare(self.config(*layers))

    def calm(self, *layers: Tables) -> Federation:
        """The federation in which rounding stays what it is."""
        return prepare(self._config(FEW, self._calm, *layers))

    def learning(self) -> Federation:
        """The federation of the problem to learn."""
        return prepare(self._config(MORE, self._accepted(LEARNERS, MORE, LEARNING)))

    def run(self, driver: str = "sequential", precision: Precision = "fp64") -> Run[Watched]:
        """Three rounds, played once however often they are asked for."""
        return self.once(
            (driver, precision), lambda: play(self.federation(), here(Watched), driver=driver, precision=precision)
        )

    def once(self, key: object, make: Callable[[], Run[Any]]) -> Run[Any]:
        """``make()``, the first time; the same run from then on."""
        if key not in self._runs:
            self._runs[key] = make()
        return self._runs[key]
