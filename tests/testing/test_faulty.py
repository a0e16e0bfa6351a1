"""Each law fails on an algorithm with the fault that it is there for: a law that never fails proves nothing."""

import inspect

import pytest
import torch

from polyfed.base.errors import MessageError
from polyfed.testing import laws
from polyfed.testing.process import Child
from polyfed.testing.subject import Subject
from polyfed.trained.export import export


@pytest.fixture
def subject(request, tmp_path):
    return Subject(f"faulty:{request.param}", tmp_path)


def fault(name, law, message=".", error=AssertionError, **arguments):
    return pytest.param(name, law, message, error, arguments, id=f"{name}-{law.removeprefix('test_')}")


@pytest.mark.parametrize(
    ("subject", "law", "message", "error", "arguments"),
    [
        fault("LastClient", "test_order_of_the_answers_does_not_matter", "in another order"),
        fault("SumNotMean", "test_equal_answers_count_once"),
        fault("Unweighted", "test_examples_weigh"),
        fault("LabelsAlone", "test_labels_are_weighed", "learns the same with"),
        fault("WeightedSum", "test_labels_are_weighed", "off"),
        fault("InPlace", "test_inputs_are_not_written_to", "sent was written to", driver="sequential"),
        fault("AtOnce", "test_order_of_the_replies_does_not_matter", "the server's state after round 1"),
        fault("ZeroWhereNobody", "test_idle_rounds_change_nothing", "model.fc.weight"),
        fault("Momentum", "test_a_client_does_not_depend_on_who_trained_before", driver="sequential"),
        fault("Momentum", "test_order_of_the_clients_does_not_matter"),
        fault("GlobalDraws", "test_same_configuration_same_run", driver="sequential"),
        fault("SendsItAll", "test_private_state_is_never_sent", "100% of its private model"),
        fault("LastButInOrder", "test_order_of_the_answers_does_not_matter", "changing hands"),
        fault("Undriven", "test_batched_equals_sequential", "no client trained"),
        fault("Undriven", "test_learns"),
        fault("UndrivenFit", "test_batched_equals_sequential", "a `yield from` is missing", TypeError),
        fault("Remembers", "test_resumed_run_is_the_same_run"),
        fault("SharedPrivate", "test_bystanders_keep_their_state"),
        fault("Undeclared", "test_broadcast_does_not_depend_on_the_id", "personal_message = True"),
        fault("Fades", "test_numbers_do_not_depend_on_how_many_rounds_follow", "the server's state after round 1"),
        fault("MovesStatistics", "test_predicting_writes_nothing"),
        fault("UpdateLost", "test_learns"),
        fault("CountsCalls", "test_batched_equals_sequential", "the server after round 1"),
        fault("CountsCalls", "test_batched_equals_sequential_in_single_precision"),
        fault("KnowsTheRound", "test_replayed_equals_stacked"),
        fault("ReadsANumber", "test_replayed_equals_stacked", "not all stacked: {'sequential'"),
        fault("SharpensWithTraining", "test_trained_models_say_what_the_trainer_says", "'client': 0, .* off"),
        fault("BehindTheBack", "test_two_workers_same_run", "the server's state after round 1"),
        fault("UndeclaredMessage", "test_through_the_wire_same_run", "got a 'Foreign'", MessageError),
    ],
    indirect=["subject"],
)
def test_a_law_sees_its_fault(subject, law, message, error, arguments, tmp_path, monkeypatch):
    test = getattr(laws, law)
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    arguments |= {name: fixtures[name] for name in inspect.signature(test).parameters if name in fixtures}
    with pytest.raises(error, match=message):
        test(subject, **arguments)


@pytest.mark.parametrize("subject", ["BehindTheBack"], indirect=True)
def test_another_process_shares_nothing(subject):
    child = Child()
    try:
        with pytest.raises(AssertionError, match="the server's state after round 1"):
            laws.test_other_process_same_run(subject, child)
    finally:
        child.close()


def test_a_chain_that_fails_as_onnx_stays_unknown(tmp_path, monkeypatch):
    """Else only the first of the algorithms with such networks would fail."""

    def refuse(model, file, form):
        if form == "onnx":
            raise NotImplementedError("no such operator")
        return export(model, file, form)

    for name, value in (("export", refuse), ("find_spec", lambda _: True), ("_CHAINS", set())):
        monkeypatch.setattr(laws, name, value)
    with pytest.raises(NotImplementedError, match="no such operator"):
        laws.test_trained_models_say_what_the_trainer_says(Subject("fedavg", tmp_path), tmp_path, monkeypatch)
    assert not laws._CHAINS


def test_chains_of_other_types_are_others(tmp_path):
    """Catches an operation that ONNX has for one type being taken as met for another."""
    for dtype in (torch.float32, torch.float64):
        program = torch.export.export(torch.nn.ReLU(), (torch.ones(2, dtype=dtype),))
        torch.export.save(program, tmp_path / f"{dtype}.pt2")
    first, second = (laws._chain(tmp_path / f"{dtype}.pt2") for dtype in (torch.float32, torch.float64))
    assert first != second


def test_every_law_is_listed():
    """A law that ``__all__`` forgets would run for nobody."""
    found = {name for name in vars(laws) if name.startswith("test_")}
    assert found == {name for name in laws.__all__ if name.startswith("test_")}
    assert all(getattr(laws, name).__doc__ for name in found)
