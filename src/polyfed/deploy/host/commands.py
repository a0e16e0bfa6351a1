"""Flower's commands, as a person could type them; each `polyfed deploy` command prints the command that it runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyfed.base import files
from polyfed.base.errors import ConfigError
from polyfed.deploy.settings import Deployment

#: The name of the connection in Flower's config.toml.
CONNECTION = "polyfed"

_APP = {
    "pyproject.toml": """\
# The bundle that Flower ships to every node: two names, no code of its own. polyfed itself is installed everywhere.
[project]
name = "polyfed-app"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "polyfed"

[tool.flwr.app.components]
serverapp = "polyfed_app.server_app:app"
clientapp = "polyfed_app.client_app:app"

[tool.flwr.app.config]
run-dirs = ""
""",
    "polyfed_app/__init__.py": '"""The bundle of a polyfed deployment."""\n',
    "polyfed_app/client_app.py": 'from polyfed.flower.app import client_app as app\n\n__all__ = ["app"]\n',
    "polyfed_app/server_app.py": 'from polyfed.flower.app import server_app as app\n\n__all__ = ["app"]\n',
}


@dataclass(frozen=True)
class Command:
    """A command line and the variables that it needs on top of the environment."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        """The command as a person would type it."""
        return shlex.join([f"{key}={value}" for key, value in self.environment.items()] + list(self.words))

    @property
    def argv(self) -> list[str]:
        """The words, with the full path of the program beside this Python.

        Raises:
            ConfigError: Flower is not installed.
        """
        if self.words[0] == "python":
            return [sys.executable, *self.words[1:]]
        program = Path(sys.executable).parent / self.words[0]
        if not program.exists():
            raise ConfigError(
                f"{self.words[0]} is not installed beside {sys.executable}; pip install 'polyfed[deploy]'"
            )
        return [str(program), *self.words[1:]]

    def full_environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment with what the command needs on top."""
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            **self.environment,
            **(more or {}),
        }


def environment(home: Path) -> dict[str, str]:
    """Return Flower's variables; ``home`` is the folder of Flower's own files."""
    return {
        "FLWR_HOME": str(home.absolute()),
        # Flower stays off the network: no telemetry, no check for updates, no installation while it runs.
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def write_app(folder: Path) -> Path:
    """Write the bundle into ``folder/app`` and return that path."""
    for name, text in _APP.items():
        files.write(folder / "app" / name, text.encode())
    return folder / "app"


def write_connection(home: Path, deployment: Deployment) -> None:
    """Write Flower's config.toml, which says how commands reach the server."""
    certificates = deployment.server.certificates
    lines = [
        "[superlink]",
        f'default = "{CONNECTION}"',
        "",
        f"[superlink.{CONNECTION}]",
        f'address = "{deployment.server.address}"',
        "insecure = true"
        if certificates is None
        else f'root-certificates = "{Path(certificates).absolute() / "ca.crt"}"',
    ]
    files.write(home / "config.toml", ("\n".join(lines) + "\n").encode())


def superlink(home: Path, deployment: Deployment, database: Path | None) -> Command:
    """Return the command that starts the server."""
    server = deployment.server
    host, _, port = server.address.rpartition(":")
    words = ["flower-superlink", "--host", host, "--port", port, "--disable-runtime-dependency-installation"]
    if server.certificates is None:
        words.append("--insecure")
    else:
        folder = Path(server.certificates).absolute()
        words += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")]
        words += ["--ssl-keyfile", str(folder / "server.key")]
        if server.node_keys:
            words.append("--enable-supernode-auth")
    words += [] if database is None else ["--database", str(database.absolute())]
    return Command(tuple(words), environment(home))


def supernode(
    home: Path,
    address: str,
    settings: Path,
    *,
    port: int,
    ca: Path | None = None,
    key: Path | None = None,
    worker: Path | None = None,
) -> Command:
    """Return the command that starts a client's node.

    Args:
        home: the folder of Flower's own files at the client.
        address: host:port of the server.
        settings: the client's node.toml.
        port: port on loopback for Flower's own processes at the client; each client on a machine needs another.
        ca: certificate of the authority that signed the server's certificate; None means no TLS.
        key: the node's private key.
        worker: socket of the client's worker; None means that each message has a process of its own.
    """
    words = ["flower-supernode", "--superlink", address, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--insecure"] if ca is None else ["--root-certificates", str(ca.absolute())]
    words += [] if key is None else ["--auth-supernode-private-key", str(key.absolute())]
    told = f'polyfed-settings="{settings.absolute()}"'
    words += ["--node-config", told if worker is None else f'{told} polyfed-worker="{worker}"']
    return Command(tuple(words), environment(home))


def worker(socket: Path, settings: Path) -> Command:
    """Return the command of the process that answers a client's messages."""
    return Command(("python", "-m", "polyfed.deploy.client.worker", str(socket), str(settings.absolute())))


def run(home: Path, app: Path, run_dirs: Sequence[Path]) -> Command:
    """Return the command that submits runs, one after another."""
    told = os.pathsep.join(str(folder.absolute()) for folder in run_dirs)
    return Command(
        ("flwr", "run", str(app.absolute()), CONNECTION, "--format", "json", "-c", f'run-dirs="{told}"'),
        environment(home),
    )


def listing(home: Path) -> Command:
    """Return the command that lists all runs and their bytes."""
    return Command(("flwr", "list", CONNECTION, "--format", "json"), environment(home))


def nodes(home: Path) -> Command:
    """Return the command that lists all nodes."""
    return Command(("flwr", "supernode", "list", CONNECTION, "--format", "json"), environment(home))


def register(home: Path, public_key: Path) -> Command:
    """Return the command that registers a node by its public key."""
    words = ("flwr", "supernode", "register", str(public_key.absolute()), CONNECTION, "--format", "json")
    return Command(words, environment(home))


def stop(home: Path, run_id: str) -> Command:
    """Return the command that ends a run."""
    return Command(("flwr", "stop", run_id, CONNECTION), environment(home))
