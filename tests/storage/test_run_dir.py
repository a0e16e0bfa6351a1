"""The run directory: whose it is, what it may hold, and who may read it."""

import os
from pathlib import Path
from typing import Any

import pytest
import running

from polyfed.base.errors import RunDirError, StorageError
from polyfed.rounds import federation
from polyfed.simulation import simulate as simulating
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage.run_dir import RunDir, RunDirInUseError


def test_a_directory_that_this_process_holds_is_refused(tmp_path: Path) -> None:
    """Catches two runs that write into one directory, in one process too."""
    first = RunDir(tmp_path)
    with pytest.raises(RunDirError, match=rf"in use by process {os.getpid()};"):
        RunDir(tmp_path)
    first.close()
    RunDir(tmp_path).close()


def test_a_directory_that_holds_a_run_is_refused_with_the_way_on(tmp_path: Path) -> None:
    """Catches a run that is overwritten."""
    simulate(running.config(run={"rounds": 1}), out=tmp_path)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(RunDirError, match=rf"polyfed resume {tmp_path}"):
        simulate(running.config(run={"rounds": 1}), out=tmp_path)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


def test_a_run_that_another_process_began_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two processes at one study of which the second, while it prepares, misses that the first has begun."""
    others: list[RunDir] = []

    def prepare(config: Any, _: Any = None) -> Any:
        others.append(RunDir(tmp_path))
        (tmp_path / "config.toml").write_text(config.to_toml())
        return federation.prepare(config)

    monkeypatch.setattr(simulating, "prepare", prepare)
    with pytest.raises(RunDirInUseError):
        simulate(running.config(run={"rounds": 1}), out=tmp_path)
    others[0].close()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Catches a run that settles among somebody's files, and sweeps away those that look like its own."""
    mine = tmp_path / "states" / "thesis" / "only-copy.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(RunDirError, match="not empty"):
        simulate(running.config(run={"rounds": 1}), out=tmp_path)
    assert mine.read_text() == "years of work"


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    """Catches a resume that makes an empty run of a mistyped path."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunDirError, match=r"holds no run: it has no config\.toml"):
            resume(folder)
    assert not (tmp_path / "nowhere").exists()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """Catches a traceback instead of an exit code."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot use"):
        simulate(running.config(run={"rounds": 1}), out=tmp_path / "file")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_run_may_be_read_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    """Catches a partition or manifest that the colleague who may read the rest may not."""
    before = os.umask(umask)
    try:
        simulate(running.config(run={"rounds": 1}), out=tmp_path / "run")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"partition.npz", "summary.json", "manifest.json", "rounds.jsonl"} <= found.keys()
    assert found == dict.fromkeys(found, mode)
