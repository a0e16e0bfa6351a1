"""The commands, as far as they go without the engine, and what they write."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError
from polyfed.cli import app
from polyfed.deploy.host import commands
from polyfed.deploy.host.commands import Command
from polyfed.deploy.host.local import Following, engine_bytes
from polyfed.deploy.host.processes import ProcessEndedError, Processes, free_ports, listening
from polyfed.deploy.settings import Deployment, NodeSettings

runner = CliRunner()


def test_help_needs_neither_torch_nor_flower() -> None:
    code = "import sys, polyfed.cli; sys.exit(bool({'torch', 'flwr', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    shown = runner.invoke(app, ["deploy", "--help"])
    for name in ("init", "server", "client", "run", "resume", "status", "local"):
        assert name in shown.output


def test_the_bundle_is_handed_on_without_torch() -> None:
    code = "import sys, polyfed.flower.app, polyfed.deploy.client.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_init_writes_a_deployment_that_loads(tmp_path: Path) -> None:
    done = runner.invoke(app, ["deploy", "init", str(tmp_path / "d"), "--port", "8123"])
    assert done.exit_code == 0, done.output
    found = Deployment.load(tmp_path / "d" / "deploy.toml")
    assert found == Deployment.load(None, ['server.address="127.0.0.1:8123"'])
    bundle = tomllib.loads((tmp_path / "d" / "app" / "pyproject.toml").read_text())
    assert bundle["project"]["dependencies"] == []
    assert bundle["tool"]["flwr"]["app"]["config"] == {"run-dirs": ""}
    again = runner.invoke(app, ["deploy", "init", str(tmp_path / "d")])
    assert again.exit_code == 7


def test_init_with_tls_makes_an_authority_a_certificate_and_keys(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    done = runner.invoke(app, ["deploy", "init", str(folder), "--host", "fl.example.org", "--tls", "--clients", "2"])
    assert done.exit_code == 0, done.output
    ca = x509.load_pem_x509_certificate((folder / "certificates" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "certificates" / "server.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
    for secret in ("certificates/ca.key", "certificates/server.key", "keys/client-0", "keys/client-1"):
        assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600
    private = load_ssh_private_key((folder / "keys" / "client-0").read_bytes(), None)
    public = load_ssh_public_key((folder / "keys" / "client-0.pub").read_bytes())
    assert private.public_key() == public
    found = Deployment.load(folder / "deploy.toml").server
    assert found.node_keys
    assert Path(found.certificates or "") == folder / "certificates"


def test_faults_of_deploy_toml_are_all_told_with_the_nearest_key(tmp_path: Path) -> None:
    (tmp_path / "deploy.toml").write_text('[rounds]\ndedline = 3\nmin_replies = 0\non_error = "ignore"\n[sever]\n')
    with pytest.raises(ConfigError) as found:
        Deployment.load(tmp_path / "deploy.toml")
    told = str(found.value)
    assert "'deadline'" in told
    assert "rounds.min_replies: got 0; expected more than 0" in told
    assert "rounds.on_error" in told
    assert "'server'" in told


def test_node_keys_need_tls() -> None:
    with pytest.raises(ConfigError, match="needs TLS"):
        Deployment.load(None, ["server.node_keys=true"])


def test_node_settings_come_back_as_they_were(tmp_path: Path) -> None:
    told = NodeSettings(
        client=0,
        state_dir="/s",
        data="/a.csv",
        data_options={"label": "y"},
        model="m:N",
        capacity=0.5,
        tell=("scores",),
    )
    (tmp_path / "node.toml").write_text(told.to_toml())
    assert NodeSettings.load(tmp_path / "node.toml") == told
    assert told.tells_scores
    assert not told.tells_costs
    assert not NodeSettings(client=1, state_dir="/s", model="m:N").tells_costs


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


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["run", "x.toml", "--dir", "nowhere"], 2, "holds no deploy.toml"),
        (["resume", "nowhere"], 7, "holds no deployed run"),
        (["status"], 2, "give --dir, --run, or both"),
        (["server", "--dir", "nowhere"], 2, "polyfed deploy init"),
        (["client", "--server", "a:1", "--client", "0", "--state", "s", "--data", "no.csv"], 2, "no such file"),
        (["client", "--server", "a:1", "--client", "0", "--state", "s", "--tell", "secrets"], 2, "tell"),
    ],
)
def test_what_is_missing_is_said(words: list[str], code: int, says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(app, ["deploy", *words])
    assert done.exit_code == code, done.output
    assert says in done.output


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


def test_flowers_own_count_is_found_by_the_number_of_the_run() -> None:
    traffic = '{"inbound-bytes": 3, "outbound-bytes": 4, "total-bytes": 7}'
    listing = f'{{"runs": [{{"run-id": "12", "network-traffic": {traffic}}}]}}'
    assert engine_bytes(listing, "12") == {"inbound": 3, "outbound": 4, "total": 7}
    assert engine_bytes(listing, "13") == {}


def test_the_environment_of_flower_stays_in_its_folder(tmp_path: Path) -> None:
    full = commands.listing(tmp_path).full_environment()
    assert full["FLWR_HOME"] == str(tmp_path)
    assert full["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.parametrize("again", [[], ["yy"], ["yyyyyyyyyyyyyyyyyyyy", "zzzzzzzzzzzzzzzzzzzzzzz"]])
def test_a_log_that_a_resumed_server_cut_is_read_from_the_start_of_a_line(tmp_path: Path, again: list[str]) -> None:
    """Catches half a line that is read as a whole one, after which `polyfed deploy resume` dies of its own log."""
    log = tmp_path / "rounds.jsonl"
    log.write_text("".join(f'{{"round": {k}}}\n' for k in range(4)))
    seen: list[Any] = []
    following = Following(tmp_path, lambda kind, row: seen.append((kind, row)))
    log.write_text('{"round": 0}\n' + "".join(f'{{"{name}": 1}}\n' for name in again))
    assert not following.look()
    with open(log, "a") as file:
        file.write('{"round": 2')
    assert not following.look()
    with open(log, "a") as file:
        file.write("}\n")
    assert not following.look()
    assert seen[-1] == ("row", {"round": 2})
    assert all(kind == "row" and len(row) == 1 for kind, row in seen)
