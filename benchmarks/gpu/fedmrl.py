"""FedMRL at N = 100, C = 10 % on noise of CIFAR-10's shape: `python fedmrl.py OUT DEVICE [--small]` writes fedmrl.csv.

Four ways to play the same rounds, in turn: ``bare``, the loop of benchmarks/speed written by hand, on the same device;
``one by one`` and ``stacked``, two of polyfed's drivers; ``stacked, graphs``, the stacked step as a CUDA graph. The
last is this file's and not polyfed's: `Graphs` holds a `polyfed.execute.stacked.Stack` for each kind of client from
round to round, captures its step once for each size of batch, and replays it on weights and batches that are copied in.
On a CPU it calls what it would replay. It comes after the others, with the bare loop once more, as a capture that fails
may leave nothing that works.

Networks are the paper's five dealt in turn, so that a cohort of 10 stacks about two at a time, or one for all.
``difference`` is that of the first round's auxiliary model from one by one, as a share of its largest number: in single
precision, where a ReLU may flip.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tables import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import bare
import speed

from polyfed.base import tree
from polyfed.base.types import Params
from polyfed.core.net import Batch
from polyfed.core.requests import Fit, Fitted
from polyfed.execute.drivers import Batched
from polyfed.execute.placement import Placement
from polyfed.execute.replay import Replays
from polyfed.execute.stacked import Stack, signature
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import plan_of

WAYS = ("bare", "one by one", "stacked", "stacked, graphs")
COLUMNS = ["networks", "way", "round_s", "times_bare", "steps_per_s", "turns", "peak_MB", "replayed", "graphs"]
COLUMNS += ["difference"]
#: Steps before the capture: kernels are chosen, and the step is traced, in the first.
WARM = 3


class Captured:
    """One client's kind and one size of stack: its memory, and a graph for each size of batch."""

    def __init__(self, fits: Sequence[Fit], placement: Placement) -> None:
        self.placement, self.replays = placement, Replays(after=0)
        self.stack = Stack(fits, placement, self.replays)
        if any(self.stack.fixed.values()) or fits[0].draw is not None:
            raise ValueError("only networks without running statistics, and steps without draws, are captured here")
        self.graphs: dict[object, tuple[Batch, Any, list[Tensor]]] = {}

    def run(self, fits: Sequence[Fit]) -> list[Fitted]:
        """Local training of these clients; the outcome of each."""
        stack = self.stack
        self._load(Stack(fits, self.placement))
        stack.fits, stack.losses = fits, [[] for _ in fits]
        plan = fits[0].client.plan
        schedules = [plan.schedule(len(fit.client.train), fit.client.rng.at("batches")) for fit in fits]
        augment = [fit.client.rng.at("augment").torch() for fit in fits]
        data = [fit.client.train for fit in fits]
        for steps in zip(*schedules, strict=True):
            batch = self.placement.batches(data, [step.rows for step in steps], augment)
            self._step(batch, fits[0].due(steps[0].index, steps[0].in_epoch))
        return stack.outcomes()

    def _load(self, fresh: Stack) -> None:
        """Other clients' weights into the memory that the graphs know, and an optimizer that remembers nothing."""
        own = self.stack
        for mine, theirs in ((own.weights, fresh.weights), (own.frozen, fresh.frozen)):
            for part, params in mine.items():
                for name, value in params.items():
                    value.copy_(theirs[part][name])
        for slot in (*own.update.slots, own.update.count):
            tree.map_parts(Tensor.zero_, slot)

    def _step(self, batch: Batch, due: bool) -> None:
        everyone = list(range(len(self.stack.fits)))
        if self.placement.device.type == "cpu":
            self.stack.step(everyone, batch, due, {})
            self.graphs.setdefault((batch[0].shape, due), (batch, None, []))
            return
        held = self.graphs.get((batch[0].shape, due))
        if held is None:
            held = self.graphs[batch[0].shape, due] = self._capture(everyone, batch, due)
        (x, y), graph, losses = held
        x.copy_(batch[0])
        y.copy_(batch[1])
        graph.replay()
        for each, loss in zip(self.stack.losses, torch.stack(losses).unbind(), strict=True):
            each.append(loss)

    def _capture(self, everyone: list[int], batch: Batch, due: bool) -> tuple[Batch, Any, list[Tensor]]:
        """The step as a graph; weights, optimizer and losses are left as they were."""
        stack, static = self.stack, (batch[0].clone(), batch[1].clone())
        moving = [stack.weights, *stack.update.slots, stack.update.count]
        before = [tree.map_parts(torch.clone, parts) for parts in moving]
        counts = [len(losses) for losses in stack.losses]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                stack.step(everyone, static, due, {})
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stack.step(everyone, static, due, {})
        losses = [each[-1] for each in stack.losses]
        for each, count in zip(stack.losses, counts, strict=True):
            del each[count:]
        for parts, kept in zip(moving, before, strict=True):
            for part, params in parts.items():
                for name, value in params.items():
                    value.copy_(kept[part][name])
        return static, graph, losses


class Graphs(Batched):
    """The stacking driver, its steps captured."""

    def __init__(self, placement: Placement, memory: int | None) -> None:
        super().__init__(placement, memory=memory)
        self.held: dict[object, Captured] = {}

    def _run(self, fits: Sequence[Fit]) -> list[Fitted]:
        key = signature(fits[0]), len(fits)
        try:
            if key not in self.held:
                self.held[key] = Captured(fits, self.placement)
            return self.held[key].run(fits)
        except RuntimeError as error:  # the driver would take it for a refusal, and go on one by one
            raise SystemExit(f"a step cannot be captured: {error}") from error


def sections(models: list[str], folder: Path, small: bool) -> dict[str, Any]:
    """The configuration of a federation."""
    count, pictures = (100, 60_000) if not small else (20, 2_000)
    return {
        "data": speed.pictures("cifar10-noise", pictures, (3, 32, 32), folder),
        "partition": {"kind": "iid", "samples_per_client": 500 if not small else 40},
        "clients": {"count": count, "participation": 0.1, "models": models},
        "train": {"epochs": 2, "batch_size": 64 if not small else 16, "lr": 0.01},
        "algorithm": {"name": "fedmrl", "auxiliary": "cnn5", "rep_dim": 100},
    }


def hand(library: speed.Library, models: list[str]) -> bare.FedMRL:
    """The loop written by hand, with the same networks and data."""
    images = library.images()
    own = {name: speed.build(name, input_shape=(3, 32, 32), num_classes=10) for name in models}
    larges = [own[models[k % len(models)]]._build().to(speed.DEVICE) for k in range(len(images.rows))]
    small = speed.build("cnn5(rep_dim=100)", input_shape=(3, 32, 32), num_classes=10)._build().to(speed.DEVICE)
    return bare.FedMRL(images, larges, small, 100, 500)


def peak() -> float:
    """The most GPU memory since it was last asked for, in MB; 0 on a CPU."""
    if speed.DEVICE.type != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 1e6
    torch.cuda.reset_peak_memory_stats()
    return found


def measure(networks: str, models: list[str], table: Table, small: bool, seconds: float) -> None:
    """Turns of all ways until the time is up; at least two of them."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tables = sections(models, Path(folder), small)
        first = speed.Library(tables, stack, driver="sequential")
        libraries = {"one by one": first}
        for way in ("stacked", "stacked, graphs"):
            libraries[way] = speed.Library(tables, stack, first.federation, driver="batched")
        drawn = libraries["stacked, graphs"]
        graphs = Graphs(drawn.placement, int(drawn.federation.config.run.memory * 1e9))
        drawn.execution.driver, drawn.clients = graphs, LocalClients(drawn.clients.federation, graphs, drawn.store)
        loop = hand(first, models)
        count, train = first.federation.config.clients, first.federation.config.train
        draws = torch.Generator().manual_seed(0)

        def by_hand() -> None:
            cohort = torch.randperm(count.count, generator=draws)[: count.wanted].tolist()
            loop.round(epochs=train.epochs or 1, batch_size=train.batch_size, lr=train.lr, cohort=cohort)

        ways: dict[str, Callable[[], float]] = {"bare": speed.timed(by_hand)}
        ways |= {way: library.round for way, library in libraries.items()}
        steps = count.wanted * plan_of(train, 1, 1).count(first.federation.data.train_size(0))
        first_round: dict[str, Tensor] = {}
        for part in (WAYS[:3], ("bare", WAYS[3])):
            found: dict[str, list[float]] = {way: [] for way in part}
            difference: dict[str, float] = {}
            started, turn = time.perf_counter(), 0
            while turn < 3 or time.perf_counter() - started < seconds / 2:
                for way in part:
                    peak()
                    took, most = ways[way](), peak()
                    if turn == 0:  # warm: kernels are chosen, steps traced and captured
                        if way != "bare":
                            first_round = first_round or dict(libraries[way].server.G)
                            difference[way] = farthest(libraries[way].server.G, first_round)
                        continue
                    found[way].append(took)
                    ratio = statistics.median(b / s for b, s in zip(found["bare"], found[way], strict=False))
                    middle = statistics.median(found[way])
                    row = (networks, way, middle, ratio, steps / middle, len(found[way]), most)
                    table.put(*row, *replays(libraries.get(way)), difference.get(way, ""))
                turn += 1
        if len(models) == 1 and not any(each.graphs for each in graphs.held.values()):
            raise SystemExit("no step was captured, though all clients have the same network")


def farthest(found: Params, expected: Params) -> float:
    """The largest difference of two tensors, as a share of the largest number."""
    shares = [(found[name] - v).abs().max() / v.abs().max().clamp_min(1e-12) for name, v in expected.items()]
    return float(torch.stack(shares).max())


def replays(library: speed.Library | None) -> tuple[int, int]:
    """How many steps were replayed from a trace (once, while it is captured, for a graph), and how many graphs are."""
    driver = library.execution.driver if library else None
    if isinstance(driver, Graphs):
        held = driver.held.values()
        return sum(each.replays.count for each in held), sum(len(each.graphs) for each in held)
    return (driver._replays.count if isinstance(driver, Batched) else 0), 0


def main() -> int:
    """Measure both federations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("device")
    parser.add_argument("--small", action="store_true", help="20 clients and 40 examples each, to try the script")
    parser.add_argument("--seconds", type=float, default=30.0, help="of turns, for each of the two federations")
    options = parser.parse_args()
    placement = Placement.of(options.device, "fp32")
    speed.DEVICE = placement.device
    table = Table(options.out / "fedmrl.csv", COLUMNS, key=2)
    with placement.defaults():
        for networks, models in (("five", speed.CNNS), ("one", ["cnn1"])):
            measure(networks, models, table, options.small, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
