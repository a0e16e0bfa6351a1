"""A small convolutional network, for which stacking of clients pays."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Two 3x3 convolutions of 8 and 16 channels, pooled to 7x7, and one dense layer."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16 * (height // 4) * (width // 4), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L)."""
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        return self.fc(x.flatten(1))


class Windows(nn.Module):
    """Two convolutions over the time of windows of 9 channels x 128 steps, and one dense layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(9, 16, 5, padding=2)
        self.conv2 = nn.Conv1d(16, 32, 5, padding=2)
        self.pool = nn.MaxPool1d(4)
        self.fc = nn.Linear(32 * 8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 9 * 128) -> (B, L)."""
        x = self.pool(torch.relu(self.conv1(x.unflatten(1, (9, 128)))))  # (B, 16, 32)
        x = self.pool(torch.relu(self.conv2(x)))  # (B, 32, 8)
        return self.fc(x.flatten(1))


class _Block(nn.Module):
    """Self-attention with four heads, and two dense layers, each added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (B, 4, T, width / 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)  # (B, 4, T, T)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Tokens(nn.Module):
    """A transformer of two layers on 64 tokens, each a number that becomes a vector of 32."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 32)
        self.place = nn.Parameter(torch.zeros(64, 32))
        self.blocks = nn.Sequential(_Block(32), _Block(32))
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, L)."""
        return self.head(self.blocks(self.embed(x.unsqueeze(-1)) + self.place).mean(dim=1))
