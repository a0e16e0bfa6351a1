"""Networks of one's own with layers that exporters may trip over."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Flat(nn.Module):
    """A network for tables: ``front`` -> a linear head."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.front = self.made(input_shape[0])
        self.head = nn.Linear(8, num_classes)

    def made(self, width: int) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(x))


class Normalised(_Flat):
    """BatchNorm with statistics that moved, dropout, and a frozen layer."""

    def made(self, width: int) -> nn.Module:
        frozen = nn.Linear(width, 8).requires_grad_(False)
        return nn.Sequential(frozen, nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.LayerNorm(8))


class _Overtime(nn.Module):
    """A network for series (B, T, C)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.front = self.made(input_shape[1])
        self.head = nn.Linear(8, num_classes)

    def made(self, channels: int) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(x)[0][:, -1])


class Recurrent(_Overtime):
    """A GRU of two layers in both directions."""

    def made(self, channels: int) -> nn.Module:
        return nn.GRU(channels, 4, num_layers=2, bidirectional=True, batch_first=True)


class LongShort(_Overtime):
    """An LSTM."""

    def made(self, channels: int) -> nn.Module:
        return nn.LSTM(channels, 8, batch_first=True)


class Attention(nn.Module):
    """A transformer's layer."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_shape[1], 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Spectral(_Flat):
    """A Fourier transform."""

    def made(self, width: int) -> nn.Module:
        return nn.Linear(2 * (width // 2 + 1), 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(torch.view_as_real(torch.fft.rfft(x)).flatten(1)))


class Inverse(_Flat):
    """An inverse of a matrix."""

    def made(self, width: int) -> nn.Module:
        return nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x)
        return self.head(torch.linalg.solve(h[:, :, None] * h[:, None] + torch.eye(8), h))


class Branching(_Flat):
    """A forward that branches on its data."""

    def made(self, width: int) -> nn.Module:
        return nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x)
        return self.head(h if bool(h.mean() > 0) else h.abs())


SUPPORTED = ("Normalised", "Recurrent", "LongShort", "Attention", "Spectral")
NOT_ONNX = {"Inverse": "solve", "Branching": "GuardOnDataDependentSymNode"}
