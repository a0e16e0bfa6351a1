"""A state directory belongs to one client process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deploy_toy import nodes
from typer.testing import CliRunner

from polyfed.base.errors import StorageError
from polyfed.cli import app
from polyfed.deploy.client.lock import NAME, in_use


def test_a_second_holder_is_refused_at_once_and_learns_what_to_do(tmp_path: Path) -> None:
    with in_use(tmp_path) as lock:
        lock.name(11, 12)
        started = time.monotonic()
        with (
            pytest.raises(StorageError, match=r"in use by another client \(processes 11, 12\).*`kill 11 12`"),
            in_use(tmp_path),
        ):
            raise AssertionError("both hold it")
        assert time.monotonic() - started < 1
    with in_use(tmp_path):
        assert json.loads((tmp_path / NAME).read_bytes()) == {"processes": [os.getpid()]}


def test_a_second_client_does_not_start(tmp_path: Path) -> None:
    """Catches a second client that waits in silence, or that overwrites the settings of the first."""
    with in_use(tmp_path):
        words = ["deploy", "client", "--server", "127.0.0.1:1", "--client", "0", "--state", str(tmp_path)]
        done = CliRunner().invoke(app, words)
    assert done.exit_code == StorageError.exit_code
    assert "in use by another client" in done.output
    assert not (tmp_path / "node.toml").exists()


def test_a_worker_holds_the_directory_and_so_does_the_orphan_of_a_killed_keeper(tmp_path: Path) -> None:
    """Catches an orphan that goes on training beside the new client."""
    settings = nodes(tmp_path)[100]
    state = Path(settings.state_dir)
    (tmp_path / "node.toml").write_text(settings.to_toml())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def keeper(name: str) -> list[str]:
        return [sys.executable, "-m", "polyfed.deploy.client.worker", str(tmp_path / name), str(tmp_path / "node.toml")]

    def processes() -> list[int]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            known = json.loads((state / NAME).read_text() or "{}") if (state / NAME).exists() else {}
            if len(known.get("processes", [])) == 2:
                return known["processes"]
            time.sleep(0.05)
        raise AssertionError("no worker")

    first = subprocess.Popen(keeper("a"), env=environment, stderr=subprocess.DEVNULL)
    numbers = processes()
    assert numbers[0] == first.pid
    os.kill(numbers[1], signal.SIGSTOP)  # an orphan that does not end when its keeper does
    second = subprocess.run(keeper("b"), env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert f"`kill {numbers[0]} {numbers[1]}`" in second.stderr
    first.kill()
    first.wait()
    with pytest.raises(StorageError, match="If the other client was killed"), in_use(state):
        pass
    os.kill(numbers[1], signal.SIGCONT)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with in_use(state):
                break
        except StorageError:
            time.sleep(0.1)
    else:
        os.kill(numbers[1], signal.SIGKILL)
        raise AssertionError("the orphan stays")
