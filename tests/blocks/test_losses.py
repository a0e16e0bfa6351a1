"""Supervised losses with the class weights and the label smoothing of a client's batch."""

import math

import pytest
import torch
from torch.nn import functional

from polyfed.blocks.losses import (
    cross_entropy,
    distance_correlation,
    feature_distance,
    mean_squared_error,
    soft_labels,
    task_loss,
    total_weight,
)
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


def test_distances_of_features_are_their_formulas() -> None:
    """Catches a sum for a mean, deviations of what was made, and a division by the deviation of a dead feature."""
    target = torch.tensor([[1.0, 0.0, 4.0], [3.0, 0.0, 4.0]], dtype=torch.float64)
    made = torch.tensor([[1.5, 0.1, 4.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(feature_distance(made, target, "mse"), mean_squared_error(made, target))
    smooth = (0.5 * 0.25 + 0.5 * 0.01 + 2.5) / 6
    assert float(feature_distance(made, target, "smooth_l1")) == pytest.approx(smooth)
    # Variances 1, 0, 0: the least is a hundredth of their mean, 1/300.
    standard = (0.25 + 0.01 * 300 + 9 * 300) / 6
    assert float(feature_distance(made, target, "standardised")) == pytest.approx(standard)
    a, b = (1.5 + 16) / ((2.25 + 0.01 + 16) * 17) ** 0.5, (9 + 4) / (10 * 25) ** 0.5
    assert float(feature_distance(made, target, "cosine")) == pytest.approx(1 - (a + b) / 2)
    assert float(feature_distance(target, target, "cosine")) == pytest.approx(0, abs=1e-12)
    dead = torch.zeros(4, 3)
    assert float(feature_distance(dead, dead, "standardised")) == 0.0


def test_distance_correlation_is_its_definition() -> None:
    """Catches distances that are squared or not centred, sums for means, and constants that divide zero by zero."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(9, d, 2, generator=generator, dtype=torch.float64) for d in (3, 2))

    def centred(rows: torch.Tensor) -> list[list[float]]:
        n, flat = len(rows), rows.flatten(1).tolist()
        d = [[math.dist(a, b) for b in flat] for a in flat]
        row, every = [sum(line) / n for line in d], sum(map(sum, d)) / n**2
        return [[d[i][j] - row[i] - row[j] + every for j in range(n)] for i in range(n)]

    def covariance(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(p * q for one, other in zip(a, b, strict=True) for p, q in zip(one, other, strict=True)) / 81

    a, b = centred(x), centred(z)
    expected = math.sqrt(covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b)))
    assert float(distance_correlation(x.float(), z.float())) == pytest.approx(expected, rel=1e-5)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0].float()
    flat = x.float().flatten(1)
    assert float(distance_correlation(flat, 3 * flat @ turn + 5)) == pytest.approx(1, rel=1e-5)
    same = torch.full((9, 4), 1.7, requires_grad=True)
    for pair in ((flat, same), (same, flat), (same, same)):
        nothing = distance_correlation(*pair)
        assert float(nothing.detach()) == 0
        assert not torch.autograd.grad(nothing, same)[0].any()
