"""Which clients make a unit, and that a round holds one unit at a time, whatever the cohort."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import running

from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.requests import Exchange
from polyfed.execute.choice import Chosen, ExecutionChoice
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.rounds.unit import Finished, UnitRunner
from polyfed.storage import state_files
from polyfed.storage.state_store import Store

FP32 = Placement.of("cpu", "fp32")


def federation(count: int, **sections: Any) -> Federation:
    clients = {"count": count, "models": ["mlp(hidden=(12, 8))", "mlp(hidden=(32, 8))"], "participation": 1.0}
    return prepare(running.config(**{"clients": clients, **sections}))


def made(
    fed: Federation, folder: Path, driver: str = "sequential", size: int = 1, store: str = "memory"
) -> LocalClients:
    """Clients of whom ``size`` are stacked."""
    choice = ExecutionChoice(lambda client: Chosen("stacked", size))
    works = make_driver(driver, FP32, choice=choice)
    kept = Store(folder / "states", fed.algorithm.states, resident=store == "memory")
    return LocalClients(fed, works, kept, folder)


def request(fed: Federation, clients: list[int]) -> Exchange:
    """The first round of these clients."""
    infos = tuple(map(fed.info, clients))
    cohort = Cohort(infos, 1, 4, fed.rng.at("round", 1, "server"))
    server = fed.algorithm.init_server(fed.task, fed.rng.at("server"))
    return Exchange(cohort, {info.id: fed.algorithm.message_for(server, info) for info in infos}, {})


@pytest.mark.parametrize(
    ("driver", "size", "expected"),
    [
        ("auto", 2, [[0, 2], [1, 3], [4, 8], [7, 9], [11]]),
        ("auto", 3, [[0, 2, 4], [1, 3, 7], [8], [9, 11]]),
        ("auto", 1, [[0], [1], [2], [3], [4], [7], [8], [9], [11]]),
        ("sequential", 3, [[0], [1], [2], [3], [4], [7], [8], [9], [11]]),
        ("batched", 2, [[0, 2, 4, 8], [1, 3, 7, 9, 11]]),
    ],
)
def test_a_unit_is_clients_of_one_kind_in_order_of_id(
    tmp_path: Path, driver: str, size: int, expected: list[list[int]]
) -> None:
    """Catches units that mix kinds, that are larger than a stack, or that follow the order of the draw."""
    fed = federation(12)
    clients = made(fed, tmp_path, driver, size)
    drawn = [9, 3, 0, 11, 4, 2, 8, 1, 7]
    down = dict.fromkeys(drawn)
    units = clients._units(map(fed.info, drawn), down)  # pyright: ignore[reportPrivateUsage]
    assert [list(unit) for unit in units] == expected


def test_a_unit_of_batched_is_a_largest_stack(tmp_path: Path) -> None:
    """Catches a cohort of one kind that is one unit: all workers but one idle, memory that grows."""
    fed = federation(300, clients={"count": 300, "models": ["mlp(hidden=(12, 8))"]})
    units = made(fed, tmp_path, "batched")._units(map(fed.info, range(300)), dict.fromkeys(range(300)))  # pyright: ignore[reportPrivateUsage]
    assert [len(unit) for unit in units] == [128, 128, 44]


def test_clients_of_other_capacity_are_another_kind(tmp_path: Path) -> None:
    """Catches stacks of submodels of unequal size."""
    clients = {"count": 8, "models": ["mlp(hidden=(12, 8))"], "capacities": [1.0, 0.5]}
    fed = federation(8, clients=clients, algorithm={"name": "fiarse"})
    units = made(fed, tmp_path, "auto", 4)._units(map(fed.info, range(8)), dict.fromkeys(range(8)))  # pyright: ignore[reportPrivateUsage]
    assert [list(unit) for unit in units] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_who_is_not_asked_is_in_no_unit(tmp_path: Path) -> None:
    """Catches a client that trains without a message: some are drawn and not there, others skip an exchange."""
    fed = federation(6)
    units = made(fed, tmp_path)._units(map(fed.info, range(6)), {4: None, 1: None})  # pyright: ignore[reportPrivateUsage]
    assert units == [{1: None}, {4: None}]


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize(("driver", "size", "most"), [("sequential", 1, 2), ("auto", 3, 6)])
def test_a_round_holds_a_unit_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, driver: str, size: int, most: int
) -> None:
    """Catches replies, and with `store = "disk"` states, that are kept until the cohort is through."""
    alive: dict[str, list[Any]] = {"upload": [], "private": []}
    peaks = {"upload": 0, "private": 0}
    train = UnitRunner.train

    def watched(self: UnitRunner, *given: Any, **keys: Any) -> dict[int, Finished]:
        finished = train(self, *given, **keys)
        for end in finished.values():
            alive["upload"].append(weakref.ref(end.upload))
            alive["private"].append(weakref.ref(end.private))
        for name, refs in alive.items():
            peaks[name] = max(peaks[name], sum(ref() is not None for ref in refs))
        return finished

    monkeypatch.setattr(UnitRunner, "train", watched)
    fed = federation(12)
    with FP32.defaults():
        clients = made(fed, tmp_path, driver, size, store)
        asked = request(fed, list(range(12)))
        gathered, reports = clients.exchange(asked)
    assert len(gathered) == len(reports) == len(alive["upload"]) == 12
    assert peaks["upload"] <= most
    assert peaks["private"] == 12 if store == "memory" else peaks["private"] <= most
    clients.discard_round()


def in_order(clients: LocalClients, monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    """Units end in this order."""
    train = LocalClients._train  # pyright: ignore[reportPrivateUsage]

    def shuffled(self: LocalClients, *given: Any, **keys: Any) -> Iterator[dict[int, Finished]]:
        ended = list(train(self, *given, **keys))
        yield from (ended[k] for k in order)

    monkeypatch.setattr(LocalClients, "_train", shuffled)


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2], [0, 1, 2, 3]])
def test_nothing_depends_on_who_is_done_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    """Catches sums, reports or states in the order of arrival."""
    fed = federation(4)
    found: list[Any] = []
    with FP32.defaults():
        server = fed.algorithm.init_server(fed.task, fed.rng.at("server"))
        for k in range(2):
            with monkeypatch.context() as patch:
                clients = made(fed, tmp_path / str(k), store="disk")
                if k:
                    in_order(clients, patch, order)
                played = play_round(fed, server, draw_cohort(fed, 1), clients, clients.driver)
                clients.commit()
                found.append((played, [clients.private(client) for client in range(4)]))
    (one, kept), (other, others) = found
    assert list(one.reports) == list(other.reports) == [0, 1, 2, 3]
    assert state_files.dump(one.server) == state_files.dump(other.server)
    assert [state_files.dump(state) for state in kept] == [state_files.dump(state) for state in others]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "states" not in path.parts] == []


def test_an_interrupted_exchange_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches replies that stay on disk when their exchange fails; the warning of an open file is an error."""
    fed = federation(4)
    with FP32.defaults():
        clients = made(fed, tmp_path, store="disk")
        in_order(clients, monkeypatch, [3, 2, 5])  # IndexError after two
        with pytest.raises(IndexError):
            clients.exchange(request(fed, [0, 1, 2, 3]))
        clients.discard_round()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_infos_of_the_cohort_come_with_the_replies(tmp_path: Path) -> None:
    """Catches a capacity that is another client's: declared sums read it."""
    fed = federation(3)
    with FP32.defaults():
        clients = made(fed, tmp_path)
        infos: list[ClientInfo] = [info for info, _, _ in clients.work(request(fed, [2, 0]), score=False)]
    assert infos == [fed.info(0), fed.info(2)]
    clients.discard_round()
