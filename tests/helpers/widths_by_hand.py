"""HeteroFL and FedRolex with modules, hooks and loops: windows by size, the Scaler, label masks, static BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import plain
import torch
from torch import Tensor, nn
from torch.nn import functional


def window(full: Tensor, small: Sequence[int], j: int) -> tuple[Tensor, ...]:
    """Positions of each dimension: where one is narrower, the window from j on, modulo the full size."""
    axes = [
        torch.arange(n) if m == n else torch.tensor(sorted((j + i) % n for i in range(m)))
        for n, m in zip(full.shape, small, strict=True)
    ]
    return torch.meshgrid(*axes, indexing="ij") if axes else ()


def sliced(w: plain.Weights, make: Callable[[], nn.Module], j: int) -> plain.Weights:
    """The weights of a smaller module."""
    return {n: w[n][window(w[n], v.shape, j)].clone() for n, v in make().state_dict().items()}


def classes(labels: Tensor, number: int) -> list[int]:
    """The classes that a client has."""
    return [c for c in range(number) if c in labels.tolist()]


def train(
    make: Callable[[], nn.Module], w: plain.Weights, batches: plain.Batches, settings: plain.Settings, rho: float,
    own: Sequence[int], absent: str,
) -> plain.Weights:  # fmt: skip
    """Plain training with a hook that divides the outputs of all layers but the last and the norms."""
    module = plain.load(make, w)
    layers = [child for child in module.modules() if isinstance(child, nn.Conv2d | nn.Linear)]
    for layer in layers[:-1]:
        layer.register_forward_hook(lambda _module, _args, out: out / rho)
    optimizer = settings.optimizer(module.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        logits = module(x)
        others = [c for c in range(logits.shape[1]) if c not in own]
        if absent != "kept":
            logits = logits.index_fill(
                1, torch.tensor(others, dtype=torch.int64), -math.inf if absent == "excluded" else 0
            )
        functional.cross_entropy(logits, y).backward()
        optimizer.step()
    return plain.saved(module)


def average(
    w: plain.Weights,
    uploads: Sequence[plain.Weights],
    starts: Sequence[int],
    own: Sequence[Sequence[int]],
    head: Sequence[str],
) -> plain.Weights:
    """Each coordinate's mean over those who hold it; rows of the head over those who have the class."""
    out: plain.Weights = {}
    for name, value in w.items():
        total, count = torch.zeros(value.shape, dtype=torch.float64), torch.zeros(value.shape)
        for up, j, mine in zip(uploads, starts, own, strict=True):
            here = torch.zeros(value.shape)
            here[window(value, up[name].shape, j)] = 1
            if name in head:
                here[[c for c in range(value.shape[0]) if c not in mine]] = 0
            full = torch.zeros(value.shape, dtype=torch.float64)
            full[window(value, up[name].shape, j)] = up[name].double()
            total, count = total + here * full, count + here
        mean = total / count.clamp_min(1)
        mean = mean if value.is_floating_point() else mean.round()
        out[name] = torch.where(count > 0, mean.to(value.dtype), value)
    return out


def statistics(make: Callable[[], nn.Module], w: plain.Weights, data: Sequence[Tensor]) -> plain.Weights:
    """Running means and variances of a cumulative average over one batch for each client, weighted by its examples."""
    found: list[Any] = []
    for x in data:
        module = plain.load(make, w)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None
        with torch.no_grad():
            module(x)
        found.append({n: v for n, v in plain.saved(module).items() if "running" in n})
    return plain.mean(found, [len(x) for x in data])
