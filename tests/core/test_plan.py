"""Schedules: which examples make which steps."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base.rng import Rng
from polyfed.core.plan import Every, LocalSGD, Step

RNG = Rng((0, "test"))


def rows(plan: LocalSGD, examples: int, rng: Rng = RNG) -> list[Step]:
    return list(plan.schedule(examples, rng))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(1, 3))
def test_an_epoch_sees_every_example_once(examples: int, batch: int, epochs: int) -> None:
    """Catches dropped partial batches, repetition, and epochs that run into each other."""
    steps = rows(LocalSGD(epochs=epochs, batch_size=batch), examples)
    alone = examples > 1 and examples % batch == 1
    assert [s.index for s in steps] == list(range(len(steps)))
    by_epoch = [list(group) for _, group in itertools.groupby(steps, key=lambda s: s.index - s.in_epoch)]
    assert len(by_epoch) == epochs
    for epoch in by_epoch:
        assert [s.in_epoch for s in epoch] == list(range(len(epoch)))
        seen = torch.cat([s.rows for s in epoch]).tolist()
        assert len(set(seen)) == len(seen) == examples - alone
        assert set(seen) <= set(range(examples))
        assert all(len(s.rows) == batch for s in epoch[:-1])
        assert alone or len(epoch[-1].rows) == (examples % batch or batch)


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({}, False),
        ({"momentum": 0.5}, True),
        ({"weight_decay": 0.1}, True),
        ({"optimizer": "adam"}, True),
        ({"optimizer": "adamw"}, True),
    ],
)
def test_what_moves_weights_without_a_gradient(settings: dict[str, Any], moves: bool) -> None:
    """Catches momentum, moments or decay that are forgotten; plain SGD moves nothing."""
    assert LocalSGD(epochs=1, clip=1.0, label_smoothing=0.1, **settings).moves_without_gradient is moves


@pytest.mark.parametrize(("examples", "sizes"), [(1, [1]), (2, [2]), (4, [4]), (5, [4]), (6, [4, 2]), (9, [4, 4])])
def test_a_last_batch_of_one_is_left_out(examples: int, sizes: list[int]) -> None:
    """Catches a batch that BatchNorm refuses; an only example is all there is and stays."""
    plan = LocalSGD(epochs=1, batch_size=4)
    assert [len(s.rows) for s in rows(plan, examples)] == sizes
    assert plan.count(examples) == len(sizes)


def test_batches_of_one_leave_nobody_out() -> None:
    """Catches the rule for a last batch of one where all batches are of one: it protects nothing there."""
    seen = torch.cat([s.rows for s in rows(LocalSGD(epochs=1, batch_size=1), 5)])
    assert sorted(seen.tolist()) == list(range(5))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_steps_span_as_many_epochs_as_they_need(steps: int) -> None:
    """Catches a count of steps that stops at the end of the data, or an epoch that is not shuffled anew."""
    plan = LocalSGD(steps=steps, batch_size=4)
    found = rows(plan, 10)
    assert plan.count(10) == len(found) == steps
    assert [s.in_epoch for s in found] == [i % 3 for i in range(steps)]
    epochs = rows(LocalSGD(epochs=3, batch_size=4), 10)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(found, epochs, strict=False))
    assert not torch.equal(epochs[0].rows, epochs[3].rows)


def test_the_order_depends_on_the_key_alone() -> None:
    """Catches draws from a global generator, and two rounds or clients that share their order."""
    plan = LocalSGD(epochs=2, batch_size=8)
    first = rows(plan, 20)
    torch.rand(7)
    torch.manual_seed(99)
    again = rows(plan, 20)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(first, again, strict=True))
    other = rows(plan, 20, RNG.at("client", 1))
    assert not all(torch.equal(a.rows, b.rows) for a, b in zip(first, other, strict=True))
    before = torch.random.get_rng_state()
    rows(plan, 20)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("every", "epochs", "steps"),
    [("never", 0, 0), ("step", 9, 7), ("epoch", 3, 3), ("round", 1, 1), (lambda n: n % 4, 6, 5)],
)
def test_steps_that_are_due_are_counted(every: Every, epochs: int, steps: int) -> None:
    """Catches a count of epochs where the plan counts steps, and of what a function returns."""
    assert LocalSGD(epochs=3, batch_size=4).due(every, 12) == epochs
    assert LocalSGD(steps=7, batch_size=4).due(every, 12) == steps
