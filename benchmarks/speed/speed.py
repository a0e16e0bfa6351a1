"""How fast polyfed trains, as ratios to a loop written by hand: `python benchmarks/speed/speed.py`.

The contestants take turns at each workload, several times, in one process. The ratio of a sample is to the bare loop in
the same turn, and the table has the medians. The script repeats a turn during which other programs used the processor.
`--only` selects workloads; `--out` writes the table as JSON. The script reads real data from $POLYFED_DATA if it holds
them, and else takes images of noise of the same shape: the times do not depend on what the images show.
`--device cuda` measures everything, the bare loop included, on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import bare

from polyfed.config import Config
from polyfed.execute.placement import Placement, threads
from polyfed.models.zoo import build
from polyfed.parallel import setup
from polyfed.parallel.setup import Execution, execution_choice
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store

CNNS = ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5"]
HERE = Path(__file__).parent

Sample = Callable[[], float]
#: Where everything is measured; --device changes it.
DEVICE = torch.device("cpu")


def pictures(name: str, count: int, shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """The [data] section: the real data set if it is at hand, else as many pictures of noise."""
    found = os.environ.get("POLYFED_DATA")
    if found and (Path(found) / name).is_dir():
        return {"dataset": name}
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 10
    np.savez(folder / f"{name}.npz", x=x, y=y)
    return {"dataset": "npz", "path": str(folder / f"{name}.npz")}


class Library:
    """A federation played by polyfed."""

    def __init__(self, sections: dict[str, Any], stack: ExitStack, like: Federation | None = None, **run: Any) -> None:
        folder = Path(tempfile.mkdtemp(prefix="polyfed-speed-"))
        told = {"rounds": 10_000, "eval_every": 10_000, "targets": [], "device": DEVICE.type, **run}
        config = Config.model_validate({**sections, "run": told}).resolved()
        self.federation = replace(like, config=config) if like else prepare(config)
        self.placement = Placement.of(config.run.device, config.run.precision)
        algorithm = self.federation.algorithm
        self.store = Store(folder, algorithm.states, resident=True)
        self.execution = Execution(self.federation, self.store, self.placement)
        self.clients = stack.enter_context(self.execution)
        self.server: Any = algorithm.init_server(self.federation.task, self.federation.rng.at("server"))
        self.number = 0

    def round(self) -> float:
        """Play a round; its seconds, without those of finding out what it costs."""
        self.number += 1
        counting, started = self.execution.driver.costs.seconds, time.perf_counter()
        cohort = draw_cohort(self.federation, self.number)
        with threads(self.federation.config.run.server_threads):  # as in a run: two would spin beside two workers
            played = play_round(self.federation, self.server, cohort, self.clients, self.execution.driver)
            self.clients.commit()
        self.server = played.server
        return time.perf_counter() - started - (self.execution.driver.costs.seconds - counting)

    def evaluate(self) -> float:
        """Test every client; its seconds."""
        algorithm = self.federation.algorithm
        infos = [self.federation.info(k) for k in range(self.federation.config.clients.count)]
        message = algorithm.message_for(self.server, infos[0])
        counting, started = self.execution.driver.costs.seconds, time.perf_counter()
        with threads(self.federation.config.run.server_threads):
            self.clients.evaluate(self.number, {info.id: message for info in infos})
        return time.perf_counter() - started - (self.execution.driver.costs.seconds - counting)

    def images(self, part: str = "train") -> bare.Images:
        """The same data for the bare loop."""
        data, partition = self.federation.dataset, self.federation.partition
        take = partition.train if part == "train" else partition.test
        rows = [torch.tensor(take(k), device=DEVICE) for k in range(self.federation.config.clients.count)]
        return bare.Images(data.x.to(DEVICE), data.y.to(DEVICE), rows, data.mean, data.std)


def timed(work: Callable[[], Any]) -> Sample:
    """The seconds of a piece of work."""

    def sample() -> float:
        started = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return sample


def fedmrl(
    batch: int, clients: int, per_client: int, folder: Path, stack: ExitStack, **train: int
) -> dict[str, Library]:
    """FedMRL on CIFAR-10: the bare loop and the library's contestants."""
    sections = {
        "data": pictures("cifar10", 60_000, (3, 32, 32), folder),
        "partition": {"kind": "iid", "samples_per_client": per_client},
        "clients": {"count": clients, "models": CNNS},
        "train": {**(train or {"epochs": 2}), "batch_size": batch, "lr": 0.01},
        "algorithm": {"name": "fedmrl", "auxiliary": "cnn5", "rep_dim": 100},
    }
    sequential = Library(sections, stack, driver="sequential", threads=torch.get_num_threads())
    like = sequential.federation  # the data are read once
    made = {"sequential": sequential, "auto": Library(sections, stack, like, driver="auto")}
    if DEVICE.type == "cuda" or setup.slower() < 1:  # elsewhere bfloat16 is emulated, and there is nothing to measure
        made["auto, bf16"] = Library(sections, stack, like, driver="auto", precision="bf16")
    return made


def bare_fedmrl(library: Library, part: str = "train") -> bare.FedMRL:
    """The hand-written FedMRL with the library's networks and data."""
    larges = [
        build(CNNS[k % 5], input_shape=(3, 32, 32), num_classes=10)._build().to(DEVICE)
        for k in range(len(library.images().rows))
    ]
    small = build("cnn5(rep_dim=100)", input_shape=(3, 32, 32), num_classes=10)._build().to(DEVICE)
    return bare.FedMRL(library.images(part), larges, small, 100, 500)


def workload_fedmrl(batch: int) -> Callable[[Path, ExitStack], dict[str, Sample]]:
    """10 clients x 400 training samples, two epochs."""

    def make(folder: Path, stack: ExitStack) -> dict[str, Sample]:
        made = fedmrl(batch, 10, 500, folder, stack)
        hand = bare_fedmrl(made["sequential"])
        libraries = {name: library.round for name, library in made.items()}
        return {"bare": timed(lambda: hand.round(epochs=2, batch_size=batch, lr=0.01)), **libraries}

    return make


def workload_fedavg(model: str, clients: int, flip: bool) -> Callable[[Path, ExitStack], dict[str, Sample]]:
    """Many small clients on 28x28 pictures, batch 10."""

    def make(folder: Path, stack: ExitStack) -> dict[str, Sample]:
        sections = {
            "data": {**pictures("mnist", 70_000, (1, 28, 28), folder), "image_size": 28, "augment": False},
            "partition": {"kind": "iid", "samples_per_client": 125},
            "clients": {"count": clients, "models": [model]},
            "train": {"epochs": 1, "batch_size": 10, "lr": 0.05},
            "algorithm": {"name": "fedavg"},
        }
        sequential = Library(sections, stack, driver="sequential", threads=torch.get_num_threads())
        auto = Library(sections, stack, sequential.federation, driver="auto")
        hand = bare.FedAvg(sequential.images(), sequential.federation.own(0)._build().to(DEVICE))
        work = lambda: hand.round(epochs=1, batch_size=10, lr=0.05, augment=False)  # noqa: E731
        return {"bare": timed(work), "sequential": sequential.round, "auto": auto.round}

    return make


def workload_testing(folder: Path, stack: ExitStack) -> dict[str, Sample]:
    """100 personalised FedMRL models, each on its own 100 images."""
    made = fedmrl(64, 100, 500, folder, stack, steps=1)
    hand = bare_fedmrl(made["sequential"])
    rows = made["sequential"].images("test").rows
    for library in made.values():
        library.round()  # so that there are states
        library.evaluate()  # so that there is a choice
    return {"bare": timed(lambda: hand.test(rows, 64)), **{name: library.evaluate for name, library in made.items()}}


WORKLOADS: dict[str, tuple[str, Callable[[Path, ExitStack], dict[str, Sample]]]] = {
    "fedmrl-64": ("FedMRL, CIFAR-10, 10 clients, batch 64", workload_fedmrl(64)),
    "fedmrl-250": ("FedMRL, CIFAR-10, 10 clients, batch 250", workload_fedmrl(250)),
    "mlp-10": ("FedAvg, MLP on 28x28, 100 clients, batch 10", workload_fedavg("mlp(hidden=(200,))", 100, False)),
    "small-cnn-10": ("FedAvg, small CNN on 28x28, 50 clients, batch 10", workload_fedavg("nets:SmallCNN", 50, False)),
    "testing": ("Testing 100 FedMRL models on 100 images each", workload_testing),
}


def foreign() -> tuple[float, float]:
    """Processor seconds of all programs, and of this one with its workers, so far."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    busy = sum(int(f) for f in fields) - int(fields[3]) - int(fields[4])
    own = 0
    for pid in [os.getpid(), *children()]:
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            own += int(words[11]) + int(words[12])
        except OSError:
            pass
    return busy / os.sysconf("SC_CLK_TCK"), own / os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """The worker processes."""
    return [int(k) for k in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def chosen(sample: Any) -> dict[str, Any]:
    """What the rule chose for each kind of client, and how many processes there are."""
    library: Library = sample.__self__
    infos = [library.federation.info(k) for k in range(library.federation.config.clients.count)]
    kinds = {(info.architecture, info.capacity): info for info in infos}
    choice = execution_choice(library.federation)
    made = {f"{name} at {capacity:g}": asdict(choice.of(info)) for (name, capacity), info in kinds.items()}
    return {"kinds": made, "workers": library.execution.count}


def measure(name: str, turns: int, patience: int) -> dict[str, Any]:
    """Medians over turns of one workload."""
    title, make = WORKLOADS[name]
    samples: dict[str, list[float]] = {}
    noisy = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants = make(Path(folder), stack)
        for sample in contestants.values():
            sample()  # warm: kernels chosen, choices made, costs counted
        while len(samples.get("bare", [])) < turns:
            gc.collect()
            before, started = foreign(), time.perf_counter()
            turn = {who: sample() for who, sample in contestants.items()}
            after, wall = foreign(), time.perf_counter() - started
            others = ((after[0] - before[0]) - (after[1] - before[1])) / wall
            if others > 0.15 and noisy < patience:
                noisy += 1
                print(f"  {name}: repeated, others used {others:.2f} cores", file=sys.stderr)
                continue
            for who, seconds in turn.items():
                samples.setdefault(who, []).append(seconds)
            print(f"  {name}: " + ", ".join(f"{who} {seconds:.3f} s" for who, seconds in turn.items()), file=sys.stderr)
        choices = {who: chosen(sample) for who, sample in contestants.items() if who.startswith("auto")}
    base = samples["bare"]
    ratios = {who: [b / s for b, s in zip(base, found, strict=True)] for who, found in samples.items()}
    return {
        "workload": title,
        "seconds": {who: statistics.median(found) for who, found in samples.items()},
        "speed": {who: statistics.median(found) for who, found in ratios.items()},
        "least": {who: min(found) for who, found in ratios.items()},
        "most": {who: max(found) for who, found in ratios.items()},
        "choices": choices,
        "turns": len(base),
        "repeated": noisy,
    }


def main() -> None:
    """Measure and print."""
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--patience", type=int, default=20, help="noisy turns that are repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    DEVICE = Placement.of(options.device, "fp32").device
    with Placement.of(options.device, "fp32").defaults():
        for name in options.only:
            found = measure(name, options.turns, options.patience)
            print(json.dumps(found), flush=True)
            if options.out:
                keep(options.out, name, found)


def keep(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put a workload's results into a file beside those of others."""
    known = json.loads(path.read_text())["results"] if path.exists() else {}
    results = {workload: {**known, name: found}[workload] for workload in WORKLOADS if workload in {*known, name}}
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if DEVICE.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(DEVICE)
    path.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
