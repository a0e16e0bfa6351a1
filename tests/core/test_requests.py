"""Coroutines: requests are answered in order, and one that nobody drove is refused under both drivers."""

from collections.abc import Generator
from typing import Any

import pytest
import torch

from polyfed.base.rng import Rng
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.gather import Gathered
from polyfed.core.message import Message, Nothing
from polyfed.core.net import Net
from polyfed.core.requests import drive, each, exchange, finished, fit
from polyfed.execute.drivers import Batched, Sequential
from polyfed.execute.placement import Placement

PLACE = Placement(torch.device("cpu"))


class Note(Message):
    n: int


def asks(*questions: Any) -> Generator[Any, Any, tuple[Any, ...]]:
    answers = []
    for question in questions:
        answers.append((yield question))
    return tuple(answers)


def test_requests_are_answered_in_order() -> None:
    """Catches an answer that reaches the wrong request."""
    assert drive(asks(1, 2, 3), lambda q: q * 10) == (10, 20, 30)


def inner() -> Generator[Any, Any, int]:
    return (yield 1)


def forgets() -> Generator[Any, Any, tuple[Any, Any]]:
    yield 0
    return Nothing(), inner()


def forgets_everything() -> tuple[Any, Any]:
    return Nothing(), inner()


def test_a_forgotten_yield_from_is_refused() -> None:
    """Catches the silent no-op: a client that seems to have trained and has not."""
    with pytest.raises(TypeError, match=r"undriven coroutine inner.*yield from"):
        drive(forgets(), lambda q: q)
    with pytest.raises(TypeError, match="undriven"):
        finished(inner())


@pytest.mark.parametrize("driver", [Sequential(PLACE), Batched(PLACE)], ids=["sequential", "batched"])
def test_a_forgotten_yield_from_is_refused_where_it_was_the_only_one(driver: Sequential) -> None:
    """Catches the same in a method that has no other yield, and so is no coroutine at all."""
    with pytest.raises(TypeError, match="undriven"):
        driver.play({0: forgets_everything()})  # type: ignore[dict-item]


@pytest.mark.parametrize("driver", [Sequential(PLACE), Batched(PLACE)], ids=["sequential", "batched"])
def test_a_client_that_asks_for_nothing_is_a_client(driver: Sequential) -> None:
    """Catches a driver that needs a yield: a method without one returns its value at once."""
    out = driver.play({3: (Nothing(), Note(1)), 1: (Nothing(), None)})  # type: ignore[dict-item]
    assert list(out) == [1, 3]
    assert out[3].upload == Note(1)
    assert out[1].upload is None


@pytest.mark.parametrize("driver", [Sequential(PLACE), Batched(PLACE)], ids=["sequential", "batched"])
def test_a_client_may_not_ask_for_what_is_the_servers(driver: Sequential) -> None:
    """Catches a client that exchanges: clients talk to the server alone."""
    cohort = Cohort((ClientInfo(0),), 1, 1, Rng((0,)))
    with pytest.raises(TypeError, match="requested Exchange; expected fit or reduce"):
        driver.play({0: exchange(cohort, None)})  # type: ignore[dict-item]


def test_exchange_asks_each_client_of_the_cohort_once() -> None:
    """Catches a message to the wrong client, and a broadcast that is built anew for each."""
    cohort = Cohort((ClientInfo(1), ClientInfo(4)), 1, 1, Rng((0,)))
    request = next(exchange(cohort, lambda client: Note(client.id)))
    assert request.down == {1: Note(1), 4: Note(4)}
    one = Note(9)
    assert all(message is one for message in next(exchange(cohort, one)).down.values())
    assert next(exchange(cohort, None)).down == {1: None, 4: None}
    by_client = {4: Note(1), 1: Note(7)}
    assert next(exchange(cohort, by_client)).down == by_client


def test_exchange_brings_back_what_it_is_sent() -> None:
    """Catches declarations that are lost on the way, and totals that are not what the driver answers."""
    cohort = Cohort((ClientInfo(1),), 1, 1, Rng((0,)))
    steps = exchange(cohort, None, gather={"n": each})
    assert next(steps).gather == {"n": each}
    assert next(exchange(cohort, None)).gather == {}
    gathered = Gathered({"n": {1: 5}}, cohort.clients)
    assert drive(exchange(cohort, None, gather={"n": each}), lambda request: gathered) is gathered


def test_fit_takes_a_loss_or_a_gradient() -> None:
    """Catches a fit that trains nothing, or silently prefers one of two."""
    for keys in ({}, {"loss": len, "gradient": len}):
        with pytest.raises(TypeError, match="exactly one"):
            next(fit(None, {}, **keys))  # type: ignore[arg-type]


def test_a_part_without_a_model_says_so() -> None:
    """Catches an AttributeError on None deep inside a loss."""
    net = Net(None, {"a": torch.ones(1)})
    assert float(net["a"]) == 1.0
    with pytest.raises(TypeError, match=r"Algorithm\.models\(\) does not name it"):
        net(torch.ones(1))
