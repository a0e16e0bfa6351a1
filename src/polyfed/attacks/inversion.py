"""Images from features: by a decoder that learns from other images, or by a search for an image with these features.

Both know how features are made: the extractor's weights, which server and clients have, and the veil (pooling, clip,
noise, type), but not the random numbers of the client's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.rng import Rng

#: Images (B, C, H, W) in [0, 1] -> the features (B, ...) that a client would send of this batch.
Show: TypeAlias = Callable[[Tensor], Tensor]


def decoder_attack(
    sent: Tensor, show: Show, auxiliary: Tensor, *, rng: Rng, steps: int = 500, batch: int = 64, width: int = 64
) -> Tensor:
    """Return images from ``sent`` by a network that learnt to invert ``show`` on other images.

    It minimises over its weights the mean of (d(show(a)) - a)^2 over auxiliary images a, by Adam. After A. Dosovitskiy,
    T. Brox: Inverting visual representations with convolutional networks, CVPR 2016; and Z. He, T. Zhang, R. B. Lee:
    Model inversion attacks against collaborative inference, ACSAC 2019. The attacker knows the extractor, and has other
    images of the same kind. It costs ``steps`` steps of a small network, however many features are sent.

    Args:
        sent: the features (B, ...) of the client's images.
        show: how features are made of images; with noise it may draw anew at each call.
        auxiliary: the attacker's images, (A, C, H, W) in [0, 1].
        rng: randomness of the decoder's weights and batches.
        steps: steps of training.
        batch: examples in a batch, of the training and of ``show``.
        width: channels of the decoder.

    Returns:
        Images (B, C, H, W) in [0, 1].
    """
    with torch.no_grad():
        seen = torch.cat([show(images) for images in auxiliary.split(batch)]).to(auxiliary.dtype)
    axes = [0, *range(2, seen.dim())]
    mean, scale = seen.mean(axes, keepdim=True), seen.std(axes, correction=0, keepdim=True).clamp_min(1e-6)
    with rng.at("decoder").fork():
        decoder = _Decoder(seen.shape[1:], auxiliary.shape[1:], width).to(auxiliary.device, auxiliary.dtype)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    draw = rng.at("batches").torch()
    for _ in range(steps):
        rows = torch.randint(len(seen), (batch,), generator=draw).to(seen.device)
        loss = functional.mse_loss(decoder((seen[rows] - mean) / scale), auxiliary[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return decoder((sent.to(auxiliary.dtype) - mean) / scale)


class _Decoder(nn.Module):
    """Features with positions: two convolutions, and each position becomes a patch of pixels; else two dense layers."""

    def __init__(self, features: Sequence[int], image: Sequence[int], width: int) -> None:
        super().__init__()
        channels, self.sides = image[0], image[1:]
        if len(features) != 3:
            layers = [nn.Flatten(), nn.Linear(math.prod(features), 8 * width), nn.ReLU()]
            layers += [nn.Linear(8 * width, math.prod(image)), nn.Unflatten(1, tuple(image))]
        else:
            by = max(-(-side // own) for side, own in zip(self.sides, features[1:], strict=True))
            fine = max(channels, width // 4)
            layers = [nn.Conv2d(features[0], width, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(width, fine * by**2, 3, padding=1), nn.PixelShuffle(by), nn.ReLU()]
            layers += [nn.Conv2d(fine, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, :, : self.sides[0], : self.sides[1]]


def white_box(
    sent: Tensor, show: Show, image: Sequence[int], *, rng: Rng, steps: int = 300, smooth: float = 0.01
) -> Tensor:
    """Return the images whose features are nearest to ``sent``, found by gradient steps on their pixels.

    It minimises over images x in [0, 1] ||show(x) - sent||^2 / ||sent||^2 + ``smooth`` TV(x), where TV is the mean
    absolute difference of neighbouring pixels, by Adam, from grey with a little noise. After A. Mahendran, A. Vedaldi:
    Understanding deep image representations by inverting them, CVPR 2015; and Z. He, T. Zhang, R. B. Lee, ACSAC 2019.
    The attacker knows the extractor and has no images at all.

    Args:
        sent: the features (B, ...) of the client's images.
        show: how features are made of images, as far as it can be computed: without the noise, whose draw is unknown,
            and in full precision, as rounding has no gradient.
        image: the shape (C, H, W) of an image.
        rng: randomness of the first images.
        steps: gradient steps.
        smooth: weight of TV, the prior that images are smooth.

    Returns:
        Images (B, C, H, W) in [0, 1].
    """
    target = sent.to(torch.get_default_dtype())
    start = torch.rand((len(sent), *image), generator=rng.at("start").torch(), dtype=torch.float64)
    x = (0.5 + 0.02 * (start - 0.5)).to(target.device, target.dtype).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    size = target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)
    for _ in range(steps):
        uneven = x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
        loss = (show(x) - target).square().sum() / size + smooth * uneven
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()
