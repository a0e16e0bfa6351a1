"""A federation small enough to follow by hand, played with the drivers; shared by the tests of the core and above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyfed.config import Config
from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message
from polyfed.core.requests import Exchange
from polyfed.data.dataset import Dataset
from polyfed.data.partition.partition import Partition
from polyfed.execute.drivers import Sequential, make_driver
from polyfed.execute.placement import Placement, Precision
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation
from polyfed.rounds.round import Played, play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.rounds.unit import Report
from polyfed.storage.state_store import Store

MLP = "mlp(hidden=(12, 6))"

#: Training labels of three clients, some of eight classes each and unequally often: all have class 3, client 0 thrice.
LABELS = ((0, 1, 2, 3, 3, 3), (3, 4, 5, 5), (3, 5, 6, 7))


def dataset(shape: tuple[int, ...], rows: int, classes: int, seed: int = 0) -> Dataset:
    """Random examples: images if ``shape`` has three sides, else features."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    image = len(shape) == 3
    return Dataset(
        name="toy",
        x=torch.randint(0, 256, (rows, *shape), generator=generator).to(torch.uint8)
        if image
        else torch.randn(rows, *shape, generator=generator),
        y=y,
        classes=tuple(map(str, range(classes))),
        mean=(0.5,) * shape[0] if image else (),
        std=(0.25,) * shape[0] if image else (),
        **({"flip": False} if image else {}),
    )


def partition(train: Sequence[int], test: int, clients: int) -> Partition:
    """Client k has ``train[k]`` rows to train on and ``test`` to be tested on."""
    starts = np.cumsum([0, *(n + test for n in train)])
    return Partition(
        train_rows=np.concatenate([np.arange(s, s + n) for s, n in zip(starts, train, strict=False)]).astype(np.int64),
        train_offsets=np.cumsum([0, *train]).astype(np.int64),
        test_rows=np.concatenate([np.arange(s + n, s + n + test) for s, n in zip(starts, train, strict=False)]).astype(
            np.int64
        ),
        test_offsets=(np.arange(clients + 1) * test).astype(np.int64),
        about={"dataset": "toy", "rows": int(starts[-1])},
    )


def federation(
    algorithm: Algorithm,
    *,
    models: Sequence[str] = (MLP,),
    sizes: Sequence[int] = (11, 8, 5),
    labels: Sequence[Sequence[int]] = (),
    shape: tuple[int, ...] = (7,),
    classes: int = 4,
    test: int = 6,
    train: Mapping[str, Any] | None = None,
    clients: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    augment: bool = True,
) -> Federation:
    """Clients with ``sizes`` training examples of random data, or with these ``labels``; images are augmented."""
    sizes = [len(own) for own in labels] or sizes
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.1, **(train or {})}
    config = Config.parse(
        {
            "run": {"rounds": 3, "threads": 1, **(run or {})},
            "data": {"augment": augment},
            "clients": {"count": len(sizes), "models": list(models), **(clients or {})},
            "train": {key: value for key, value in settings.items() if value is not None},
            "algorithm": {"name": algorithm.name},
        }
    )
    data, dealt = dataset(shape, sum(sizes) + test * len(sizes), classes), partition(sizes, test, len(sizes))
    if labels:
        y = data.y.clone()
        y[torch.tensor(dealt.train_rows)] = torch.tensor([c for own in labels for c in own])
        data = replace(data, y=y)
    return Federation(config, data, dealt, algorithm)


class Noting(LocalClients):
    """Clients of this process; what travels is noted, exchange by exchange."""

    def __init__(self, fed: Federation, driver: Sequential, store: Store) -> None:
        super().__init__(fed, driver, store)
        self.sent: list[dict[int, Any]] = []
        self.got: list[dict[int, Any]] = []

    def work(self, request: Exchange, *, score: bool) -> Iterator[tuple[ClientInfo, Message | None, Report]]:
        """Run the clients and note messages and uploads, in order of client id."""
        uploads: dict[int, Any] = {}
        for info, upload, report in super().work(request, score=score):
            uploads[info.id] = upload
            yield info, upload, report
        self.sent.append(dict(request.down))
        self.got.append(dict(sorted(uploads.items())))


@dataclass
class Game:
    """A federation at play: server, clients, and everything that each round told."""

    federation: Federation
    driver: Sequential
    clients: Noting
    server: Any
    played: list[Played] = field(default_factory=list)

    @property
    def sent(self) -> list[dict[int, Any]]:
        """What each client received, by exchange."""
        return self.clients.sent

    @property
    def got(self) -> list[dict[int, Any]]:
        """What each client sent, by exchange."""
        return self.clients.got

    def round(self) -> Game:
        """Play one more round."""
        number = len(self.played) + 1
        with self.driver.placement.defaults():
            played = play_round(
                self.federation, self.server, draw_cohort(self.federation, number), self.clients, self.driver
            )
            self.clients.commit()
        self.played.append(played)
        self.server = played.server
        return self

    def private(self, client: int) -> Any:
        """A client's state."""
        return self.clients.private(client)

    def local(self, client: int, round_: int | None = None) -> Any:
        """A client as it works in a round, the last by default."""
        with self.driver.placement.defaults():
            return self.federation.local(client, len(self.played) if round_ is None else round_)


def play(
    fed: Federation, rounds: int = 0, *, driver: str = "sequential", precision: Precision = "fp32", folder: Any = None
) -> Game:
    """Set up a federation and play some rounds."""
    placement = Placement(torch.device("cpu"), precision)
    made = make_driver(driver, placement)
    store = Store(Path(folder or "/nonexistent"), fed.algorithm.states, resident=True)
    with placement.defaults():
        server = fed.algorithm.init_server(fed.task, fed.rng.at("server"))
    game = Game(fed, made, Noting(fed, made, store), server)
    for _ in range(rounds):
        game.round()
    return game


def copy(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in tensors of their own."""
    return {name: value.clone() for name, value in params.items()}


def close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, floor: float = 0.01) -> None:
    """Assert equal names and, for each tensor, a difference below ``tolerance`` of its norm (or of ``floor``)."""
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == value.dtype, name
        difference = float((got[name].double() - value.double()).norm())
        assert difference <= tolerance * max(float(value.double().norm()), floor), f"{name}: {difference}"
