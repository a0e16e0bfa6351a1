"""What a small capacity saves: `python savings.py [--device cuda] [--turns 5] [--out FOLDER]` writes savings.csv.

One client of each capacity trains one network (ResNet-18 on noise of CIFAR-10's shape, batches of 20) under each
algorithm. ``weights`` travel down; ``MACs`` are half the counted FLOPs of testing one example; ``down`` and ``up`` are
encoded messages; ``step_peak`` is the largest sum of live tensors in a step, counted; ``step_s`` the least seconds of a
local step over turns in which every row takes its turn, and ``of_dense`` its share of a step of FedAvg with the whole
network in the same turns. ``process`` is the largest resident memory of a process of its own that plays one round, less
that of the imports; on a GPU it is the memory that torch allocated at most.

``--round`` writes round.csv instead, what a round of four clients, one of each capacity, takes in each turn: its
seconds, without tests, and their share of as many dense steps, which FedAvg takes with the whole network in that turn.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from tables import Table

from polyfed.config import Config
from polyfed.core.message import flatten
from polyfed.core.requests import drive
from polyfed.execute.drivers import make_driver
from polyfed.execute.local_training import bind, tree_to
from polyfed.execute.placement import Placement
from polyfed.parallel.clients import resident
from polyfed.parallel.pool import process_peak
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store

HERE = Path(__file__).resolve().parent
CAPACITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)
#: The keys with which each algorithm is measured; the first is the whole network without a submodel.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fiarse": {},
    "fiarse-neuron": {"capacity_in": "macs"},
    "heterofl": {},
    "fedrolex": {},
    "scalefl": {},
    "fjord": {"widths": [0.125, 0.25, 0.5, 1.0]},
    "depthfl": {},
}
COLUMNS = ["algorithm", "capacity", "weights", "MACs", "down", "up", "step_peak", "process"]
COLUMNS += ["step_s", "most_s", "of_dense"]


class Clients:
    """A client of each capacity, and their server.

    Args:
        name: the algorithm.
        capacities: the capacities.
        data: a file of images.
        model: the network.
        steps: local steps in a round.
        device: where it trains.
    """

    def __init__(self, name: str, capacities: Sequence[float], data: Path, model: str, steps: int, device: str) -> None:
        tables: dict[str, dict[str, Any]] = {
            "run": {"rounds": 10_000, "device": device, "threads": torch.get_num_threads()},
            "data": {"dataset": "npz", "path": str(data), "options": {"layout": "NHWC"}, "augment": False},
            "partition": {"kind": "iid", "samples_per_client": 20 * steps},
            "clients": {"count": len(capacities), "models": [model], "capacities": list(capacities)},
            "train": {"epochs": None, "steps": steps, "batch_size": 20, "lr": 0.01},
            "algorithm": {"name": name, **ALGORITHMS[name]},
        }
        self.placement = Placement.of(device, "fp32")
        self.federation = resident(prepare(Config.parse(tables).resolved()), self.placement)
        algorithm = self.federation.algorithm
        self.driver = make_driver("sequential", self.placement)
        store = Store(Path("never-written"), algorithm.states, resident=True)
        self.clients = LocalClients(self.federation, self.driver, store)
        self.server: Any = algorithm.init_server(self.federation.task, self.federation.rng.at("server"))
        self.seconds: list[float] = []
        self.rounds = 0

    def round(self) -> list[Any]:
        """Play a round; the costs of each client."""
        self.rounds += 1
        with self.placement.defaults():
            cohort = draw_cohort(self.federation, self.rounds)
            played = play_round(self.federation, self.server, cohort, self.clients, self.driver)
            self.clients.commit()
        self.server = played.server
        return list(played.reports.values())

    def turn(self) -> None:
        """Play a round and keep the mean seconds of a local step."""
        works = [report.work for report in self.round()]
        self.seconds.append(sum(work.seconds for work in works) / sum(work.steps for work in works))

    def weights(self) -> int:
        """The number of the numbers that travel down."""
        message = self.federation.algorithm.message_for(self.server, self.federation.info(0))
        return sum(tensor.numel() for _, tensor in flatten(message)[1] if tensor.is_floating_point())

    def macs(self) -> float:
        """Multiply-accumulates of testing one example."""
        algorithm, local = self.federation.algorithm, self.federation.local(0, 1)
        message = algorithm.message_for(self.server, local.info)
        private = self.federation.private(0, None)
        with torch.no_grad(), self.placement.defaults():
            parts: Any = drive(algorithm.predictor_parts(private, message, local), self.driver.perform)
            nets = bind(local.models, tree_to(parts, self.placement))
            x, _ = self.placement.batch(local.train, torch.arange(1))
            return self.driver.costs.forward("one example", partial(algorithm.predict, nets), x) / 2


def images(path: Path, rows: int) -> Path:
    """Write noise of CIFAR-10's shape."""
    x = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(rows) % 10)
    return path


def memory(options: argparse.Namespace, name: str, capacity: float, data: Path) -> float:
    """The memory of one round in bytes: of a process of its own, or what a GPU's tensors take."""
    if options.device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        Clients(name, [capacity], data, options.model, 2, options.device).round()
        return torch.cuda.max_memory_allocated() - before
    row = ["--row", name, str(capacity), str(data), "--model", options.model]
    command = [sys.executable, str(HERE / "savings.py"), *row]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """The rows, the whole network first."""
    for name in options.only or ALGORITHMS:
        for capacity in CAPACITIES[: 1 if name == "fedavg" else None]:
            yield name, capacity


def rounds(options: argparse.Namespace, data: Path) -> None:
    """Write the seconds of a round of four clients of each algorithm, and its share of as many dense steps."""
    names = [name for name in options.only or ALGORITHMS if name != "fedavg"]
    everyone = {
        name: Clients(name, CAPACITIES, data, options.model, options.steps, options.device)
        for name in ("fedavg", *names)
    }
    for clients in everyone.values():
        clients.round()
    taken: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(options.turns):
        for name, clients in everyone.items():
            began = time.perf_counter()
            clients.turn()
            taken[name].append(time.perf_counter() - began)
    steps = len(CAPACITIES) * options.steps
    dense = [steps * seconds for seconds in everyone["fedavg"].seconds]
    table = Table(options.out / "round.csv", ["algorithm", "turn", "steps", "round_s", "of_dense"], key=2)
    for name, seconds in taken.items():
        for turn, (own, as_many) in enumerate(zip(seconds, dense, strict=True), 1):
            table.put(name, turn, steps, own, own / as_many)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="algorithms; fedavg first, which the others are compared with")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--round", action="store_true", help="measure a round of four clients instead")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name, capacity, data = options.row
        before = process_peak()
        Clients(name, [float(capacity)], Path(data), options.model, 2, "cpu").round()
        print(process_peak() - before)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder) / "noise.npz", 40 * options.steps * len(CAPACITIES))
        if options.round:
            rounds(options, data)
            return
        if options.device != "cpu":  # what a GPU's libraries keep for good is on nobody's account
            memory(options, *next(rows(options)), data)
        taken = {row: memory(options, *row, data) for row in rows(options)}
        clients = {
            (name, capacity): Clients(name, [capacity], data, options.model, options.steps, options.device)
            for name, capacity in rows(options)
        }
        first = {row: client.round()[0] for row, client in clients.items()}
        for _ in range(options.turns):
            for client in clients.values():
                client.turn()
        dense = next(iter(clients.values())).seconds
        table = Table(options.out / "savings.csv", COLUMNS, key=2)
        for row, client in clients.items():
            report, share = first[row], fmean(a / b for a, b in zip(client.seconds, dense, strict=True))
            sent = report.down.total, report.up.total, report.work.peak_bytes, int(taken[row])
            table.put(*row, client.weights(), client.macs(), *sent, min(client.seconds), max(client.seconds), share)


if __name__ == "__main__":
    main()
