"""The setup of a run's execution: a driver in this process, or worker processes."""

from __future__ import annotations

import logging
import math
import timeit
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import torch

from polyfed.base import given
from polyfed.base.errors import ConfigError
from polyfed.base.memory import map_large_blocks, without_collection
from polyfed.config import Config
from polyfed.config.config import cores
from polyfed.core.clients import ClientInfo
from polyfed.execute.choice import Chosen, ExecutionChoice, choose
from polyfed.execute.drivers import Sequential, make_driver
from polyfed.execute.placement import Placement
from polyfed.parallel.clients import Worker, WorkerClients, resident
from polyfed.parallel.pool import Pool, can_fork, process_peak
from polyfed.rounds.clients import LocalClients, SimulatedClients
from polyfed.rounds.federation import Federation, plan_of
from polyfed.storage.state_store import Store

log = logging.getLogger(__name__)

#: FLOPs of a round's training below which worker processes cost more than they save: about 20 ms of one core.
WORTH_WORKERS = 4e8


class Execution:
    """Makes the clients of a run by `run.driver`, `run.workers` and `run.store`; to be used in a ``with`` block.

    Args:
        federation: the federation of these clients.
        store: the private states.
        placement: device and precision.
        scratch: a folder on the disk where replies and states wait.
        say: receives what a user should know about the execution of the run.
        close: file descriptors that worker processes must not keep open.
    """

    def __init__(
        self,
        federation: Federation,
        store: Store,
        placement: Placement,
        *,
        scratch: Path | None = None,
        say: Callable[[str], None] = log.info,
        close: Sequence[int] = (),
    ) -> None:
        run = federation.config.run
        self.federation, self.store, self.placement = federation, store, placement
        self.scratch, self.close = scratch, close
        if (run.workers or 1) > 1 and current_process().daemon:
            raise ConfigError(
                f"run.workers: got {run.workers} in a daemonic process, which Python does not let have children; "
                "set run.workers = 1, or start polyfed in a process with daemon=False"
            )
        with without_collection():
            import_module("torch._dynamo")  # torch's optimizers import it in any case; here for all workers at once
        self.driver = driver_for(federation, placement, say)
        for note in (note for model in federation.task.family().values() for note in model.notes):
            say(note)
        self.count = min(run.workers or self._workers(), federation.config.clients.count)
        if (objects := _of_a_program(federation.config)) and not self._forks():
            if (run.workers or 1) > 1:
                raise ConfigError(
                    f"run.workers: got {run.workers}; {objects} of a program reach worker processes by a fork alone, "
                    "with run.threads = 1 on Linux and without a GPU; set run.workers = 1, or put them into files"
                )
            self.count = 1
        self._pool: Pool | None = None
        self._clients: SimulatedClients | None = None
        if placement.precision == "bf16" and placement.device.type == "cpu" and (times := slower()) > 1:
            say(f"bf16 takes {times:.1f} times as long as fp32 on this processor, which has no instructions for it")

    def __enter__(self) -> SimulatedClients:
        if self.count == 1:
            self._clients = LocalClients(
                resident(self.federation, self.placement), self.driver, self.store, self.scratch
            )
        else:
            threads = self.federation.config.run.threads or 1
            source = self.federation if self._forks() else self.federation.config
            self._pool = Pool(
                [partial(_worker, source, _on(self.placement, number)) for number in range(self.count)],
                self.close,
                threads=threads,
            )
            map_large_blocks()  # after the forks, as they train
            self._clients = WorkerClients(self.federation, self.driver, self.store, self._pool, self.scratch)
        return self._clients

    def peak(self) -> int:
        """Return the largest resident memory of this process and its workers together; shared pages count in each."""
        return process_peak() + sum(self._pool.peaks() if self._pool else ())

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._clients is not None:
            self._clients.discard_round()  # removes the replies and states of an interrupted round from the disk

    def _forks(self) -> bool:
        """Whether worker processes are forks of this process, which share its data."""
        return can_fork() and (self.federation.config.run.threads or 1) == 1

    def _workers(self) -> int:
        """Return the number of processes if ``run.workers`` is None: by cores, or GPUs, for ``auto``, else 1."""
        run, clients = self.federation.config.run, self.federation.config.clients
        if run.driver != "auto" or current_process().daemon:
            return 1
        if self.placement.device.type == "cuda":
            return 1 if ":" in str(self.placement.device) else torch.cuda.device_count()
        apart = min(cores() // (run.threads or 1), clients.wanted)  # 0 if the run began on a larger machine
        return apart if apart > 1 and self._worth_workers() else 1

    def _worth_workers(self) -> bool:
        federation, clients, run = self.federation, self.federation.config.clients, self.federation.config.run
        infos = map(federation.info, range(min(len(clients.models) * len(clients.capacities), clients.count)))
        flops = [chosen.flops for chosen in map(execution_choice(federation).of, infos)]
        # Clients whose own settings ask for more or fewer steps do not count: this is a matter of time alone.
        plan = plan_of(federation.config.train, 1, run.rounds)
        steps = plan.count(int(federation.partition.train_offsets[-1]) // clients.count)
        counted = [f for f in flops if f is not None]
        # A step that cannot be counted is taken as large.
        return len(counted) < len(flops) or sum(counted) / len(counted) * steps * clients.wanted > WORTH_WORKERS


def driver_for(federation: Federation, placement: Placement, say: Callable[[str], None] = log.info) -> Sequential:
    """Return the driver of a federation's clients in one process."""
    run = federation.config.run
    return make_driver(run.driver, placement, say, choice=execution_choice(federation), memory=int(run.memory * 1e9))


def execution_choice(federation: Federation) -> ExecutionChoice:
    """Return the choice of execution for each kind of client of a federation."""
    clients, run = federation.config.clients, federation.config.run
    device = Placement.of(run.device, run.precision).device.type
    # Networks and capacities are both dealt in turn, so that together they come again after so many clients.
    period = min(math.lcm(len(clients.models), len(clients.capacities)), clients.count)
    period = clients.count if federation.config.train.clients else period
    alike = Counter(map(federation.kind, range(period)))

    def decide(client: ClientInfo) -> Chosen:
        return choose(
            federation.algorithm.models_at(federation.task, federation.own(client.id), client.capacity),
            plan_of(federation.keys(client.id), 1, run.rounds),
            federation.dataset.input_shape,
            together=clients.wanted * alike[federation.kind(client.id)] / period,
            device=device,
        )

    return ExecutionChoice(decide, lambda client: federation.kind(client.id))


def _of_a_program(config: Config) -> str:
    """Return which parts of a run only this process has, in words; "" if a new process can read all of them."""
    parts = {
        "data": config.data.dataset == "python",
        "networks": any(given.is_given(spec.name) for spec in config.clients.models),
        "the algorithm": given.is_given(config.algorithm.name),
    }
    return " and ".join(part for part, there in parts.items() if there)


def _worker(source: Federation | Config, placement: Placement) -> Mapping[str, Callable[..., Any]]:
    return Worker(source, lambda federation: driver_for(federation, placement)).methods()


def _on(placement: Placement, worker: int) -> Placement:
    """Return the placement of a worker: several GPUs are dealt in turn."""
    if placement.device.type != "cuda" or ":" in str(placement.device):
        return placement
    return replace(placement, device=torch.device("cuda", worker % torch.cuda.device_count()))


def slower() -> float:
    """Return how many times longer a product of matrices takes in bfloat16."""
    a = torch.randn(64, 512)
    half, single = (
        min(timeit.repeat(partial(torch.mm, factor, factor.repeat(8, 1)), number=1, repeat=3))
        for factor in (a.bfloat16(), a)
    )
    return half / single
