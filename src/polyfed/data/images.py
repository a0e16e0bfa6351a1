"""Sizes and statistics of images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from polyfed.base.errors import ConfigError

_ROWS_AT_ONCE = 2048  # bounds the float64 copy of the images to some 50 MB


def check_image_size(image_size: int | None, default: int) -> int:
    """The side of the images in pixels.

    Raises:
        ConfigError: the side is not a whole number from 4 to 1024.
    """
    side = default if image_size is None else image_size
    if isinstance(side, bool) or not isinstance(side, int) or not 4 <= side <= 1024:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"image_size: got {side!r}; expected a whole number of pixels from 4 to 1024")
    return side


def resize(x: Tensor, side: int) -> Tensor:
    """Return images ``(N, C, H, W)`` as ``(N, C, side, side)`` of their type, bilinear, smoothed when they shrink.

    The grey levels of uint8 are those of exact arithmetic, halves rounded to the even one: the same on every machine.
    """
    if tuple(x.shape[2:]) == (side, side):
        return x
    out = torch.empty((*x.shape[:2], side, side), dtype=x.dtype)
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = functional.interpolate(
            x[start : start + _ROWS_AT_ONCE].double(), size=(side, side), mode="bilinear", antialias=True
        )
        if x.is_floating_point():
            out[start : start + _ROWS_AT_ONCE] = part
            continue
        # Means of grey levels are often halves. Rounding to a grid that contains every half first removes the error of
        # about 1e-13 that depends on the processor; else the processor would decide whether a half is rounded up.
        out[start : start + _ROWS_AT_ONCE] = ((part * 2**20).round() / 2**20).round().clamp(0, 255).to(torch.uint8)
    return out


def pad_or_resize(x: Tensor, side: int) -> Tensor:
    """Return images of 28x28: unchanged for side 28, with a black frame of 2 pixels for 32, else resized."""
    return functional.pad(x, (2, 2, 2, 2)) if x.shape[2] == 28 and side == 32 else resize(x, side)


def pixel_stats(x: Tensor, rows: NDArray[np.int64] | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 pixels / 255, or of floating-point pixels, over ``rows``.

    For uint8 the function counts in whole numbers, as a histogram of the 256 grey levels, so the result is the same on
    every machine. A channel of one grey level gets standard deviation 1, so that dividing by it is harmless.

    Args:
        x: images ``(N, C, H, W)``.
        rows: the images that count; None for all.
    """
    chosen = np.arange(len(x)) if rows is None else rows
    if x.is_floating_point():
        return _float_stats(x.numpy(), chosen)
    counts = np.zeros((x.shape[1], 256), dtype=np.int64)
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        part = x.numpy()[chosen[start : start + _ROWS_AT_ONCE]]
        for channel in range(x.shape[1]):
            counts[channel] += np.bincount(part[:, channel].ravel(), minlength=256)
    level = np.arange(256)
    # Python's whole numbers, as products of these exceed 64 bits.
    sums = [[int((row * level**power).sum()) for power in range(3)] for row in counts]
    means = tuple(first / (255 * n) for n, first, _ in sums)
    stds = (math.sqrt((n * second - first**2) / (255 * n) ** 2) for n, first, second in sums)
    return means, tuple(1.0 if std < 1e-6 else std for std in stds)


def _float_stats(x: NDArray[Any], rows: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As `pixel_stats`, from sums in float64."""
    parts = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
    count = len(rows) * x.shape[2] * x.shape[3]
    mean = sum(x[part].sum(axis=(0, 2, 3), dtype=np.float64) for part in parts) / count
    spread = sum(np.square(x[part] - mean[:, None, None]).sum(axis=(0, 2, 3)) for part in parts) / count
    std = np.sqrt(spread)
    return tuple(mean.tolist()), tuple(np.where(std <= 1e-6 * np.abs(mean), 1.0, std).tolist())
