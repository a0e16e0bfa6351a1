"""Which clients share a stack, which run alone, and who is told why."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from fits import FP32, FP64, PLANS, a_loss, check, dropping, model, normed, request

from polyfed.algorithms.fedavg import FedAvg
from polyfed.core.algorithm import Task
from polyfed.core.clients import ClientInfo
from polyfed.core.requests import Fit
from polyfed.execute import drivers
from polyfed.execute.choice import Chosen, ExecutionChoice, ExecutionName
from polyfed.execute.drivers import Batched, make_driver
from polyfed.execute.local_training import run_fit
from polyfed.execute.replay import Replays
from polyfed.execute.stacked import run_stacked, signature, why_not
from polyfed.models.catalogue import ModelSpec
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store


def coroutines(fits: list[Fit]) -> dict[int, Any]:
    def ask(asked: Fit) -> Any:
        fitted = yield asked
        return fitted, None

    return {asked.client.info.id: ask(asked) for asked in fits}


def test_stacks_are_really_taken_and_single_clients_run_alone() -> None:
    """Catches a batched driver that quietly runs everything in turn."""
    net = model()
    fits = [request(PLANS["plain"], k=k, net=net) for k in range(3)]
    fits.append(request(PLANS["plain"], k=3, net=model(normed), lr={"model": 0.7}))
    driver = Batched(FP32)
    out = driver.play(coroutines(fits))
    assert driver.paths == {"stacked": 3, "sequential": 1}
    assert list(out) == [0, 1, 2, 3]


def test_networks_that_draw_random_numbers_run_alone_and_the_reason_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches dropout whose stacked draws would differ, and a log that repeats itself every round."""
    net = model(dropping)
    assert net.random
    fits = [request(PLANS["plain"], k=k, net=net) for k in range(3)]
    assert "draws random numbers" in (why_not(fits[0]) or "")
    driver = Batched(FP32)
    with caplog.at_level(logging.INFO, "polyfed"):
        first = driver.play(coroutines(fits))
        driver.play(coroutines(fits))
    assert driver.paths == {"sequential": 6}
    assert [r.message for r in caplog.records if r.levelno == logging.INFO].count(
        "clients run one by one: " + str(why_not(fits[0]))
    ) == 1
    for asked in fits:
        mine: Any = first[asked.client.info.id].private
        check(mine.parts, run_fit(asked, FP32).parts, 0.0)


@pytest.mark.parametrize(
    ("driver", "chosen", "path"),
    [
        ("auto", Chosen("stacked", 8), "stacked"),
        ("auto", Chosen("stacked", 1), "sequential"),
        ("auto", Chosen("channels-last"), "channels-last"),
        ("auto", Chosen("sequential"), "sequential"),
        ("auto", None, "sequential"),
        ("batched", Chosen("sequential"), "stacked"),
        ("sequential", Chosen("stacked", 8), "sequential"),
    ],
)
def test_auto_does_what_was_chosen_and_others_their_own(driver: str, chosen: Chosen | None, path: str) -> None:
    """Catches a choice that is made and not followed, and one that reaches a driver which does not choose."""
    federation = toy.federation(FedAvg(), models=("cnn5",), shape=(1, 16, 16), sizes=(4, 4))
    choice = None if chosen is None else ExecutionChoice(lambda client: chosen)
    works = make_driver(driver, FP32, choice=choice)
    clients = LocalClients(federation, works, Store(Path("-"), (), resident=True))
    server = federation.algorithm.init_server(federation.task, federation.rng)
    play_round(federation, server, draw_cohort(federation, 1), clients, works)
    assert works.paths == {path: 2}


@pytest.mark.parametrize("layout", ["sequential", "channels-last"])
def test_clients_are_tested_in_the_layout_of_their_kind(layout: ExecutionName) -> None:
    """Catches tests in the layout of another kind, or of training where that is stacked."""
    choice = ExecutionChoice(
        lambda client: Chosen("stacked", 8, layout if client.architecture == "a" else "sequential")
    )
    auto = make_driver("auto", FP32, choice=choice)
    assert auto.testing(ClientInfo(0, 1.0, "a")).channels_last is (layout == "channels-last")
    assert auto.testing(ClientInfo(0, 1.0, "b")).channels_last is False
    for other in ("sequential", "batched"):
        assert make_driver(other, FP32, choice=choice).testing(ClientInfo(0, 1.0, "a")) == FP32


def test_the_networks_of_a_server_are_tested_in_the_layout_of_their_kind() -> None:
    """Catches tests of networks of images with the channels outermost, which take 1.5 times as long."""
    image, flat = (3, 16, 16), (8,)
    images = {"model": Task(input_shape=image, num_classes=4).build(ModelSpec.parse("resnet8(width=2)"))}
    features = {"model": Task(input_shape=flat, num_classes=4).build(ModelSpec.parse("mlp(hidden=(4,))"))}
    auto = make_driver("auto", FP32)
    assert [auto.testing_server(models).channels_last for models in (images, features)] == [True, False]
    assert make_driver("sequential", FP32).testing_server(images) == FP32


def accounts(fits: list[Fit]) -> list[Any]:
    """An empty account for each."""
    return [drivers._Account() for _ in fits]  # pyright: ignore[reportPrivateUsage]


def test_a_stack_takes_no_more_than_its_memory_and_computes_the_same() -> None:
    """Catches groups that are as large as the cohort, whatever it takes."""
    net = model()
    fits = [request(PLANS["momentum"], k=k, net=net, dtype=torch.float64) for k in range(5)]
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drivers, "run_stacked", lambda few, *_, **__: sizes.append(len(few)) or run_stacked(few, FP64))
        alone = Batched(FP64)._together(fits, accounts(fits))  # pyright: ignore[reportPrivateUsage]
        peak = Batched(FP64).costs.peak("-", fits[0], 4, False)
        tight = Batched(FP64, memory=2 * peak + 1)._together(fits, accounts(fits))  # pyright: ignore[reportPrivateUsage]
    assert sizes == [5, 1, 2, 2]
    assert alone is not None
    assert tight is not None
    for one, other in zip(alone, tight, strict=True):
        check(one.parts, other.parts, 1e-12)


def scaled(grad: Any, nets: Any, batch: Any, due: int) -> Any:
    """A step whose size is its number."""
    return {part: {name: due * g for name, g in found.items()} for part, found in grad(a_loss).items()}


def test_steps_of_unlike_numbers_are_stacked_and_counted_apart() -> None:
    """Catches clients that step by another's number, a trace of one number that serves all, and fits that run alone."""
    net = model()

    def asked(k: int) -> Fit:
        numbers = torch.randint(3, (6,), generator=torch.Generator().manual_seed(k)).tolist()
        made = request(PLANS["plain"], k=k, net=net, dtype=torch.float64)
        return replace(made, loss=None, gradient=scaled, every=numbers.__getitem__)

    fits = [asked(k) for k in range(3)]
    assert signature(fits[0]) == signature(fits[1])
    stacked = run_stacked(fits, FP64, Replays(after=0))
    for fit, got in zip(fits, stacked, strict=True):
        check(got.parts, run_fit(fit, FP64).parts, 1e-12)
    kinds = drivers._steps(fits[0])  # pyright: ignore[reportPrivateUsage]
    assert len({due for _, due in kinds}) > 1
    assert sum(kinds.values()) == 6
