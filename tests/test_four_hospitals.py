"""The worked example of docs/four-hospitals.md: a person who follows the page gets what it says, deployed too."""

from __future__ import annotations

import ast
import csv
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from deploy_memory import Memory
from numpy.typing import NDArray
from page import ROOT, blocks
from typer.testing import CliRunner

from polyfed import load_run, simulate
from polyfed.cli import app
from polyfed.config import Config
from polyfed.deploy.server.loop import create, serve
from polyfed.deploy.settings import Deployment, NodeSettings
from polyfed.testing.read_back import read_back

Scores = NDArray[np.float64]
PAGE = list(blocks("docs/four-hospitals.md"))
DEPLOYED = "The same on real machines"
EXAMPLE = str(ROOT / "examples" / "four_hospitals.py")
#: In the order of the clients.
NAMES = ("east", "north", "south", "west")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's files, in the working directory."""
    runpy.run_path(EXAMPLE)["write"](tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def polyfed(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, f"{words}: {result.output}"
    return result.stdout


def plain(text: str) -> list[str]:
    """Lines without the blanks around them."""
    return [line.strip() for line in text.strip().splitlines()]


def answers(text: str) -> list[tuple[str, str]]:
    """The id and the class of each prediction that is among these lines."""
    return [(words[0], words[1]) for words in csv.reader(text.splitlines()) if len(words) == 4]


def said(folder: Path, client: int) -> tuple[list[int], Scores]:
    """The rows that `predictions.parquet` holds of a client, and their scores by the headline predictor."""
    rows = [row for row in pq.read_table(folder / "predictions.parquet").to_pylist() if row["client"] == client]
    rows = [row for row in rows if row["predictor"] == rows[0]["predictor"]]
    return [row["row"] for row in rows], np.array([[row["score ill"], row["score well"]] for row in rows])


def patients(study: Path, client: int, rows: list[int]) -> list[dict[str, str]]:
    """Rows of a hospital's own file."""
    with (study / "hospitals" / f"{NAMES[client]}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return [table[row] for row in rows]


def inputs(rows: list[dict[str, str]]) -> dict[str, NDArray[Any]]:
    """Patients as a program that knows the export's description hands them in."""
    pressure = [float(row["pressure"]) if row["pressure"].isdecimal() else np.nan for row in rows]
    numbers = np.array([pressure, [float(row["age"]) for row in rows]]).T
    return {"numbers": numbers, "categories": np.array([["fm".index(row["sex"])] for row in rows])}


def before(study: Path, client: int) -> int:
    """The number of the hospital's first row among all rows."""
    return sum(len((study / "hospitals" / f"{name}.csv").read_text().splitlines()) - 1 for name in NAMES[:client])


def test_a_person_who_follows_the_page_gets_what_it_says(study: Path) -> None:
    """Catches a command or a line of Python that does not work as the page has it, and what it no longer prints."""
    last = ""
    for block in PAGE:
        if block.heading == DEPLOYED:
            break
        if block.language == "toml":
            assert block.text == (study / "study.toml").read_text()
        elif block.language == "python" and "use.py" in block.words:
            (study / "use.py").write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, "<page>", "exec"), {"__name__": "page"})
        elif block.language == "text" and answers(block.text):
            assert answers(last) == answers(block.text)
        elif block.language == "text" and "no-run" not in block.words:
            assert plain(last) == plain(block.text)
        elif block.language == "console":
            for program, *words in block.commands():
                if program == "polyfed":
                    short = ("--set", "run.rounds=2", "--set", "run.eval_every=2")
                    last = polyfed(*words, *(short if words[0] == "compare" else ()))
                elif words == ["use.py"]:
                    # As where polyfed is not installed.
                    code = "import runpy, sys; sys.modules['polyfed'] = None; runpy.run_path('use.py')"
                    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True)
                    used = done.stdout.decode()
    assert {path.name for path in (study / "runs" / "study").iterdir()} >= {"summary.json", "predictions.parquet"}
    run = load_run("runs/study")
    assert run.clients["name"] == list(NAMES)
    assert min(run.clients["metrics.auroc"]) > 0.85
    alone = polyfed("predict", "runs/study", "new_patients.csv", "--client", "north", "--keep", "id")
    ill = float(alone.splitlines()[1].split(",")[2])
    assert ast.literal_eval(used)["ill"] == pytest.approx(ill, abs=1e-5)
    rows, scores = said(study / "runs" / "study", 1)
    given = inputs(patients(study, 1, [row - before(study, 1) for row in rows]))
    assert np.isnan(given["numbers"]).any(), "a patient of the test has no pressure"
    for output, about in read_back([(study / "north.pt2", given), (study / "north.onnx", given)], study):
        np.testing.assert_allclose(output, scores, atol=1e-5)
        assert (about["name"], about["classes"]) == ("north", ["ill", "well"])


def test_deployed_the_hospitals_have_the_numbers_of_the_simulation(study: Path) -> None:
    """Catches a site that splits, scales, trains or predicts otherwise than its part of the simulation."""
    tables = tomllib.loads((study / "study.toml").read_text())
    (agreed,) = [block.text for block in PAGE if block.language == "toml" and block.heading == DEPLOYED]
    assert plain(polyfed("data", "study.toml", "--agreed")) == plain(agreed)
    tables["run"] |= {"rounds": 3, "eval_every": 3, "driver": "sequential"}
    here = simulate(tables, out=study / "here", progress=False)
    tables["data"] |= tomllib.loads(agreed)["data"]
    create(study / "there", Config.parse(tables), Deployment.load(None, ["rounds.poll=0.01"]))
    sites = {
        100 + k: NodeSettings(
            client=k, state_dir=f"{name}-state", data=f"hospitals/{name}.csv", model=tables["clients"]["models"][k]
        )
        for k, name in enumerate(NAMES)
    }
    serve(study / "there", Memory(sites))
    there = load_run(study / "there")
    assert there.metrics == here.metrics
    for column in ("accuracy", "examples", "metrics.auroc"):
        assert there.clients[column] == here.clients[column]
    cases = []
    for client, name in enumerate(NAMES):
        (own,) = (study / f"{name}-state").glob(f"*/client-{client}")
        rows, scores = said(own, client)
        simulated, expected = said(study / "here", client)
        assert [row + before(study, client) for row in rows] == simulated
        np.testing.assert_array_equal(scores, expected)
        found = patients(study, client, rows)
        with (study / "again.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sex", "age", "pressure"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(found)
        text = polyfed("predict", f"{name}-state", "again.csv").splitlines()[1:]
        np.testing.assert_allclose([[float(cell) for cell in row.split(",")[1:]] for row in text], scores, atol=1e-6)
        if name in ("north", "west"):
            form = "onnx" if name == "west" else "pt2"
            polyfed("export", f"{name}-state", "--format", form, "--out", f"{name}.{form}")
            cases.append((study / f"{name}.{form}", inputs(found), scores))
    outputs = read_back([case[:2] for case in cases], study)
    for (output, _), (_, _, scores) in zip(outputs, cases, strict=True):
        np.testing.assert_allclose(output, scores, atol=1e-5)
