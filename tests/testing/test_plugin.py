"""``pytest --algorithm`` in a directory of the user's: what is collected, what passes, what fails, what is said."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import polyfed

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_algorithm.py"
BROKEN = """
from dataclasses import dataclass

from polyfed import exchange
from polyfed.algorithms.fedavg import FedAvg
from polyfed.core.gather import each


@dataclass(frozen=True, kw_only=True)
class Broken(FedAvg):
    exempt = {"learns": "it averages nothing", "examples_weigh": "there is no average"}

    def server_round(self, server, cohort):
        got = yield from exchange(cohort, self.Broadcast(server.model), gather={"model": each})
        return self.Server([*got["model"].values()][-1])


@dataclass(frozen=True, kw_only=True)
class Demanding(FedAvg):
    needed: int

    def check(self, task):
        super().check(task)
        assert str(task.architectures[0]) == "mlp(hidden=(5,))"
"""


def pytest_in(folder, *arguments):
    """Run pytest in ``folder``: installed, the entry point loads the plugin; from source, ``-p`` does."""
    installed = any(point.value == "polyfed.testing.plugin" for point in entry_points(group="pytest11"))
    source = str(Path(polyfed.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    environment.pop("PYTEST_ADDOPTS", None)
    load = [] if installed else ["-p", "polyfed.testing.plugin"]
    command = [sys.executable, "-m", "pytest", *load, "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "mine.py").write_text(BROKEN)
    (tmp_path / "new_algorithm.py").write_text(EXAMPLE.read_text())
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    pass\n")
    return tmp_path


def test_a_good_algorithm_obeys_and_a_broken_one_does_not(folder):
    """Where no path is given the laws are all there is; here the server's, and one test that would pass."""
    laws = ["-k", "answers or examples_weigh or learns or test_mine"]
    run = pytest_in(folder, "--algorithm", "new_algorithm:PrivateHead", "--algorithm", "my_pkg.mine:Broken", *laws)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    failed = {line.split()[1].split("::")[1] for line in run.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_order_of_the_answers_does_not_matter[my_pkg.mine:Broken]"}, run.stdout
    assert "learns does not apply to my_pkg.mine:Broken: it averages nothing" in run.stdout
    assert "1 failed, 5 passed" in run.stdout, run.stdout


def test_beside_tests_of_ones_own(folder):
    """A path that is given is collected too."""
    run = pytest_in(folder, "-q", "--algorithm", "new_algorithm:PrivateHead", "--collect-only", "test_mine.py")
    assert "test_mine.py::test_mine" in run.stdout
    assert "test_learns[new_algorithm:PrivateHead]" in run.stdout


def test_settings_of_ones_own(folder):
    """Networks and required keys come from ``--law-config``."""
    (folder / "laws.toml").write_text('[clients]\nmodels = ["mlp(hidden=(5,))"]\n\n[algorithm]\nneeded = 3\n')
    run = pytest_in(
        folder, "-q", "--algorithm", "my_pkg.mine:Demanding", "--law-config", "laws.toml", "-k", "wire or encoded"
    )
    assert "3 passed" in run.stdout, run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algorithm", "fedavgg"), "did you mean 'fedavg'?"),
        (("--algorithm", "my_pkg.nowhere:X"), "no module 'my_pkg.nowhere'"),
        (("--algorithm", "fedavg", "--law-config", "none.toml"), "no file 'none.toml'"),
    ],
)
def test_bad_options_are_named(folder, arguments, message):
    run = pytest_in(folder, *arguments)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in run.stderr


def test_the_plugin_is_free_of_torch(folder):
    """Who merely has polyfed installed pays nothing in other projects."""
    (folder / "test_other.py").write_text('import sys\n\n\ndef test_other():\n    assert "torch" not in sys.modules\n')
    run = pytest_in(folder, "-q", "test_other.py")
    assert "1 passed" in run.stdout, run.stdout
