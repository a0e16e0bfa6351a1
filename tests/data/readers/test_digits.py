"""The digits that come with polyfed."""

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
