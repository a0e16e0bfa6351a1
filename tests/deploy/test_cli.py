"""The commands of a deployment: what they load, and what they say when something is missing."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_toy import Run, config
from typer.testing import CliRunner

from polyfed.cli import app
from polyfed.config import Config
from polyfed.deploy import cli as commands

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


def test_resume_gives_a_run_more_rounds_before_it_is_submitted(tmp_path: Path, monkeypatch) -> None:
    """Catches rounds that are passed over, and a run that becomes longer although the command fails."""
    run = Run(tmp_path, config("fedavg"))

    def found() -> int:
        return Config.load(run.folder / "config.toml").run.rounds

    words = ["deploy", "resume", str(run.folder), "--rounds"]
    done = runner.invoke(app, [*words, "5"])
    assert (done.exit_code, found()) == (2, 2)
    assert "--dir: missing" in done.output
    submitted: list[int] = []
    monkeypatch.setattr(commands, "_submit", lambda folder, run_dir: submitted.append(found()))
    assert runner.invoke(app, [*words, "5", "--dir", str(tmp_path)]).exit_code == 0
    assert submitted == [5]
    done = runner.invoke(app, [*words, "3", "--dir", str(tmp_path)])
    assert (done.exit_code, submitted) == (2, [5])
    assert "got 3; the run has 5 rounds" in done.output


def test_an_interrupted_resume_says_how_to_go_on(tmp_path: Path, monkeypatch) -> None:
    """Catches a command that lacks the folder of the deployment, without which it is refused."""
    run = Run(tmp_path, config("fedavg"))

    def interrupted(folder: Path, run_dir: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_submit", interrupted)
    done = runner.invoke(app, ["deploy", "resume", str(run.folder), "--dir", str(tmp_path)])
    assert done.exit_code == 130
    assert f"continue with: polyfed deploy resume {run.folder} --dir {tmp_path}\n" in done.output


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


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        words = ["--server", "127.0.0.1:1", "--client", "0", "--state", str(tmp_path / "s"), "--port", port]
        done = runner.invoke(app, ["deploy", "client", *words])
    assert done.exit_code == 2, done.output
    assert f"port {port} of 127.0.0.1 is in use; give another with --port" in done.output


def test_local_deals_the_data_before_it_starts_a_process(tmp_path: Path, monkeypatch) -> None:
    """Catches a server that waits for clients of which each refuses the same data."""
    (tmp_path / "a.csv").write_text(
        "age,site,ill\n" + "".join(f"{k},{'ab'[k % 2]},{'yn'[k % 3 == 0]}\n" for k in range(40))
    )
    (tmp_path / "a.toml").write_text(
        '[data]\ndataset = "csv"\npath = "a.csv"\noptions = { label = "ill", group = "site" }\n'
        '[partition]\nkind = "natural"\n[clients]\ncount = 2\nmodels = ["mlp"]\n[algorithm]\nname = "fedavg"\n'
    )
    started: list[int] = []
    monkeypatch.setattr(commands, "_play_locally", lambda run_dir, clients, tls: started.append(clients))
    words = ["deploy", "local", str(tmp_path / "a.toml"), "--out", str(tmp_path / "run"), "--clients"]
    done = runner.invoke(app, [*words, "3"])
    assert (done.exit_code, started) == (2, []), done.output
    assert "2" in done.output
    assert not (tmp_path / "run").exists()
    done = runner.invoke(app, [*words, "2"])
    assert (done.exit_code, started) == (0, [2]), done.output


def test_an_option_of_the_reader_without_a_value_is_named(tmp_path: Path) -> None:
    words = ["deploy", "client", "--server", "a:1", "--client", "0", "--state", str(tmp_path / "s")]
    done = runner.invoke(app, [*words, "--data-option", "label"])
    assert done.exit_code == 2
    assert "--data-option 'label': expected key=value, such as label=ill" in done.output
