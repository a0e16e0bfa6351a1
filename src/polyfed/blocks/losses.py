"""Losses: pure functions of tensors, each with its reduction stated."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from polyfed.core.net import Batch, Nets


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[y]. ``logits`` (B, L), ``y`` (B,) int64.

    With ``y`` (B, L), probabilities: of -sum_c y_c log softmax(logits)_c, which is 0 where a row of ``y`` is.
    """
    return functional.cross_entropy(logits, y)


def task_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """The loss of the task: `cross_entropy` for class numbers; for a regression's targets the mean squared error.

    ``outputs`` (B, L) and ``y`` (B,) int64; or ``outputs`` (B, 1) and ``y`` (B,) of a floating type.
    """
    return mean_squared_error(outputs.squeeze(1), y) if y.is_floating_point() else cross_entropy(outputs, y)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (prediction - target)^2; both of the same shape."""
    return functional.mse_loss(prediction, target)


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of KL(softmax(target) || softmax(logits)): a sum over classes, not a mean.

    Both (B, L), both logits. Neither is detached: write ``target.detach()`` where the target is not to learn from it.
    (torch calls this ``batchmean``; its default divides by L as well, which makes the term L times weaker.)
    """
    p, q = functional.log_softmax(target, dim=1), functional.log_softmax(logits, dim=1)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def supervised(nets: Nets, batch: Batch) -> Tensor:
    """The task's loss of the part ``model``: plain local training."""
    x, y = batch
    return task_loss(nets["model"](x), y)
