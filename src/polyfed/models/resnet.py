"""Residual networks of basic blocks.

One class covers the networks for small images (3x3 stem, as in FIARSE's experiments) and the networks with the stem
made for ImageNet (as in FedIN's family). A deeper network has all the names of a shallower network and more, so
that the names identify the layers that two networks share.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.models.norm import norm2d

#: name -> (kind of stem, blocks per stage)
SIZES: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("plain", (2, 2, 2, 2)),
    "resnet8": ("plain", (1, 1, 1)),
    "in-resnet10": ("imagenet", (1, 1, 1, 1)),
    "in-resnet14": ("imagenet", (1, 1, 2, 2)),
    "in-resnet18": ("imagenet", (2, 2, 2, 2)),
    "in-resnet22": ("imagenet", (2, 2, 3, 3)),
    "in-resnet26": ("imagenet", (3, 3, 3, 3)),
    "in-resnet10-small": ("small", (1, 1, 1, 1)),
    "in-resnet14-small": ("small", (1, 1, 2, 2)),
    "in-resnet18-small": ("small", (2, 2, 2, 2)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm2d(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm2d(norm, width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm2d(norm, width))
            if stride != 1 or channels != width
            else nn.Sequential()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` -> ``(B, width, H / stride, W / stride)``."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """A stem, stages ``layer1`` ... that double the width and halve the map, average pooling, ``fc``.

    Args:
        input_shape: ``(C, H, W)``.
        stem: "plain": 3x3, stride 1; "imagenet": 7x7, stride 2, and 3x3 max-pooling of stride 2; "small": as
            "imagenet" with a 3x3 convolution.
        blocks: number of blocks of each stage.
        width: channels of the stem and the first stage.
        norm: see :func:`polyfed.models.norm.norm2d`.
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
        if len(input_shape) != 3:
            raise ModelError(
                f"the ResNets take images (C, H, W), got samples of shape {input_shape}; choose a model such as mlp"
            )
        super().__init__()
        kernel, stride = {"plain": (3, 1), "imagenet": (7, 2), "small": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(input_shape[0], width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norm2d(norm, width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if stem == "plain" else nn.MaxPool2d(3, 2, padding=1)
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            wide = width * 2**number
            first = BasicBlock(wide // 2, wide, 2, norm) if number else BasicBlock(width, width, 1, norm)
            rest = [BasicBlock(wide, wide, 1, norm) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
        self.fc = nn.Linear(width * 2 ** (len(blocks) - 1), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> logits ``(B, L)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, h, w)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))  # (B, L)
