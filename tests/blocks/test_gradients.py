"""The closed form of the alignment against a solver, its promises, and all four modes alone and under vmap."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from polyfed.blocks.gradients import Align, combine, combine_all, nearest_unopposed

MODES: tuple[Align, ...] = ("none", "local_primary", "in_primary_sum", "always")


def draw(seed: int, *, opposed: bool | None = None, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g, r = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    if opposed is not None and (float(g @ r) < 0) is not opposed:
        r = -r
    return g, r


def solved(g: Tensor, r: Tensor) -> Tensor:
    """argmin ||g - z||^2 with <z, r> >= 0, by a solver that knows no closed form."""
    found = minimize(
        lambda z: float(((g.numpy() - z) ** 2).sum()),
        np.zeros(len(g)),
        jac=lambda z: 2 * (z - g.numpy()),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda z: float(z @ r.numpy()), "jac": lambda z: r.numpy()},
        options={"ftol": 1e-14, "maxiter": 200},
    )
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("opposed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_is_what_a_solver_finds(seed: int, opposed: bool) -> None:
    """Catches a wrong sign, a missing case or a wrong denominator."""
    g, r = draw(seed, opposed=opposed)
    z = nearest_unopposed(g, r)
    assert torch.allclose(z, solved(g, r), rtol=0, atol=1e-6)
    assert torch.equal(z, g) is not opposed


def test_a_zero_reference_constrains_nothing() -> None:
    """Catches 0 / 0."""
    g, _ = draw(0)
    assert torch.equal(nearest_unopposed(g, torch.zeros(5, dtype=torch.float64)), g)
    for mode in MODES:
        assert bool(torch.isfinite(combine(g, torch.zeros_like(g), mode, 1.0)).all())
        assert bool(torch.isfinite(combine(torch.zeros_like(g), g, mode, 1.0)).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_the_outcome_never_opposes_its_reference(seed: int, scale: float) -> None:
    """Catches a projection that stops short: <z, r> >= 0, up to rounding."""
    g, r = draw(seed)
    z = nearest_unopposed(g, r * scale)
    assert float(z @ (r * scale)) >= -1e-12 * float(g.norm() * r.norm()) * scale
    assert torch.allclose(z, nearest_unopposed(g, r), rtol=1e-9, atol=1e-12)  # the reference's length is no matter


@pytest.mark.parametrize("opposed", [True, False])
def test_each_mode_is_its_formula(opposed: bool) -> None:
    """Catches exchanged roles: which gradient yields, which stays, and where the weight goes."""
    local, foreign = draw(3, opposed=opposed)
    b, a_local, a_foreign = local @ foreign, local @ local, foreign @ foreign
    expected = {
        "none": local + 0.5 * foreign,
        "local_primary": local - b / a_foreign * foreign if opposed else local,
        "in_primary_sum": local + 0.5 * (foreign - b / a_local * local if opposed else foreign),
        "always": local - b / a_foreign * foreign,
    }
    for mode in MODES:
        assert torch.allclose(combine(local, foreign, mode, 0.5), expected[mode], rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 10))
def test_the_default_step_never_opposes_the_local_gradient(seed: int, weight: float) -> None:
    """Catches the loss of the default's promise: <step, g_local> >= ||g_local||^2."""
    local, foreign = draw(seed)
    step = combine(local, foreign, "in_primary_sum", weight)
    assert float(step @ local) >= float(local @ local) * (1 - 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_under_vmap_it_is_the_loop(mode: Align) -> None:
    """Catches an `if` on a value, and a reduction over the clients' axis."""
    pairs = [draw(seed, n=6) for seed in range(8)]
    local, foreign = (torch.stack([p[i].reshape(2, 3) for p in pairs]) for i in range(2))
    assert {bool((p[0] @ p[1]) < 0) for p in pairs} == {True, False}
    together = torch.func.vmap(lambda g, r: combine(g, r, mode, 0.7))(local, foreign)
    alone = torch.stack([combine(g, r, mode, 0.7) for g, r in zip(local, foreign, strict=True)])
    assert torch.allclose(together, alone, rtol=1e-13, atol=1e-15)


def layers(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a 2-D and a 1-D convolution, a dense layer and a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (3, 2, 3, 3), "conv1d": (2, 3, 5), "fc": (4, 3), "bias": (4,)}
    return tuple(  # type: ignore[return-value]
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in range(2)
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_is_what_one_pair_of_channels_has(mode: Align) -> None:
    """Catches a kernel over the wrong axes, and a tensor without kernels that is cut in pieces."""
    g, r = layers(5)
    found = combine_all(g, r, mode, 0.7, "kernel")
    for name in ("conv", "conv1d"):
        for o in range(g[name].shape[0]):
            for i in range(g[name].shape[1]):
                alone = combine(g[name][o, i], r[name][o, i], mode, 0.7)
                assert torch.allclose(found[name][o, i], alone, rtol=1e-12, atol=1e-14)
    for name in ("fc", "bias"):
        assert torch.equal(found[name], combine(g[name], r[name], mode, 0.7))


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_is_one_long_vector_and_a_tensor_its_own(mode: Align) -> None:
    """Catches pieces that come back in another order, and a granularity that is none."""
    g, r = layers(6)
    long_g, long_r = (torch.cat([v.flatten() for v in params.values()]) for params in (g, r))
    found = combine_all(g, r, mode, 0.7, "whole")
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in g.items()}
    together = torch.cat([v.flatten() for v in found.values()])
    assert torch.allclose(together, combine(long_g, long_r, mode, 0.7), rtol=1e-12, atol=1e-14)
    each = combine_all(g, r, mode, 0.7, "tensor")
    assert all(torch.equal(each[n], combine(g[n], r[n], mode, 0.7)) for n in g)
    assert combine_all({}, r, mode, 0.7, "whole") == {}


def test_each_kernel_is_its_own_problem() -> None:
    """Catches one projection for all kernels: each is what a solver finds for it, opposed or not."""
    g, r = layers(7)
    z = nearest_unopposed(g["conv"], r["conv"], (2, 3))
    opposed = set()
    for o in range(3):
        for i in range(2):
            one, reference = g["conv"][o, i].flatten(), r["conv"][o, i].flatten()
            opposed.add(bool(one @ reference < 0))
            assert torch.allclose(z[o, i].flatten(), solved(one, reference), rtol=0, atol=1e-6)
    assert opposed == {True, False}
    assert torch.equal(nearest_unopposed(g["conv"], torch.zeros(3, 2, 3, 3, dtype=torch.float64), (2, 3)), g["conv"])


@pytest.mark.parametrize("granularity", ["kernel", "whole"])
def test_granularities_under_vmap_are_the_loop(granularity: Any) -> None:
    """Catches sums over the clients' axis."""
    many = [layers(seed) for seed in range(5)]
    g, r = ({n: torch.stack([m[i][n] for m in many]) for n in many[0][i]} for i in range(2))
    together = torch.func.vmap(lambda a, b: combine_all(a, b, "in_primary_sum", 0.7, granularity))(g, r)
    for k, (a, b) in enumerate(many):
        alone = combine_all(a, b, "in_primary_sum", 0.7, granularity)
        assert all(torch.allclose(together[n][k], alone[n], rtol=1e-12, atol=1e-14) for n in alone)
