"""What a round does is of its cohort: calls and bytes are counted at ten thousand and at a million clients."""

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy.ma  # noqa: F401  # numpy's sets load it when first used; it is not to be counted
import pytest
import running

from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation.simulate import simulate

WARM, LAST = 3, 9


class Counting(Quiet):
    """Counts the calls of all functions between two rounds, and the bytes that these rounds hold at most."""

    calls = peak = kept = 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event in ("call", "c_call")

    def round_ended(self, row: Any) -> None:
        """Begin when all kinds of steps have been seen; end with Ctrl-C."""
        if row["round"] == WARM:
            tracemalloc.start()
            self.before = tracemalloc.get_traced_memory()[0]
            sys.setprofile(self)
        if row["round"] == LAST:
            sys.setprofile(None)
            now, peak = tracemalloc.get_traced_memory()
            self.peak, self.kept = peak - self.before, now - self.before
            raise KeyboardInterrupt


def counted(folder: Path, clients: int, store: str) -> Counting:
    config = running.config(
        run={"rounds": 99, "eval_every": 3, "eval_clients": 3, "checkpoint_every": 3, "store": store},
        partition={"kind": "resampled", "classes_per_client": None, "samples_per_client": 10, "alpha": 1e6},
        clients={"count": clients, "participation": 4 / clients},
        train={"epochs": None, "steps": 1},
    )
    callback = Counting()
    try:
        with pytest.raises(Interrupted):
            simulate(config, out=folder, callbacks=[callback])
    finally:
        sys.setprofile(None)
        tracemalloc.stop()
    return callback


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_round_does_not_know_how_many_clients_there_are(tmp_path: Path, store: str) -> None:
    """Catches a loop over all clients, in Python or in an array, in drawing, training, testing, metering or saving."""
    some, many = (counted(tmp_path / str(n), n, store) for n in (20_000, 1_000_000))
    assert some.calls > 10_000
    assert many.calls == pytest.approx(some.calls, rel=0.05)
    # An array of a byte for each client would be 980,000 bytes more.
    assert many.peak < some.peak + 300_000
    assert many.kept < some.kept + 300_000
