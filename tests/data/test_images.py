"""Pixels: their statistics and their size."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from data_helpers import image_dataset

from polyfed.data.images import pad_or_resize, pixel_stats, resize


def test_statistics_are_those_of_the_pixels() -> None:
    x = image_dataset(rows=30).x
    mean, std = pixel_stats(x, np.arange(20))
    pixels = x[:20].double() / 255
    assert mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())
    assert pixel_stats(torch.full((3, 1, 4, 4), 7, dtype=torch.uint8))[1] == (1.0,)


def test_resizing() -> None:
    x = torch.arange(28 * 28).remainder(256).to(torch.uint8).reshape(1, 1, 28, 28)
    padded = pad_or_resize(x, 32)
    assert torch.equal(padded[:, :, 2:30, 2:30], x)
    assert int(padded.int().sum()) == int(x.int().sum())  # the frame is black
    assert torch.equal(pad_or_resize(x, 28), x)
    assert resize(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), 14).unique().tolist() == [200]
    assert resize(x, 14).shape == (1, 1, 14, 14)


def triangle(n: int, side: int) -> list[list[Fraction]]:
    """The weights of bilinear resizing from ``n`` to ``side`` pixels, smoothed when they shrink, exactly."""
    scale = Fraction(n, side)
    reach = max(scale, Fraction(1))
    rows = []
    for i in range(side):
        centre = scale * (i + Fraction(1, 2))
        row = [max(Fraction(0), 1 - abs(j + Fraction(1, 2) - centre) / reach) for j in range(n)]
        rows.append([weight / sum(row) for weight in row])
    return rows


@pytest.mark.parametrize("side", [14, 16, 20, 32, 40])
def test_resized_pixels_are_those_of_exact_arithmetic(side: int) -> None:
    """Catches grey levels halfway between two that the processor's last bit rounds up or down."""
    weights = triangle(28, side)
    shared = math.lcm(*(weight.denominator for row in weights for weight in row))
    whole = np.array([[int(weight * shared) for weight in row] for row in weights])
    x = np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28), dtype=np.uint8)
    level, rest = np.divmod(whole @ x.astype(np.int64) @ whole.T, shared**2)
    level += (2 * rest > shared**2) | ((2 * rest == shared**2) & (level % 2 == 1))
    assert (2 * rest == shared**2).any()
    assert np.array_equal(resize(torch.from_numpy(x), side).numpy(), level)


def test_statistics_are_exact() -> None:
    """Catches sums in floating point, whose last bit is the processor's."""
    x = image_dataset(rows=30).x
    pixels = [int(level) for level in x[:, 0].flatten()]
    mean = Fraction(sum(pixels), 255 * len(pixels))
    variance = Fraction(sum(level**2 for level in pixels), 255**2 * len(pixels)) - mean**2
    found = pixel_stats(x)
    assert (found[0][0], found[1][0]) == (float(mean), math.sqrt(float(variance)))
