"""The example of a new algorithm runs, is found by its dotted path, and obeys the laws."""

import os
import re
import subprocess
import sys
from pathlib import Path

import polyfed
from polyfed.testing.laws import *  # noqa: F403

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
ALGORITHMS = ["new_algorithm:PrivateHead"]


def test_it_runs_beside_the_baselines(tmp_path, monkeypatch):
    import new_algorithm

    monkeypatch.chdir(tmp_path)
    smaller = ["run.rounds=2", "clients.count=4", 'clients.models=["mlp(hidden=(16,))"]', "train.epochs=1"]
    table = new_algorithm.main(*smaller)
    ours, alone, together = table.lines
    assert ours.label == "new_algorithm:PrivateHead"
    assert alone.costs.up == 0
    assert 0 < ours.costs.up < together.costs.up  # the head stays


def test_its_toml_is_accepted(tmp_path):
    """The lines that its docstring shows are a configuration."""
    text = (ROOT / "examples" / "new_algorithm.py").read_text()
    shown = re.search(r"where mine\.toml says\n\n((?: {8}.*\n|\n)+)", text)
    assert shown is not None
    (tmp_path / "mine.toml").write_text("".join(line[8:] + "\n" for line in shown[1].splitlines()))
    command = [sys.executable, "-m", "polyfed", "validate", str(tmp_path / "mine.toml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(polyfed.__file__).parents[1])}
    run = subprocess.run(command, cwd=ROOT / "examples", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_it_is_short():
    assert len((ROOT / "examples" / "new_algorithm.py").read_text().splitlines()) < 100
