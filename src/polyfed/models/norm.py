"""The normalisation layers that a convolutional network can be built with."""

from __future__ import annotations

from math import gcd

from torch import nn

from polyfed.base.errors import ModelError


def norm(kind: str, channels: int, dims: int) -> nn.Module:
    """A normalisation layer for ``(B, channels, H, W)``, or for signals ``(B, channels, T)``.

    Args:
        kind: "batch": BatchNorm; "static": BatchNorm without running statistics, which uses the batch's own
            in evaluation too; "group": GroupNorm with 32 groups where that leaves two channels or more to a
            group, else the largest number that divides 32 and does so (a group of one channel would turn 1x1
            maps into zeros).
        channels: width of the map.
        dims: 2 for images, 1 for signals.
    """
    batch = nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d
    match kind:
        case "batch":
            return batch(channels)
        case "static":
            return batch(channels, momentum=None, track_running_stats=False)
        case "group":
            return nn.GroupNorm(groups(channels), channels)
        case _:
            raise ModelError(f"unknown norm {kind!r}; expected batch, group or static")


def groups(channels: int) -> int:
    """Return the number of groups of GroupNorm: the largest divisor of 32 with at least two channels in each group."""
    return gcd(32, channels // 2) if channels % 2 == 0 else 1
