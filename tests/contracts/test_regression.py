"""The laws hold for a regression too, for each algorithm that declares it: the digits are numbers to predict."""

from __future__ import annotations

import pytest

from polyfed.algorithms.catalogue import ALGORITHMS as CATALOGUE
from polyfed.base.errors import ConfigError
from polyfed.config import Config, algorithm_class
from polyfed.testing.laws import (  # noqa: F401 - these laws are collected here
    child,
    pytest_generate_tests,
    test_batched_equals_sequential,
    test_learns,
    test_predicting_writes_nothing,
    test_through_the_wire_same_run,
)
from polyfed.testing.subject import Subject

ALGORITHMS = [name for name in CATALOGUE if "regression" in algorithm_class(name).tasks]
TABLES = {
    # The squared error grows without bound where a cross-entropy is linear: smaller steps, and more of them.
    "run": {"rounds": 10},
    "train": {"lr": 0.005},
    "data": {"task": "regression", "target_offset": 4.5, "target_scale": 3.0},
    "partition": {"kind": "iid", "alpha": None},
}


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    # Clients at different widths are not stacked, so the adaptive one gets a ladder of one step.
    keys = {"algorithm": {"granularities": [9]}} if request.param == "fedmrl-adaptive" else {}
    return Subject(request.param, tmp_path_factory.mktemp("laws"), {**TABLES, **keys})


def test_the_main_algorithms_are_among_them() -> None:
    main = {"standalone", "fedavg", "fedmrl", "fedmrl-e", "fedmrl-adaptive", "lg-fedavg", "fedin"}
    main |= {"fiarse", "fiarse-neuron"}
    main |= {"fedprox", "scaffold", "fednova", "moon", "inclusivefl"}
    assert set(ALGORITHMS) == main


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - set(ALGORITHMS)))
def test_an_algorithm_of_classes_refuses_a_regression(name: str) -> None:
    """Catches a run that trains class numbers as if they were amounts, or a fault that names no way out."""
    tables = {
        "data": {"dataset": "npz", "path": "x.npz", "task": "regression"},
        "partition": {"kind": "iid"},
        "algorithm": {"name": name},
    }
    with pytest.raises(ConfigError, match="cannot train a regression") as caught:
        Config.parse(tables)
    assert len(caught.value.faults) == 1
    assert "fedavg" in caught.value.faults[0]
