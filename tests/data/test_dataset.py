"""A data set as a value: what is refused, and its shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import feature_dataset, image_dataset, some_labels

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.rng import Rng
from polyfed.data.dataset import Dataset
from polyfed.data.partition.make import make_partition


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
        ({"std": (0.1, float("nan"), 0.1)}, "expected finite numbers, with std above 0"),
        ({"classes": ("a",), "y": torch.zeros(40, dtype=torch.int64)}, "at least 2"),
        ({"test_rows": np.array([1, 1])}, "different"),
        ({"test_rows": np.array([40])}, "0 to 39"),
        ({"test_rows": np.arange(40)}, "not all rows"),
        ({"test_rows": np.array([0.5])}, "float64"),
        ({"y": torch.arange(40) % 4 - 1}, "-1 marks rows without a label, say so by unlabelled = true"),
        ({"y": torch.arange(40) % 4 - 2, "unlabelled": True}, "labels run from -2 to 1"),
        ({"y": torch.full((40,), -1), "unlabelled": True}, "none of its 40 rows has a label"),
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


def targets(y: torch.Tensor, **more: Any) -> Dataset:
    return Dataset("t", torch.ones(len(y), 2), y, more.pop("classes", ()), (), (), **more)


def test_a_regression_has_targets_and_no_classes() -> None:
    found = targets(torch.tensor([1.5, -2.0], dtype=torch.float64), target_offset=1.0, target_scale=2.0)
    assert (found.task, found.num_classes, found.strata.tolist()) == ("regression", 1, [0, 0])
    assert some_labels(10, 3).task == "classification"
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for wrong, text in (
        ({"y": numbers.float()}, "torch.float64 for a regression"),
        ({"y": torch.tensor([1.0, float("inf")], dtype=torch.float64)}, "the target of row 1 is inf"),
        ({"y": numbers, "classes": ("a", "b")}, "got 2 classes for targets"),
        ({"y": numbers, "target_scale": 0.0}, "the scale above 0"),
        ({"y": numbers, "target_offset": float("nan")}, "finite numbers"),
    ):
        with pytest.raises(DataError, match=text):
            targets(**wrong)


def test_a_regression_is_dealt_without_classes_and_split_at_random() -> None:
    """Catches targets that are taken for class numbers by a partition or a split."""
    dataset = targets(torch.arange(60, dtype=torch.float64) - 30.5)
    partition = make_partition(dataset, kind="iid", num_clients=3, rng=Rng((0,)), samples_per_client=15)
    assert {len(partition.train(k)) + len(partition.test(k)) for k in range(3)} == {15}
    held = partition.validating(0.25, dataset.strata, Rng((1,)))
    assert not set(held.test_rows) & set(partition.test_rows)
    for kind, more in (("classes", {"classes_per_client": 1}), ("dirichlet", {"alpha": 1.0})):
        with pytest.raises(ConfigError, match="deals classes; a regression has none: choose 'iid' or 'natural'"):
            make_partition(dataset, kind=kind, num_clients=3, rng=Rng((0,)), **more)


@pytest.mark.parametrize(
    ("x", "declared", "says"),
    [
        (
            torch.zeros(4, 3, 2),
            None,
            r"\(N, C, H, W\) torch.uint8 pixels or .* declare its kind, one of image, features",
        ),
        (torch.zeros(4, 3, 2), "features", r"expected \(N, F\) .* for kind 'features'"),
        (torch.zeros(4, 3), "series", r"for kind 'series'"),
        (torch.zeros(4, 3), "tokens", r"torch.int64 tokens for kind 'tokens'"),
        (torch.zeros(4, 3, dtype=torch.int32), "tokens", "for kind 'tokens'"),
        (torch.full((4, 3, 2), float("inf")), "series", "row 0 has an infinite value"),
    ],
)
def test_other_kinds_are_declared_and_checked(x: torch.Tensor, declared, says: str) -> None:
    with pytest.raises(DataError, match=says):
        replace(feature_dataset([[0.0]] * 4, [0, 1, 0, 1]), x=x, declared=declared)


def test_pixels_may_be_numbers_if_declared_and_finite() -> None:
    pixels = torch.rand(40, 3, 8, 8)
    assert replace(image_dataset(), x=pixels, declared="image").is_image
    pixels[7, 1, 1, 1] = float("nan")
    with pytest.raises(DataError, match="row 7 has a pixel that is not a finite number"):
        replace(image_dataset(), x=pixels, declared="image")


def test_a_digest_changes_with_all_that_a_run_computes_with() -> None:
    """Catches a part that is left out: a resumed run would go on with other data."""
    data = image_dataset(groups=np.arange(40) % 3)
    changed = data.x.clone()
    changed[39, 2, 7, 7] += 1
    others = [
        {"x": changed},
        {"y": (data.y + 1) % 4},
        {"classes": ("a", "b", "c", "d")},
        {"mean": (0.5, 0.4, 0.31)},
        {"test_rows": np.array([3])},
        {"groups": np.arange(40) % 4},
        {"units": np.arange(40)},
        {"times": np.arange(40)},
        {"flip": True},
    ]
    assert len({data.digest, *(replace(data, **other).digest for other in others)}) == len(others) + 1
    assert replace(data, x=data.x.clone(), name="other").digest == data.digest


def test_rows_without_a_label_are_counted_and_are_no_test_rows() -> None:
    """Catches labels that are 0 for want of one, and data sets of before that have another identity."""
    full = image_dataset(official=10)
    y = full.y.clone()
    y[:12] = -1
    some = replace(full, y=y, unlabelled=True)
    assert (some.num_unlabelled, full.num_unlabelled, some.num_classes) == (12, 0, 4)
    assert some.strata.tolist() == y.tolist()
    assert replace(full, unlabelled=True).digest == full.digest != some.digest
    with pytest.raises(DataError, match="2 of the 10 official test rows have no label, such as row 3;"):
        replace(some, test_rows=np.array([3, 5, *range(32, 40)]))
    with pytest.raises(DataError, match="a regression needs the target of every row"):
        replace(targets(torch.zeros(3, dtype=torch.float64)), unlabelled=True)
