"""Steps replayed from a trace: the same numbers bit by bit, and the plain call wherever that cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from polyfed.execute.replay import Product, Replays, tidy


def step(weights: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    def objective(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional.linear(x, w["w"]).relu().square().mean()

    grads, losses = torch.func.vmap(torch.func.grad_and_value(objective))(weights, x)
    return grads, losses


def inputs(seed: int, examples: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(3, 2, 4, generator=generator), torch.randn(3, examples, 4, generator=generator)
    return {"w": w}, x


def test_a_replay_gives_bitwise_what_the_function_gives() -> None:
    """Catches inputs in another order, a trace whose numbers became constants, and a path that is never taken."""
    replays = Replays(after=2)
    for seed in range(8):
        grads, losses = replays.call("step", step, *inputs(seed))
        expected = step(*inputs(seed))
        assert torch.equal(grads["w"], expected[0]["w"])
        assert torch.equal(losses, expected[1])
    assert replays.count == 6  # two as they are


def operations(function: Any, *given: Tensor) -> list[Any]:
    graph = tidy(make_fx(function)(*given))
    for got, expected in zip(graph(*given), function(*given), strict=True):
        assert torch.equal(got, expected)
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def test_a_trace_has_no_operation_for_nothing() -> None:
    """Catches the third of vmap's operations that do nothing, each of which takes microseconds at every step."""
    aten, x = torch.ops.aten, torch.arange(12.0).view(3, 4)
    viewed = operations(lambda x: [(x.view(3, 4).expand(3, 4).view(2, 6) * 2).view(2, 6)], x)
    assert viewed == [aten.view.default, aten.mul.Tensor]
    assert operations(lambda x: [x.transpose(0, 1).transpose(0, 1) * 2], x) == viewed[1:]
    assert operations(lambda x: [aten.mul.Scalar(x, 1) + 2], x) == [aten.add.Tensor]
    assert operations(lambda x: [(x + 1) * (x + 1)], x) == [aten.add.Tensor, aten.mul.Tensor]


def test_what_looks_like_nothing_and_is_something_stays() -> None:
    """Catches results that share a memory, other types, and two equal readings with a writing in between."""
    x = torch.arange(4)
    assert len(operations(lambda x: [x + 1, x + 1], x)) == 2
    assert len(operations(lambda x: [(x + 1).view(2, 2), (x + 1).view(2, 2)], x)) == 4
    assert len(operations(lambda x: [torch.ops.aten.mul.Scalar(x, 1)], x)) == 1
    assert len(operations(lambda x: [torch.ops.aten.mul.Scalar(x, 1.0) + 2], x)) == 2

    def writing(x: Tensor) -> list[Tensor]:
        moved = x.clone()
        before = moved * 2
        moved.add_(1)
        return [before + moved * 2]

    operations(writing, x)


def test_steps_with_operations_of_several_results_are_replayed() -> None:
    """Catches a convolutional network, or a BatchNorm, whose trace is given up without a word."""

    def pooled(x: Tensor) -> tuple[Tensor]:
        return (torch.func.vmap(torch.func.grad(lambda x: functional.max_pool2d(x, 2).sum()))(x),)

    replays = Replays(after=0)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(replays.call("pooled", pooled, x)[0], pooled(x)[0])
    assert replays.count == 1


def test_other_shapes_and_layouts_are_other_steps() -> None:
    """Catches a replay of a trace that was made for another layout."""
    replays = Replays(after=0)
    weights, x = inputs(0)
    turned = x.mT.contiguous().mT
    for _ in range(3):
        for given in (x, turned, x[:, :4]):
            got, expected = replays.call("step", step, weights, given), step(weights, given)
            assert torch.equal(got[0]["w"], expected[0]["w"])
    assert replays.count == 9


def test_what_depends_on_more_than_tensors_is_not_replayed() -> None:
    """Catches a number that was read out of a tensor while tracing, and stays what it was then."""
    replays = Replays(after=0)

    def scaled(x: Tensor) -> Tensor:
        return x * float(torch.tensor(x.tolist()).sum())

    for seed in range(5):
        x = inputs(seed)[1]
        assert torch.equal(replays.call("scaled", scaled, x), scaled(x))
    assert replays.count == 0


def test_short_memory_is_no_reason_to_compute_otherwise() -> None:
    """Catches a last bit that depends on how much memory was free when a step was traced."""

    def greedy(x: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        Replays(after=0).call("greedy", greedy, torch.ones(3))


def test_what_cannot_be_traced_is_called() -> None:
    """Catches a refusal of the tracer that ends a run."""
    replays = Replays(after=0)

    def branching(x: Tensor) -> Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1

    for sign in (1, -1, 1, -1):
        x = sign * torch.ones(3)
        assert torch.equal(replays.call("branching", branching, x), x + sign)
    assert replays.count == 0


def test_a_gradient_may_stay_the_product_that_it_is_from_the_first_call_on() -> None:
    """Catches factors that multiply to something else, and numbers that depend on how often a step was called."""
    replays = Replays()
    for seed in range(3):
        (grads, losses), expected = replays.call("step", step, *inputs(seed), products=True), step(*inputs(seed))
        assert isinstance(grads["w"], Product)
        assert grads["w"].left.numel() + grads["w"].right.numel() == 3 * (2 * 5 + 5 * 4)
        assert torch.equal(grads["w"].multiplied(), expected[0]["w"])
        assert torch.equal(losses, expected[1])
    assert replays.count == 3
    written, _ = replays.call("step", step, *inputs(0))
    assert isinstance(written["w"], Tensor), "only where it was asked for"


def test_a_product_that_something_else_needs_is_written() -> None:
    """Catches factors in the place of what a clipped or proximal gradient is made of, and of results that are none."""

    def pulled(weights: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grads, _ = step(weights, x)
        return {"pulled": grads["w"] + weights["w"], "plain": grads["w"]}, torch.bmm(weights["w"], x.mT)

    grads, product = Replays().call("pulled", pulled, *inputs(0), products=True)
    for got, expected in zip((grads["pulled"], grads["plain"], product), _values(pulled(*inputs(0))), strict=True):
        assert torch.equal(got, expected)


def _values(result: tuple[dict[str, Tensor], Tensor]) -> list[Tensor]:
    return [*result[0].values(), result[1]]
