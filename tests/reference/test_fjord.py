"""A round of FjORD against plain torch: narrow modules of their own, weights copied in and out by hand."""

import math
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fjord import FjORD
from polyfed.models.mlp import MLP
from polyfed.models.resnet import ResNet

WIDTHS = (0.25, 0.5, 1.0)
#: The widest of WIDTHS whose square these allow: 1, 0.25 and 0.5.
CAPACITIES = (1.0, 0.1, 0.3)


def module(net: str, p: float) -> nn.Module:
    """The network of width p, built as a network of its own."""
    if net == "mlp":
        return MLP((7,), hidden=(math.ceil(12 * p), math.ceil(6 * p)), num_classes=4)
    width = math.ceil(8 * p)
    return ResNet((1, 8, 8), stem="plain", blocks=(1, 1, 1), width=width, norm=net, num_classes=4)


def corner(value: Tensor, like: Tensor) -> Tensor:
    """The leading block: in these networks the first channels of every dimension."""
    return value[tuple(slice(0, n) for n in like.shape)]


def train(
    net: str, p_max: float, start: plain.Weights, drawn: list[float], data: list[Any], settings: Any, distill: bool
) -> tuple[plain.Weights, dict[float, plain.Weights]]:
    """One client: the weights of its width, and for each width the statistics; SGD by hand."""
    widths = [p for p in WIDTHS if p <= p_max]
    outer = module(net, p_max).to(next(iter(start.values())).dtype)
    w = {n: corner(start[n], v).clone().requires_grad_() for n, v in outer.named_parameters()}
    nets = {p: module(net, p).to(next(iter(start.values())).dtype).train() for p in widths}

    def forward(p: float, x: Tensor) -> Tensor:
        own = {n: corner(w[n], v) for n, v in nets[p].named_parameters()}
        return torch.func.functional_call(nets[p], own, (x,))

    optimizer = settings.optimizer(list(w.values()))
    for (x, y), p in zip(data, drawn, strict=True):
        if distill and p < p_max:
            z = forward(p_max, x)
            target = torch.softmax(z, 1).detach()
            narrow = -(target * torch.log_softmax(forward(p, x), 1)).sum(1).mean()
            loss = functional.cross_entropy(z, y) + narrow
        else:
            loss = functional.cross_entropy(forward(p, x), y)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(list(w.values()), settings.clip)
        optimizer.step()
    return {n: v.detach() for n, v in w.items()}, {p: dict(m.named_buffers()) for p, m in nets.items()}


def follow(cls: type[FjORD], net: str, distill: bool, training: str, precision: Any, driver: str) -> None:
    keys, settings = TRAINING[training]
    spec, shape = (toy.MLP, (7,)) if net == "mlp" else (f"resnet8(norm={net}, width=8)", (1, 8, 8))
    sizes = (11, 8, 6)
    fed = toy.federation(
        cls(widths=WIDTHS, distill=distill),
        models=(spec,), shape=shape, sizes=sizes, train=keys, clients={"capacities": list(CAPACITIES)},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    start = toy.copy(game.server.model)
    weights = {n: v for n, v in start.items() if "/" not in n}
    game.round()
    sums = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in start.items()}
    counts = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in start.items()}
    for k, p_max in enumerate((1.0, 0.25, 0.5)):
        data, local = pairs(batches(game, k, 1)), game.local(k, 1)
        own = [p for p in WIDTHS if p <= p_max]
        draws = torch.randint(len(own), (len(data),), generator=local.rng.at("widths").torch())
        with game.driver.placement.defaults():
            w, statistics = train(net, p_max, weights, [own[i] for i in draws], data, settings, distill)
        sent = {**w, **{f"{p:g}/{n}": v for p, found in statistics.items() for n, v in found.items()}}
        for n, value in sent.items():
            corner(sums[n], value).add_(value.double() * sizes[k])
            corner(counts[n], value).add_(sizes[k])
    expected = {}
    for n, value in start.items():
        mean = torch.where(counts[n] > 0, sums[n] / counts[n].clamp(min=1), value.double())
        expected[n] = mean.to(value.dtype) if value.is_floating_point() else mean.round().to(value.dtype)
    toy.close(game.server.model, expected, TOLERANCE[precision] * (100 if driver == "batched" else 1))


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(
    ("net", "distill", "training"),
    [("mlp", False, "sgd"), ("mlp", True, "momentum, decay, clip"), ("batch", True, "sgd"), ("group", False, "sgd")],
)
def test_fjord(net: str, distill: bool, training: str, precision: Any, driver: str) -> None:
    """Catches a wrong width, draw, slice or loss, shared statistics, and zeros averaged in."""
    follow(FjORD, net, distill, training, precision, driver)


class TeachersLearn(FjORD):
    """Distillation whose teacher is not detached."""

    def loss(self, nets: Any, batch: Any, p: float) -> Tensor:
        if not self.distill or p == self.widest(nets):
            return super().loss(nets, batch, p)
        z, narrow = self.at(nets, self.widest(nets))(batch[0]), self.at(nets, p)(batch[0])
        return functional.cross_entropy(z, batch[1]) + functional.cross_entropy(narrow, z.softmax(1))


class SharedStatistics(FjORD):
    """Every width moves the statistics of the widest."""

    def at(self, nets: Any, p: float) -> Any:
        own, widest = super().at(nets, p), nets[f"{self.widest(nets):g}"].params
        shared = {n: widest[n][: v.shape[0]] if v.dim() else widest[n] for n, v in nets[f"{p:g}"].params.items()}
        return type(own)(own.model, {**own.params, **shared})


@pytest.mark.parametrize(("faulty", "net"), [(TeachersLearn, "mlp"), (SharedStatistics, "batch")])
def test_faults_are_seen(faulty: type[FjORD], net: str) -> None:
    """Catches a comparison that would pass whatever the teacher or the statistics do."""
    with pytest.raises(AssertionError, match=r"fc|running"):
        follow(faulty, net, True, "sgd", "fp64", "sequential")
