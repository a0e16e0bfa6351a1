"""Rounds that a run keeps to be looked into: what they hold, after a kill too, and what is refused."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import running
import torch

import polyfed
from polyfed.base.errors import CheckpointError, ConfigError
from polyfed.config import Config
from polyfed.rounds.callbacks import Quiet
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import state_files
from polyfed.storage.run_dir import SavedRun

FEDIN = {"name": "fedin", "feature_batch": 4}


def config(**run: Any) -> Config:
    """Four clients of two depths, whose server has layers and features."""
    return running.config(
        run={"rounds": 3, "eval_every": 3, "checkpoint_every": 2, **run},
        clients={"participation": 1.0, "models": ["in-resnet10-small(width=2)", "in-resnet14-small(width=2)"]},
        algorithm=FEDIN,
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds that keeps the first two and the state before training."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    simulate(config(keep_rounds=(0, 1, 2)), out=folder, progress=False)
    return folder


@pytest.mark.parametrize("round_", [1, 2])
def test_a_kept_round_is_what_a_run_that_ends_there_has(kept: Path, round_: int, tmp_path: Path) -> None:
    """Catches the state of another round, and states that later rounds change."""
    simulate(config(rounds=round_), out=tmp_path / "there", progress=False)
    found = polyfed.kept_round(kept, round_)
    there = SavedRun(tmp_path / "there", found.algorithm.states)
    assert state_files.dump(found.server) == state_files.dump(there.server)
    there.close()
    assert found.round == round_
    assert found.server.bank.keys() == {0, 1, 2, 3}  # pyright: ignore[reportAttributeAccessIssue]
    assert len(found.nets) == 2
    for nets in found.nets.values():
        assert nets["model"](torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_nothing_else_changes_and_a_longer_run_keeps_them(kept: Path, tmp_path: Path) -> None:
    """Catches numbers that depend on what is kept, and kept files that a checkpoint or a resume throws away."""
    simulate(config(), out=tmp_path / "plain", progress=False)
    for log in ("rounds.jsonl", "clients.jsonl"):
        one, other = (running.essence(running.lines(folder / log)) for folder in (tmp_path / "plain", kept))
        assert one == other
    first = simulate(config(rounds=2, keep_rounds=(0, 1)), out=tmp_path / "run", progress=False)
    before = polyfed.kept_round(first.run_dir, 1).server
    resume(first.run_dir, rounds=3, progress=False)
    assert state_files.dump(polyfed.kept_round(first.run_dir, 1).server) == state_files.dump(before)
    files = {path.name for path in (tmp_path / "run" / "checkpoint").glob("server-*")}
    assert files == {f"server-round-{n}.safetensors" for n in (0, 1, 3)}


class Copying(Quiet):
    """Copies a run's directory when round 3 is over, of which no checkpoint is written yet: what a kill would leave."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self.folder, self.copy = folder, copy

    def round_ended(self, row: Mapping[str, Any]) -> None:
        if row["round"] == 3:
            shutil.copytree(self.folder, self.copy)


def test_a_killed_run_keeps_the_same(tmp_path: Path) -> None:
    """Catches a kept round before the checkpoint that a resume forgets, and one after it that it does not make anew."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = config(rounds=4, keep_rounds=(1, 3))
    simulate(settings, out=whole, progress=False, callbacks=[Copying(whole, killed)])
    with pytest.raises(CheckpointError, match=r"state of round 3 \(it keeps the rounds 1\)"):
        polyfed.kept_round(killed, 3)
    resume(killed, progress=False)
    for round_ in (1, 3):
        one, other = (polyfed.kept_round(folder, round_).server for folder in (killed, whole))
        assert state_files.dump(one) == state_files.dump(other)
    running.same(killed, whole)


def test_what_is_refused(kept: Path, tmp_path: Path) -> None:
    """Catches a round that is taken for another, private states of the last round, and a changed file."""
    with pytest.raises(CheckpointError, match=r"state of round 3 \(it keeps the rounds 0, 1, 2\).*run\.keep_rounds"):
        polyfed.kept_round(kept, 3)
    with pytest.raises(ConfigError, match=r"run\.keep_rounds: got 4; expected rounds from 0 to run\.rounds, 3"):
        config(keep_rounds=(1, 4))
    for rounds in ((2, 1), (1, 1)):
        with pytest.raises(ConfigError, match=r"run\.keep_rounds: .*expected rounds in ascending order, each once"):
            config(keep_rounds=rounds)
    found = SavedRun(kept, polyfed.kept_round(kept, 1).algorithm.states, 1)
    with pytest.raises(CheckpointError, match="the server's state of round 1, no private states"):
        found.private(0)
    found.close()
    simulate(config(rounds=1, keep_rounds=(0,)), out=tmp_path / "run", progress=False)
    path = tmp_path / "run" / "checkpoint" / "server-round-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"server-round-0\.safetensors is damaged"):
        polyfed.kept_round(tmp_path / "run", 0)
