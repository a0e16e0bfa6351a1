"""Four hospitals, each with a table and a network of its own: the folder that docs/data.md works through.

The tables are made up: the risk depends on age, pressure and sex; hospitals differ in size and in whom they treat, and
in how they write a missing value. Files have their columns in different orders. Every file is a client.

    python examples/four_hospitals.py [ROUNDS]      # trains together and alone, and prints accuracy and AUROC
    python examples/four_hospitals.py --write DIR   # writes the folder of CSV files only
"""

import csv
import random
import sys
import tempfile
from pathlib import Path

from polyfed import FedMRL, Standalone, simulate

HOSPITALS = {"north": (180, 55, ""), "south": (120, 62, "NA"), "east": (240, 68, "-"), "west": (90, 47, "null")}
NETWORKS = ["mlp(hidden=(32, 16))", "mlp(hidden=(16,))", "mlp(hidden=(64, 32))", "mlp(hidden=(8,))"]


def write_tables(folder: Path) -> None:
    """Make up a table for each hospital."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (patients, age, gap)) in enumerate(HOSPITALS.items()):
        draw = random.Random(number)
        columns = ["age", "pressure", "sex", "outcome"]
        draw.shuffle(columns)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            for _ in range(patients):
                years, pressure, sex = draw.gauss(age, 12), draw.gauss(130, 15), draw.choice("fm")
                risk = years / 15 + pressure / 40 + (sex == "m") + draw.gauss(0, 0.8)
                row = {"age": f"{years:.0f}", "pressure": f"{pressure:.0f}", "sex": sex}
                if draw.random() < 0.06:
                    row["pressure"] = gap
                table.writerow({**row, "outcome": "ill" if risk > 8 else "well"})


def main(rounds: int) -> None:
    """Train together, then alone, on the same splits."""
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder) / "hospitals")
        tables = {
            "run": {"name": "four-hospitals", "rounds": rounds, "eval_every": rounds, "metrics": ["accuracy", "auroc"]},
            "data": {
                "dataset": "csv",
                "path": str(Path(folder) / "hospitals"),
                "test_fraction": 0.3,
                "options": {"label": "outcome"},
            },
            "partition": {"kind": "natural"},
            "clients": {"count": 4, "models": NETWORKS},
            "train": {"epochs": 2, "batch_size": 16, "lr": 0.05},
        }
        for algorithm in (FedMRL(auxiliary="mlp(hidden=(8,))", rep_dim=8), Standalone()):
            print(simulate(tables, algorithm=algorithm))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_tables(Path(sys.argv[2]))
    else:
        main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 10)
