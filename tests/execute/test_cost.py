"""What a step costs: FLOPs against hand counts, and peak memory against allocations that are known."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedin import FedIN
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.algorithms.fiarse import FIARSE
from polyfed.blocks.losses import supervised
from polyfed.core.requests import Fit, fit
from polyfed.execute.cost import CostCounter, Counts, PeakMemory
from polyfed.execute.placement import Placement
from polyfed.models.flops import Flops

FP32 = Placement(torch.device("cpu"))


def request(spec: str, shape: tuple[int, ...], *, examples: int = 40, classes: int = 4, **train: Any) -> Fit:
    """The training of one client."""
    fed = toy.federation(FedAvg(), models=(spec,), shape=shape, sizes=(examples,), classes=classes, train=train)
    client = fed.local(0, 1)
    return next(fit(client, {"model": client.models["model"].init(fed.rng)}, loss=supervised))  # type: ignore[return-value]


def dense(*widths: int) -> int:
    """Multiply-adds times two of one example through dense layers: forward, weights, and inputs but the first's."""
    pairs = list(itertools.pairwise(widths))
    return sum(2 * a * b * (3 if i else 2) for i, (a, b) in enumerate(pairs))


def cnn5(classes: int, side: int = 16) -> int:
    """The same for CNN-5 on one channel."""
    one, two = side - 4, (side - 4) // 2 - 4
    conv1 = 2 * one * one * 16 * 25
    conv2 = 2 * two * two * 32 * 16 * 25
    flat = 32 * (two // 2) ** 2
    return 2 * conv1 + 3 * conv2 + 3 * 2 * (flat * 500 + 500 * 500 + 500 * classes)


@pytest.mark.parametrize("batch", [4, 7, 16])
def test_flops_are_the_hand_counts(batch: int) -> None:
    """Catches a gradient for the input, a missing backward pass, and multiply-adds that count once."""
    counter = CostCounter(FP32)
    mlp, cnn = request("mlp(hidden=(12, 6))", (7,)), request("cnn5", (1, 16, 16))
    assert counter.step("mlp", mlp, batch, False) == batch * dense(7, 12, 6, 4)
    assert counter.step("cnn", cnn, batch, False) == batch * cnn5(4)


@pytest.mark.parametrize("spec", ["mlp(hidden=(12, 6))", "cnn5", "resnet8(width=4)", "in-resnet10-small(width=4)"])
def test_two_sizes_tell_all(spec: str) -> None:
    """Catches an affine rule that is wrong at sizes that were never counted."""
    asked, counter = request(spec, (1, 16, 16)), CostCounter(FP32)
    for batch in (16, 7, 2, 5, 9, 33):
        assert counter.step("a", asked, batch, False) == CostCounter(FP32).step("b", asked, batch, False)


def counted(work: Callable[[], object]) -> float:
    with Flops() as counter:
        work()
    return counter.total


def test_recurrent_layers_and_attention_are_counted_by_hand() -> None:
    """Catches the zero that torch's counter gives them on a CPU, and a fast path of evaluation that hides products."""
    x = torch.randn(2, 5, 4)
    lstm = torch.nn.LSTM(4, 8, batch_first=True)
    forward = 2 * 2 * 5 * (4 + 8) * 4 * 8
    with torch.no_grad():
        assert counted(lambda: lstm(x)) == forward
    assert counted(lambda: lstm(x)[0].sum().backward()) == 3 * forward
    q, k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    products = 2 * 2 * 3 * 6 * 6 * 4  # of queries and keys, or of weights and values
    assert counted(lambda: attend(q, k, v)) == 2 * products
    assert counted(lambda: attend(q, k, v).sum().backward()) == 2 * products + 5 * products
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        dense = 2 * 10 * (8 * 24 + 8 * 8 + 2 * 8 * 16)
        assert counted(lambda: block(torch.randn(2, 5, 8))) == dense + 2 * 2 * 2 * 2 * 5 * 5 * 4
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_products_beyond_matrices_are_counted_by_hand() -> None:
    """Catches products that torch's counter takes for nothing; a backward pass has one product for each input."""
    x, y, z = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 4), (3, 6, 4), (3, 5, 2)))
    matrix, vector = torch.randn(5, 4), torch.randn(4)
    assert counted(lambda: torch.mv(matrix, vector)) == 2 * 5 * 4
    assert counted(lambda: torch.addmv(torch.zeros(5), matrix, vector)) == 2 * 5 * 4
    assert counted(lambda: torch.dot(vector, vector)) == counted(lambda: torch.vdot(vector, vector)) == 2 * 4
    with torch.no_grad():
        assert counted(lambda: torch.addbmm(torch.zeros(5, 6), x, y.transpose(1, 2))) == 2 * 3 * 5 * 6 * 4
    for p in (1.0, 2.0):
        assert counted(lambda p=p: torch.cdist(x, y, p=p).sum().backward()) == 3 * 2 * 3 * 5 * 6 * 4
    with torch.no_grad():
        assert counted(lambda: torch.cdist(x, y[:1])) == 2 * 3 * 5 * 6 * 4
    large, other = (value[0].detach().repeat(8, 1).requires_grad_() for value in (x, y))  # a product of matrices
    with torch.no_grad():
        assert counted(lambda: torch.cdist(large, other)) == 2 * 40 * 48 * 4
    assert counted(lambda: torch.cdist(large, other).sum().backward()) == 3 * 2 * 40 * 48 * 4
    layer = torch.nn.Bilinear(4, 2, 7)
    with torch.no_grad():
        assert counted(lambda: layer(x, z)) == 2 * 3 * 5 * 7 * 4 * 2
    assert counted(lambda: layer(x, z).sum().backward()) == 4 * 2 * 3 * 5 * 7 * 4 * 2


def test_a_parameter_that_is_fed_to_a_submodule_can_be_counted() -> None:
    """Catches torch's counter, which follows modules and fails on it."""
    layer, query = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.randn(2, 4))
    assert counted(lambda: layer(query).sum().backward()) == 3 * 2 * 2 * 4 * 3


@pytest.mark.parametrize(
    "work",
    [
        torch.linalg.inv,
        torch.cholesky_inverse,
        torch.fft.rfft,
        lambda x: torch.sparse.mm(x.to_sparse(), x),
    ],
)
def test_products_without_a_formula_are_unknown(work: Callable[[Tensor], object]) -> None:
    """Catches a zero where there is work."""
    assert math.isnan(counted(lambda: work(torch.eye(4))))
    assert counted(lambda: torch.relu(torch.eye(4)).norm()) == 0


def test_a_step_that_cannot_be_measured_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a measurement that ends the work."""
    asked, counter = request("mlp(hidden=(12, 6))", (7,)), CostCounter(FP32)

    def broken(*_: object) -> None:
        raise RuntimeError("no such thing under a mode")

    monkeypatch.setattr("polyfed.models.flops._formula", broken)
    assert math.isnan(counter.step("a", asked, 8, False))
    assert math.isnan(counter.step("a", asked, 4, False))
    assert math.isnan(counter.step("a", asked, 2, False))
    assert counter.peak("a", asked, 8, False) > 0


def test_a_batch_of_one_can_be_counted() -> None:
    """Catches a counter that needs two examples where a client has one."""
    asked = request("mlp(hidden=(12, 6))", (7,), examples=1)
    assert CostCounter(FP32).step("a", asked, 1, False) == dense(7, 12, 6, 4)


def test_a_third_size_is_on_the_line_through_two() -> None:
    """Catches a size that is counted again, and operations that do not depend on the number of examples."""
    counts = Counts()
    assert [counts.at(size, lambda size=size: 100 + 7 * size) for size in (16, 5)] == [212, 135]
    assert counts.at(1, lambda: pytest.fail("counted again")) == 107


def test_counting_moves_nothing() -> None:
    """Catches a counter that trains the client's weights, or draws from its streams."""
    asked = request("in-resnet10-small(width=4)", (1, 16, 16))
    before, state = toy.copy(asked.parts["model"]), torch.random.get_rng_state()
    CostCounter(FP32).step("a", asked, 8, False)
    toy.close(asked.parts["model"], before, 0.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_step_with_another_part_costs_more() -> None:
    """Catches one price for steps with and without FedIN's second gradient."""
    game = toy.play(
        toy.federation(
            FedIN(feature_batch=8),
            models=("in-resnet10-small(width=4)", "in-resnet14-small(width=4)"),
            shape=(1, 16, 16), sizes=(16, 16), train={"epochs": 1, "batch_size": 8},
        ),
        2,
    )  # fmt: skip
    first, second = (played.reports[0].work.flops for played in game.played)
    assert first < second < 2 * first  # one of two steps takes an IN step besides


@pytest.mark.parametrize(
    ("algorithm", "models"),
    [
        (FedAvg(), ("mlp(hidden=(12, 6))",)),
        (FIARSE(), ("mlp(hidden=(12, 6))",)),
        (FedMRL(auxiliary="cnn5", rep_dim=4), ("cnn5(rep_dim=6)",)),
        (FedIN(feature_batch=4), ("in-resnet10-small(width=4)",)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_both_drivers_report_the_same_costs(algorithm: Any, models: tuple[str, ...]) -> None:
    """Catches a driver with an account of its own, also where clients have unequal numbers of examples."""
    found = []
    for driver in ("sequential", "batched"):
        game = toy.play(toy.federation(algorithm, models=models, shape=(1, 16, 16), sizes=(8, 12, 6)), 2, driver=driver)
        assert ("stacked" in game.driver.paths) is (driver == "batched")
        found.append(
            [
                (k, r.work.flops, r.work.peak_bytes, r.work.steps, r.up, r.down)
                for played in game.played
                for k, r in played.reports.items()
            ]
        )
    assert found[0] == found[1]
    assert all(flops > 0 and peak > 0 and steps > 0 for _, flops, peak, steps, *_ in found[0])


# ----------------------------------------------------------------------------------------------------------- memory

MIB = 2**20


def floats(mib: int) -> Tensor:
    return torch.empty(mib * MIB // 4)


def keeps_two() -> None:
    a = floats(2)
    b = floats(3)
    del a, b


def one_after_another() -> None:
    a = floats(2)
    del a
    b = floats(3)
    del b


def a_large_one_before_a_small_one() -> None:
    a = floats(4)
    del a
    b = floats(1)
    del b


def a_view() -> None:
    a = floats(4)
    views = [a[:10], a.reshape(-1, 4), a.detach()]
    del a, views


def held_by_a_view() -> None:
    a = floats(4)
    a = a[:1]
    b = floats(2)
    del a, b


def a_temporary() -> None:
    a = floats(2)
    a = a + 1 + 1  # two temporaries and a are alive in turn
    del a


def held_by_autograd() -> None:
    a = torch.empty(MIB // 4, requires_grad=True)
    b = a.exp()  # kept for backward
    c = b.exp()  # kept for backward
    del b
    del c


@pytest.mark.parametrize(
    ("pattern", "peak"),
    [
        (keeps_two, 5),
        (one_after_another, 3),
        (a_large_one_before_a_small_one, 4),
        (a_view, 4),
        (held_by_a_view, 6),
        (a_temporary, 6),
        (held_by_autograd, 3),
    ],
)
def test_the_peak_is_that_of_the_live_tensors(pattern: Callable[[], None], peak: int) -> None:
    """Catches memory that is never given back, given back too soon, or counted twice for views; an end for a peak."""
    with PeakMemory() as memory:
        pattern()
    assert memory.peak == peak * MIB
    assert memory.live == 0


def test_what_was_there_before_counts_once_it_is_followed() -> None:
    """Catches weights that the account begins without."""
    weights = floats(2)
    with PeakMemory() as memory:
        memory.follow(weights)
        memory.follow(weights.view(2, -1))
        assert memory.live == 2 * MIB
        _ = floats(1)
    assert memory.peak == 3 * MIB
