"""What the rule of ``driver = "auto"`` costs against the best of all ways: `python benchmarks/speed/regret.py`.

For each workload every way plays rounds in turn, in one process: one client after another as it comes or with the
channels innermost, and stacks of several sizes, each in one process and in two workers. A turn has a round of each
way, or several short ones; a way that took twice as long as the best in both of the first two turns is left out of the
rest. The best way is the one with the least median, and the regret of a turn is the rule's seconds over the best way's,
less one. The table has the median and the quartiles over the turns. A regret over 8 % counts if the lower quartile is
over 8 %, too.
`--only` selects workloads, `--turns` says how many turns, `--out` keeps the results as JSON. `--device cuda` measures
on a GPU, in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import speed
from speed import CNNS, Library, pictures

from polyfed.execute.choice import Chosen, ExecutionChoice
from polyfed.execute.placement import Placement
from polyfed.parallel import setup

#: The ways beside the rule's own choice.
WAYS = {
    "sequential": Chosen("sequential", 1, "sequential"),
    "channels-last": Chosen("channels-last", 1, "channels-last"),
    **{f"stacked {size}": Chosen("stacked", size, "sequential") for size in (8, 16, 32, 64)},
}
BAR = 0.08
#: Seconds that a way plays in a turn, at least.
LEAST = 0.3


def arrays(folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """A [data] section of noise: features in ten classes."""
    rng = np.random.default_rng(0)
    path = folder / f"{name}.npz"
    np.savez(path, x=rng.standard_normal((20_000, *shape)).astype(np.float32), y=np.arange(20_000) % 10)
    return {"dataset": "npz", "path": str(path)}


def workloads(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables of a configuration by workload; a cohort of all clients, of three and of one."""
    cifar, mnist = pictures("cifar10", 60_000, (3, 32, 32), folder), pictures("mnist", 70_000, (1, 28, 28), folder)
    small = {
        "data": {**mnist, "image_size": 28, "augment": False},
        "train": {"epochs": 1, "batch_size": 10, "lr": 0.05},
    }
    made: dict[str, dict[str, Any]] = {
        "fedmrl-64": {
            "data": cifar,
            "clients": {"count": 10, "models": CNNS},
            "train": {"epochs": 1, "batch_size": 64, "lr": 0.01},
            "algorithm": {"name": "fedmrl", "auxiliary": "cnn5", "rep_dim": 100},
        },
        "fedmrl-64-alike": {
            "data": cifar,
            "clients": {"count": 10, "models": ["cnn1"]},
            "train": {"epochs": 1, "batch_size": 64, "lr": 0.01},
            "algorithm": {"name": "fedmrl", "auxiliary": "cnn5", "rep_dim": 100},
        },
        "resnet8-20": {
            "data": cifar,
            "clients": {"count": 16, "models": ["resnet8"]},
            "train": {"epochs": 1, "batch_size": 20, "lr": 0.05},
        },
        "mlp-10": {**small, "clients": {"count": 100, "models": ["mlp(hidden=(200,))"]}},
        "small-cnn-10": {**small, "clients": {"count": 50, "models": ["nets:SmallCNN"]}},
        "fiarse-resnet8": {
            "data": cifar,
            "clients": {"count": 8, "models": ["resnet8"], "capacities": [1.0, 0.25, 0.0625, 0.015625]},
            "train": {"epochs": 1, "batch_size": 20, "lr": 0.05},
            "algorithm": {"name": "fiarse"},
        },
        "cnn1d-9x128": {
            "data": arrays(folder, "windows", (9 * 128,)),
            "clients": {"count": 30, "models": ["nets:Windows"]},
            "train": {"epochs": 1, "batch_size": 20, "lr": 0.05},
        },
        "transformer-64": {
            "data": arrays(folder, "tokens", (64,)),
            "clients": {"count": 20, "models": ["nets:Tokens"]},
            "train": {"epochs": 1, "batch_size": 20, "lr": 0.05},
        },
    }
    for name in ("fedmrl-64", "mlp-10", "small-cnn-10", "cnn1d-9x128", "transformer-64"):
        for cohort in (3, 1):
            clients = made[name]["clients"]
            made[f"{name}, cohort {cohort}"] = {
                **made[name],
                "clients": {**clients, "participation": cohort / clients["count"]},
            }
    for tables in made.values():
        tables.setdefault("algorithm", {"name": "fedavg"})
        tables["partition"] = {"kind": "iid", "samples_per_client": 125}
    return made


def contestants(tables: dict[str, Any], stack: ExitStack) -> dict[str, Library]:
    """The rule, and every way in one process and in two."""
    rule = Library(tables, stack, driver="auto")
    like, made = rule.federation, {"rule": rule}
    images = any(len(shape) == 4 for shape in like.own(0).shapes.values())
    original = setup.execution_choice
    try:
        for name, way in WAYS.items():
            if way.size > max(8, like.config.clients.wanted) or (way.layout == "channels-last" and not images):
                continue
            setup.execution_choice = lambda federation, way=way: ExecutionChoice(lambda client: way)
            several = like.config.clients.wanted > 1 and speed.DEVICE.type == "cpu"
            for workers in (1, 2) if several else (1,):
                made[f"{name}, {workers} process{'es' * (workers > 1)}"] = Library(
                    tables, stack, like, driver="auto", workers=workers, threads=like.config.run.threads
                )
                made[f"{name}, {workers} process{'es' * (workers > 1)}"].round()  # while the way is the patched one
    finally:
        setup.execution_choice = original
    return made


def measure(tables: dict[str, Any], turns: int) -> dict[str, Any]:
    """The rule beside all ways on one workload."""
    with ExitStack() as stack:
        players = contestants(tables, stack)
        chosen = asdict(setup.execution_choice(players["rule"].federation).of(players["rule"].federation.info(0)))
        rounds = max(1, round(LEAST / players["rule"].round()))
        seconds: dict[str, list[float]] = {name: [] for name in players}
        dropped: list[str] = []
        for turn in range(turns):
            gc.collect()
            order = list(players)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:  # who comes first finds cold caches
                if name not in dropped:
                    seconds[name].append(statistics.fmean(players[name].round() for _ in range(rounds)))
            if turn == 1:
                best = min(max(found) for found in seconds.values())
                dropped = [name for name, found in seconds.items() if name != "rule" and min(found) > 2 * best]
        workers = players["rule"].execution.count
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    best = min((name for name in medians if name != "rule" and name not in dropped), key=medians.__getitem__)
    regrets = [a / b - 1 for a, b in zip(seconds["rule"], seconds[best], strict=True)]
    lower, median, upper = statistics.quantiles(regrets, n=4)
    return {
        "rule": {**chosen, "workers": workers},
        "best": best,
        "seconds": medians,
        "regret": median,
        "quartiles": [lower, upper],
        "over": median > BAR and lower > BAR,
    }


def main() -> int:
    """Measure and print; the exit code is 1 where a regret counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    placement = Placement.of(options.device, "fp32")
    speed.DEVICE = placement.device
    results = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder, placement.defaults():
        for name, tables in workloads(Path(folder)).items():
            if options.only and name not in options.only:
                continue
            found = results[name] = measure(tables, options.turns)
            lower, upper = found["quartiles"]
            print(
                f"{name}: {found['rule']['execution']} {found['rule']['size']} in {found['rule']['workers']}, best "
                f"{found['best']}, regret {found['regret']:+.1%} ({lower:+.1%} to {upper:+.1%})",
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(found["over"] for found in results.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
