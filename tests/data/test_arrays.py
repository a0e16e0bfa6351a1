"""Arrays as rows of a data set: what is certain is read, and what can be read in two ways is asked for."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.arrays import Rows, coded, numbered, ranked, read_rows
from polyfed.data.catalogue import LAYOUTS
from polyfed.data.images import pixel_stats, resize

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "read_as"),
    [
        ((4, 9, 9), "uint8", "image", (1, 9, 9)),
        ((4, 12, 30), "uint8", "image", (1, 12, 30)),
        ((4, 3, 9, 5), "uint8", "image", (3, 9, 5)),
        ((4, 3, 9, 5), "float64", "image", (3, 9, 5)),
        ((4, 1, 9, 9), "int16", "image", (1, 9, 9)),
        ((4, 7), "float64", "features", (7,)),
        ((4, 7), "uint8", "features", (7,)),
        ((4, 7), "bool", "features", (7,)),
    ],
)
def test_what_is_certain_is_read_without_an_option(shape, dtype: str, kind: str, read_as) -> None:
    found = read_rows(np.ones(shape, dtype), "x.npz")
    assert (found.kind, tuple(found.x.shape[1:])) == (kind, read_as)
    assert found.x.dtype == torch.uint8 or found.x.is_floating_point()


@pytest.mark.parametrize(
    ("shape", "dtype", "names"),
    [
        ((4, 16, 16, 13), "uint8", ['"NCHW" for channels first, 16 channels of 16x13', '"NHWC" for channels last, 13']),
        ((4, 13, 16, 16), "uint8", ['"NCHW"', '"NHWC"']),
        ((4, 32, 32, 3), "float32", ['"NCHW"', '"NHWC" for channels last, 3 channels of 32x32']),
        ((4, 3, 32, 3), "uint8", ['"NCHW"', '"NHWC"']),
        ((4, 128, 9), "uint8", ['"NHW" for grey images of 128x9', '"NTC" for series of 128 steps of 9 channels']),
        ((4, 9, 9), "float32", ['"NHW"', '"NTC"', '"NCT"']),
        ((4, 9, 9), "int64", ['"NHW"', '"NTC"', '"NCT"']),
    ],
)
def test_what_can_be_read_in_two_ways_is_asked_for(shape, dtype: str, names: list[str]) -> None:
    """Catches a guess: (N, 16, 16, 13) was read as 16 channels of 16x13."""
    with pytest.raises(DataError) as caught:
        read_rows(np.ones(shape, dtype), "x.npz")
    for name in names:
        assert name in str(caught.value)
    assert "expected the option layout" in str(caught.value) or "the option layout:" in str(caught.value)


@pytest.mark.parametrize(
    ("x", "options", "says"),
    [
        (np.ones((4, 9, 9)), {"kind": "series"}, "expected the option layout"),
        (np.ones((4, 16, 16, 13)), {"kind": "image"}, "expected the option layout"),
        (np.ones((4, 9)), {"layout": "NTC"}, "expected 3 axes for layout 'NTC'"),
        (np.ones((4, 9, 9)), {"kind": "features"}, "expected 2 axes for kind 'features'"),
        (np.ones((4, 9)), {"kind": "tokens"}, "expected whole numbers"),
        (np.full((4, 9), 2**63, np.uint64), {"kind": "tokens"}, "below 2"),
        (np.array([["a"], ["b"]]), {}, "make tokens of texts"),
        (np.ones(4), {}, "expected uint8 images"),
        (np.ones((0, 4)), {}, "none of them empty"),
    ],
)
def test_faults(x, options, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        read_rows(x, "x.npz", **options)


def test_kind_and_layout_may_not_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="'NTC', a layout of kind 'series', for kind 'image'"):
        read_rows(np.ones((4, 9, 9)), "x.npz", kind="image", layout="NTC")
    assert read_rows(np.ones((4, 9, 9)), "x.npz", kind="series", layout="NTC").kind == "series"


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([*LAYOUTS]),
    sides=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    dtype=st.sampled_from(["uint8", "float32", "float64", "int32", "uint16", "float16", ">f4"]),
)
def test_every_layout_gives_the_values_that_were_written(layout: str, sides: list[int], dtype: str) -> None:
    """Catches axes that are swapped, values that are rounded, and a layout that depends on the sizes."""
    x = np.random.default_rng(1).integers(0, 200, sides[: len(layout)]).astype(dtype)
    found = read_rows(x, "x.npz", layout=layout)
    there = found.x.numpy()
    if layout == "NHWC":
        there = there.transpose(0, 2, 3, 1)
    assert np.array_equal(there[:, 0] if layout == "NHW" else there, x.astype(np.float64))
    assert (found.kind, found.channels_first) == (LAYOUTS[layout], layout == "NCT")


def test_series_of_one_channel_and_tokens() -> None:
    found = read_rows(np.ones((4, 9)), "x.npz", kind="series")
    assert tuple(found.x.shape) == (4, 9, 1)
    tokens = read_rows(np.array([[5, 0], [7, 2**40]]), "x.npz", kind="tokens")
    assert (tokens.x.dtype, tokens.x.tolist()) == (torch.int64, [[5, 0], [7, 2**40]])


def test_pixels_keep_their_precision_where_it_counts() -> None:
    """Catches a scan with a large offset that becomes even."""
    x = RNG.normal(size=(6, 1, 5, 5))
    assert read_rows(x, "x.npz").x.dtype == torch.float32
    assert read_rows(x + 1e6, "x.npz").x.dtype == torch.float64
    for worst in (np.nan, np.inf, 1e300):
        x[3, 0, 2, 2] = worst
        with pytest.raises(DataError, match="row 3 of x has a pixel that is no finite"):
            read_rows(x, "x.npz")
    with pytest.raises(DataError, match=r"channel 1 of x: .* would become equal"):
        read_rows(np.stack([np.zeros((2, 2)), [[0, 2**40], [2**40 + 1, 0]]], axis=2), "x.npz", layout="NTC")


def test_floating_pixels_have_the_statistics_of_the_training_rows() -> None:
    x = RNG.normal(3, 2, size=(9, 2, 5, 5)).astype(np.float32)
    x[:, 1] = 7
    data = Rows(torch.from_numpy(x), "image").dataset(
        "scan", "scan", y=torch.arange(9) % 2, classes=("a", "b"), test_rows=np.array([0, 8])
    )
    assert data.mean == pytest.approx((x[1:8, 0].mean(dtype=np.float64), 7))
    assert data.std == pytest.approx((x[1:8, 0].std(dtype=np.float64), 1))  # a constant channel: no division by 0
    assert pixel_stats(torch.from_numpy(x))[0] == pytest.approx((x[:, 0].mean(dtype=np.float64), 7))


def test_floating_images_are_resized_without_rounding() -> None:
    x = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    small = resize(x, 4)
    assert (small.dtype, tuple(small.shape)) == (torch.float32, (1, 1, 4, 4))
    assert 0 < small.min() < small.max() < 1
    with pytest.raises(ConfigError, match="holds series, not images"):
        read_rows(np.ones((4, 9)), "x.npz", kind="series").dataset("x", "x.npz", image_size=8)


def test_names_are_compared_as_text_and_ordered() -> None:
    assert coded(["10", "9", "01", "1"])[1] == ("01", "1", "9", "10")
    assert coded(["b", "10", "a", "9"], ["c"])[1] == ("10", "9", "a", "b", "c")
    numbers, names = numbered(np.array([7, 5, 7]), 3, "units")
    assert (numbers.tolist(), names) == ([1, 0, 1], ("5", "7"))
    with pytest.raises(DataError, match="units has shape"):
        numbered(np.array([0.5]), 1, "units")


@pytest.mark.parametrize(
    ("values", "places"),
    [
        (np.array([3, 1, 3]), [1, 0, 1]),
        (np.array([2**60 + 1, 2**60, 0]), [2, 1, 0]),
        (np.array([0.5, -1e9, 7]), [1, 0, 2]),
        (np.array(["10", "9", "9.5"]), [2, 0, 1]),
        (np.array([str(2**60 + 1), str(2**60)]), [1, 0]),
        (np.array(["2024-02-01", "2023-12-31T23:59", "2024-02-01T00:00"]), [1, 0, 1]),
        (np.array(["2024-02-01", "2023-12-31"], "datetime64[D]"), [1, 0]),
    ],
)
def test_moments_are_ranked(values: np.ndarray, places: list[int]) -> None:
    assert ranked(values, len(values), "times").tolist() == places


@pytest.mark.parametrize(
    "values",
    [
        np.array(["3 May", "4 May"]),
        np.array([np.nan, 1]),
        np.array(["NaT", "2024-01-01"]),
        np.array(["2024-01-01T10:00+02:00", "2024-01-01"]),
        np.zeros((2, 1)),
    ],
)
def test_what_is_no_moment_is_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected \\(2,\\) numbers or dates"):
        ranked(values, 2, "times")
