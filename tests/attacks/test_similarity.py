"""Mean squared error, PSNR and SSIM against their definitions."""

import math

import pytest
import torch

from polyfed.attacks.similarity import mse, psnr, ssim

DRAW = torch.Generator().manual_seed(0)
X = torch.rand(2, 3, 13, 12, generator=DRAW)
Y = (X + 0.2 * torch.rand(X.shape, generator=DRAW)).clamp(0, 1)


def test_errors_and_decibels_are_of_each_image() -> None:
    """Catches a mean over images, a sum of squares, another peak, and infinity."""
    assert mse(X, Y).tolist() == pytest.approx([float((x - y).square().mean()) for x, y in zip(X, Y, strict=True)])
    shifted = X[:, :, :, :] * 0 + 0.25
    assert psnr(shifted, shifted + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(X, X).tolist() == [100.0, 100.0]


def by_hand(x: list[list[float]], y: list[list[float]], side: int) -> float:
    """SSIM of one channel, window by window."""
    weights = [
        [math.exp(-((i - side // 2) ** 2 + (j - side // 2) ** 2) / 4.5) for j in range(side)] for i in range(side)
    ]
    total, found = sum(map(sum, weights)), []
    for top in range(len(x) - side + 1):
        for left in range(len(x[0]) - side + 1):
            here = [
                (weights[i][j] / total, x[top + i][left + j], y[top + i][left + j])
                for i in range(side)
                for j in range(side)
            ]
            m, n = sum(w * a for w, a, _ in here), sum(w * b for w, _, b in here)
            v, u = sum(w * (a - m) ** 2 for w, a, _ in here), sum(w * (b - n) ** 2 for w, _, b in here)
            c = sum(w * (a - m) * (b - n) for w, a, b in here)
            found.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + u + 9e-4)))
    return sum(found) / len(found)


@pytest.mark.parametrize(("size", "side"), [((13, 12), 11), ((8, 12), 7)])
def test_structural_similarity_is_its_definition(size: tuple[int, int], side: int) -> None:
    """Catches other constants, a window that is flat, padded or too small, and a mean over both images."""
    x, y = X[:, :, : size[0], : size[1]], Y[:, :, : size[0], : size[1]]
    expected = [
        sum(by_hand(a.tolist(), b.tolist(), side) for a, b in zip(one, other, strict=True)) / 3
        for one, other in zip(x, y, strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    assert float(ssim(x, 1 - x).max()) < 0.1
