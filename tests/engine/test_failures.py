"""One deployment with TLS and node keys, and everything that can happen to it: the training goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deploy_toy import config

from polyfed.deploy.host import commands, keys
from polyfed.deploy.host.local import Following, Local
from polyfed.deploy.host.processes import ProcessEndedError, free_ports
from polyfed.deploy.server.loop import create
from polyfed.deploy.settings import Deployment

#: Client 1's own network, which does as files beside it say; nobody else can import it.
OCCULT = """
import os, time
from pathlib import Path
from torch import nn

HERE = Path(__file__).parent

class Cabalistic(nn.Linear):
    def forward(self, x):
        if self.training and (HERE / "raise").exists():
            (HERE / "raise").unlink()
            raise RuntimeError("cabalistic failure")
        if self.training and (HERE / "stall").exists():
            (HERE / "stall").unlink()
            (HERE / "stalled").write_text(str(os.getpid()))
            time.sleep(600)
        return super().forward(x)

class SecretNet(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.flat, self.cabalistic, self.act = nn.Flatten(), Cabalistic(1024, 19), nn.ReLU()
        self.occult = nn.Linear(19, num_classes)

    def forward(self, x):
        return self.occult(self.act(self.cabalistic(self.flat(x))))
"""
#: Three times what a round takes on a busy machine; a round waits so long for a killed node.
RULES = ("rounds.start_timeout=300", "rounds.deadline=60", "rounds.min_clients=2")


class Watched:
    """A run that is looked at until something has happened."""

    def __init__(self, folder: Path, there: Local) -> None:
        self.folder, self.there = folder, there
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.again()

    def again(self) -> None:
        """Before it is submitted anew."""
        self.following = Following(self.folder, self._seen)

    def _seen(self, kind: str, row: dict[str, Any]) -> None:
        (self.events if kind == "event" else self.rows).append(row)

    def until(self, what: Callable[[], bool], seconds: float = 400.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"rounds {[r['round'] for r in self.rows]}; events {self.events[-5:]}"
            self.following.look()
            if "server" in self.there.processes.running:
                self.there.tend()
            time.sleep(0.1)

    def row(self, after: int = -1) -> int:
        """The last round that is over."""
        return max((row["round"] for row in self.rows), default=-1)

    def failed(self, client: int) -> list[str]:
        return [row["reason"] for row in self.events if row["event"] == "failed" and row["client"] == client]

    def fails(self, client: int, seen: int) -> str:
        """Wait for a failure of a client after the first ``seen`` that is not its being slow; its reason."""

        def told() -> list[str]:
            return [reason for reason in self.failed(client)[seen:] if not reason.startswith("no reply within")]

        self.until(lambda: bool(told()))
        return told()[0]

    def answered(self, number: int) -> bool:
        """Whether a round in which so many answered is the last."""
        return bool(self.rows) and self.rows[-1].get("replies") == number


def intruders(there: Local) -> None:
    """Three nodes that must not get in: without a key, with a key that nobody registered, and without TLS."""
    first, second, third = free_ports(3)
    keys.node_key(there.folder / "keys" / "stranger")
    ca = there.folder / "certificates" / "ca.crt"
    address, file = there.deployment.server.address, there.node_file(0)
    arguments: dict[str, dict[str, Any]] = {
        "keyless": {"port": first, "ca": ca},
        "stranger": {"port": second, "ca": ca, "key": there.folder / "keys" / "stranger"},
        "plaintext": {"port": third},
    }
    for name, more in arguments.items():
        command = commands.supernode(there.folder / "intruders" / name, address, file, **more)
        there.processes.start(name, command)


def test_whatever_happens_the_training_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "occult_nets.py").write_text(OCCULT)
    run_dir = tmp_path / "run"
    experiment = create(run_dir, config("fedmrl", "run.rounds=200", "run.eval_every=200"), Deployment.load(None, RULES))
    secret = {1: {"model": 'occult_nets:SecretNet(classifier="occult")'}}
    path = os.pathsep.join(part for part in (str(home), os.environ.get("PYTHONPATH", "")) if part)
    with Local(
        tmp_path / "deployment", 3, tls=True, late=[2], settings=secret, environment={1: {"PYTHONPATH": path}}
    ) as there:
        intruders(there)
        run = Watched(run_dir, there)
        there.submit([run_dir])
        run.until(lambda: run.row() >= 1)
        assert run.rows[1]["cohort"] == [0, 1]

        there.start_client(2)  # late
        (home / "raise").touch()
        assert run.fails(1, seen=0).startswith("ModelError;")  # not what it said: that names a layer
        run.until(lambda: run.answered(3))

        (home / "stall").touch()
        run.until((home / "stalled").exists)
        state_dir = there.node_file(1).parent / "state" / experiment / "client-1" / "pointer.json"
        before, seen = state_dir.read_bytes(), len(run.failed(1))
        os.kill(int((home / "stalled").read_text()), signal.SIGKILL)
        run.fails(1, seen)  # at once, not at the deadline
        assert state_dir.read_bytes() == before or run.answered(3)
        run.until(lambda: run.answered(3))

        there.processes.kill("client-0")
        run.until(lambda: len(run.failed(0)) >= 1)
        there.start_client(0)
        run.until(lambda: run.answered(3))

        done = run.row()
        there.processes.kill("server")
        with pytest.raises(ProcessEndedError):
            run.until(lambda: False)
        last = json.loads((run_dir / "checkpoint" / "manifest.json").read_text())["manifest"]["round"]
        assert last >= done
        there.start_server()
        run.again()
        there.submit([run_dir])
        run.until(lambda: run.row() > last and run.answered(3))
        assert {"event": "resumed", "round": last}.items() <= next(
            row for row in run.events if row["event"] == "resumed"
        ).items()

        listed = json.loads(there.processes.call(commands.nodes(there.home)))["nodes"]
        registered = {row["node-id"] for row in listed}
        assert len(registered) == 3, listed  # the three that were registered, at their old numbers
        assert there.processes.running["keyless"].poll() == 1
        assert there.processes.running["stranger"].poll() == 1
    assert there.processes.marked() == []

    lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in lines] == list(range(len(lines)))
    assert not [row for row in run.events if row["event"] == "lost-state"]
    at_server = [
        *run_dir.rglob("*"),
        *tmp_path.glob("deployment/superlink.db*"),
        *tmp_path.glob("deployment/logs/server*"),
    ]
    for file in at_server:
        if file.is_file():
            for word in (b"occult", b"SecretNet", b"cabalistic"):
                assert word not in file.read_bytes(), file
