"""Small networks with one peculiarity each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.rng import Rng
from polyfed.models.split import SplitModel


def split(
    net: Callable[[], nn.Module], classifier: str | None = "fc", extractor: str | None = None, **more: Any
) -> SplitModel:
    return SplitModel("net", net, **{"input_shape": (6,), **more}, classifier=classifier, extractor=extractor)


def weights(model: SplitModel, number: int = 0) -> dict[str, Tensor]:
    return model.init(Rng((number, "weights")))


def batch(model: SplitModel, size: int = 5, number: int = 0) -> Tensor:
    return torch.randn((size, *model.input_shape), generator=Rng((number, "batch")).torch())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))))


class Residual(Plain):
    """With a parameter and a buffer that the root's own forward uses, and a norm."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.rand(4))
        self.bn = nn.BatchNorm1d(4)
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        twice = self.shift * 2  # a buffer without any activation in sight
        h = h + self.bn(self.c(h)) * self.scale + twice
        return self.fc(h) * self.scale.sum()


class Residual2(Residual):
    """The same, its parameter used on one side only."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        h = h + self.bn(self.c(h)) * self.scale + self.shift * 2
        return self.fc(h)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 3)
        self.join = nn.Identity()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(torch.cat([self.left(x).tanh(), self.right(x)], 1)))


class FunctionalDropout(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = functional.dropout(torch.relu(self.b(self.a(x))), 0.5, self.training)
        return functional.dropout(self.fc(h), 0.5, self.training)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class InPlace(nn.Module):
    """Writes into what it is given, at the start of each piece."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.a = nn.Linear(6, 4)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.a(self.act(x))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x)))


class ControlFlow(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        if h.sum() > 0:
            h = -h
        return self.fc(h)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x.view(-1, 3, 2))[0][:, -1])


class Picky(nn.Module):
    """For the tests of your own models."""

    def __init__(self, num_classes: int, input_shape: tuple[int, ...], width: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(input_shape[0], width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x))


class Stubborn(Picky):
    """Has its own opinion about the number of classes."""

    def __init__(self) -> None:
        super().__init__(7, (6,))


class Broken(nn.Module):
    def __init__(self) -> None:
        raise ValueError("no luck today")


not_callable = 3
