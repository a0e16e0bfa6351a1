"""The commands of the engine, and the environment that they run in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from polyfed.deploy.host import commands
from polyfed.deploy.settings import Deployment


def test_commands_are_what_flower_takes(tmp_path: Path) -> None:
    rules = Deployment.load(None, ['server.certificates="/c"', "server.node_keys=true"])
    assert str(commands.superlink(tmp_path, rules, tmp_path / "s.db")).endswith(
        "flower-superlink --host 127.0.0.1 --port 8000 --disable-runtime-dependency-installation "
        "--ssl-ca-certfile /c/ca.crt --ssl-certfile /c/server.crt --ssl-keyfile /c/server.key "
        f"--enable-supernode-auth --database {tmp_path}/s.db"
    )
    node = commands.supernode(tmp_path, "fl:8000", Path("/n.toml"), port=9, ca=Path("/ca"), key=Path("/k"))
    assert "--root-certificates /ca --auth-supernode-private-key /k" in str(node)
    assert node.words[-1] == 'polyfed-settings="/n.toml"'
    assert node.environment["FLWR_TELEMETRY_ENABLED"] == "0"


def test_the_environment_of_flower_stays_in_its_folder(tmp_path: Path) -> None:
    full = commands.listing(tmp_path).full_environment()
    assert full["FLWR_HOME"] == str(tmp_path)
    assert full["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
