"""Four hospitals, each with a table and a network of its own: the files that docs/four-hospitals.md works through.

The tables are made up: the risk depends on age, pressure and sex; hospitals differ in size and in whom they treat, and
in how they write a missing value. Files have their columns in different orders. Every file is a client.

    python examples/four_hospitals.py [ROUNDS]      # trains together and alone, and predicts for a new patient
    python examples/four_hospitals.py --write DIR   # writes the files only: tables, new patients, study.toml
"""

import csv
import random
import sys
import tempfile
import tomllib
from pathlib import Path

import torch

from polyfed import load_run, simulate

HOSPITALS = {"north": (180, 55, ""), "south": (120, 62, "NA"), "east": (240, 68, "-"), "west": (90, 47, "null")}
#: The fifth, which was not there when the others trained.
NEW_HOSPITAL = (60, 58, "n/a")
#: The second has no pressure yet; nobody in the training had the sex of the third.
NEW_PATIENTS = "id,sex,age,pressure\nA1,m,74,148\nA2,f,51,NA\nA3,x,63,120\n"
#: Files are clients in the order of their names: east, north, south, west.
STUDY = """\
[data]
dataset = "csv"
path = "hospitals"
test_fraction = 0.3
options = { label = "outcome" }

[partition]
kind = "natural"

[clients]
count = 4
names = ["east", "north", "south", "west"]
models = ["mlp(hidden=(32, 16))", "mlp(hidden=(16,))", "mlp(hidden=(64, 32))", "mlp(hidden=(8,))"]

[run]
rounds = 20
eval_every = 20
metrics = ["auroc", "accuracy"]
predictions = true

[train]
epochs = 2
batch_size = 16
lr = 0.05

[algorithm]
name = "fedmrl"
auxiliary = "mlp(hidden=(8,))"
rep_dim = 8
"""


def write_table(path: Path, number: int, patients: int, age: float, gap: str) -> None:
    """Make up a hospital's table.

    Args:
        path: the file to write.
        number: the hospital's, from 0, which draws the patients and the order of the columns.
        patients: how many.
        age: their mean age in years.
        gap: how the hospital writes a missing pressure.
    """
    draw = random.Random(number)
    columns = ["age", "pressure", "sex", "outcome"]
    draw.shuffle(columns)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for _ in range(patients):
            years, pressure, sex = draw.gauss(age, 12), draw.gauss(130, 15), draw.choice("fm")
            risk = years / 15 + pressure / 40 + (sex == "m") + draw.gauss(0, 0.8)
            row = {"age": f"{years:.0f}", "pressure": f"{pressure:.0f}", "sex": sex}
            if draw.random() < 0.06:
                row["pressure"] = gap
            table.writerow({**row, "outcome": "ill" if risk > 8 else "well"})


def write(folder: Path) -> None:
    """Write the hospitals' tables, new patients, a fifth hospital and the configuration."""
    (folder / "hospitals").mkdir(parents=True, exist_ok=True)
    for number, (name, (patients, age, gap)) in enumerate(HOSPITALS.items()):
        write_table(folder / "hospitals" / f"{name}.csv", number, patients, age, gap)
    write_table(folder / "new_hospital.csv", len(HOSPITALS), *NEW_HOSPITAL)
    (folder / "new_patients.csv").write_text(NEW_PATIENTS)
    (folder / "study.toml").write_text(STUDY)


def main(rounds: int) -> None:
    """Train together, then alone, on the same splits; then ask the model of north about a new patient."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        config = tomllib.loads(STUDY)
        config["data"]["path"] = f"{folder}/hospitals"
        config["run"] |= {"name": "four-hospitals", "rounds": rounds, "eval_every": rounds}
        together = simulate(config)
        print(together)
        print(simulate(config, algorithm="standalone"))
    model = load_run(together.run_dir).model(client="north")  # needs neither the tables nor this configuration
    numbers, categories = model.inputs
    patient = {"age": 74.0, "pressure": float("nan"), "sex": "m"}  # NaN is missing
    codes = dict(zip(categories.columns, categories.categories, strict=True))  # {"sex": ("f", "m")}
    row = [
        torch.tensor([[patient[name] for name in numbers.columns]], dtype=torch.float64),
        torch.tensor([[codes[name].index(patient[name]) for name in codes]]),
    ]
    print(dict(zip(model.classes, model(*row)[0].tolist(), strict=True)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    else:
        main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 20)
