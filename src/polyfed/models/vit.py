"""A small vision transformer.

References:
    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, https://arxiv.org/abs/2010.11929; here
    the mean of the tokens is classified, in place of a class token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.errors import ModelError


class Patches(nn.Module):
    """Cuts an image into patches, maps each to a token, and adds a learned vector for its place."""

    def __init__(self, input_shape: tuple[int, ...], *, patch: int, width: int) -> None:
        super().__init__()
        channels, height, across = input_shape
        self.map = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (height // patch) * (across // patch), width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, T, width)``, T patches."""
        return self.map(x).flatten(2).transpose(1, 2) + self.places


class Attention(nn.Module):
    """Self-attention of several heads. The number of heads follows from the weights, their size is ``size``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(B, T, width)`` -> the same shape; ``bias`` is added to the scores ``(B, heads, T, T)``."""
        q, k, v = self.qkv(x).unflatten(2, (3, -1, self.size)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, size)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two dense layers, each behind a LayerNorm and beside a shortcut (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches, blocks ``block1`` ..., a LayerNorm, the mean over the tokens, ``fc``.

    Args:
        input_shape: ``(C, H, W)``, sides that are multiples of ``patch``.
        patch: side of a patch in pixels.
        width: width of a token.
        depth: number of blocks.
        heads: heads of each attention; a divisor of ``width``.
        num_classes: width of ``fc``.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, patch: int, width: int, depth: int, heads: int, num_classes: int
    ) -> None:
        if len(input_shape) != 3 or any(side % patch for side in input_shape[1:]):
            raise ModelError(
                f"vit(patch={patch}) takes images (C, H, W) whose sides are multiples of {patch}, got samples of shape "
                f"{input_shape}; set data.image_size, or another patch"
            )
        if width % heads:
            raise ModelError(f"vit has width = {width} and heads = {heads}; set heads to a divisor of width")
        super().__init__()
        self.patches = Patches(input_shape, patch=patch, width=width)
        self.stages = [f"block{number}" for number in range(1, depth + 1)]
        for name in self.stages:
            self.add_module(name, Block(width, heads))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> logits ``(B, L)``."""
        x = self.patches(x)  # (B, T, width)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.norm(x).mean(1))  # (B, L)
