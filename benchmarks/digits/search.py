"""The search for the setting of `polyfed run`: is sharing worth something on the embedded digits?

Each cell is one setting and seed: FedMRL, its local-only control and Standalone on the same splits. Finished cells
are read back from results.jsonl, so the search may be interrupted at any moment and goes on where it was.

    python benchmarks/digits/search.py [--threads 1] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from polyfed.config import Config
from polyfed.runtime.simulate import simulate

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
MODELS = ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5"]

#: name -> (classes per client, test fraction, lr, momentum, batch, epochs, rounds); a client has about 180 examples.
SETTINGS: dict[str, tuple[int, float, float, float, int, int, int]] = {
    "c5-t80-lr05-b16": (5, 0.8, 0.05, 0.0, 16, 2, 30),
    "c5-t90-lr10-b16": (5, 0.9, 0.1, 0.0, 16, 2, 40),
    "c10-t90-lr10-b16": (10, 0.9, 0.1, 0.0, 16, 2, 40),
    "c5-t95-lr10-b8-e5": (5, 0.95, 0.1, 0.0, 8, 5, 30),
    "c5-t90-lr05-b10-m5": (5, 0.9, 0.05, 0.5, 10, 2, 30),
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedmrl": {"name": "fedmrl"},
    "local-only": {"name": "fedmrl", "share": False},
    "standalone": {"name": "standalone"},
}


def cell(name: str, algorithm: str, seed: int, threads: int) -> dict[str, Any]:
    """Run one algorithm at one setting and seed; its accuracies every ten rounds."""
    classes, test_fraction, lr, momentum, batch, epochs, rounds = SETTINGS[name]
    config = Config.parse(
        {
            "run": {"seed": seed, "rounds": rounds, "eval_every": 10, "threads": threads, "checkpoint_every": rounds},
            "data": {"dataset": "digits", "test_fraction": test_fraction, "augment": False},
            "partition": {"kind": "classes", "classes_per_client": classes},
            "clients": {"count": 10, "models": MODELS},
            "train": {"epochs": epochs, "batch_size": batch, "lr": lr, "momentum": momentum},
            "algorithm": ALGORITHMS[algorithm],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(config, out=Path(folder) / "run")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "rounds.jsonl").read_text().splitlines()]
    curve = {row["round"]: row["accuracy"]["mean"] for row in rows if "accuracy" in row}
    return {
        "setting": name,
        "algorithm": algorithm,
        "seed": seed,
        "curve": curve,
        "worst_decile": summary["accuracy"]["worst_decile"],
        "seconds": summary["seconds"],
    }


def main() -> None:
    """Run what is not in results.jsonl yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    options = parser.parse_args()
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["setting"], row["algorithm"], row["seed"]) for row in known}
    for seed in options.seeds:
        for name in options.only:
            for algorithm in ALGORITHMS:
                if (name, algorithm, seed) in done:
                    continue
                row = cell(name, algorithm, seed, options.threads)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
