"""Arithmetic on mappings of tensors."""

import torch

from polyfed.base import tree


def test_the_difference_of_truth_values_is_taken_back_by_a_sum() -> None:
    """Catches a traceback of torch, another type than what was sent, and a mean that a minority decides."""
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    turned = tree.sub({"on": b}, {"on": a})
    assert turned["on"].dtype == torch.bool
    assert turned["on"].tolist() == [False, True, True, False]
    assert tree.add({"on": a}, turned)["on"].tolist() == b.tolist()
    mean = {"on": torch.tensor([2 / 3, 2 / 3, 1 / 3, 0.5], dtype=torch.float64)}
    assert tree.add({"on": a}, mean)["on"].tolist() == [False, False, False, False]
    assert tree.add({"on": a}, mean, scale=0.5)["on"].tolist() == a.tolist()
