"""Pixels: their statistics and their size."""

from __future__ import annotations

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
