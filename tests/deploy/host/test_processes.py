"""Processes of a deployment: all that they started ends with them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from polyfed.deploy.host.commands import Command
from polyfed.deploy.host.processes import ProcessEndedError, Processes, free_ports, listening


def test_processes_end_with_all_that_they_started(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    code += "start_new_session=True); time.sleep(600)"
    processes = Processes(tmp_path)

    def body() -> None:
        with processes:
            processes.start("sleeper", Command(("python", "-c", code)))
            end = time.monotonic() + 20
            while len(processes.marked()) < 2 and time.monotonic() < end:
                time.sleep(0.05)
            assert len(processes.marked()) == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        body()
    assert processes.marked() == []


def test_a_process_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("short", Command(("python", "-c", "print('the reason'); raise SystemExit(3)"))).wait()
        with pytest.raises(ProcessEndedError, match=r"short ended with 3(.|\n)*the reason"):
            processes.check()
        with pytest.raises(ProcessEndedError, match="ended with 1"):
            processes.call(Command(("python", "-c", "raise SystemExit(1)")))


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert not listening(f"127.0.0.1:{ports[0]}")
