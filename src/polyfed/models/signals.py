"""Networks of three kinds for signals: convolutions, a recurrent network, a transformer.

All begin with the same stem and end with the same two dense layers, so that networks of one ``width`` and ``rep_dim``
have equal cuts whatever their kind and depth. What lies between is of its own kind, and has names of its own.

References:
    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014,
    https://arxiv.org/abs/1406.1078, for the GRU; the block of the transformer is that of :mod:`polyfed.models.vit`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.models.vit import Block

_STRIDE = 4  # steps of the signal for a step of the network


class Stem(nn.Module):
    """A convolution of 8 steps, 4 apart, with ReLU; for a transformer, a learned vector for each place besides."""

    def __init__(self, input_shape: tuple[int, ...], width: int, *, places: bool) -> None:
        super().__init__()
        channels, length = input_shape
        self.conv = nn.Conv1d(channels, width, 2 * _STRIDE, _STRIDE, padding=_STRIDE // 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, length // _STRIDE, width)) if places else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, T)`` -> ``(B, T / 4, width)``."""
        x = self.conv(x).relu().transpose(1, 2)
        return x if self.places is None else x + self.places


class Convolution(nn.Module):
    """A convolution of five steps with ReLU, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` -> the same shape."""
        return x + self.conv(x.transpose(1, 2)).relu().transpose(1, 2)


class Recurrence(nn.Module):
    """A layer of gated recurrent units (GRU), beside a shortcut; by hand, as ``nn.GRU`` cannot lack a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.state = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` -> the same shape."""
        h, states = 0 * x[:, 0], list[Tensor]()
        for given in self.inputs(x).unbind(1):
            (r, z, n), (hr, hz, hn) = given.chunk(3, 1), self.state(h).chunk(3, 1)  # each (B, width)
            n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
            h = n + torch.sigmoid(z + hz) * (h - n)
            states.append(h)
        return x + torch.stack(states, 1)


def _transformer(width: int) -> Block:
    if width % 4:
        raise ModelError(f"vit-1d has width = {width} and 4 heads; set width to a multiple of 4")
    return Block(width, 4)


#: name -> its blocks' name and class.
KINDS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "cnn-1d": ("conv", Convolution),
    "gru-1d": ("gru", Recurrence),
    "vit-1d": ("block", _transformer),
}


class Signal(nn.Module):
    """A stem, ``depth`` blocks of one kind, the mean over the steps, ``fc1`` with ReLU, ``fc2``.

    Args:
        input_shape: ``(C, T)``, T a multiple of 4.
        kind: a key of ``KINDS``.
        width: channels of the stem and of the blocks.
        depth: number of blocks.
        rep_dim: width of ``fc1``.
        num_classes: width of ``fc2``.
    """

    #: Of what a stage gives; the convolutions of cnn-1d would tell otherwise, as they turn it and turn it back.
    channels_last = True

    def __init__(
        self, input_shape: tuple[int, ...], *, kind: str, width: int, depth: int, rep_dim: int, num_classes: int
    ) -> None:
        if len(input_shape) != 2:
            raise ModelError(f"{kind} takes signals (C, T), got samples of shape {input_shape}; choose an mlp")
        if rest := input_shape[1] % _STRIDE:
            below, above = input_shape[1] - rest, input_shape[1] - rest + _STRIDE
            raise ModelError(
                f"{kind} takes signals (C, T) of a multiple of {_STRIDE} steps, got {input_shape}; cut or "
                f"pad them to {f'{below} or ' * (below > 0)}{above} steps, if the channels do not come last"
            )
        super().__init__()
        name, block = KINDS[kind]
        self.stem = Stem(input_shape, width, places=kind == "vit-1d")
        self.stages = [f"{name}{number}" for number in range(1, depth + 1)]
        for stage in self.stages:
            self.add_module(stage, block(width))
        self.fc1 = nn.Linear(width, rep_dim)
        self.fc2 = nn.Linear(rep_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Signals ``(B, C, T)`` -> logits ``(B, L)``."""
        x = self.stem(x)  # (B, T / 4, width)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc2(self.fc1(x.mean(1)).relu())  # (B, L)
