"""The deployed half of docs/four-hospitals.md, as its commands say: TLS, keys, and the numbers of the simulation."""

from __future__ import annotations

import json
import re
import runpy
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
from test_commands import PATIENCE, left, stop

from polyfed import load_run, simulate
from polyfed.deploy.host.processes import free_ports

PAGE = [block for block in blocks("docs/four-hospitals.md") if block.heading == "The same on real machines"]
#: Of the configuration's twenty; a round of the engine takes ten seconds.
ROUNDS = ("--set", "run.rounds=2", "--set", "run.eval_every=2")


def scores(folder: Path, client: int) -> list[list[float]]:
    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["client"] == client]
    return [[row["score ill"], row["score well"]] for row in sorted(rows, key=lambda r: (r["predictor"], r["row"]))]


def test_the_commands_of_the_page_give_the_numbers_of_the_simulation(tmp_path: Path) -> None:
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
