"""How alike images are: mean squared error, PSNR and SSIM, each by image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SIDE, _SIGMA = 11, 1.5  # of SSIM's window, in pixels


def mse(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error of the pixels of each image, (N,) float64; both (N, C, H, W) in [0, 1]."""
    return (images.double() - others.double()).square().flatten(1).mean(1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, (N,) float64: -10 log10 of `mse`, as the peak is 1.

    Equal images would have infinitely many: at most 100, the value of a mean squared error of 1e-10.
    """
    return -10 * mse(images, others).clamp_min(1e-10).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each image, (N,) float64, of at most 1, which equal images have.

    The mean over channels and over all places of a normal window of 11 x 11 pixels with a deviation of 1.5, or of the
    largest odd side that fits into a smaller image, of

        (2 m n + C1) (2 c + C2) / ((m^2 + n^2 + C1) (v + w + C2)),  C1 = 0.01^2,  C2 = 0.03^2

    with the windows' weighted means m and n, variances v and w, and covariance c. Z. Wang, A. C. Bovik, H. R. Sheikh,
    E. P. Simoncelli: Image quality assessment: from error visibility to structural similarity, IEEE Transactions on
    Image Processing 2004; without the reduction of large images that its released code begins with.
    """
    side = min(_SIDE, *(length - (length % 2 == 0) for length in images.shape[2:]))
    places = torch.arange(side, dtype=torch.float64, device=images.device) - side // 2
    line = (-(places**2) / (2 * _SIGMA**2)).exp()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    x, y = (value.double().flatten(0, 1)[:, None] for value in (images, others))

    def mean(value: Tensor) -> Tensor:
        return functional.conv2d(value, window)

    m, n = mean(x), mean(y)
    v, w, c = mean(x * x) - m * m, mean(y * y) - n * n, mean(x * y) - m * n
    value = (2 * m * n + 0.01**2) * (2 * c + 0.03**2) / ((m * m + n * n + 0.01**2) * (v + w + 0.03**2))
    return value.flatten(1).mean(1).reshape(images.shape[:2]).mean(1)
