"""What all tests share: reproducible properties, real data where they are, and no silent skip in CI.

One thread, or as many as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported anywhere, subprocesses included.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from polyfed.testing import plugin

# Tests import these as plain modules; their assertions are to say as much as those of tests.
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py")))

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the plugin may have imported torch already
settings.register_profile("polyfed", deadline=None, derandomize=True, database=None)
settings.load_profile("polyfed")


def pytest_configure(config: pytest.Config) -> None:
    """Where polyfed is not installed but on PYTHONPATH, no entry point loads its plugin."""
    if not config.pluginmanager.has_plugin("polyfed"):
        config.pluginmanager.register(plugin, "polyfed")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets: $POLYFED_DATA, else ``shared/data`` beside this checkout."""
    named = os.environ.get("POLYFED_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set POLYFED_DATA to a folder with mnist, fashion-mnist, cifar10, ...")
    return folder


def _refused(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a skip hides what was not tested: only a missing GPU excuses."""
    if os.environ.get("CI", "").lower() != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
    if "GPU" not in reason:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only a missing GPU excuses: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    _refused(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    _refused(report)
    return report
