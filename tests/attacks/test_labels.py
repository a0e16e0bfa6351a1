"""Labels from logits."""

import pytest
import torch

from polyfed.attacks.labels import label_inference


def test_labels_are_those_of_the_largest_logits() -> None:
    """Catches shares of another axis, and a histogram that counts each example that is wrong."""
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1])] * 5 + 1
    leak = label_inference(logits, torch.tensor([0, 2, 1, 1]))
    assert (leak.accuracy, leak.majority, leak.histogram) == pytest.approx((0.5, 0.5, 0.0))
    leak = label_inference(logits, torch.tensor([0, 0, 0, 1]))
    assert (leak.accuracy, leak.majority, leak.histogram) == pytest.approx((0.5, 0.75, 0.5))
