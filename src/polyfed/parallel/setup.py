"""Who does the work of a run: a driver in this process, worker processes, and the choice between them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import current_process
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from polyfed.base import files
from polyfed.base.errors import ConfigError
from polyfed.config.config import cores
from polyfed.config.sections import RunSection
from polyfed.execute.choice import ExecutionChoice
from polyfed.execute.drivers import Auto, Batched, make_driver
from polyfed.execute.placement import Placement
from polyfed.parallel.auto import AutoClients
from polyfed.parallel.clients import Worker, WorkerClients, resident
from polyfed.parallel.pool import Make, Pool, can_fork, process_peak
from polyfed.rounds.clients import LocalClients, Simulated
from polyfed.rounds.federation import Federation
from polyfed.storage.state_store import Store

log = logging.getLogger(__name__)


class Execution:
    """The clients of a run as `run.driver`, `run.workers` and `run.store` want them; to be used in a ``with``.

    Args:
        federation: whose clients.
        store: their private states.
        placement: device and precision.
        choices: where the choices of ``auto`` are kept; a file that is there is believed.
        say: told what a user should know about the way it is done.
        close: file descriptors that worker processes must not keep open.
    """

    def __init__(
        self,
        federation: Federation,
        store: Store,
        placement: Placement,
        *,
        choices: Path | None = None,
        say: Callable[[str], None] = log.info,
        close: Sequence[int] = (),
    ) -> None:
        run = federation.config.run
        self.federation, self.store, self.placement, self.close = federation, store, placement, close
        self.choices = choices
        self.choice = ExecutionChoice()
        if choices is not None and choices.exists():
            self.choice = ExecutionChoice.from_json(files.read_json(choices), str(choices))
        self.memory = self.choice.memory = self.choice.memory or _memory(run.memory, placement)
        if (run.workers or 1) > 1 and current_process().daemon:
            raise ConfigError(
                f"run.workers is {run.workers}, but this is a daemonic process, which Python lets have no children; "
                "set run.workers = 1, or start polyfed in a process with daemon=False"
            )
        self.most = min(run.workers or _most(run, placement), federation.config.clients.count)
        self.driver = make_driver(run.driver, placement, say, choice=self.choice, memory=self.memory)
        self._pool: Pool | None = None
        if placement.precision == "bf16" and placement.device.type == "cpu" and (times := slower()) > 1:
            say(f"bf16 takes {times:.1f} times as long as fp32 on this processor, which has no instructions for it")

    def __enter__(self) -> Simulated:
        if isinstance(self.driver, Batched) and self.choices is not None and not self.choices.exists():
            self._keep(self.choice)  # free memory decides about sizes of stacks, and these about the last bit
        local = LocalClients(resident(self.federation, self.placement), self.driver, self.store)
        if isinstance(self.driver, Auto):
            if self.federation.config.run.workers is not None:
                self.choice.workers = self.most
            return AutoClients(local, self.driver, self.choice, start=self.workers, most=self.most, found=self._keep)
        return self.workers(self.most) if self.most > 1 else local

    def peak(self) -> int:
        """The largest resident memory of this process and its workers together; what forks share counts in each."""
        return process_peak() + sum(self._pool.peaks() if self._pool else ())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()

    def workers(self, count: int) -> WorkerClients:
        """So many processes, and the clients dealt to them."""
        run = self.federation.config.run
        source = self.federation if can_fork() else self.federation.config
        memory = self.memory // count
        makers: list[Make] = [
            partial(_worker, source, _on(self.placement, number), run.driver, memory) for number in range(count)
        ]
        self._pool = Pool(makers, self.close)
        self.store.write_through()  # workers hold the states; a second copy here would double the memory
        return WorkerClients(
            self.federation, self._pool, self.store, self.choice, self.driver, resident=run.store == "memory"
        )

    def _keep(self, choice: ExecutionChoice) -> None:
        if self.choices is not None:
            files.write_json(self.choices, choice.to_json())


def _worker(source: Any, placement: Placement, driver: str, memory: int | None) -> Any:
    return Worker(source, placement, driver, memory).methods()


def _most(run: RunSection, placement: Placement) -> int:
    """Workers that ``auto`` may use: the cores, or the GPUs. Other drivers have none unless they are asked for."""
    if run.driver != "auto" or current_process().daemon:
        return 1
    if placement.device.type == "cuda":
        return 1 if ":" in str(placement.device) else torch.cuda.device_count()
    return min(cores(), run.threads or cores())


def _on(placement: Placement, worker: int) -> Placement:
    """Where a worker computes: several GPUs are dealt in turn."""
    if placement.device.type != "cuda" or ":" in str(placement.device):
        return placement
    return replace(placement, device=torch.device("cuda", worker % torch.cuda.device_count()))


def slower() -> float:
    """How many times longer a product of matrices takes in bfloat16."""
    a = torch.randn(64, 512)
    times = [min(_timed(a.to(dtype)) for _ in range(3)) for dtype in (torch.bfloat16, torch.float32)]
    return times[0] / times[1]


def _timed(a: torch.Tensor) -> float:
    b = a.repeat(8, 1)
    started = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - started


def _memory(asked: float | None, placement: Placement) -> int:
    """Bytes that stacks of clients may take together: three quarters of a GPU's free memory, a quarter of the CPU's."""
    if asked is not None:
        return int(asked * 1e9)
    if placement.device.type == "cuda":
        return int(torch.cuda.mem_get_info(placement.device)[0] * 0.75)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
