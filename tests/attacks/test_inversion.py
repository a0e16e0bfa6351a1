"""Inversion where it must succeed, and where it cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from polyfed.attacks.inversion import decoder_attack, white_box
from polyfed.attacks.similarity import psnr
from polyfed.base.rng import Rng

RNG = Rng((0, "attack"))


def images(count: int, seed: int) -> Tensor:
    """Smooth images (count, 1, 8, 8): a bright square on a slope."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=draw)
    return functional.interpolate(coarse, size=(8, 8), mode="bilinear")


MINE, OTHERS = images(8, 1), images(400, 2)
TURN = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0][:, :, None, None]


def linear(x: Tensor) -> Tensor:
    """An invertible linear map: patches of 4 x 4 pixels, turned."""
    return functional.conv2d(functional.pixel_unshuffle(x, 4), TURN)


def noise(x: Tensor) -> Tensor:
    """Features that know nothing of the image."""
    return torch.randn(len(x), 16, 2, 2, generator=torch.Generator().manual_seed(len(x)))


@pytest.mark.parametrize("show", [lambda x: x, linear, lambda x: linear(x).flatten(1)], ids=["same", "linear", "flat"])
def test_a_decoder_inverts_what_can_be_inverted(show: Any) -> None:
    """Catches a decoder that does not learn, or is not applied to what was sent."""
    found = decoder_attack(show(MINE), show, OTHERS, rng=RNG, steps=250, width=16, batch=32)
    assert found.shape == MINE.shape
    assert float(psnr(found, MINE).min()) > 24
    assert float(psnr(found, MINE).mean()) > 28


def test_a_decoder_finds_nothing_in_noise() -> None:
    """Catches an attack that has seen the images it is to find: the best is the mean image."""
    found = decoder_attack(noise(MINE), noise, OTHERS, rng=RNG, steps=60, width=8, batch=32)
    blind = psnr(OTHERS.mean(0, keepdim=True).expand_as(MINE), MINE).mean()
    assert float(psnr(found, MINE).mean()) < float(blind) + 1


def test_a_search_finds_an_image_with_these_features() -> None:
    """Catches a search that does not move, leaves the pixels' range, or follows its prior alone."""
    found = white_box(linear(MINE), linear, (1, 8, 8), rng=RNG, steps=150, smooth=0.001)
    assert float(psnr(found, MINE).min()) > 30
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    flat = white_box(linear(MINE), linear, (1, 8, 8), rng=RNG, steps=150, smooth=10.0)
    assert float(flat.diff(dim=3).abs().mean()) < 0.1 * float(found.diff(dim=3).abs().mean())


def test_attacks_can_be_redone_and_depend_on_their_key() -> None:
    """Catches global randomness."""
    ways = (
        lambda rng: decoder_attack(linear(MINE), linear, OTHERS, rng=rng, steps=3, width=8),
        lambda rng: white_box(linear(MINE), linear, (1, 8, 8), rng=rng, steps=3),
    )
    for attack in ways:
        before = torch.get_rng_state()
        first = attack(RNG)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(attack(RNG), first)
        assert not torch.equal(attack(RNG.at(1)), first)
