"""A small generator of representations: from a class and Gaussian noise to (d,), by two layers.

Its weights are a value like any other, so that a server can train it, send it, and clients can run it in a loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.blocks.server_training import run_two_layers
from polyfed.core.plan import Step


def draw_classes(classes: Sequence[int], noise_dim: int, rng: Rng, step: Step) -> dict[str, Tensor]:
    """What a generator is asked for at a step: as many classes as the step has rows, and noise.

    Args:
        classes: drawn from uniformly; 0 where there is none.
        noise_dim: width of the noise.
        rng: of the round; the step's number is added to its key.
        step: how many, and which.

    Returns:
        ``y`` (B,) int64 and ``eps`` (2, B, noise_dim), standard normal: a second one for the batch's own classes.
    """
    draws, n = rng.at("generator", step.index).torch(), len(step.rows)
    y = torch.tensor([*classes] or [0])[torch.randint(len(classes) or 1, (n,), generator=draws)]
    return {"y": y, "eps": torch.randn(2, n, noise_dim, generator=draws)}


def generate(weights: Params, eps: Tensor, y: Tensor) -> Tensor:
    """Representations (B, d) of the classes ``y`` (B,): two layers on ``eps`` (B, noise_dim) beside one of L."""
    classes = weights["fc1.weight"].shape[1] - eps.shape[1]  # L
    onehot = torch.eye(classes, dtype=eps.dtype, device=eps.device)[y]  # (B, L)
    return run_two_layers(weights, torch.cat([eps, onehot], dim=1))


def ensemble(heads: Sequence[Params], counts: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """Logits (B, L) of linear heads together: sum_k a_k(y) h_k(z), a_k(y) being client k's share of class y.

    Args:
        heads: K of them, ``weight`` (L, d) and, if they have one, ``bias`` (L,).
        counts: (K, L), the examples of each class that each client has; somebody has each of ``y``.
        z: (B, d).
        y: (B,), the classes that ``z`` were made for.
    """
    shares = counts[:, y] / counts[:, y].sum(dim=0)  # (K, B)
    logits = torch.stack([linear(z, head["weight"], head.get("bias")) for head in heads])  # (K, B, L)
    return (shares[..., None] * logits).sum(dim=0)


def sameness(z: Tensor, eps: Tensor) -> Tensor:
    """exp(-mean over i, j of mean|z_i - z_j| mean(eps_i - eps_j)^2): 1 where all of ``z`` (B, d) are one, towards 0.

    FedGen's diversity loss, as its authors' code has it: what is far apart in noise (B, n) shall be so in ``z``.
    """
    apart = (z[:, None] - z).abs().mean(dim=2) * (eps[:, None] - eps).square().mean(dim=2)  # (B, B)
    return (-apart.mean()).exp()
