"""The settings of a deployment and of a node."""

from __future__ import annotations

import ipaddress
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError
from polyfed.cli import app
from polyfed.deploy.settings import Deployment, NodeSettings

runner = CliRunner()


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


def test_faults_of_rules_name_the_option_and_the_section(tmp_path: Path) -> None:
    """Catches a fault of the command line that a file without faults is blamed for."""
    (tmp_path / "deploy.toml").write_text("[rounds]\npoll = 0\n")
    with pytest.raises(ConfigError) as found:
        Deployment.load(
            tmp_path / "deploy.toml", ["start_timeout=45", "rounds.dedline=3", "rounds", "rounds.max_void=0"]
        )
    for said in (
        "--rule: start_timeout: unknown key; did you mean 'rounds.start_timeout'? known: server, rounds",
        "--rule 'rounds': expected section.key=value, such as rounds.deadline=60",
        "--rule: rounds.dedline: unknown key; did you mean 'deadline'?",
        "--rule: rounds.max_void: got 0",
        f"{tmp_path / 'deploy.toml'}: rounds.poll: got 0",
    ):
        assert len([fault for fault in found.value.faults if fault.startswith(said)]) == 1, found.value.faults


def test_node_keys_need_tls() -> None:
    with pytest.raises(ConfigError, match=r"server\.node_keys: got true without TLS"):
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
