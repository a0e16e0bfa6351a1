"""Every algorithm's first round on a GPU against the CPU: `python algorithms.py OUT DEVICE` writes algorithms.csv.

Compared are all tensors that the server and the clients keep, in double precision: kernels differ in the order of
their sums only, so what is apart by more than the tolerance is computed otherwise. On the device clients run one by one
and stacked; ``again`` says whether a second run one by one gave the same bits, which a GPU does not owe. Where the
first round is a warm-up there are two.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tables import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "numbers"))

from same import FAMILIES, KEYS, ROUNDS

from polyfed import Config, PolyfedError
from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.core.message import flatten
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.parallel.clients import resident
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store

#: Of the largest number of a tensor.
TOLERANCE = 1e-9
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 10, "lr": 0.01, "momentum": 0.5, "weight_decay": 1e-3}
#: The last maps of deep networks are 1x1: normalised over a batch of ten they are near to signs of differences, which
#: enlarge rounding by orders of magnitude. So all examples of a client make one batch.
DEEP = {"batch_size": 64, "lr": 0.001}
COLUMNS = ["algorithm", "networks", "rounds", "cpu_s", "one_by_one_s", "stacked_s", "one_by_one", "stacked"]
COLUMNS += ["tolerance", "again", "outcome"]


def federation(name: str) -> Federation:
    """A small one with the first networks that the algorithm accepts."""
    for capacities in ([1.0, 0.3], [1.0]):
        for models in FAMILIES:
            tables: dict[str, dict[str, Any]] = {
                "run": {"seed": 3, "threads": 1},
                "partition": {"kind": "dirichlet", "alpha": 2.0, "samples_per_client": 40},
                "clients": {"count": 5, "models": models, "capacities": capacities},
                "train": {**TRAIN, **(DEEP if models[0].startswith("in-") else {})},
                "algorithm": {"name": name, **KEYS.get(name, {})},
            }
            try:
                return prepare(Config.parse(tables).resolved())
            except PolyfedError as error:
                refusal = error
    raise refusal


def played(small: Federation, device: str, driver: str) -> tuple[list[torch.Tensor], float]:
    """What server and clients keep after the first round, and the seconds it took."""
    placement = Placement.of(device, "fp64")
    found, name = resident(small, placement), small.config.algorithm.name
    works = make_driver(driver, placement)
    clients = LocalClients(found, works, Store(Path("never-written"), found.algorithm.states, resident=True))
    with placement.defaults():
        server: Any = found.algorithm.init_server(found.task, found.rng.at("server"))
        started = time.perf_counter()
        for round_ in range(1, ROUNDS.get(name, 1) + 1):
            server = play_round(found, server, draw_cohort(found, round_), clients, works).server
            clients.commit()
        seconds = time.perf_counter() - started - works.costs.seconds
        kept = [server, *(clients.private(client) for client in range(found.config.clients.count))]
    return [tensor for state in kept for _, tensor in flatten(state)[1]], seconds


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of two tensors as a share of the largest number; infinite for other shapes."""
    if [(value.shape, value.dtype) for value in found] != [(value.shape, value.dtype) for value in expected]:
        return float("inf")
    shares = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12))
        for a, b in zip(found, expected, strict=True)
        if a.numel()
    ]
    return max(shares, default=0.0)


def main(out: Path, device: str) -> int:
    """One line for each algorithm; 1 where one differs by more than the tolerance, or fails."""
    table = Table(out / "algorithms.csv", COLUMNS)
    failed = 0
    played(federation("standalone"), device, "sequential")  # libraries are loaded now, and on nobody's clock
    for name in ALGORITHMS:
        small = federation(name)
        networks = " ".join(map(str, small.config.clients.models))
        try:
            here, cpu = played(small, "cpu", "sequential")
            alone, seconds = played(small, device, "sequential")
            together, stacked = played(small, device, "batched")
            again = all(map(torch.equal, alone, played(small, device, "sequential")[0]))
        except Exception as error:
            traceback.print_exc()
            failed += 1
            text = str(error).splitlines()[0] if str(error) else ""
            table.put(name, networks, *[""] * 8, f"{type(error).__name__}: {text}")
            continue
        differences = apart(alone, here), apart(together, here)
        good = max(differences) <= TOLERANCE
        failed += not good
        table.put(
            *(name, networks, ROUNDS.get(name, 1), cpu, seconds, stacked, *differences, TOLERANCE),
            *("the same bits" if again else "other bits", "passed" if good else "apart"),
        )
    print(f"{len(ALGORITHMS) - failed} of {len(ALGORITHMS)} algorithms passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
