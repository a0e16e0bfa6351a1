"""Peak memory of a deployed client of capacity 1/16 beside one of capacity 1, for a model of 231 MB: real processes.

    OMP_NUM_THREADS=1 python benchmarks/deploy/memory.py [--algorithms heterofl fiarse] [--out memory.json]

Each algorithm has a deployment of two clients on loopback, with a worker process each. A round with a small network
loads everything that a worker has anyway; its peak is the worker's own size. Then comes a round with the large network,
one step on 8 images and an evaluation. What a client needs is the peak after it less the own size; numbers are the
largest resident memory that Linux has seen of the worker (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from polyfed.config import Config
from polyfed.deploy.host.local import Following, Local
from polyfed.deploy.server.loop import create
from polyfed.deploy.settings import Deployment

HERE = Path(__file__).parent
CAPACITIES = (1.0, 1 / 16)
#: Units of the two hidden layers: of the network that warms workers up, and of the large one.
WARM, LARGE = 64, 7_100


def peaks(there: Local) -> list[int]:
    """The peak of each client's worker so far, in bytes."""
    found = [0] * len(CAPACITIES)
    for pid in there.processes.marked():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        for client in range(len(found)):
            if b"--serve" in words and str(there.node_file(client)).encode() in words:
                status = Path(f"/proc/{pid}/status").read_text()
                found[client] = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return found


def measured(algorithm: str) -> dict[str, object]:
    """One deployment, a run with each network."""
    folder = Path(tempfile.mkdtemp(prefix="polyfed-memory-"))
    try:
        with Local(folder / "deployment", len(CAPACITIES)) as there:
            seen: list[list[int]] = []
            for units in (WARM, LARGE):
                run = folder / f"{units}"
                keys = [f"algorithm.name={algorithm}", f'clients.models=["mlp(hidden=({units},{units}))"]']
                keys += [f"clients.count={len(CAPACITIES)}", f"clients.capacities={list(CAPACITIES)}"]
                keys += ["partition.samples_per_client=30", "train.steps=1", "train.batch_size=8"]
                keys += ["run.rounds=1", "run.threads=1"]
                rules = ["rounds.start_timeout=600", "rounds.deadline=900"]
                create(run, Config.load(HERE / "overhead.toml", keys), Deployment.load(None, rules))
                following = Following(run, patience=3600)
                there.submit([run])
                following.until_ended(there.processes.check)
                seen.append(peaks(there))
        row = json.loads((folder / f"{LARGE}" / "rounds.jsonl").read_text().splitlines()[-1])
        return {
            "algorithm": algorithm,
            "capacities": CAPACITIES,
            "own": seen[0],
            "peak": seen[1],
            "bytes": row["bytes"],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["fiarse-neuron", "heterofl", "fiarse"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = [measured(algorithm) for algorithm in arguments.algorithms]
    for one in found:
        print(json.dumps(one))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
