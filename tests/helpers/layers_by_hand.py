"""What the references of the layer-wise algorithms share: federations of one or of two depths, and their keys."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import plain
import toy
from rounds_by_hand import TOLERANCE, TRAINING, batches, pairs, resnet8
from torch import Tensor, nn

from polyfed.rounds.federation import Federation

SIZES = (11, 8, 7)  # no batch of two, whose normalised values are signs
#: The runs: one network with BatchNorm; two depths, the second client's the larger.
RUNS = [
    ("all", "sgd", "fp32", "sequential"),
    ("all", "sgd", "fp64", "batched"),
    ("all", "momentum, decay, clip", "fp64", "sequential"),
    ("all", "adam", "fp64", "batched"),
    ("architecture", "sgd", "fp64", "sequential"),
    ("layer", "sgd", "fp64", "batched"),
    ("layer", "momentum, decay, clip", "fp64", "sequential"),
]
TOWERS = tuple(f"layers_by_hand:Tower(classifier=fc, depth={depth})" for depth in (1, 2, 3))
MAPS = tuple(f"layers_by_hand:Maps(classifier=fc, depth={depth})" for depth in (1, 3))
DEPTHS = {f"layers_by_hand:Chain(classifier=fc, depth={depth})": depth for depth in (1, 2)}


class Chain(nn.Module):
    """A smooth network of one or two hidden layers, with running statistics, whose layers have one shape by name."""

    def __init__(self, depth: int = 1, num_classes: int = 4) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(7, 9), nn.BatchNorm1d(9)
        self.fc2 = nn.Linear(9, 9) if depth > 1 else nn.Identity()
        self.fc = nn.Linear(9, num_classes)

    def represent(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn1(self.fc1(x)).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.represent(x))


class Tower(nn.Module):
    """A smooth network whose one stage consists of blocks; the first takes another width than the others."""

    def __init__(self, depth: int = 1, num_classes: int = 4) -> None:
        super().__init__()
        self.stages = ["tower"]
        widths = (7, *[9] * depth)
        self.tower = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, 9), nn.BatchNorm1d(9), nn.Tanh()) for a in widths[:depth])
        )
        self.fc = nn.Linear(9, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tower(x))


class Maps(nn.Module):
    """Convolutions in two stages, of one block and of ``depth`` blocks."""

    def __init__(self, depth: int = 1, num_classes: int = 4) -> None:
        super().__init__()
        self.stages = ["stage1", "stage2"]
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.stage1, self.stage2 = (
            nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(n)))
            for n in (1, depth)
        )
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


class Named(nn.Module):
    """A network whose tensors are called like no other's."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.own1, self.own2 = nn.Linear(7, 5), nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.own2(self.own1(x).tanh())


def federation(algorithm: Any, sizes: Sequence[int] = SIZES, **keys: Any) -> Federation:
    """Clients with chains, in turn of depth 1 and 2."""
    return toy.federation(algorithm, **{"models": tuple(DEPTHS), "sizes": sizes, **keys})


def numel(depth: int, *, weights: bool = True, buffers: bool = True) -> tuple[int, int]:
    """How many floating-point numbers a chain has, and how many counters."""
    fc = 9 * 7 + 9 + (depth - 1) * (9 * 9 + 9) + 9 * 4 + 4
    return (fc + 2 * 9) * weights + 2 * 9 * buffers, 1 * buffers


@dataclass
class Hand:
    """A federation beside which somebody computes by hand."""

    game: toy.Game
    average: str
    settings: plain.Settings
    tolerance: float

    def architecture(self, client: int) -> str:
        return str(self.game.federation.config.clients.model(client))

    def make(self, client: int) -> Callable[[], nn.Module]:
        """What makes a client's network."""
        if self.average == "all":
            return resnet8("batch")
        return partial(Chain, DEPTHS[self.architecture(client)])

    def key(self, client: int, name: str) -> str:
        """Where the server has a client's tensor."""
        return f"{self.architecture(client)}: {name}" if self.average == "architecture" else name

    def keyed(self, client: int, params: plain.Weights) -> plain.Weights:
        return {self.key(client, name): value for name, value in params.items()}

    def own(self, client: int, params: plain.Weights) -> plain.Weights:
        """A client's part of what the server has."""
        names = self.make(client)().state_dict()
        return {n: params[self.key(client, n)] for n in names if self.key(client, n) in params}

    def weights(self, client: int) -> list[str]:
        return [name for name, _ in self.make(client)().named_parameters()]

    def batches(self, client: int, round_: int) -> list[Any]:
        with self.game.driver.placement.defaults():
            return pairs(batches(self.game, client, round_))

    def owners(self, key: str) -> list[int]:
        return [k for k in range(3) if key in {self.key(k, n) for n in self.make(k)().state_dict()}]

    def rounds(self, count: int) -> Iterator[int]:
        for t in range(1, count + 1):
            self.game.round()
            yield t


def hand(cls: Any, average: str, training: str, precision: Any, driver: str, **keys: Any) -> Hand:
    """Three clients of unequal sizes."""
    known = {**TRAINING, "adam": ({"optimizer": "adam", "lr": 0.01}, plain.Settings(0.01, adam=True))}
    table, settings = known[training]
    one = average == "all"
    fed = toy.federation(
        cls(average=average, **keys),
        models=("resnet8(norm=batch, width=4)",) if one else tuple(DEPTHS),
        shape=(1, 8, 8) if one else (7,), sizes=SIZES, train=table,
    )  # fmt: skip
    # By another kernel of Adam, and over other orders of summation in a stack.
    slack = 1000 if training == "adam" else 100 if driver == "batched" else 10
    return Hand(toy.play(fed, precision=precision, driver=driver), average, settings, slack * TOLERANCE[precision])
