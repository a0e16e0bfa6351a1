"""What a cohort costs in memory: the peak of the process that adds up uploads of 10 MB, with 4 and with 200 clients.

    python benchmarks/large/cohort.py [--only ALGORITHM] [--scratch FOLDER] [--out cohort.json]

Measured are the parent of a simulation with two workers (``store = "disk"``) and the server of a deployment, whose
clients answer in another process; each in a process of its own, two rounds, no evaluation but that of four clients. The
difference of the two peaks is in uploads. The peaks of the processes that train stand beside them. The server is
measured without an engine around it. About ten minutes, and 5 GB of scratch space.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COHORTS = (4, 200)
#: Algorithm -> its keys and networks; each upload is about 10 MB.
WIDE = "mlp(hidden=(2415,))"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({}, {"models": [WIDE]}),
    "fedmrl": ({"auxiliary": "mlp(hidden=(2220, 100))", "rep_dim": 100}, {"models": ["mlp(hidden=(100,))"]}),
    "fiarse": ({}, {"models": [WIDE], "capacities": [1.0, 0.5]}),
}
PLACES = ("simulation", "deployed")


def config(algorithm: str, cohort: int) -> Any:
    """Two rounds of a federation of 200 clients."""
    from polyfed import Config

    keys, clients = CASES[algorithm]
    run = {"rounds": 2, "eval_every": 2, "eval_clients": 4, "checkpoint_every": 2, "store": "disk", "threads": 1}
    return Config.parse(
        {
            "run": {**run, "workers": 2},
            "data": {"dataset": "digits", "augment": False, "image_size": 32},
            "partition": {"kind": "resampled", "samples_per_client": 20},
            "clients": {"count": COHORTS[-1], "participation": cohort / COHORTS[-1], **clients},
            "train": {"steps": 1, "batch_size": 8, "lr": 0.01},
            "algorithm": {"name": algorithm, **keys},
        }
    )


def peak() -> int:
    """The most resident bytes of this process so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def simulated(algorithm: str, cohort: int, folder: Path) -> dict[str, Any]:
    """A simulation; what is measured is the parent."""
    from polyfed import simulate

    return simulate(config(algorithm, cohort), progress=False, out=folder / "run").summary


def deployed(algorithm: str, cohort: int, folder: Path) -> dict[str, Any]:
    """The server of a deployment; its clients answer, one at a time, when the server looks for their replies."""
    from polyfed.deploy.server.loop import create, serve
    from polyfed.deploy.settings import Deployment, NodeSettings
    from polyfed.deploy.wire.transport import Incoming, Outgoing
    from polyfed.testing.process import Child

    class Lazy:
        """Keeps requests until their replies are pulled."""

        def __init__(self, child: Child, clients: int) -> None:
            self.child, self.waiting, self.count = child, {}, 0
            self.settings = {k: NodeSettings(client=k, state_dir=str(folder / f"client-{k}")) for k in range(clients)}

        def nodes(self) -> list[int]:
            return list(self.settings)

        def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
            tickets = [str(self.count + k) for k in range(len(messages))]
            self.waiting |= dict(zip(tickets, messages, strict=True))
            self.count += len(messages)
            return list(tickets)

        def pull(self, tickets: Sequence[str]) -> list[Incoming]:
            found = []
            for ticket in tickets:
                if (message := self.waiting.pop(ticket, None)) is not None:
                    frame = self.child.ask(self.settings[message.node], (message.header, message.body))
                    found.append(Incoming(ticket, *frame))
            return found

    rules = ["rounds.deadline=3000", "rounds.start_timeout=3000", "rounds.poll=0.01", "rounds.min_clients=200"]
    create(folder / "run", config(algorithm, cohort), Deployment.load(None, rules))
    child = Child()
    try:
        return serve(folder / "run", Lazy(child, COHORTS[-1]))
    finally:
        child.close()


def one(algorithm: str, place: str, cohort: int, scratch: Path) -> None:
    """Measure in this process, and print it."""
    with tempfile.TemporaryDirectory(prefix="polyfed-cohort-", dir=scratch) as folder:
        summary = (simulated if place == "simulation" else deployed)(algorithm, cohort, Path(folder))
    upload = summary["bytes"]["up"] / summary["clients"]["participations"]
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"peak": peak(), "child": workers, "upload": upload}))


def main() -> int:
    """Measure all cases; the exit code is 1 where the bar of four uploads is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), nargs="*", default=list(CASES))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cohort.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], options.one[1], int(options.one[2]), options.scratch)
        return 0
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for algorithm in options.only:
        for place in PLACES:
            found = []
            for cohort in COHORTS:
                command = [sys.executable, __file__, "--one", algorithm, place, str(cohort)]
                command += ["--scratch", str(options.scratch)]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
            upload = max(row["upload"] for row in found)
            row = {"algorithm": algorithm, "place": place, "upload": upload, "peaks": [row["peak"] for row in found]}
            row["children"] = [one["child"] for one in found]  # the largest of the processes that train
            row["uploads"] = (found[1]["peak"] - found[0]["peak"]) / upload
            rows = [old for old in rows if (old["algorithm"], old["place"]) != (algorithm, place)] + [row]
            small, large = (peak / 1e6 for peak in row["peaks"])
            text = f"{small:.0f} MB and {large:.0f} MB, {row['uploads']:.1f} uploads"
            children = " and ".join(f"{child / 1e6:.0f} MB" for child in row["children"])
            print(f"{algorithm}, {place}: {text}; the processes that train {children}", flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["uploads"] > 4 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
