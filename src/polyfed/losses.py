"""Losses: pure functions of tensors, each with its reduction stated."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[y]. ``logits`` (B, L), ``y`` (B,) int64."""
    return F.cross_entropy(logits, y)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (prediction - target)^2; both of the same shape."""
    return F.mse_loss(prediction, target)
