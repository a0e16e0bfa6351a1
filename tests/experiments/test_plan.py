"""The estimate of what a study costs."""

import pytest

from polyfed.config import Config
from polyfed.experiments.catalogue import find
from polyfed.experiments.plan import RATE, work
from polyfed.experiments.reproduce import Job


def test_the_estimate_counts_examples() -> None:
    base = Config.parse(
        {
            "run": {"rounds": 10, "eval_every": 10},
            "data": {"dataset": "cifar10"},
            "clients": {"count": 100, "participation": 0.1},
        }
    )
    assert work(base) == pytest.approx(10 * 10 * 480 + 2 * 0.3 * 120 * 110)
    assert work(base.replace("data", dataset="npz", path="x.npz")) is None
    n100 = [c for c in Job.load(find("fedmrl/table1"), "cpu").study.cells() if "N = 100" in c.setting.title]
    assert sum(work(c.config) or 0 for c in n100) / RATE < 3.3 * 3600
