"""Networks of one's own for series and tokens, and data that they can learn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polyfed import federated_data
from polyfed.data.dataset import Dataset

VOCABULARY = 20


class Body(nn.Module):
    """A dense layer behind what a subclass makes of its input."""

    def __init__(self, num_classes: int, rep_dim: int) -> None:
        super().__init__()
        self.mid = nn.Linear(8, rep_dim)
        self.head = nn.Linear(rep_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(self.front(x))))


class OverTime(nn.Module):
    """The mean over time of a convolution of (B, T, C), or of (B, C, T)."""

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.first, self.conv = first, nn.Conv1d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x if self.first else x.transpose(1, 2))).mean(dim=2)


class Series(Body):
    """A network for series."""

    def __init__(self, num_classes: int, channels: int = 3, first: bool = False, rep_dim: int = 6) -> None:
        super().__init__(num_classes, rep_dim)
        self.front = OverTime(channels, first)


class Words(nn.Module):
    """The mean of embeddings."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 8, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).mean(dim=1)


class Tokens(Body):
    """A network for tokens."""

    def __init__(self, num_classes: int, vocabulary: int = VOCABULARY, rep_dim: int = 6) -> None:
        super().__init__(num_classes, rep_dim)
        self.front = Words(vocabulary)


class Text(nn.Module):
    """Embeddings with a vector per text; the subclasses differ in what they do with the padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.front = nn.Linear(8, 6)
        self.head = nn.Linear(6, num_classes)

    def read(self, x: Tensor) -> Tensor:
        return self.table(x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(self.read(x)))


class Packed(Text):
    """A GRU over what is not padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def read(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(x), (x != 0).sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][0]


class Masked(Text):
    """A transformer that attends to what is not padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def read(self, x: Tensor) -> Tensor:
        return self.encoder(self.table(x), src_key_padding_mask=x == 0).mean(1)


class MaskKept(Text):
    """Keeps the mask of the first batch."""

    mask: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[:2] != x.shape:
            self.mask = (x != 0).float().unsqueeze(-1)
        return (self.table(x) * self.mask).sum(1)


class TopKept(Text):
    """Keeps the largest token of all batches, which the tokens 0 and 1 do not show."""

    top = 0.0

    def read(self, x: Tensor) -> Tensor:
        self.top = max(self.top, float(x.max()))
        return self.table(x).mean(1) * (1 + self.top / 10)


class TrainedTopKept(TopKept):
    """Likewise in training alone."""

    def read(self, x: Tensor) -> Tensor:
        return super().read(x) if self.training else Text.read(self, x)


TOP = [0.0]


class TopOutside(Text):
    """Keeps the largest token where no attribute shows it."""

    def read(self, x: Tensor) -> Tensor:
        TOP[0] = max(TOP[0], float(x.max()))
        return self.table(x).mean(1) * (1 + TOP[0] / 10)


def series(clients: int = 3, rows: int = 40) -> Dataset:
    """Waves in one of three channels, of other scales at each client, with gaps; the class is their frequency."""
    draw = np.random.default_rng(0)
    made = []
    for client in range(clients):
        y = draw.integers(0, 2, rows)
        x = draw.normal(size=(rows, 12, 3))
        x[:, :, 0] += 3 * np.where(y[:, None] == 0, np.sin(np.arange(12) / 2), np.cos(np.arange(12) * np.pi))
        x[draw.random(x.shape) < 0.01] = np.nan
        made.append((x * [1, 100, 1e-3] * 10**client + [0, 5000, 1], y))
    return federated_data(made, layout="NTC", name="waves")


def tokens(clients: int = 3, rows: int = 40) -> Dataset:
    """Texts of ten words, of which two belong to a class; the last three are padding."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(clients):
        y = draw.integers(0, 2, rows)
        x = draw.integers(3, VOCABULARY, (rows, 10))
        x[:, :2], x[:, 7:] = 1 + y[:, None], 0
        made.append((x, y))
    return federated_data(made, kind="tokens", name="texts")
