"""What a Dataset refuses, and the embedded digits."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from data_helpers import feature_dataset, image_dataset

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.images import pad_or_resize, pixel_stats, resize
from polyfed.data.sources import load_dataset


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"y": torch.arange(40) % 5}, "labels run from 0 to 4"),
        ({"y": torch.arange(40) % 4 - 1}, "labels run from -1 to 2"),
        ({"y": torch.zeros(39, dtype=torch.int64)}, r"\(39,\)"),
        ({"y": torch.zeros(40)}, "float32"),
        ({"x": torch.zeros(40, 3, 8, 8)}, "uint8"),
        ({"x": torch.zeros(40, 8, 8, dtype=torch.uint8)}, r"\(40, 8, 8\)"),
        ({"x": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, "none of them empty"),
        ({"mean": (0.5,)}, "1 means"),
        ({"std": (0.1, 0.0, 0.1)}, "above 0"),
        ({"std": (0.1, float("nan"), 0.1)}, "not usable"),
        ({"classes": ("a",), "y": torch.zeros(40, dtype=torch.int64)}, "at least 2"),
        ({"test_rows": np.array([1, 1])}, "different"),
        ({"test_rows": np.array([40])}, "0 to 39"),
        ({"test_rows": np.arange(40)}, "not all rows"),
        ({"test_rows": np.array([0.5])}, "float64"),
        ({"groups": np.zeros(39, dtype=np.int64)}, "one group"),
        ({"groups": np.full(40, 2), "group_names": ("a", "b")}, "0 to 1"),
    ],
)
def test_faults_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(DataError, match=says):
        replace(image_dataset(), **fields)


def test_features_may_miss_values_but_not_be_infinite() -> None:
    assert len(feature_dataset([[float("nan")], [1.0]], [0, 1])) == 2
    with pytest.raises(DataError, match="row 1 has an infinite"):
        feature_dataset([[0.0], [float("inf")]], [0, 1])


def test_shapes() -> None:
    images, table = image_dataset(), feature_dataset([[1, 2, 3], [4, 5, 6]], [0, 1])
    assert (images.input_shape, images.num_classes, images.is_image) == ((3, 8, 8), 4, True)
    assert (table.input_shape, table.num_classes, table.is_image) == ((3,), 2, False)


def test_digits_are_the_uci_digits() -> None:
    digits = load_dataset("digits")
    assert digits.x.shape == (1797, 1, 32, 32)
    assert torch.bincount(digits.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    raw = load_dataset("digits", image_size=8).x[:, 0].float() * (16 / 255)
    # The first row of the UCI file optdigits.tes, line by line of the image.
    assert raw[0].round().int()[0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert raw[0].round().int()[7].tolist() == [0, 0, 6, 13, 10, 0, 0, 0]
    assert int(digits.x.max()) > 240
    assert not digits.flip


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


def test_unknown_names_and_options(tmp_path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")
    with pytest.raises(ConfigError) as caught:
        load_dataset("digits", path=tmp_path, colour=True)
    assert len(caught.value.faults) == 2
    for name in ("npz", "csv"):
        with pytest.raises(ConfigError, match="path"):
            load_dataset(name)
    for size in (3, 2000, 31.5, True):
        with pytest.raises(ConfigError, match="image_size"):
            load_dataset("digits", image_size=size)


def test_catalogue_needs_no_torch() -> None:
    program = (
        "import sys; from polyfed.data.catalogue import DATASETS, PARTITIONS; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(len(DATASETS))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "7", done.stderr
