"""What a round costs with a hundred to a million clients at a cohort of 10: time, memory, and where it goes.

    python benchmarks/large/measure.py [--only CASE] [--fresh] [--scratch FOLDER]

Each number of clients is a process of its own with one thread. The processes of a case take turns, so a machine whose
speed changes does so for all. results.json keeps the measurements: an interrupted measurement continues, and writes the
table of docs/large.md from it. A sample is a window of rounds with exactly one checkpoint in it; a ratio is to the
smallest number of clients in the same turn. No evaluation falls into a window. A turn in which other programs used more
than a quarter of a core is repeated, up to a limit; if there are too few quiet turns then, all turns count and the rows
say so. It takes about 10 minutes on 2 quiet cores, and 10 GB of scratch space.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "large.md"
COHORT = 10
NUMBERS = (10**2, 10**3, 10**4, 10**5, 10**6)
ENDS = (10**2, 10**6)
TURNS, MOST = 7, 15  # quiet turns wanted, turns at most
SMALL = {"image_size": 8}, {"samples_per_client": 20}, "mlp(hidden=(8,))"
WIDE = {"image_size": 32}, {"samples_per_client": 20}, "mlp(hidden=(2415,))"

#: Case -> rounds in a window; what of the configuration differs; numbers of clients; what the table calls it.
CASES: dict[str, tuple[int, dict[str, Any], tuple[int, ...], str]] = {
    "small-disk": (15, {"store": "disk", "filled": True}, NUMBERS, "3.5 kB each, all have trained; `disk`"),
    "first-memory": (15, {"store": "memory"}, ENDS, "3.5 kB each, none has trained before; `memory`"),
    "large-disk": (2, {"store": "disk", "sizes": WIDE, "steps": 2}, NUMBERS, "10 MB each, in files; `disk`"),
    "first-time": (15, {"store": "disk"}, ENDS, "3.5 kB each, none has trained before; `disk`"),
    "own-rows": (15, {"store": "disk", "rows": 5_000_000}, ENDS, "3 kB each, 5 rows of its own each; `disk`"),
}


def config(case: str, clients: int, scratch: Path) -> Any:
    """A run of FedMRL with small networks on digits; only the number of clients differs within a case."""
    from polyfed import Config

    window, changes, _, _ = CASES[case]
    data, partition, model = changes.get("sizes", SMALL)
    tables: dict[str, Any] = {
        "run": {"rounds": 10**6, "eval_every": 10**6, "eval_clients": COHORT, "checkpoint_every": window, "threads": 1},
        "data": {"dataset": "digits", "augment": False, **data},
        "partition": {"kind": "resampled", **partition},
        "clients": {"count": clients, "participation": COHORT / clients, "models": [model]},
        "train": {"steps": changes.get("steps", 10), "batch_size": 8},
        "algorithm": {"name": "fedmrl", "auxiliary": "mlp(hidden=(8,))", "rep_dim": 4},
    }
    tables["run"] |= {"store": changes["store"], "driver": "sequential"}
    if "rows" in changes:
        tables["data"] = {"dataset": "npz", "path": str(rows_of_their_own(changes["rows"], scratch))}
        tables["partition"] = {"kind": "iid", "samples_per_client": 5}
    return Config.parse(tables)


def rows_of_their_own(rows: int, scratch: Path) -> Path:
    """A data set large enough that a million clients can have rows of their own."""
    import numpy as np

    path = scratch / f"rows-{rows}.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        np.savez(path, x=rng.random((rows, 4), dtype=np.float32), y=rng.integers(0, 10, rows))
    return path


def busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, int]:
    """Resident bytes of this process now, and the most since the last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"rss": int(status["VmRSS"].split()[0]) * 1024, "peak": int(status["VmHWM"].split()[0]) * 1024}


class Done(KeyboardInterrupt):
    """Enough was measured."""


def contestant(case: str, clients: int, scratch: Path) -> None:
    """One process: plays a window for every line that it reads, and tells of it in a line; at the end, of the rest."""
    from polyfed import simulate
    from polyfed.rounds.callbacks import Interrupted, Quiet
    from polyfed.simulation.simulate import resume
    from polyfed.storage.state_store import Store

    spent = {"store": 0.0}

    def timed(name: str) -> None:
        inner = getattr(Store, name)

        def outer(*arguments: Any, **keys: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **keys)
            finally:
                spent["store"] += time.perf_counter() - began

        setattr(Store, name, outer)

    for name in ("get", "put", "save", "prune"):
        timed(name)
    window, filled = CASES[case][0], CASES[case][1].get("filled", False)
    found: dict[str, Any] = {"case": case, "clients": clients}

    class Meter(Quiet):
        def __init__(self, until: int | None) -> None:
            self.until, self.mark = until, (0.0, 0.0, 0.0, 0.0)

        def now(self) -> tuple[float, float, float, float]:
            return time.perf_counter(), time.process_time(), busy(), spent["store"]

        def started(self, run_dir: Path, config: Any, first_round: int) -> None:
            found["setup"] = time.perf_counter() - began

        def round_ended(self, row: Any) -> None:
            if row["round"] == 0:
                found["evaluation"] = row["seconds_evaluation"]
            if row["round"] == self.until:
                raise Done
            # A checkpoint is written after this call: the last round of a window is told before its checkpoint.
            if self.until is not None or row["round"] == 0 or row["round"] % window != 0:
                return
            if row["round"] == window:  # warm: costs of steps are known, files are there
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                told: dict[str, float] = {}
            else:
                wall, cpu, all_, store = (b - a for a, b in zip(self.mark, self.now(), strict=True))
                told = {"round": wall / window, "cpu": cpu / window, "store": store / window, **memory()}
                told["foreign"] = max(0.0, all_ - cpu) / wall
            print(json.dumps(told), flush=True)
            if not sys.stdin.readline():
                raise Done
            self.mark = self.now()

    folder = Path(tempfile.mkdtemp(prefix="polyfed-large-", dir=scratch))
    try:
        settings = config(case, clients, scratch)
        began = time.perf_counter()
        with suppress(Interrupted):
            simulate(settings, out=folder / "run", callbacks=[Meter(1 if filled else None)], progress=False)
        if filled:
            fill(folder / "run", clients)
            began = time.perf_counter()
            with suppress(Interrupted):
                resume(folder / "run", callbacks=[Meter(None)], progress=False)
        with closing(sqlite3.connect(folder / "run" / "states" / "index.sqlite")) as index:
            (found["states"],) = index.execute("SELECT count(*) FROM states").fetchone()
        found["partition_bytes"] = (folder / "run" / "partition.npz").stat().st_size
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found), flush=True)


def compete(case: str, scratch: Path) -> list[dict[str, Any]]:
    """A row for each number of clients of a case."""
    turns: list[list[dict[str, float]]] = []
    with ExitStack() as stack:
        players: list[subprocess.Popen[str]] = []
        for clients in CASES[case][2]:
            command = [sys.executable, __file__, "--one", case, str(clients), "--scratch", str(scratch)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            pipe = subprocess.PIPE
            player = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            players.append(stack.enter_context(player))
            answer(player)  # it is warm, and waits
        quiet: list[list[dict[str, float]]] = []
        while len(quiet) < TURNS and len(turns) < MOST:
            turns.append([answer(player, "go\n") for player in players])
            quiet = [turn for turn in turns if max(window["foreign"] for window in turn) < 0.25]
            print(f"  {case}:", ", ".join(f"{1e3 * window['round']:.0f} ms" for window in turns[-1]), flush=True)
        rows: list[dict[str, Any]] = [last(player) for player in players]
    chosen = quiet if len(quiet) == TURNS else turns
    for k, row in enumerate(rows):
        for key in ("round", "cpu", "store", "foreign", "rss"):
            row[key] = statistics.median(turn[k][key] for turn in chosen)
        for key in ("round", "cpu", "rss"):
            row[f"{key}_ratio"] = statistics.median(turn[k][key] / turn[0][key] for turn in chosen)
        row["peak"] = max(turn[k]["peak"] for turn in turns)
        row["windows"], row["disturbed"] = len(chosen), len(quiet) < TURNS
    return rows


def answer(player: subprocess.Popen[str], line: str = "") -> dict[str, Any]:
    """What a process says, to a line if one is given."""
    assert player.stdin is not None
    assert player.stdout is not None
    player.stdin.write(line)
    player.stdin.flush()
    return json.loads(player.stdout.readline())


def last(player: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process says when nothing more is wanted."""
    assert player.stdin is not None
    assert player.stdout is not None
    player.stdin.close()
    return json.loads(player.stdout.readline())


def fill(run: Path, clients: int) -> None:
    """Give every client a state, as if all had trained in round 1: a copy of one that did."""
    from polyfed.base import files
    from polyfed.storage import run_dir
    from polyfed.storage.state_store import Seal

    with closing(sqlite3.connect(run / "states" / "index.sqlite")) as index, index:
        index.execute("PRAGMA synchronous = OFF")
        index.execute(
            "WITH RECURSIVE k(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k WHERE i + 1 < ?) "
            "INSERT INTO states SELECT i, 1, sha256, data FROM k, (SELECT sha256, data FROM states LIMIT 1) "
            "WHERE i NOT IN (SELECT client FROM states)",
            (clients,),
        )
        seal = Seal()
        for client, round_, sha256 in index.execute("SELECT client, round, sha256 FROM states"):
            seal = seal.plus(client, round_, sha256)
    path = run / "checkpoint" / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"] | {"states": seal.entry()}
    files.write_json(path, {"sha256": run_dir._digest(manifest), "manifest": manifest})


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, each with its ratio to the smallest number of clients of its case, turn by turn."""
    lines = [
        "| private state | clients | a round, ms | of it CPU | of it store | resident, MB | peak, MB | set-up, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, (_, _, _, title) in CASES.items():
        rows = [row for row in results if row["case"] == case]
        for row in rows:
            lines.append(
                f"| {title if row is rows[0] else ''} | {row['clients']:,} "
                f"| {1e3 * row['round']:.1f} ({row['round_ratio']:.2f}x){' *' * row['disturbed']} "
                f"| {1e3 * row['cpu']:.1f} ({row['cpu_ratio']:.2f}x) | {1e3 * row['store']:.1f} "
                f"| {row['rss'] / 1e6:.0f} ({row['rss_ratio']:.2f}x) | {row['peak'] / 1e6:.0f} | {row['setup']:.1f} |"
            )
    if any(row["disturbed"] for row in results):
        lines.append("\n\\* measured while other programs ran: read the CPU seconds.")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), help="this case, again")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        contestant(arguments.one[0], int(arguments.one[1]), arguments.scratch)
        return
    path = HERE / "results.json"
    kept = [] if arguments.fresh or not path.exists() else json.loads(path.read_text())
    results = [row for row in kept if row["case"] != arguments.only]
    for case in [arguments.only] if arguments.only else CASES:
        if any(row["case"] == case for row in results):
            continue
        results += compete(case, arguments.scratch)
        results.sort(key=lambda row: (list(CASES).index(row["case"]), row["clients"]))
        path.write_text(json.dumps(results, indent=1) + "\n")
    for rows in arguments.scratch.glob("rows-*.npz"):
        rows.unlink()
    head, _, rest = PAGE.read_text().partition("<!-- large:begin -->\n")
    told = table(results)
    PAGE.write_text(f"{head}<!-- large:begin -->\n{told}\n<!-- large:end -->{rest.partition('<!-- large:end -->')[2]}")
    print(told)


if __name__ == "__main__":
    main()
