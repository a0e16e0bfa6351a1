"""The UCI optical digits that come with polyfed, so that a first run needs no file and no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from polyfed.data.dataset import Dataset
from polyfed.data.images import check_image_size, pixel_stats, resize
from polyfed.data.readers.cache import read_npz

#: The file in the package.
DIGITS = Path(__file__).parents[1] / "digits.npz"


def load_digits(image_size: int | None = None) -> Dataset:
    """1,797 grey images of 8x8 with 17 levels, shown as ``image_size`` (32) pixels a side with 256 levels.

    Raises:
        ConfigError: an ``image_size`` out of range.
    """
    arrays = read_npz(DIGITS)
    levels = torch.from_numpy(arrays["x"].astype(np.float32))  # (N, 8, 8), 0..16
    x = resize((levels * (255 / 16)).round().to(torch.uint8)[:, None], check_image_size(image_size, 32))
    return Dataset("digits", x, torch.from_numpy(arrays["y"].astype(np.int64)), tuple("0123456789"), *pixel_stats(x))
