"""Your own table: a CSV file with numbers, categories, gaps and a column that names the hospital of each row.

The table below is made up: three hospitals, a label that depends on two columns, 5 % of the ages missing. Every
hospital is a client (partition "natural"); polyfed standardises its features with its own training rows only.

    python examples/own_csv.py [ROUNDS]
"""

import csv
import random
import sys
import tempfile
from pathlib import Path

from polyfed import simulate


def write_table(path: Path, rows: int = 600) -> None:
    """Make up a table."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["hospital", "age", "pressure", "ward", "outcome"])
        for _ in range(rows):
            hospital, ward = draw.choice(["north", "south", "west"]), draw.choice(["a", "b", "c"])
            age, pressure = draw.gauss(60, 12), draw.gauss(130, 15)
            ill = age / 12 + (2 if ward == "a" else 0) + draw.gauss(0, 0.5) > 5.7
            known = "" if draw.random() < 0.05 else f"{age:.1f}"
            table.writerow([hospital, known, f"{pressure:.1f}", ward, "ill" if ill else "well"])


def main(rounds: int) -> None:
    """Train together, then alone, on the same splits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patients.csv"
        write_table(path)
        tables = {
            "run": {"name": "own-csv", "rounds": rounds, "eval_every": rounds, "threads": 1},
            "data": {"dataset": "csv", "path": str(path), "options": {"label": "outcome", "group": "hospital"}},
            "partition": {"kind": "natural"},
            "clients": {"count": 3, "models": ["mlp(hidden=(32, 16))"]},
            "train": {"epochs": 2, "batch_size": 32, "lr": 0.1},
        }
        for algorithm in ("fedavg", "standalone"):
            result = simulate(tables, algorithm=algorithm)
            print(f"{algorithm}: accuracy {result.accuracy:.3f}, in {result.run_dir}")


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 10)
