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


class Workers:
    """A real worker process for each client."""

    def __init__(self, folder: Path, run: Run, packages: dict[int, Path]) -> None:
        self.sockets: dict[int, Path] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        for node, settings in run.memory.settings.items():
            file, socket = folder / f"{node}.toml", folder / f"{node}.sock"
            file.write_text(settings.to_toml())
            paths = [path for path in (*sys.path, str(packages.get(node, ""))) if path]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            command = [sys.executable, "-m", "polyfed.deploy.client.worker", str(socket), str(file)]
            self.processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
            self.sockets[node] = socket
        end = time.monotonic() + 60
        while not all(path.exists() for path in self.sockets.values()) and time.monotonic() < end:
            time.sleep(0.05)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=20)

    def worker(self, index: int) -> int:
        """The process below a keeper that does the work."""
        pid = self.processes[index].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_network_and_its_name_stay_with_the_client(tmp_path: Path) -> None:
    package = tmp_path / "home"
    package.mkdir()
    (package / "occult_nets.py").write_text(SECRET)
    spec = 'occult_nets:SecretNet(classifier="occult")'
    run = Run(tmp_path, config("fedmrl"))
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": spec})
    with Workers(tmp_path / "w", run, {101: package}) as workers:

        def elsewhere(message, go):
            frame = ask(workers.sockets[message.node], message.header, message.body)
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
    assert {row["flops"] for row in rows if row["client"] == 1 and "flops" in row} == {0}
    assert {row["model"] for row in rows if row["client"] == 1} == {""}


def test_a_killed_worker_fails_its_message_at_once_and_a_new_one_answers(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl", "run.rounds=3"))
    straight = Run(tmp_path / "straight", config("fedmrl", "run.rounds=1"))
    straight.serve()
    with Workers(tmp_path / "w", run, {}) as workers:

        def through(message, go):
            asked = json.loads(message.header)
            if message.kind == "train" and message.node == 101 and asked["key"][0] == 2:
                asked["config"]["train"]["epochs"] = 100_000  # it works until it is killed
                pid = workers.worker(1)
                threading.Timer(1.5, os.kill, (pid, signal.SIGKILL)).start()
                try:
                    return ask(workers.sockets[101], json.dumps(asked), message.body)
                except WorkerGoneError as error:
                    assert same(run.private()[1], straight.private()[1])
                    return str(error)
            return ask(workers.sockets[message.node], message.header, message.body)

        run.memory.instead = through
        run.serve()
    assert "ended while it was working" in run.event("failed")["reason"]
    assert [row.get("replies") for row in run.rows] == [None, 3, 2, 3]
