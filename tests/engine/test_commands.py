"""The commands as a person types them: `deploy local`, Ctrl-C, `deploy resume`; and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from polyfed.deploy.host.processes import free_ports
from polyfed.trained.load import trained_model

#: Seconds until something must have happened; a quiet machine takes a tenth of it.
PATIENCE = 400

CONFIG = """
[run]
rounds = 3
eval_every = 3
threads = 1

[data]
dataset = "digits"

[partition]
samples_per_client = 30

[clients]
models = ["mlp(hidden=(24,))", "mlp(hidden=(16,))"]

[algorithm]
name = "fedmrl"
auxiliary = "mlp(hidden=(12,))"
rep_dim = 8
"""


def left(folder: Path) -> list[str]:
    """Processes that know of the folder."""
    found: list[str] = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and int(path.name) != os.getpid():
            try:
                line = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in line:
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
    return found


def test_local_interrupted_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(CONFIG)
    words = [sys.executable, "-m", "polyfed", "deploy"]
    out = tmp_path / "log.txt"
    with open(out, "wb") as log:
        process = subprocess.Popen(
            [*words, "local", "study.toml", "--clients", "2", "--out", "run"],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A shell ignores Ctrl-C for what it starts in the background, as this suite may have been.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        rounds = tmp_path / "run" / "rounds.jsonl"
        end = time.monotonic() + PATIENCE
        while (len(rounds.read_text().splitlines()) if rounds.exists() else 0) < 2 and process.poll() is None:
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130, out.read_text()
    said = out.read_text()
    assert "$ FLWR_HOME=" in said
    assert "flower-superlink" in said
    assert "flwr run" in said
    assert "joined: client 0" in said
    assert "continue with: polyfed deploy resume run" in said
    assert left(tmp_path) == []
    done = subprocess.run(
        [*words, "resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed: round" in done.stdout
    assert "Flower counts" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [json.loads(line)["round"] for line in rounds.read_text().splitlines()] == [0, 1, 2, 3]
    assert summary["deployed"]["engine"]["total"] > 0
    shown = subprocess.run(
        [*words, "status", "--run", "run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "state finished" in shown.stdout
    assert left(tmp_path) == []


def stop(running: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(running):
        process.send_signal(signal.SIGTERM)
    for process in running:
        process.wait(timeout=PATIENCE)


def test_two_hospitals_and_a_centre_each_with_its_commands(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for k in range(2):
        y = generator.integers(0, 3, 60)
        x = generator.normal(size=(60, 5)) + 3 * y[:, None]
        np.savez(tmp_path / f"hospital-{k}.npz", x=x.astype(np.float32), y=y)
    text = CONFIG.replace('dataset = "digits"', "").replace("rounds = 3\neval_every = 3", "rounds = 1\neval_every = 1")
    (tmp_path / "study.toml").write_text(text + "\n")
    words = [sys.executable, "-m", "polyfed", "deploy"]
    (port,) = free_ports(1)

    def call(*more: str) -> str:
        done = subprocess.run(
            [*words, *more], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("init", "centre", "--port", str(port), "--tls", "--clients", "2")
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        logs = [stack.enter_context(open(tmp_path / f"log-{k}.txt", "wb")) for k in range(3)]
        stack.callback(stop, running)
        start: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen([*words, "server", "--dir", "centre"], stdout=logs[0], **start))
        end = time.monotonic() + PATIENCE
        while b"the server answers" not in (tmp_path / "log-0.txt").read_bytes():
            assert time.monotonic() < end, (tmp_path / "log-0.txt").read_text()
            assert running[0].poll() is None, (tmp_path / "log-0.txt").read_text()
            time.sleep(0.2)
        for k in range(2):
            mine = ["--client", str(k), "--state", f"state-{k}", "--data", f"hospital-{k}.npz"]
            mine += ["--ca", "centre/certificates/ca.crt", "--key", f"centre/keys/client-{k}"]
            mine += ["--port", str(free_ports(1)[0])] + (["--model", "mlp(hidden=(10,))"] if k else [])
            command = [*words, "client", "--server", f"127.0.0.1:{port}", *mine]
            running.append(subprocess.Popen(command, stdout=logs[1 + k], **start))
        assert "client 1 is node" in (tmp_path / "log-0.txt").read_text()
        while not (tmp_path / "state-0" / "in-use.json").exists():
            assert time.monotonic() < end, (tmp_path / "log-1.txt").read_text()
            time.sleep(0.2)
        second = [*words, "client", "--server", f"127.0.0.1:{port}", "--client", "0", "--state", "state-0"]
        refused = subprocess.run(second, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert refused.returncode != 0
        assert "in use by another client" in refused.stderr
        said = call("run", "study.toml", "--dir", "centre", "--out", "run", "--set", "clients.count=2")
        assert "$ FLWR_HOME=" in said
        assert "fedmrl" in said
        listed = call("status", "--dir", "centre", "--run", "run")
        assert listed.count("online") == 2, listed
        assert "state finished" in listed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["clients"] == {"count": 2, "trained": 2, "participations": 2}
    assert summary["accuracy"]["clients"] == 2
    assert summary["deployed"]["kept"] == [0, 1]
    assert [trained_model(tmp_path / f"state-{k}").about["client"] for k in range(2)] == [0, 1]
    assert left(tmp_path) == []
