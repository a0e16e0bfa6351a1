"""The processes of a deployment on this machine, which end together whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyfed.base.errors import PolyfedError
from polyfed.deploy.host.commands import Command
from polyfed.deploy.host.parent import with_parent

_MARK = "POLYFED_DEPLOYMENT"


class ProcessEndedError(PolyfedError):
    """A process of the deployment ended before its time."""


def free_ports(count: int) -> list[int]:
    """Return different ports on loopback that are free at the moment."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def free_port(port: int) -> bool:
    """Return whether a process could listen at this port of loopback."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not hold the port
        with contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return True
    return False


def listening(address: str, seconds: float = 0.5) -> bool:
    """Return whether a process listens at host:port."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=seconds):
        return True
    return False


class Processes:
    """Starts processes and ends all of them, with their children, at the end of a ``with`` block.

    A variable in the environment marks each process, and its children inherit it; on Linux a marked process is found
    even where it left its process group.

    Args:
        logs: folder of the logs, one file for each process.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.mark = secrets.token_hex(8)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, tuple[Command, Mapping[str, str] | None, float]] = {}
        self._down: dict[str, float] = {}  # the time since which a process has not stayed up

    def __enter__(self) -> Processes:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()

    def start(self, name: str, command: Command, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; its output goes to a log of its name."""
        with open(self.logs / f"{name}.log", "ab") as out:
            self.running[name] = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**command.full_environment(more), _MARK: self.mark},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others in order
                preexec_fn=with_parent if sys.platform == "linux" else None,
            )
        self._started[name] = (command, more, time.monotonic())
        return self.running[name]

    def tend(self, name: str, *, pause: float = 5.0, patience: float = 300.0) -> str:
        """Restart a process that has ended, as a service manager would; to be called repeatedly.

        Flower refuses a node with a key for about a minute after the same node was killed.

        Args:
            name: the name of a process that this object started.
            pause: seconds from an end to the next start.
            patience: seconds without a process that stays up, after which the method gives up.

        Returns:
            The end of the log, once, when the process has ended; else "".

        Raises:
            ProcessEndedError: the process does not stay up.
        """
        now = time.monotonic()
        command, more, started = self._started[name]
        if self.running[name].poll() is None:
            if now - started > 30.0:
                self._down.pop(name, None)
            return ""
        first = self._down.setdefault(name, now)
        if now - first > patience:
            self.check(name)
        if now - max(started, first) > pause:
            self.start(name, command, more)
        return self.tail(name) if first == now else ""

    def call(self, command: Command, seconds: float = 180.0, more: Mapping[str, str] | None = None) -> str:
        """Run a short command and return its standard output.

        Raises:
            ProcessEndedError: the command failed; the text holds the end of its output.
        """
        environment = {**command.full_environment(more), _MARK: self.mark}
        try:
            return subprocess.run(
                command.argv, env=environment, capture_output=True, text=True, timeout=seconds, check=True
            ).stdout
        except subprocess.TimeoutExpired as error:
            raise ProcessEndedError(f"`{command}` did not end within {seconds:g} s") from error
        except subprocess.CalledProcessError as error:
            raise ProcessEndedError(
                f"`{command}` ended with {error.returncode}: {(error.stdout + error.stderr).strip()[-800:]}"
            ) from error

    def register(self, command: Command) -> str | None:
        """Register a node and return its number; None if the server knows its key already.

        Args:
            command: that of `polyfed.deploy.host.commands.register`.

        Raises:
            ProcessEndedError: the server refuses the key, or does not answer.
        """
        try:
            said = self.call(command)
        except ProcessEndedError as error:
            said = str(error)
        told: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            told = json.loads(said)
        if told.get("node-id"):
            return str(told["node-id"])
        if "already" in said.lower():
            return None
        raise ProcessEndedError(f"`{command}` registered no node: {said.strip()[-800:]}")

    def check(self, *names: str) -> None:
        """Check that these processes, or all, still run.

        Raises:
            ProcessEndedError: a process has ended; the text holds the end of its log.
        """
        for name in names or tuple(self.running):
            code = self.running[name].poll()
            if code is not None:
                raise ProcessEndedError(f"{name} ended with {code}; the end of its log:\n{self.tail(name)}")

    def tail(self, name: str, lines: int = 15) -> str:
        """Return the end of a log."""
        path = self.logs / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def kill(self, name: str) -> None:
        """End one process at once, as a power cut would; its children notice by themselves."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def marked(self) -> list[int]:
        """Return the processes that bear the mark, except this process."""
        if sys.platform != "linux":
            return [process.pid for process in self.running.values() if process.poll() is None]
        others = {int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()} - {os.getpid()}
        return [pid for pid in sorted(others) if _has_variable(pid, f"{_MARK}={self.mark}".encode())]

    def end_all(self, patience: float = 5.0) -> None:
        """Ask all processes to end, then kill those that still run."""
        before: Any = None
        with contextlib.suppress(ValueError):  # only the main thread may; a second Ctrl-C must leave no process behind
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for how in (signal.SIGTERM, signal.SIGKILL):
                end = time.monotonic() + patience
                for pid in self.marked():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, how)
                while time.monotonic() < end and self.marked():  # a process that has ended has no environment
                    time.sleep(0.1)
            for process in self.running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience)
            self.running.clear()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)


def _has_variable(pid: int, variable: bytes) -> bool:
    with contextlib.suppress(OSError):
        return variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False
