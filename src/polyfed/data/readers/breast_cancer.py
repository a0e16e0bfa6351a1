"""The table of breast tumours that comes with polyfed, so that a first table needs no file and no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from polyfed.data.columns import Column
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cache import read_npz

#: The file in the package.
BREAST_CANCER = Path(__file__).parents[1] / "breast_cancer.npz"

_MEASURES = (
    *("radius", "texture", "perimeter", "area", "smoothness"),
    *("compactness", "concavity", "concave points", "symmetry", "fractal dimension"),
)
#: Of the cells of an image: the mean of each measure, its standard error, the mean of the three largest.
_NAMES = (*(f"mean {m}" for m in _MEASURES), *(f"error {m}" for m in _MEASURES), *(f"worst {m}" for m in _MEASURES))


def load_breast_cancer() -> Dataset:
    """569 tumours: 30 features of the cells in an image of each, and whether it is malignant."""
    arrays = read_npz(BREAST_CANCER)
    x = torch.from_numpy((arrays["x"] / 10.0 ** arrays["decimals"][:, None]).T.copy())
    columns = tuple(
        Column(name, "number", low=float(values.min()), high=float(values.max()))
        for name, values in zip(_NAMES, x.T, strict=True)
    )
    y, classes = torch.from_numpy(arrays["y"].astype(np.int64)), ("malignant", "benign")
    columns = (*columns, Column("diagnosis", "label", classes))
    return Dataset("breast-cancer", x, y, classes, (), (), columns=columns)
