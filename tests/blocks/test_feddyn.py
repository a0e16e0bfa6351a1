"""FedDyn: the gradient is that of the objective, memories are sums of steps, the fixed point is the optimum."""

import pytest
import torch
from torch import Tensor

from polyfed.blocks.feddyn import corrected, pulled, remembered


def draws(*names: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, dtype=torch.float64, generator=generator) for name in names}


def test_the_gradient_is_that_of_the_objective() -> None:
    """Catches a sign, and a pull on tensors without a memory."""
    w, start, memory = draws("a", "b"), draws("a", seed=1), draws("a", seed=2)
    leaf = w["a"].clone().requires_grad_()
    objective = leaf.square().sum() - (memory["a"] * leaf).sum() + 0.3 / 2 * (leaf - start["a"]).square().sum()
    (expected,) = torch.autograd.grad(objective, leaf)
    g = {"a": 2 * w["a"], "b": w["b"]}
    found = pulled(g, w, start, memory, 0.3)
    assert torch.allclose(found["a"], expected)
    assert found["b"] is g["b"]


def test_a_tensor_without_a_client_keeps_its_h() -> None:
    """Catches a correction of what nobody trained, and an h of running statistics."""
    model, mean, h = draws("a", "b", "s"), draws("a", "s", seed=1), draws("a", "b", seed=2)
    new, found = corrected(h, model, {**model, **mean}, {"a": 2, "b": 0, "s": 2}, 5, 0.3)
    assert torch.allclose(new["a"], h["a"] - 0.3 * 2 / 5 * (mean["a"] - model["a"]))
    assert torch.allclose(found["a"], mean["a"] - new["a"] / 0.3)
    assert new["b"] is h["b"]
    assert found["b"] is model["b"]
    assert found["s"] is mean["s"]
    assert set(new) == {"a", "b"}


@pytest.mark.parametrize("holders", [3, 2])
def test_the_fixed_point_is_the_optimum_of_those_who_hold_a_tensor(holders: int) -> None:
    """Catches memories that cancel too little or too much: with unlike clients plain averages stop elsewhere.

    Client k minimises c_k / 2 |w - t_k|^2, exactly. The optimum of the mean is sum_k c_k t_k / sum_k c_k, also where
    some of the clients lack the tensor.
    """
    c, t, alpha = (1.0, 5.0, 0.5)[:holders], [draws("w", seed=k)["w"] for k in range(holders)], 0.7
    model, h = draws("w", seed=9), {"w": torch.zeros(3, dtype=torch.float64)}
    memory = [{"w": torch.zeros(3, dtype=torch.float64)} for _ in c]
    for _ in range(400):
        # 0 = c (w - t) + alpha (w - start) - g
        own = [(ck * tk + alpha * model["w"] + g["w"]) / (ck + alpha) for ck, tk, g in zip(c, t, memory, strict=True)]
        memory = [remembered(g, {"w": w}, model, alpha) for g, w in zip(memory, own, strict=True)]
        mean = {"w": torch.stack(own).mean(0)}
        h, model = corrected(h, model, mean, {"w": holders}, 3, alpha)
    expected = torch.stack([ck * tk for ck, tk in zip(c, t, strict=True)]).sum(0) / sum(c)
    assert torch.allclose(model["w"], expected, atol=1e-9)
