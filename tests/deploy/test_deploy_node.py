"""A client's side alone: state that is of before or of after, one answer to one request, and nothing told unasked."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_toy import Run, config, nodes, same
from safetensors.torch import load_file

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.base.errors import MessageError, StorageError
from polyfed.base.rng import Rng
from polyfed.config import load_algorithm
from polyfed.core.message import State, decode, encode
from polyfed.deploy.client.node import answer
from polyfed.deploy.client.state_dir import ClientStateDir
from polyfed.deploy.client.worker import WorkerGoneError, ask
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import ReplyHeader, RequestHeader, TaskFacts

EXPERIMENT = "test-1"
SHAPE = (1, 16, 16)


def facts(settings: NodeSettings) -> TaskFacts:
    header, _ = answer(
        headers.dump(RequestHeader(kind="describe", experiment=EXPERIMENT, config=config().to_dict())), None, settings
    )
    about = headers.load(ReplyHeader, header).about
    assert about is not None
    return TaskFacts(input_shape=about.input_shape, num_classes=about.num_classes, architectures=())


def train(settings: NodeSettings, round_: int, **more: Any) -> tuple[str, bytes]:
    """A request to train, and its body."""
    from polyfed.deploy.client.local_setup import task_of

    told = config()
    task = facts(settings)
    algorithm = load_algorithm(told.algorithm.name, told.algorithm.keys)
    server = algorithm.init_server(task_of(told, task), Rng((0, "server")))
    body = encode(FedMRL.Broadcast(server.G))
    fields = {"kind": "train", "experiment": EXPERIMENT, "key": (round_, 1, 1), "client": settings.client}
    request = RequestHeader(**fields, config=told.to_dict(), task=task, **more)
    return headers.dump(request), body


def kept(settings: NodeSettings) -> dict[tuple[int, ...], dict[str, torch.Tensor]]:
    folder = Path(settings.state_dir) / EXPERIMENT / f"client-{settings.client}"
    if not (folder / "pointer.json").exists():
        return {}
    entries = json.loads((folder / "pointer.json").read_text())["entries"]
    return {tuple(entry["key"]): load_file(folder / entry["state"][0]) for entry in entries}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("moment", ["received", "trained"])
def test_an_exception_before_the_end_leaves_the_state_of_before(moment: str, tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    before = kept(settings)

    def stop(now: str) -> None:
        if now == moment:
            raise StoppedError

    told = {"since": (1, 1, 1), "settled": (1, 1, 1)}
    header, body = answer(*train(settings, 2, **told), settings, wait=stop)
    assert headers.load(ReplyHeader, header).error == "Error; its text is in the client's log"
    assert body is None
    assert kept(settings).keys() == before.keys()
    assert same(kept(settings)[1, 1, 1], before[1, 1, 1])


@pytest.mark.parametrize(("moment", "after"), [("received", False), ("trained", False), ("kept", True)])
def test_a_kill_leaves_the_state_of_before_or_of_after_and_never_less(moment: str, after: bool, tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    header, body = train(settings, 2, since=(1, 1, 1), settled=(1, 1, 1))
    (tmp_path / "header").write_text(header)
    (tmp_path / "body").write_bytes(body)
    (tmp_path / "node.toml").write_text(settings.to_toml())
    code = f"""
import os, signal
from pathlib import Path
from polyfed.deploy.client.node import answer
from polyfed.deploy.settings import NodeSettings
def stop(now):
    if now == {moment!r}:
        os.kill(os.getpid(), signal.SIGKILL)
here = Path({str(tmp_path)!r})
answer((here / "header").read_text(), (here / "body").read_bytes(), NodeSettings.load(here / "node.toml"), wait=stop)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert ((2, 1, 1) in kept(settings)) is after
    assert (1, 1, 1) in kept(settings)
    again, up = answer(header, body, settings)
    assert headers.load(ReplyHeader, again).error is None
    other = NodeSettings(client=0, state_dir=str(tmp_path / "other"))
    answer(*train(other, 1), other)
    _, expected = answer(header, body, other)
    assert up == expected
    assert same(kept(settings)[2, 1, 1], kept(other)[2, 1, 1])


def test_a_repeated_request_is_answered_once(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    asked = train(settings, 1)
    moments: list[str] = []
    first = answer(*asked, settings, wait=moments.append)
    second = answer(*asked, settings, wait=moments.append)
    assert moments.count("trained") == 1
    assert first[1] == second[1]


def test_another_message_under_the_same_key_is_no_repetition(tmp_path: Path) -> None:
    """Catches a server that was resumed without its last round, and is given the answer to its earlier message."""
    settings = nodes(tmp_path)[100]
    header, body = train(settings, 1)
    moments: list[str] = []
    first = answer(header, body, settings, wait=moments.append)
    G = {name: 0.5 * value for name, value in decode(body, FedMRL.Broadcast).G.items()}  # noqa: N806
    second = answer(header, encode(FedMRL.Broadcast(G)), settings, wait=moments.append)
    assert moments.count("trained") == 2
    assert first[1] != second[1]


def test_a_void_round_is_trained_from_the_state_that_counts(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    answer(*train(settings, 2, since=(1, 1, 1), settled=(1, 1, 1)), settings)
    _, third = answer(*train(settings, 3, since=(1, 1, 1), settled=(1, 1, 1)), settings)
    assert set(kept(settings)) == {(1, 1, 1), (3, 1, 1)}
    _, fourth = answer(*train(settings, 4, since=(3, 1, 1), settled=(3, 1, 1)), settings)
    assert third != fourth
    assert set(kept(settings)) == {(3, 1, 1), (4, 1, 1)}


def test_a_state_that_was_lost_is_told(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    header, _ = answer(*train(settings, 5, since=(4, 1, 1), settled=(4, 1, 1)), settings)
    assert headers.load(ReplyHeader, header).lost is True


def test_private_state_is_the_owners_alone(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    root = Path(settings.state_dir)
    for folder in (root, root / EXPERIMENT, root / EXPERIMENT / "client-0"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = [path for path in folder.iterdir() if path.name.startswith(("state-", "reply-", "pointer"))]
    assert len(kept) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", "A", "."])
def test_the_name_of_an_experiment_is_no_path(name: str, tmp_path: Path) -> None:
    header = json.dumps({"polyfed": 1, "kind": "describe", "experiment": name, "key": [0, 0, 0], "config": {}})
    with pytest.raises(MessageError, match="experiment"):
        answer(header, None, nodes(tmp_path)[100])


def test_another_holder_of_the_state_is_waited_for_and_then_told(tmp_path: Path) -> None:
    state_dir = ClientStateDir(tmp_path, EXPERIMENT, 0, (State,))
    other = ClientStateDir(tmp_path, EXPERIMENT, 0, (State,))
    with state_dir.held(), pytest.raises(StorageError, match="held by another process"), other.held(0.2):
        raise AssertionError("both hold it")


def test_a_request_for_another_client_is_refused(tmp_path: Path) -> None:
    settings = nodes(tmp_path)
    header, body = train(settings[100], 1)
    told, _ = answer(header, body, settings[101])
    assert (headers.load(ReplyHeader, told).error or "").startswith("MessageError")


def test_a_client_that_tells_nothing_sends_the_declared_message_alone(tmp_path: Path) -> None:
    settings = nodes(tmp_path, tell=())[100]
    header, body = answer(*train(settings, 1, score=True), settings)
    told = headers.load(ReplyHeader, header)
    assert body is not None
    assert told.score is None
    assert told.work == headers.WorkReport()
    assert told.seconds == {}, "the time of the work is the size of the network"
    run = Run(tmp_path / "whole", config(), tell=())
    assert run.serve()["accuracy"] == {"best": None}


def test_own_data_are_read_where_they_lie(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for client in range(3):  # the third has no row of the last class
        y = generator.integers(0, 3 if client < 2 else 2, 60)
        x = generator.normal(size=(60, 5)) + 3 * y[:, None]
        np.savez(tmp_path / f"hospital-{client}.npz", x=x.astype(np.float32), y=y)
    run = Run(tmp_path, config("fedmrl", 'clients.models=["mlp(hidden=(8,))"]'))
    run.memory.settings = {
        node: settings.model_copy(update={"data": str(tmp_path / f"hospital-{settings.client}.npz")})
        for node, settings in run.memory.settings.items()
    }
    summary = run.serve()
    assert summary["accuracy"]["clients"] == 3
    assert [row.get("replies") for row in run.rows] == [None, 3, 3]


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


def test_an_algorithm_that_must_know_the_network_refuses_a_private_one(tmp_path: Path) -> None:
    from polyfed.base.errors import ModelError

    run = Run(tmp_path, config("fedavg"))
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": "mlp(hidden=(24,))"})
    with pytest.raises(ModelError, match="private networks"):
        run.serve()


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
