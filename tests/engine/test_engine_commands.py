"""The commands as a person types them: `deploy local`, Ctrl-C, `deploy resume`; and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
        )
        rounds = tmp_path / "run" / "rounds.jsonl"
        end = time.monotonic() + 120
        while (len(rounds.read_text().splitlines()) if rounds.exists() else 0) < 2 and process.poll() is None:
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, out.read_text()
    said = out.read_text()
    assert "$ FLWR_HOME=" in said
    assert "flower-superlink" in said
    assert "flwr run" in said
    assert "joined: client 0" in said
    assert "go on with: polyfed deploy resume run" in said
    assert left(tmp_path) == []
    done = subprocess.run(
        [*words, "resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed: round" in done.stdout
    assert "Flower counts" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [json.loads(line)["round"] for line in rounds.read_text().splitlines()] == [0, 1, 2, 3]
    assert summary["deployed"]["engine"]["total"] > 0
    shown = subprocess.run([*words, "status", "--run", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "state finished" in shown.stdout
    assert left(tmp_path) == []
