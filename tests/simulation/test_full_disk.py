"""A disk that is full, in the middle of a run and really: nothing whole is lost."""

import errno
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import running

from polyfed.base.errors import StorageError
from polyfed.rounds.callbacks import Quiet
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import state_store as store_module


def full(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("which", ["server-round-3", "manifest.json", "client-"])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_run_goes_on_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, store: str
) -> None:
    """Catches a checkpoint that a failed one has spoilt, whichever of its files did not fit any more."""
    rename, rounds = os.replace, {"run": {"store": store}}
    monkeypatch.setattr(store_module, "INLINE", 0)

    def fails(source: Any, target: Any) -> None:
        if which in str(target) and armed:
            raise full(target)
        rename(source, target)

    armed: list[int] = []

    class Arm(Quiet):
        def round_ended(self, row: Any) -> None:
            if row["round"] == 2:
                armed.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(StorageError, match="Make room"):
            simulate(running.config(**rounds), out=tmp_path / "a", callbacks=[Arm()])
    assert json.loads((tmp_path / "a/checkpoint/manifest.json").read_text())["manifest"]["round"] < 3
    resume(tmp_path / "a")
    simulate(running.config(**rounds), out=tmp_path / "b")
    running.same(tmp_path / "a", tmp_path / "b")


def can_mount() -> bool:
    """Whether this process may have a small disk of its own."""
    if os.geteuid() != 0:
        return False
    target = tempfile.mkdtemp()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", target], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", target], check=True)
    os.rmdir(target)
    return done.returncode == 0


if can_mount():  # elsewhere the patched functions above have to do

    @pytest.mark.parametrize("room", [4, 30, 60, 120])
    def test_a_disk_that_is_really_full(tmp_path: Path, room: int) -> None:
        """Catches errors that no patched function raises: buffered logs, the lock, the partition."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            usage = os.statvfs(disk)
            filler = disk / "filler"
            filler.write_bytes(b"\0" * (usage.f_bavail * usage.f_frsize - room * 1024))
            with pytest.raises(StorageError):
                simulate(running.config(run={"eval_every": 1}), out=disk / "run")
            filler.unlink()
            if (disk / "run" / "config.toml").exists():
                resume(disk / "run")
            else:
                simulate(running.config(run={"eval_every": 1}), out=disk / "run")
            simulate(running.config(run={"eval_every": 1}), out=tmp_path / "straight")
            running.same(disk / "run", tmp_path / "straight")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
