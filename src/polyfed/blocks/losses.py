"""Losses: pure functions of tensors, each with its reduction stated."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from polyfed.core.net import Batch, Nets, WeightedBatch


def cross_entropy(logits: Tensor, y: Tensor | Batch) -> Tensor:
    """Mean over the batch of -log softmax(logits)[y]. ``logits`` (B, L), ``y`` (B,) int64.

    Give a client's batch, not its labels alone, wherever a client learns from its labels: its class weights and its
    label smoothing count then, as torch defines them: the mean is over the weights of the labels. ``y`` alone is for a
    server, which has no weights, and for terms of distillation.

    With ``y`` (B, L), probabilities: of -sum_c y_c log softmax(logits)_c, which is 0 where a row of ``y`` is.
    """
    if isinstance(y, Tensor):
        return functional.cross_entropy(logits, y)
    if not isinstance(y, WeightedBatch):
        return functional.cross_entropy(logits, y[1])
    # Under bfloat16's autocast a loss is computed in float32, and the weights have to follow the logits' type.
    weights = None if y.weights is None else y.weights.to(logits.dtype)
    return functional.cross_entropy(logits, y[1], weight=weights, label_smoothing=y.smoothing)


def task_loss(outputs: Tensor, y: Tensor | Batch) -> Tensor:
    """The loss of the task: `cross_entropy` for class numbers; for a regression's targets the mean squared error.

    ``outputs`` (B, L) and ``y`` (B,) int64; or ``outputs`` (B, 1) and ``y`` (B,) of a floating type. As in
    `cross_entropy`, give a client's batch for ``y``.
    """
    target = y if isinstance(y, Tensor) else y[1]
    return mean_squared_error(outputs.squeeze(1), target) if target.is_floating_point() else cross_entropy(outputs, y)


def total_weight(batch: Batch) -> Tensor | int:
    """The sum of the weights of a batch's labels, by which `cross_entropy` divides; without weights B.

    ``task_loss(outputs, batch) * total_weight(batch)`` is a sum over examples, which adds up over batches.
    """
    weights = batch.weights if isinstance(batch, WeightedBatch) else None
    return len(batch[1]) if weights is None else weights[batch[1]].sum()


def soft_labels(batch: Batch, like: Tensor) -> Tensor:
    """What `cross_entropy` compares log softmax with, (B, L): ones at the labels, smoothed and weighted.

    With q of these, `cross_entropy` is -sum q log softmax(logits) / `total_weight`; without class weights each row has
    the sum 1.

    Args:
        batch: inputs and labels (B,).
        like: a tensor (B, L) of the wanted type.
    """
    right = torch.zeros_like(like).scatter(1, batch[1][:, None], 1)
    if not isinstance(batch, WeightedBatch):
        return right
    weights = torch.ones_like(like[0]) if batch.weights is None else batch.weights.to(like.dtype)
    return ((1 - batch.smoothing) * right + batch.smoothing / like.shape[1]) * weights


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over classes, (B, L) float64, of ``logits`` (B, L).

    A class with the logit -inf, such as one without a prototype, has the probability 0. Without any candidate, as
    before prototypes are made, each class has 1/L.
    """
    exact = logits.double()
    none = (exact == -torch.inf).all(dim=1, keepdim=True)
    return exact.masked_fill(none, 0.0).softmax(dim=1)


def without(logits: Tensor, present: Tensor, value: float | None = None) -> Tensor:
    """Logits (B, L) in which classes that are not ``present``, (L,) bool, have ``value``.

    None is the lowest finite number, with which a class has the probability 0.
    """
    return logits.masked_fill(~present, torch.finfo(logits.dtype).min if value is None else value)


def cross_entropy_among(
    logits: Tensor, batch: Batch, present: Tensor, absent: Literal["excluded", "zero", "kept"] = "excluded"
) -> Tensor:
    """`cross_entropy` for a client that has some classes only.

    Args:
        logits: (B, L).
        batch: inputs and labels (B,), which are among the classes present.
        present: (L,) bool.
        absent: how the other classes count: not at all, so that what label smoothing gives to them is dropped;
            ``"zero"``, with the logit 0, which takes probability; ``"kept"``, with their own logits.
    """
    if absent != "excluded":
        return cross_entropy(without(logits, present, 0.0) if absent == "zero" else logits, batch)
    log_p = functional.log_softmax(without(logits, present), dim=1).masked_fill(~present, 0)
    return -(soft_labels(batch, log_p) * log_p).sum() / total_weight(batch)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (prediction - target)^2; both of the same shape."""
    return functional.mse_loss(prediction, target)


#: How far features are from their targets; see `feature_distance`.
Distance: TypeAlias = Literal["mse", "smooth_l1", "cosine", "standardised"]


def feature_distance(made: Tensor, target: Tensor, distance: Distance) -> Tensor:
    """The distance of features (B, d) from their targets (B, d), a mean over what it compares.

    ``mse``: `mean_squared_error`. ``smooth_l1``: e^2 / 2 for errors |e| < 1 and |e| - 1/2 beyond. ``cosine``: 1 - cos
    of each row. ``standardised``: the squared error, each feature in standard deviations of its targets in the batch;
    of at least a tenth of the features' root mean variance, as a feature that is always 0 has the deviation 0.
    """
    if distance == "smooth_l1":
        return functional.smooth_l1_loss(made, target)
    if distance == "cosine":
        return (1 - functional.cosine_similarity(made, target, dim=1)).mean()
    if distance == "standardised":
        variance = target.var(0, correction=0)
        floor = (0.01 * variance.mean()).clamp_min(torch.finfo(target.dtype).tiny)
        return ((made - target).square() / torch.maximum(variance, floor)).mean()
    return mean_squared_error(made, target)


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """The distance correlation of examples x (B, ...) and z (B, ...), a scalar in [0, 1].

    0 where all examples of x, or of z, are alike; 1 for z = c Q x + d with an orthogonal Q. With A and B the Euclidean
    distances between the examples, centred by row and by column, its square is <A, B> / (|A| |B|): formulas 2.8 to 2.10
    of G. J. Szekely, M. L. Rizzo, N. K. Bakirov: Measuring and testing dependence by correlation of distances, Annals
    of Statistics 2007. In a small batch it is far above 0 for independent x and z, too. Its gradient is 0 where it is.
    """
    a, b = (_centred_distances(value.flatten(1).to(torch.get_default_dtype())) for value in (x, z))
    tiny = torch.finfo(a.dtype).tiny
    square = (a * b).sum() / (a.norm().clamp_min(tiny) * b.norm().clamp_min(tiny))
    some = square > 0
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def _centred_distances(rows: Tensor) -> Tensor:
    """The distances (B, B) between ``rows`` (B, d), minus the means of their row and column, plus the mean of all."""
    # Not by a product of matrices: its rounding would give equal rows distances above 0.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of KL(softmax(target) || softmax(logits)): a sum over classes, not a mean.

    Both (B, L), both logits. Neither is detached: write ``target.detach()`` where the target is not to learn from it.
    (torch calls this ``batchmean``; its default divides by L as well, which makes the term L times weaker.)
    """
    p, q = functional.log_softmax(target, dim=1), functional.log_softmax(logits, dim=1)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def supervised(nets: Nets, batch: Batch) -> Tensor:
    """The task's loss of the part ``model``: plain local training."""
    return task_loss(nets["model"](batch[0]), batch)


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss: each view has to name its partner among all other views of the batch, by cosine.

    Mean over the 2 B rows of -log softmax_j(cos(z_i, z_j) / temperature)[partner of i], j != i.

    T. Chen et al.: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, Eq. 1.

    Args:
        z: projected views (2 B, p); rows i and B + i are views of one example. With B = 1 there is nothing to tell
            apart, and the loss is 0.
        temperature: above 0.
    """
    unit, rows = functional.normalize(z, dim=1), torch.arange(len(z), device=z.device)
    likeness = (unit @ unit.T / temperature).masked_fill(rows[:, None] == rows, -torch.inf)  # (2B, 2B)
    return functional.cross_entropy(likeness, rows.roll(len(z) // 2))


def barlow_twins(z: Tensor, redundancy: float) -> Tensor:
    """Barlow Twins' loss: the two views' numbers correlate one by one, and with no other.

    Mean over i of (1 - C_ii)^2 + redundancy * sum over j != i of C_ij^2, where C (p, p) is the correlation over the
    batch of the one view's numbers with the other's.

    J. Zbontar et al.: Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021, Eq. 1 and 2, which
    have the sum over i.

    Args:
        z: projected views (2 B, p); rows i and B + i are views of one example.
        redundancy: the weight of what should be 0.
    """
    pair = z.unflatten(0, (2, -1))  # (2, B, p)
    centred = pair - pair.mean(dim=1, keepdim=True)
    one, other = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    C = one.T @ other / one.shape[0]  # noqa: N806
    on = C.diagonal()
    off = C.square().sum() - on.square().sum()
    return ((1 - on).square().sum() + redundancy * off) / len(C)


def view_loss(z: Tensor, kind: Literal["simclr", "barlow"], temperature: float, redundancy: float) -> Tensor:
    """`nt_xent` or `barlow_twins` of projected views (2 B, p)."""
    return nt_xent(z, temperature) if kind == "simclr" else barlow_twins(z, redundancy)
