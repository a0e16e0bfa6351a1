"""Residual networks of basic blocks.

One class covers the networks for small images (3x3 stem, as in FIARSE's experiments), the networks with the stem
made for ImageNet (as in FedIN's family), and their relatives for signals. A deeper network has all the names of a
shallower network and more, so that the names identify the layers that two networks share.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.models import norm as norms

_FAMILY = {10: (1, 1, 1, 1), 14: (1, 1, 2, 2), 18: (2, 2, 2, 2), 22: (2, 2, 3, 3), 26: (3, 3, 3, 3)}

#: name -> (kind of stem, blocks per stage)
SIZES: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("plain", (2, 2, 2, 2)),
    "resnet8": ("plain", (1, 1, 1)),
    **{
        f"in-resnet{depth}{ending}": (stem, blocks)
        for stem, ending in (("imagenet", ""), ("small", "-small"), ("signal", "-1d"))
        for depth, blocks in _FAMILY.items()
    },
}

_SHORTEST = 16  # steps of a signal: the stem and the stages halve them five times


class BasicBlock(nn.Module):
    """Two convolutions of size 3 and a shortcut, which is a convolution of size 1 where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, norm: str, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv1d
        self.conv1 = conv(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = norms.norm(norm, width, dims)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = norms.norm(norm, width, dims)
        self.downsample = (
            nn.Sequential(conv(channels, width, 1, stride, bias=False), norms.norm(norm, width, dims))
            if stride != 1 or channels != width
            else nn.Sequential()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` -> ``(B, width, H / stride, W / stride)``; signals have one side."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """A stem, stages ``layer1`` ... that double the width and halve the map, average pooling, ``fc``.

    Args:
        input_shape: ``(C, H, W)``; for the stem "signal" ``(C, T)``, at least 16 steps.
        stem: "plain": 3x3, stride 1; "imagenet": 7x7, stride 2, and 3x3 max-pooling of stride 2; "small": as
            "imagenet" with a 3x3 convolution; "signal": as "imagenet", all convolutions over one dimension.
        blocks: number of blocks of each stage.
        width: channels of the stem and the first stage.
        norm: see :func:`polyfed.models.norm.norm`.
        num_classes: width of ``fc``.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        stem: str,
        blocks: tuple[int, ...],
        width: int,
        norm: str,
        num_classes: int,
    ) -> None:
        dims = 1 if stem == "signal" else 2
        if dims == 1 and (len(input_shape) != 2 or input_shape[1] < _SHORTEST):
            raise ModelError(
                f"the ResNets for signals take (C, T) of at least {_SHORTEST} steps, got samples of shape "
                f'{input_shape}; where the channels come last, transpose the data and set layout = "NCT"'
            )
        if dims == 2 and len(input_shape) != 3:
            signal = "; for signals (C, T) choose one whose name ends in -1d" if len(input_shape) == 2 else ""
            raise ModelError(
                f"the ResNets take images (C, H, W), got samples of shape {input_shape}; choose a model such as "
                f"mlp{signal}"
            )
        super().__init__()
        kernel, stride = {"plain": (3, 1), "imagenet": (7, 2), "small": (3, 2), "signal": (7, 2)}[stem]
        conv, pool = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv1d, nn.MaxPool1d)
        self.conv1 = conv(input_shape[0], width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norms.norm(norm, width, dims)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if stem == "plain" else pool(3, 2, padding=1)
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            wide = width * 2**number
            first = BasicBlock(wide // 2, wide, 2, norm, dims) if number else BasicBlock(width, width, 1, norm, dims)
            rest = [BasicBlock(wide, wide, 1, norm, dims) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
        self.fc = nn.Linear(width * 2 ** (len(blocks) - 1), num_classes)
        self.positions = (2, 3) if dims == 2 else (2,)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, or signals ``(B, C, T)`` -> logits ``(B, L)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, h, w), or (B, width, t)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean(self.positions))  # (B, L)
