"""Sizes and statistics of uint8 images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from polyfed.base.errors import ConfigError

_ROWS_AT_ONCE = 4096  # bounds the float copy of the images to some 50 MB


def check_image_size(image_size: int | None, default: int) -> int:
    """The side of the images in pixels.

    Raises:
        ConfigError: a side that is not a whole number from 4 to 1024.
    """
    side = default if image_size is None else image_size
    if isinstance(side, bool) or not isinstance(side, int) or not 4 <= side <= 1024:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"image_size: got {side!r}; expected a whole number of pixels from 4 to 1024")
    return side


def resize(x: Tensor, side: int) -> Tensor:
    """Images ``(N, C, H, W)`` uint8 as ``(N, C, side, side)`` uint8, bilinear, smoothed when they shrink."""
    if tuple(x.shape[2:]) == (side, side):
        return x
    out = torch.empty((*x.shape[:2], side, side), dtype=torch.uint8)
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = x[start : start + _ROWS_AT_ONCE].float()
        part = functional.interpolate(part, size=(side, side), mode="bilinear", antialias=True)
        out[start : start + _ROWS_AT_ONCE] = part.round().clamp(0, 255).to(torch.uint8)
    return out


def pad_or_resize(x: Tensor, side: int) -> Tensor:
    """Images of 28x28 as they are, with a black frame of 2 for 32, and resized for any other side."""
    if x.shape[2] == 28 and side == 32:
        return functional.pad(x, (2, 2, 2, 2))
    return resize(x, side)


def pixel_stats(x: Tensor, rows: NDArray[np.int64] | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels / 255, over ``rows`` (default: all).

    Counted as a histogram of the 256 grey levels, so the result is exact and the same on every machine. A
    channel of one grey level has standard deviation 1, so that dividing by it is harmless.
    """
    pixels = x.numpy()
    chosen = np.arange(len(x)) if rows is None else rows
    counts = np.zeros((x.shape[1], 256))
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        part = pixels[chosen[start : start + _ROWS_AT_ONCE]]
        for channel in range(x.shape[1]):
            counts[channel] += np.bincount(part[:, channel].ravel(), minlength=256)
    level = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ level
    std = np.sqrt(np.maximum(share @ level**2 - mean**2, 0))
    std = np.where(std < 1e-6, 1.0, std)
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)
