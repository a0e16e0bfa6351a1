"""Supervised losses with the class weights and the label smoothing of a client's batch."""

import pytest
import torch
from torch.nn import functional

from polyfed.blocks.losses import cross_entropy, soft_labels, task_loss, total_weight
from polyfed.core.net import WeightedBatch, alike

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
X, Y = torch.zeros(7, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 3, 3, 3, 0])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
GIVEN = [(None, 0.0), (WEIGHTS, 0.0), (None, 0.3), (WEIGHTS, 0.3)]


@pytest.mark.parametrize(("weights", "smoothing"), GIVEN)
def test_the_mean_is_torchs(weights: torch.Tensor | None, smoothing: float) -> None:
    """Catches a mean over examples where torch divides by the weights, and smoothing that is lost on the way."""
    batch = WeightedBatch(X, Y, weights, smoothing)
    expected = functional.cross_entropy(LOGITS, Y, weight=weights, label_smoothing=smoothing)
    assert torch.equal(cross_entropy(LOGITS, batch), expected)
    assert torch.equal(task_loss(LOGITS, batch), expected)
    assert torch.equal(cross_entropy(LOGITS, (X, Y)), functional.cross_entropy(LOGITS, Y))


@pytest.mark.parametrize(("weights", "smoothing"), GIVEN)
def test_sums_add_up_over_batches_and_soft_labels_give_the_gradient(
    weights: torch.Tensor | None, smoothing: float
) -> None:
    """Catches a validation loss that depends on how it was cut into batches, and a slope of another loss."""
    batch = WeightedBatch(X, Y, weights, smoothing)
    whole = cross_entropy(LOGITS, batch)
    pieces = [(LOGITS[some], alike(batch, X[some], Y[some])) for some in (slice(0, 3), slice(3, 7))]
    sums = [float((cross_entropy(logits, part) * total_weight(part)).detach()) for logits, part in pieces]
    assert sum(sums) == pytest.approx(float(whole.detach()) * float(total_weight(batch)), rel=1e-12)
    (gradient,) = torch.autograd.grad(whole, LOGITS)
    p, q = LOGITS.detach().softmax(dim=1), soft_labels(batch, LOGITS)
    assert torch.allclose(gradient, (q.sum(dim=1, keepdim=True) * p - q) / total_weight(batch), rtol=1e-10)


def test_targets_of_a_regression_are_not_weighed() -> None:
    """Catches numbers that are taken for classes."""
    y = torch.randn(7, dtype=torch.float64)
    assert torch.equal(task_loss(X[:, :1], (X, y)), y.square().mean())
