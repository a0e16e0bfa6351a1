"""What reading a table costs: `python benchmarks/large/table.py [--rows N] [--out table.json]`.

Two files of made-up numbers, categories and missing cells: 100,000 rows of 40 columns, whose reading is timed, and a
file of at least 200 MB, whose reading is measured in memory. Each is read in a process of its own, three times for the
seconds; the memory is the process's largest, less that before the reading, in sizes of the file.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COLUMNS = 40


def write(path: Path, rows: int) -> None:
    """Thirty-six numbers, of which a hundredth are missing, three categories of five levels, and a label."""
    draws = np.random.default_rng(0)
    names = [*(f"number{k}" for k in range(36)), *(f"category{k}" for k in range(3)), "label"]
    with path.open("w") as file:
        file.write(",".join(names) + "\n")
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            numbers = draws.standard_normal((count, 36))
            gone = draws.random((count, 36)) < 0.01
            levels = draws.integers(0, 5, (count, 3))
            for k in range(count):
                cells = ["NA" if g else f"{v:.6f}" for v, g in zip(numbers[k], gone[k], strict=True)]
                file.write(",".join([*cells, *(f"level {v}" for v in levels[k]), "ill" if k % 3 else "well"]) + "\n")


def read(path: Path) -> None:
    """Read the table in this process, and print what it took."""
    import pyarrow.csv  # noqa: F401  # the libraries are loaded before anything is measured

    from polyfed.data.sources import load_dataset

    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dataset = load_dataset("csv", path=path, label="label")
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"rows": len(dataset), "seconds": seconds, "bytes": (after - before) * 1024}))


def measured(path: Path, times: int) -> dict[str, float]:
    """Read a file in processes of their own."""
    command = [sys.executable, __file__, "--read", str(path)]
    found = [json.loads(subprocess.check_output(command)) for _ in range(times)]
    size = path.stat().st_size
    return {
        "rows": found[0]["rows"],
        "megabytes": size / 1e6,
        "seconds": statistics.median(one["seconds"] for one in found),
        "times_the_file": max(one["bytes"] for one in found) / size,
    }


def main() -> int:
    """Measure both files; 1 where a bar is missed: two seconds, and four times the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000, help="of the large file")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        results: dict[str, dict[str, float]] = {}
        for name, rows, times in (("time", 100_000, 3), ("memory", options.rows, 1)):
            write(path, rows)
            results[name] = measured(path, times)
            print(name, results[name], flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(results["time"]["seconds"] > 2 or results["memory"]["times_the_file"] > 4)


if __name__ == "__main__":
    sys.exit(main())
