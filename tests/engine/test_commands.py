"""The commands as a person types them: `deploy local`, Ctrl-C, `deploy resume`; and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from page import ROOT, blocks

from polyfed import load_run, simulate
from polyfed.deploy.host.processes import free_ports
from polyfed.trained.load import trained_model

#: Seconds until something must have happened; a quiet machine takes a tenth of it.
PATIENCE = 400

PAGE = [block for block in blocks("docs/four-hospitals.md") if block.heading == "The same on real machines"]
#: Of the configuration's twenty; a round of the engine takes ten seconds.
ROUNDS = ("--set", "run.rounds=2", "--set", "run.eval_every=2")

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


def scores(folder: Path, client: int) -> list[list[float]]:
    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["client"] == client]
    return [[row["score ill"], row["score well"]] for row in sorted(rows, key=lambda r: (r["predictor"], r["row"]))]


def test_the_commands_of_the_worked_example_give_the_numbers_of_the_simulation(tmp_path: Path) -> None:
    """Catches a page whose deployed half does not work as it stands, with TLS and keys."""
    runpy.run_path(str(ROOT / "examples" / "four_hospitals.py"))["write"](tmp_path)
    agreed = next(block.text for block in PAGE if block.language == "toml")
    with (tmp_path / "study.toml").open("a") as file:
        file.write("\n" + agreed)
    (port,) = free_ports(1)
    running: list[subprocess.Popen[bytes]] = []
    start: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.STDOUT}

    def wait_for(log: Path, text: str) -> None:
        end = time.monotonic() + PATIENCE
        while text not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert running[-1].poll() is None, log.read_text()
            time.sleep(0.2)

    with ExitStack() as stack:
        stack.callback(stop, running)
        for words in (words for block in PAGE if block.language == "console" for words in block.commands()):
            assert words[0] == "polyfed"
            words = [re.sub(r"(?<=^127\.0\.0\.1:)8000$|^8000$", str(port), word) for word in words[1:]]
            command = [sys.executable, "-m", "polyfed", *words]
            if words[:2] in (["deploy", "server"], ["deploy", "client"]):
                log = tmp_path / f"log-{len(running)}.txt"
                if words[1] == "client":
                    command += ["--port", str(free_ports(1)[0])]
                running.append(subprocess.Popen(command, stdout=stack.enter_context(log.open("wb")), **start))
                wait_for(log, "the server answers" if words[1] == "server" else " runs; its logs are in")
            else:
                command += ROUNDS if words[:2] == ["deploy", "run"] else ()
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
                assert done.returncode == 0, done.stdout + done.stderr
                if words[0] == "predict":
                    assert re.findall("^A[123]", done.stdout, re.MULTILINE) == ["A1", "A2", "A3"]
    assert len(running) == 5
    # Plain files of their own: the simulation reads all hospitals', and computes in this process.
    config = f"{tmp_path}/simulated.toml"
    text = (tmp_path / "study.toml").read_text().replace("rounds = 20\neval_every = 20", "rounds = 2\neval_every = 2")
    Path(config).write_text(text.replace('"hospitals"', json.dumps(str(tmp_path / "hospitals"))))
    here, there = simulate(config, out=tmp_path / "here", progress=False), load_run(tmp_path / "runs" / "deployed")
    assert there.clients["name"] == here.clients["name"] == ["east", "north", "south", "west"]
    for column in ("examples", "accuracy", "metrics.auroc"):
        assert there.clients[column] == here.clients[column]
    for client, name in enumerate(here.clients["name"]):
        (own,) = (tmp_path / f"{name}-state").glob(f"*/client-{client}")
        np.testing.assert_allclose(scores(own, client), scores(tmp_path / "here", client), atol=1e-6)
    taken = torch.export.load(tmp_path / "north-deployed.pt2").module()
    given = [torch.tensor([[148.0, 74.0]], dtype=torch.float64), torch.tensor([[1]])]  # patient A1
    np.testing.assert_allclose(taken(*given), here.model(client="north")(*given), atol=1e-5)
    assert left(tmp_path) == []
