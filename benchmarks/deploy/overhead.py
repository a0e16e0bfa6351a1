"""What a deployed round costs beside the training: real processes on loopback, messages of 1, 10 and 50 MB.

    python benchmarks/deploy/overhead.py [--out results.json] [--quick]

Clients take one step on 8 images, so nearly all of a round is overhead. A round's seconds are the server's, from the
first request to the aggregate. "ours" is polyfed's own part at a client: configuration, data, decode, load, encode,
save. The rest is the engine's, and waiting for its polls. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from polyfed.config import Config
from polyfed.deploy.host.local import Following, Local
from polyfed.deploy.server.loop import create
from polyfed.deploy.settings import Deployment

#: Size of a message -> width of the one hidden layer; (1024 + 10 + 1) float32 per unit.
SIZES = {1: 241, 10: 2_415, 50: 12_077}
OURS = ("config", "data", "decode", "load", "init", "encode", "save")
HERE = Path(__file__).parent


def measured(nodes: int, *, tls: bool, workers: bool, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One deployment, one run for each size."""
    folder = Path(tempfile.mkdtemp(prefix="polyfed-overhead-"))
    try:
        runs = [folder / f"{size}mb" for size in sizes]
        for size, run in zip(sizes, runs, strict=True):
            keys = ["algorithm.name=fedavg", f'clients.models=["mlp(hidden=({SIZES[size]},))"]', "train.steps=1"]
            keys += ["train.batch_size=8", f"run.rounds={rounds}", f"run.eval_every={rounds}", "run.threads=1"]
            keys += [f"clients.count={nodes}", "partition.samples_per_client=30"]
            rules = ["rounds.start_timeout=300", "rounds.deadline=300"]
            create(run, Config.load(HERE / "overhead.toml", keys), Deployment.load(None, rules))
        with Local(folder / "deployment", nodes, tls=tls, workers=workers) as there:
            following = [Following(run, patience=3600) for run in runs]
            there.submit(runs)
            for one in following:
                one.until_ended(there.processes.check)
        found: list[dict[str, Any]] = []
        for size, run in zip(sizes, runs, strict=True):
            rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()][1:]
            warm = rows[1:] or rows  # the first round loads data and networks
            clients = [seconds for row in warm for seconds in row["client_seconds"].values()]
            found.append(
                {
                    "nodes": nodes,
                    "tls": tls,
                    "workers": workers,
                    "MB": rows[0]["bytes"]["up"] / nodes / 1e6,
                    "nominal": size,
                    "round": statistics.median(row["seconds"] for row in warm),
                    "ours": statistics.median(sum(one.get(key, 0.0) for key in OURS) for one in clients),
                    "import": statistics.median(one.get("import", 0.0) for one in clients),
                    "work": statistics.median(one["work"] for one in clients),
                    "parts": {key: statistics.median(one.get(key, 0.0) for one in clients) for key in OURS},
                    "load_average": os.getloadavg()[0],
                }
            )
            print(json.dumps(found[-1]), flush=True)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure all combinations and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="2 nodes without TLS, 1 and 10 MB, 2 rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        found = measured(2, tls=False, workers=True, sizes=(1, 10), rounds=2)
    else:
        found = []
        for nodes in (2, 4):
            for tls in (False, True):
                found += measured(nodes, tls=tls, workers=True, sizes=(1, 10, 50), rounds=arguments.rounds)
        found += measured(2, tls=False, workers=False, sizes=(10,), rounds=arguments.rounds)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
