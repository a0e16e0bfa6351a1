"""A client's process of its own: what stays in it, and what follows when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from deploy_toy import Run, config, same

from polyfed.deploy.client.worker import WorkerGoneError, ask
from polyfed.deploy.wire.frames import Frame

SECRET = """
from torch import nn

class SecretNet(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.cabalistic = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], 19), nn.ReLU())
        self.occult = nn.Linear(19, num_classes)

    def forward(self, x):
        return self.occult(self.cabalistic(x))
"""


class Worker:
    """Real processes of a client's worker, its keeper above it; the other clients answer in this process."""

    def __init__(self, folder: Path, run: Run, node: int, package: Path | None = None) -> None:
        self.node, self.socket = node, folder / "socket"
        folder.mkdir()
        file = folder / "node.toml"
        file.write_text(run.memory.settings[node].to_toml())
        paths = [path for path in (*sys.path, str(package or "")) if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "polyfed.deploy.client.worker", str(self.socket), str(file)]
        self.keeper = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not self.socket.exists() and time.monotonic() < end:
            time.sleep(0.05)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.terminate()
        self.keeper.wait(timeout=20)

    def ask(self, header: str, body: bytes | None) -> Frame:
        return ask(self.socket, header, body)

    def pid(self) -> int:
        """The process below the keeper that does the work."""
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children")
        return int(children.read_text().split()[0])


def test_a_network_and_its_name_stay_with_the_client(tmp_path: Path) -> None:
    package = tmp_path / "home"
    package.mkdir()
    (package / "occult_nets.py").write_text(SECRET)
    spec = 'occult_nets:SecretNet(classifier="occult")'
    run = Run(tmp_path, config("fedmrl"))
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": spec})
    with Worker(tmp_path / "w", run, 101, package) as worker:

        def elsewhere(message, go):
            if message.node != worker.node:
                return go()
            frame = worker.ask(message.header, message.body)
            run.memory.replies.append(frame)
            return frame

        run.memory.instead = elsewhere
        run.serve()
    assert [row.get("replies") for row in run.rows] == [None, 3, 3]
    assert "occult_nets" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        __import__("occult_nets")
    sent = b"".join(message.header.encode() + (message.body or b"") for message in run.memory.log)
    received = b"".join(header.encode() + (body or b"") for header, body in run.memory.replies)
    at_server = b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    for bytes_ in (sent, received, at_server):
        for word in (b"occult", b"SecretNet", b"cabalistic"):
            assert word not in bytes_
    state = run.private()[1]
    assert any(19 in value.shape for value in state.values())  # it did train
    # Nor is its size told: no FLOPs, steps or memory of client 1.
    rows = [json.loads(line) for line in (run.folder / "clients.jsonl").read_text().splitlines()]
    assert {row["flops"] for row in rows if row["client"] == 1 and "flops" in row} == {None}
    assert {row["model"] for row in rows if row["client"] == 1} == {""}


def test_a_killed_worker_fails_its_message_at_once_and_a_new_one_answers(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl", "run.rounds=3"))
    straight = Run(tmp_path / "straight", config("fedmrl", "run.rounds=1"))
    straight.serve()
    with Worker(tmp_path / "w", run, 101) as worker:

        def through(message, go):
            asked = json.loads(message.header)
            if message.kind == "train" and message.node == 101 and asked["key"][0] == 2:
                asked["config"]["train"]["epochs"] = 100_000  # it works until it is killed
                threading.Timer(1.5, os.kill, (worker.pid(), signal.SIGKILL)).start()
                try:
                    return worker.ask(json.dumps(asked), message.body)
                except WorkerGoneError as error:
                    assert same(run.private()[1], straight.private()[1])
                    return str(error)
            return worker.ask(message.header, message.body) if message.node == worker.node else go()

        run.memory.instead = through
        run.serve()
    assert "ended while it was working" in run.event("failed")["reason"]
    assert [row.get("replies") for row in run.rows] == [None, 3, 2, 3]
