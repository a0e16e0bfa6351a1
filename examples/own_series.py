"""Your own sensor series in an .npz file, a recurrent network of your own, and a test on later days.

The series below are made up: four machines, each with two sensors that are read 50 times a day. Before a bearing
fails, the vibration swings faster. Machines differ in the scale of their sensors; polyfed standardises each sensor by
the machine's own training days. `split = "time"` tests on the last days of each machine, as in use.

    python examples/own_series.py [ROUNDS]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from polyfed import simulate


class LastState(nn.Module):
    """A GRU whose output is its state after the last step: (B, T, C) -> (B, width)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Series to states."""
        return self.gru(x)[1][0]


class Recurrent(nn.Module):
    """A GRU and a dense head, by which it is cut."""

    def __init__(self, input_shape: tuple[int, int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.states = LastState(input_shape[1], width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Series (B, T, C) -> logits (B, L)."""
        return self.head(self.states(x))


def write_series(path: Path, machines: int = 4, days: int = 60, steps: int = 50) -> None:
    """Make up a file of (machines * days, steps, 2) numbers, some of them missing."""
    draw = np.random.default_rng(0)
    day = np.tile(np.arange(days), machines)
    machine = np.repeat(np.arange(machines), days)
    worn = draw.random(len(day)) < 0.4
    time = np.arange(steps) / steps
    swing = np.sin(2 * np.pi * np.where(worn, 7, 3)[:, None] * (time + draw.random((len(day), 1))))
    heat = np.cumsum(draw.normal(size=(len(day), steps)), axis=1)
    x = np.stack([swing + draw.normal(scale=0.5, size=swing.shape), heat], axis=2)
    x = x * np.array([0.01, 5])[None] * (1 + machine[:, None, None]) + np.array([0, 300])
    x[draw.random(x.shape) < 0.01] = np.nan
    np.savez(path, x=x, y=worn.astype(int), groups=machine, times=day, classes=np.array(["sound", "worn"]))


def main(rounds: int) -> None:
    """Train together, then alone, on the same splits."""
    own = {"name": "own_series:Recurrent", "classifier": "head"}
    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder) / "machines.npz")
        tables = {
            "run": {"name": "own-series", "rounds": rounds, "eval_every": rounds, "threads": 1},
            "data": {
                "dataset": "npz",
                "path": f"{folder}/machines.npz",
                "options": {"layout": "NTC"},
                "split": "time",
            },
            "partition": {"kind": "natural"},
            "clients": {"count": 4, "models": [own]},
            "train": {"epochs": 5, "batch_size": 16, "optimizer": "adam", "lr": 0.01},
        }
        for algorithm in ("fedavg", "standalone"):
            result = simulate(tables, algorithm=algorithm)
            print(f"{algorithm}: accuracy {result.accuracy:.3f}, in {result.run_dir}")


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 10)
