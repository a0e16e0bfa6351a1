"""The digits and the table that come with polyfed."""

from __future__ import annotations

import torch

from polyfed.data.sources import load_dataset


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


def test_the_table_of_tumours_is_that_of_uci() -> None:
    """Catches rows and columns that are mixed, decimals of another column, and classes the other way round."""
    table = load_dataset("breast-cancer")
    assert torch.bincount(table.y).tolist() == [212, 357]
    assert table.classes == ("malignant", "benign")
    first = dict(zip((name for name, _ in table.feature_columns), table.x[0].tolist(), strict=True))
    # The first row of the UCI file wdbc.data: 842302,M,17.99,10.38,122.8,1001, ...
    known = {"mean radius": 17.99, "mean texture": 10.38, "mean area": 1001.0, "error radius": 1.095}
    assert {name: first[name] for name in known} == known
    assert (first["worst radius"], first["worst fractal dimension"]) == (25.38, 0.1189)
    assert table.classes[table.y[0]] == "malignant"
