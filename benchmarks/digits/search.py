"""The search for the setting of `polyfed run`: is sharing worth something on the embedded digits?

Each cell is one setting, algorithm and seed: FedMRL, its local-only control and Standalone on the same splits.
It reads finished cells from results.jsonl, so you may interrupt the search at any moment.

    python benchmarks/digits/search.py [--only NAME ...] [--seeds 0 1 2 3 4] [--threads 2]
    python benchmarks/digits/search.py --table          prints results.jsonl as Markdown
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from polyfed.base.errors import DivergedError
from polyfed.config import Config
from polyfed.simulation.simulate import simulate

RESULTS = Path(__file__).parent / "results.jsonl"
MODELS = ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5"]


def sgd(lr: float, momentum: float, batch: int, epochs: int = 2) -> dict[str, Any]:
    """A [train] section with SGD."""
    return {"epochs": epochs, "batch_size": batch, "lr": lr, "momentum": momentum}


ADAM = {"epochs": 2, "batch_size": 9, "optimizer": "adam", "lr": 0.001}

#: name -> (classes per client, test fraction, rounds, [train], keys of FedMRL). A client has about 180 examples.
SETTINGS: dict[str, tuple[int, float, int, dict[str, Any], dict[str, Any]]] = {
    "c5-t80-sgd": (5, 0.8, 30, sgd(0.05, 0.0, 16), {}),
    "c5-t80-sgd-fast": (5, 0.8, 50, sgd(0.05, 0.9, 32), {}),
    "c5-t90-sgd": (5, 0.9, 60, sgd(0.05, 0.0, 16), {}),
    "c5-t90-sgd-momentum": (5, 0.9, 40, sgd(0.02, 0.9, 16), {}),
    "c5-t95-sgd-momentum": (5, 0.95, 40, sgd(0.02, 0.9, 8, epochs=4), {}),
    "c10-t90-sgd-momentum": (10, 0.9, 40, sgd(0.02, 0.9, 16), {}),
    "c10-t90-adam-d100": (10, 0.9, 20, ADAM, {}),
    "c10-t90-adam-d400": (10, 0.9, 20, ADAM, {"rep_dim": 400, "lr_private": 2e-4, "lr_projector": 2e-4}),
    "c10-t90-adam-d500": (10, 0.9, 20, ADAM, {"rep_dim": 500, "lr_private": 1e-4, "lr_projector": 2e-4}),
}
ALGORITHMS = ("fedmrl", "local-only", "standalone")


def cell(name: str, algorithm: str, seed: int, threads: int) -> dict[str, Any]:
    """Run one algorithm at one setting and seed; its mean accuracy every five rounds."""
    classes, test_fraction, rounds, train, keys = SETTINGS[name]
    chosen = {"name": "fedmrl", "share": algorithm == "fedmrl", **keys}
    config = Config.parse(
        {
            "run": {"seed": seed, "rounds": rounds, "eval_every": 5, "threads": threads, "checkpoint_every": rounds},
            "data": {"dataset": "digits", "test_fraction": test_fraction, "augment": False},
            "partition": {"kind": "classes", "classes_per_client": classes},
            "clients": {"count": 10, "models": MODELS},
            "train": train,
            "algorithm": chosen if algorithm != "standalone" else {"name": "standalone"},
        }
    )
    row: dict[str, Any] = {"setting": name, "algorithm": algorithm, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        try:
            simulate(config, progress=False, out=Path(folder) / "run")
        except DivergedError as error:
            return row | {"diverged": str(error)}
        lines = (Path(folder) / "run" / "rounds.jsonl").read_text().splitlines()
    measured = [row for row in map(json.loads, lines) if "accuracy" in row]
    return row | {"curve": {str(row["round"]): round(row["accuracy"]["mean"], 4) for row in measured}}


def table(rows: list[dict[str, Any]]) -> str:
    """Final accuracies per setting: mean and standard deviation over the seeds that were run."""
    lines = ["| setting | seeds | FedMRL | local-only | Standalone |", "| --- | --- | --- | --- | --- |"]
    for name in SETTINGS:
        cells: list[str] = []
        seeds: set[int] = set()
        for algorithm in ALGORITHMS:
            found = [row for row in rows if row["setting"] == name and row["algorithm"] == algorithm]
            final = [100 * list(row["curve"].values())[-1] for row in found if "curve" in row]
            seeds |= {row["seed"] for row in found}
            spread = f" ± {statistics.stdev(final):.1f}" if len(final) > 1 else ""
            cells.append(f"{statistics.mean(final):.1f}{spread}" if final else "diverged" if found else "")
        lines.append(f"| `{name}` | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not in results.jsonl yet, or print the table of what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if options.table:
        sys.stdout.write(table(rows))
        return
    done = {(row["setting"], row["algorithm"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for name in options.only:
            for algorithm in ALGORITHMS:
                if (name, algorithm, seed) not in done:
                    line = json.dumps(cell(name, algorithm, seed, options.threads))
                    with RESULTS.open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
