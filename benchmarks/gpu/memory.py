"""Memory of a GPU under a limit: `python memory.py OUT DEVICE [--small]` writes memory.csv.

torch is kept from taking more than the limit (`torch.cuda.set_per_process_memory_fraction`), stacks are given half of
it (`run.memory`), and two rounds of fedmrl.py's federation are played, stacked. ``allocated_MB`` is what tensors took
at most, ``reserved_MB`` what torch took from the GPU. A limit that is too small must end in OutOfMemoryError, not in
other numbers; it passes all the same. On a CPU there is no limit, and both are the process's resident memory.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from tables import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import fedmrl
import speed

from polyfed.execute.placement import Placement
from polyfed.parallel.pool import process_peak

#: GB, descending, as memory that is reserved is given back only on request.
LIMITS = (8.0, 4.0, 2.0, 0.5)
COLUMNS = ["limit_GB", "stacks_GB", "allocated_MB", "reserved_MB", "rounds", "outcome"]


def measured(limit: float, small: bool) -> tuple[float, float, int, str]:
    """The most memory allocated and reserved, in MB, rounds played, and how it ended."""
    cuda = speed.DEVICE.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))
        torch.cuda.reset_peak_memory_stats()
    rounds, outcome = 0, "passed"
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            tables = fedmrl.sections(["cnn1"], Path(folder), small)
            library = speed.Library(tables, stack, driver="batched", memory=limit / 2)
            for _ in range(2):
                library.round()
                rounds += 1
    except torch.OutOfMemoryError:
        outcome = "OutOfMemoryError"
    if not cuda:
        return process_peak() / 1e6, process_peak() / 1e6, rounds, outcome
    return torch.cuda.max_memory_allocated() / 1e6, torch.cuda.max_memory_reserved() / 1e6, rounds, outcome


def main() -> int:
    """A row for each limit; 1 where more was reserved than the limit, or the largest limit was too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("device")
    parser.add_argument("--small", action="store_true", help="fewer clients and examples, to try the script")
    options = parser.parse_args()
    placement = Placement.of(options.device, "fp32")
    speed.DEVICE = placement.device
    table = Table(options.out / "memory.csv", COLUMNS)
    failed = False
    with placement.defaults():
        for limit in LIMITS:
            allocated, reserved, rounds, outcome = measured(limit, options.small)
            if speed.DEVICE.type == "cuda" and reserved > limit * 1e3:
                outcome = f"{outcome}, over the limit"
            failed |= "over" in outcome or (limit == LIMITS[0] and outcome != "passed")
            table.put(limit, limit / 2, allocated, reserved, rounds, outcome)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
