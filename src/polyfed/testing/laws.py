"""The laws. Each is a test, run for every algorithm under test; its docstring says what fault it catches.

Collected by ``pytest --algorithm NAME`` (see `polyfed.testing`), or by a test module of your own that says

    from polyfed.testing.laws import *
    ALGORITHMS = ["my_pkg.my_file:MyMethod"]
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from polyfed.execute.drivers import Sequential
from polyfed.testing.clients import Watched
from polyfed.testing.compare import differences, furthest, tensors
from polyfed.testing.process import Child
from polyfed.testing.subject import Run, Subject, local, memory, play

__all__ = [
    "child",
    "pytest_generate_tests",
    "subject",
    "test_a_client_does_not_depend_on_who_trained_before",
    "test_batched_equals_sequential",
    "test_batched_equals_sequential_in_single_precision",
    "test_broadcast_does_not_depend_on_the_id",
    "test_bystanders_keep_their_state",
    "test_bytes_are_what_is_encoded",
    "test_divergence_is_named",
    "test_equal_answers_count_once",
    "test_examples_weigh",
    "test_idle_rounds_change_nothing",
    "test_inputs_are_not_written_to",
    "test_learns",
    "test_order_of_the_answers_does_not_matter",
    "test_order_of_the_clients_does_not_matter",
    "test_other_process_same_run",
    "test_predicting_writes_nothing",
    "test_private_state_is_never_sent",
    "test_resumed_run_is_the_same_run",
    "test_same_configuration_same_run",
    "test_state_cannot_be_encoded",
    "test_through_the_wire_same_run",
]

BOTH = pytest.mark.parametrize("driver", ["sequential", "batched"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per algorithm: those that the module names as ``ALGORITHMS``, else those of ``--algorithm``."""
    if "subject" in metafunc.fixturenames:
        asked: Sequence[str] = metafunc.config.getoption("polyfed_algorithms")
        names = getattr(metafunc.module, "ALGORITHMS", asked)
        metafunc.parametrize("subject", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The algorithm under test; shared by all laws, so that they share runs."""
    path = request.config.getoption("polyfed_law_config")
    given = tomllib.loads(Path(path).read_text(encoding="utf-8")) if path else None
    return Subject(request.param, tmp_path_factory.mktemp("laws"), given)


@pytest.fixture(scope="session")
def child() -> Generator[Child]:
    """One other process for all algorithms: starting torch takes it a second."""
    process = Child()
    yield process
    process.close()


def same(a: Run[Any], b: Run[Any]) -> None:
    """Two runs are bitwise the same: the server after every round, every private state at the end."""
    assert len(a.servers) == len(b.servers)
    for round_, (left, right) in enumerate(zip(a.servers, b.servers, strict=True)):
        assert not differences(left, right), f"the server's state after round {round_}"
    for client, state in a.privates.items():
        assert not differences(state, b.privates[client]), f"the private state of client {client}"


# ------------------------------------------------------------------------------------------------------- drivers


def test_batched_equals_sequential(subject: Subject) -> None:
    """Stacked clients compute what single ones do: in double precision within 1e-9 of each tensor's norm.

    Catches losses that mix clients or read global state under vmap, BatchNorm statistics that are shared or lost,
    another order of batches, and a batched driver that quietly takes the sequential way.
    """
    one, many = subject.run("sequential"), subject.run("batched")
    fits = one.driver.paths["sequential"]
    assert fits > 0, "no client trained: is a `yield from` missing?"
    assert many.driver.paths["stacked"] == fits, f"{dict(many.driver.paths)} of {fits} fits"
    for round_, (left, right) in enumerate(zip(many.servers, one.servers, strict=True)):
        gap, where = furthest(left, right)
        assert gap <= 1e-9, f"the server after round {round_}: {where} is {gap:.1e} off"
    for client, state in one.privates.items():
        gap, where = furthest(many.privates[client], state)
        assert gap <= 1e-9, f"client {client}: {where} is {gap:.1e} off"


def test_batched_equals_sequential_in_single_precision(subject: Subject) -> None:
    """In single precision drivers drift apart by rounding only.

    One step from a common state stays within 1e-6. After three rounds the median client does so too, and the worst is
    within 5e-3: a ReLU or a mask may flip. Catches what double precision hides, such as sums in half precision.
    """
    federation = subject.federation({"train": {"epochs": None, "steps": 1}})
    step = [play(federation, watch, rounds=1, driver=d) for d, watch in (("sequential", _watch), ("batched", _watch))]
    assert max(_gaps(*step)) <= 1e-6, "one step from a common state"
    gaps = _gaps(subject.run("sequential", "fp32"), subject.run("batched", "fp32"))
    assert statistics.median(gaps) <= 1e-6, f"the median of {sorted(gaps)}"
    assert max(gaps) <= 5e-3, f"the worst of {sorted(gaps)}"


def _watch(federation: Any, driver: Sequential) -> Watched:
    return Watched(federation, driver, memory(federation))


def _gaps(one: Run[Watched], many: Run[Watched]) -> list[float]:
    """For each client how far what it last trained is apart: over the norm of all of it together."""
    last = [{visit.client: visit.report.work.parts for visit in run.clients.visits} for run in (one, many)]
    gaps: list[float] = []
    for client, parts in last[0].items():
        ours, theirs = tensors(parts), tensors(last[1][client])
        pairs = [(ours[path].double(), theirs[path].double()) for path in ours]
        norm = sum(float(a.square().sum()) for a, _ in pairs)
        gaps.append((sum(float((a - b).square().sum()) for a, b in pairs) / norm) ** 0.5 if norm else 0.0)
    return gaps


@BOTH
def test_same_configuration_same_run(subject: Subject, driver: str) -> None:
    """The same configuration gives bitwise the same run.

    Catches draws from a global generator, from the clock or the order of a set, and state kept on ``self`` or in a
    module from one run to the next.
    """
    first = subject.run(driver, "fp32")
    same(play(subject.federation(), local, driver=driver), first)


def test_order_of_the_clients_does_not_matter(subject: Subject) -> None:
    """Clients that run in descending order give bitwise the same run.

    Catches one client's work that leaks into the next one's: a shared optimizer, generator or buffer.
    """
    same(play(subject.federation(), local, driver="backwards"), subject.run("sequential", "fp32"))


@BOTH
def test_a_client_does_not_depend_on_who_trained_before(subject: Subject, driver: str) -> None:
    """Client B after client A keeps and sends what B alone does.

    Catches momentum or Adam moments that leak between clients, and results that depend on who else is in the stack.
    """
    federation = subject.federation()
    a, b = _alike(subject)[:2]
    server = subject.run().servers[1]
    alone = _play_clients(subject, federation, server, [b.id], driver)
    both = _play_clients(subject, federation, server, [a.id, b.id], driver)
    assert both[b.id][0] == 0.0 if driver == "sequential" else True
    for what, (left, right) in {"keeps": (alone, both)}.items():
        gap, where = furthest(left[b.id][1], right[b.id][1])
        limit = 0.0 if driver == "sequential" else 1e-9
        assert gap <= limit, f"what client {b.id} {what}: {where} is {gap:.1e} off after client {a.id} trained"
