"""Small trained runs of every kind of input, and what the trainer said of each client's test rows."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sequence_nets import series, tokens

from polyfed import federated_data
from polyfed.config import Config
from polyfed.data.dataset import Dataset
from polyfed.rounds.federation import deal
from polyfed.simulation.simulate import simulate

HEADER = ("id", "age", "site", "dose", "smoker", "outcome")
KINDS = ("table", "headerless", "quantity", "numbers", "pictures", "floats", "series", "channels-first", "tokens")


def table_rows(rows: int = 60) -> list[list[str]]:
    """Rows of a table with decimal commas, categories of text and of numbers, and missing cells spelt differently."""
    draw = np.random.default_rng(3)
    out: list[list[str]] = []
    for row in range(rows):
        age, dose = draw.normal(60, 9), draw.normal(1200, 400)
        site, smoker = "abc"[draw.integers(3)], str(draw.integers(0, 3))
        ill = age + 8 * (site == "a") + 5 * draw.normal() > 62
        cells = [f"p{row}", f"{age:.2f}".replace(".", ","), site, f"{dose:.1f}".replace(".", ","), smoker]
        for at in (1, 2, 3, 4):
            if draw.random() < 0.08:
                cells[at] = ("", "n/a", "unbekannt")[draw.integers(3)]
        out.append([*cells, "ill" if ill else "well"])
    return out


def write_csv(path: Path, rows: list[list[str]], header: tuple[str, ...] | None = HEADER) -> Path:
    """Write a table with semicolons."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";").writerows([*([header] if header else []), *rows])
    return path


OPTIONS = {"delimiter": ";", "decimal": ",", "missing": ["", "n/a", "unbekannt"]}
#: A small run of two clients, of which the second has two layers.
BASE: Mapping[str, Mapping[str, Any]] = {
    "run": {"rounds": 1, "threads": 1, "predictions": True, "driver": "sequential"},
    "clients": {"count": 2, "models": ["mlp(hidden=(7,))", "mlp(hidden=(9, 7))"]},
    "partition": {"kind": "iid"},
    "train": {"epochs": 1, "batch_size": 8, "lr": 0.05},
    "algorithm": {"name": "standalone"},
}


@dataclass(frozen=True)
class Trained:
    """A run that is complete.

    Args:
        folder: its run directory.
        config: its configuration.
        data: the data set, if a program gave it.
    """

    folder: Path
    config: Config
    data: Dataset | None = None

    def test_rows(self, client: int) -> NDArray[np.int64]:
        """The rows of a client's test, as they are in the data."""
        return deal(self.config, self.data)[1].test(client)

    def said(self, client: int, predictor: str | None = None) -> NDArray[np.float64]:
        """What ``predictions.parquet`` holds of a client's test rows: (n, L) probabilities, or (n, 1) predictions."""
        rows = pq.read_table(self.folder / "predictions.parquet").to_pylist()
        rows = [row for row in rows if row["client"] == client]
        name = predictor or rows[0]["predictor"]
        return np.array(
            [
                [row[key] for key in row if key.startswith(("score", "prediction"))]
                for row in rows
                if row["predictor"] == name
            ]
        )


def config(folder: Path, kind: str, **sections: Mapping[str, Any]) -> tuple[Config, Dataset | None]:
    """The configuration of a kind of input, whose files go to ``folder``, and its data if a program gives them."""
    data: dict[str, Any] = {"dataset": "python"}
    made: Dataset | None = None
    models: list[Any] | None = None
    draw = np.random.default_rng(5)
    y = draw.integers(0, 3, 60)
    if kind in ("table", "quantity"):
        rows = table_rows()
        if kind == "quantity":
            rows = [[*row[:-1], f"{1e5 + 300 * number:.1f}".replace(".", ",")] for number, row in enumerate(rows)]
        options = {**OPTIONS, "categorical": ["smoker"], "ignore": ["id"], "label": "outcome"}
        data = {"dataset": "csv", "path": str(write_csv(folder / "all.csv", rows)), "options": options}
        if kind == "quantity":
            data |= {"task": "regression", "target_offset": 1.1e5, "target_scale": 5e3}
    elif kind == "headerless":
        rows = [row[1:] for row in table_rows()]
        options = {**OPTIONS, "header": False, "categorical": [3]}
        data = {"dataset": "csv", "path": str(write_csv(folder / "all.csv", rows, None)), "options": options}
    elif kind == "numbers":
        x = draw.normal(size=(60, 4)) * [1, 1e4, 1e-3, 0] + [5, 0, 0, 7]
        x[draw.random(x.shape) < 0.1] = np.nan
        np.savez(folder / "all.npz", x=x, y=y)
        data = {"dataset": "npz", "path": str(folder / "all.npz")}
    elif kind == "pictures":
        x = draw.integers(0, 256, (60, 9, 9, 3), dtype=np.uint8)
        np.savez(folder / "all.npz", x=x, y=y)
        data = {"dataset": "npz", "path": str(folder / "all.npz"), "options": {"layout": "NHWC"}, "image_size": 8}
    elif kind == "floats":
        np.savez(folder / "all.npz", x=draw.normal(2000, 300, (60, 1, 8, 8)).astype(np.float32), y=y)
        data = {"dataset": "npz", "path": str(folder / "all.npz"), "options": {"layout": "NCHW"}}
    elif kind == "series":
        made, models = series(clients=2), ["sequence_nets:Series"]
    elif kind == "channels-first":
        x = draw.normal(size=(60, 3, 10)) * [[[1], [100], [1e-3]]] + [[[0], [5000], [1]]]
        made = federated_data([(x[:30], y[:30]), (x[30:], y[30:])], layout="NCT", name="leads")
        models = [{"name": "sequence_nets:Series", "first": True}]
    else:
        made, models = tokens(clients=2), ["sequence_nets:Tokens"]
    tables = {name: {**keys, **sections.get(name, {})} for name, keys in BASE.items()}
    if "algorithm" in sections:
        tables["algorithm"] = dict(sections["algorithm"])
    if models is not None:
        tables["clients"]["models"] = models
    if made is not None:
        tables["partition"] = {"kind": "natural"}
    return Config.parse({**tables, "data": {**data, **sections.get("data", {})}}), made


def trained(folder: Path, kind: str, **sections: Mapping[str, Any]) -> Trained:
    """A complete run of a kind of input, with ``sections`` of the configuration on top; of the algorithm's, instead."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, data = config(folder, kind, **sections)
    simulate(settings, dataset=data, out=folder / "run")
    return Trained(folder / "run", settings, data)


def inputs_of(run: Trained, client: int) -> dict[str, Any]:
    """A client's test rows as an export takes them: by name, as a program reads them from the files itself."""
    at = run.test_rows(client)
    if run.config.data.image_size is not None:  # whoever uses an export resizes images
        return {"images": deal(run.config)[0].x.numpy()[at]}
    if run.data is not None:
        kind = run.data.kind
        return {kind: run.data.x.numpy()[at].astype(np.int64 if kind == "tokens" else np.float64)}
    path = Path(str(run.config.data.path))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            x = arrays["x"][at]
        return {"numbers": x.astype(np.float64)} if x.ndim == 2 else {"images": x}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter=";"))
    rows = [row[1:] for row in rows[1:]] if len(rows[0]) == len(HEADER) else rows
    gone = OPTIONS["missing"]
    numbers = [[np.nan if cell in gone else float(cell.replace(",", ".")) for cell in (row[0], row[2])] for row in rows]
    levels = [sorted({row[column] for row in rows} - {*gone}) for column in (1, 3)]
    codes = [
        [-1 if row[column] in gone else known.index(row[column]) for column, known in zip((1, 3), levels, strict=True)]
        for row in rows
    ]
    return {"numbers": np.array(numbers)[at], "categories": np.array(codes)[at]}
