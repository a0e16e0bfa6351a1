"""Two random views of each example, for losses that need no labels, and what compares them.

What is random is drawn outside the loss (`draw_views`, for ``fit(..., draw=...)``), and the loss makes the views from
the batch and what was drawn (`two_views`): so stacked clients see what single ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.ranges import Fraction, NonNegative, Portion, Rate
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.core.algorithm import Task, raise_idle
from polyfed.core.plan import Step


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a view differs from its example, and which loss compares two; a base of algorithms, with the keys.

    Args:
        contrast: ``"simclr"``, NT-Xent with its ``temperature``; or ``"barlow"``, Barlow Twins with its ``redundancy``.
        crop: the least share of each axis (height and width; time) that a view keeps; it is stretched to the whole.
        flip: whether images are mirrored with probability 1/2.
        jitter: channels are multiplied by up to 1 +- jitter, and up to +- jitter is added, in the channel's deviations.
        grey: the probability with which an image of three channels gets their mean in each.
        noise: standard deviation of the Gaussian noise that is added to every number of a signal.
        channels_last: whether signals are ``(T, C)``; else ``(C, T)``.
    """

    contrast: Literal["simclr", "barlow"] = "simclr"
    temperature: Rate = 0.5
    redundancy: NonNegative = 0.005
    crop: Portion = 0.6
    flip: bool = True
    jitter: NonNegative = 0.4
    grey: Fraction = 0.2
    noise: NonNegative = 0.1
    channels_last: bool = False

    def __post_init__(self) -> None:
        """No key without an effect."""
        idle = {"simclr": "redundancy", "barlow": "temperature"}[self.contrast]
        raise_idle(self, (True, f"contrast = {self.contrast!r} does not use it", {idle}))

    def check_views(self, algorithm: str, task: Task) -> None:
        """Raise ModelError where examples have no views: rows of a table, and tokens."""
        shape = task.input_shape
        if task.dtype is not None or len(shape) < 2:
            raise ModelError(f"{algorithm} makes views of images and signals; examples have shape {shape}")
        if self.channels_last and len(shape) == 3:
            raise ModelError("algorithm.channels_last: got true; images are (C, H, W), and only signals have a choice")

    def axes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Return the axes of a batch along which views are cropped, and that of the channels.

        Args:
            shape: of one example, ``(C, H, W)``, or of a signal.
        """
        if len(shape) == 3:
            return (2, 3), 1
        return ((1,), 2) if self.channels_last else ((2,), 1)


def draw_views(views: Views, shape: Sequence[int], rng: Rng, step: Step) -> dict[str, Tensor]:
    """Return what the two views of a step's examples are made with.

    Args:
        views: how they differ.
        shape: of one example.
        rng: of the round and client; the step's number is added to its key.
        step: how many examples, and which step.

    Returns:
        For each cropped axis ``a`` of n places ``axis-a`` (2, B, n) int64: where each place of a view comes from;
        ``gain`` and ``bias``, (2, B, C); for images of three channels ``grey``, (2, B, 1) bool; for signals ``noise``
        (2, B, ...), of the shape of two batches.
    """
    draws = rng.at("views", step.index).torch()
    axes, channels = views.axes(shape)
    size, count, image = (2, len(step.rows)), shape[channels - 1], len(shape) == 3
    out: dict[str, Tensor] = {}
    for axis in axes:
        n = shape[axis - 1]
        share = 1 - (1 - views.crop) * torch.rand(*size, 1, generator=draws)
        start = n * (1 - share) * torch.rand(*size, 1, generator=draws)
        out[f"axis-{axis}"] = (start + (torch.arange(n) + 0.5) * share).long().clamp(max=n - 1)
    if image and views.flip:
        across = out["axis-3"]
        out["axis-3"] = torch.where(torch.rand(*size, 1, generator=draws) < 0.5, across.flip(-1), across)
    gain, bias = views.jitter * (2 * torch.rand(2, *size, count, generator=draws) - 1)
    out |= {"gain": 1 + gain, "bias": bias}
    if image and count == 3:
        out["grey"] = torch.rand(*size, 1, generator=draws) < views.grey
    if not image:
        out["noise"] = views.noise * torch.randn(*size, *shape, generator=draws)
    return out


def two_views(views: Views, x: Tensor, drawn: Params) -> Tensor:
    """Return both views of a batch, one below the other, (2 B, ...): rows i and B + i are views of example i.

    Args:
        views: how they differ.
        x: normalised images (B, C, H, W), or standardised signals.
        drawn: by `draw_views`.
    """
    axes, channels = views.axes(x.shape[1:])

    def view(which: int) -> Tensor:
        out = x
        for axis in axes:
            out = out.gather(axis, _along(drawn[f"axis-{axis}"][which], out, axis).expand_as(out))
        gain, bias = (_along(drawn[name][which], out, channels) for name in ("gain", "bias"))
        out = out * gain + bias
        if "grey" in drawn:
            out = torch.where(_along(drawn["grey"][which], out, 1), out.mean(dim=1, keepdim=True), out)
        return out + drawn["noise"][which] if "noise" in drawn else out

    return torch.cat([view(0), view(1)])


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """(B, n) as (B, 1, ..., n, ..., 1), with n at ``axis`` of ``x``."""
    shape = [len(values)] + [1] * (x.dim() - 1)
    shape[axis] = -1
    return values.reshape(shape)
