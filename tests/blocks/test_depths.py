"""What classifiers of unlike depth learn from one another, and how much; which depth a capacity allows."""

import math

import pytest
import torch

from polyfed.blocks.depths import Depths, each_logits, mutual, rampup
from polyfed.core.net import Net


def test_classifiers_move_towards_one_another_and_teach_unmoved() -> None:
    """Catches a divergence the wrong way round, and a teacher that moves."""
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = a.softmax(1), b.softmax(1)
    expected = (q.detach() * (q.detach() / p).log() + p.detach() * (p.detach() / q).log()).sum() / 5
    assert torch.allclose(mutual((a, b)), expected)
    (slope,) = torch.autograd.grad(mutual((a, b)), a)
    assert torch.allclose(slope, (p - q).detach() / 5)
    assert mutual((a,)) == 0


def test_the_ramp() -> None:
    """Catches a weight that goes on rising after R rounds, or begins at 0."""
    assert [rampup(t, 4) for t in (0, 2, 4, 9)] == [math.exp(-5), math.exp(-1.25), 1.0, 1.0]


def test_depths_are_nested_over_capacities() -> None:
    """Catches a depth beyond the last, and one of no stage."""
    depths = Depths((("a",), ("a", "b"), ("a", "b", "c")), (0.0, 0.25, 2.0))
    assert [depths.at(c) for c in (1e-6, 0.2499, 0.25, 1.0)] == [1, 1, 2, 2]
    assert [depths.names_at(c) for c in (0.1, 0.5)] == [("a",), ("a", "b")]


def test_a_part_without_a_network_has_no_classifiers() -> None:
    """Catches a failure far from its cause."""
    with pytest.raises(TypeError, match="no network, so it has no classifiers"):
        each_logits(Net(None, {}), torch.zeros(1, 2))
