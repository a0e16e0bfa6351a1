"""Runs that workers may share, and Ctrl-C at the end of a round."""

from __future__ import annotations

from typing import Any

import running

from polyfed.rounds.callbacks import Quiet

MODELS = ["mlp(hidden=(12, 8))", "mlp(hidden=(32, 8))"]


def config(participation: float = 0.67, **run: Any) -> Any:
    told = {"rounds": 4, "eval_every": 2, "checkpoint_every": 2, **run}
    return running.config(run=told, clients={"count": 6, "models": MODELS, "participation": participation})


class Stop(Quiet):
    """Ctrl-C at the end of a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_ended(self, row: Any) -> None:
        if row["round"] == self.number:
            raise KeyboardInterrupt
