"""Requests for training of a small network with BatchNorm, and the same training by hand."""

from collections.abc import Mapping
from typing import Any

import torch
import toy
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.rng import Rng
from polyfed.blocks.losses import cross_entropy
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.net import Batch, Nets
from polyfed.core.plan import LocalSGD
from polyfed.core.requests import Fit, fit
from polyfed.execute.placement import Placement
from polyfed.models.split import SplitModel

FP32, FP64 = (Placement(torch.device("cpu"), p) for p in ("fp32", "fp64"))
PLANS = {
    "plain": LocalSGD(epochs=2, batch_size=4, lr=0.1),
    "momentum": LocalSGD(epochs=3, batch_size=4, lr=0.05, momentum=0.9),
    "decay": LocalSGD(epochs=3, batch_size=4, lr=0.05, momentum=0.9, weight_decay=0.01),
    "clip": LocalSGD(epochs=2, batch_size=4, lr=0.5, momentum=0.5, clip=0.3),
    "steps": LocalSGD(steps=5, batch_size=4, lr=0.1),
    "adam": LocalSGD(epochs=3, batch_size=4, lr=0.01, optimizer="adam"),
    "adam with decay": LocalSGD(epochs=3, batch_size=4, lr=0.01, optimizer="adam", weight_decay=0.1),
    "adamw": LocalSGD(epochs=3, batch_size=4, lr=0.01, optimizer="adamw", weight_decay=0.1),
    "scheduled": LocalSGD(epochs=2, batch_size=4, lr=0.1, momentum=0.5, factor=0.3),
    "smoothed": LocalSGD(epochs=2, batch_size=4, lr=0.1, label_smoothing=0.2),
}


class Normed(nn.Module):
    """Two dense layers with a BatchNorm between: buffers that training moves."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 6, bias=False)  # before BatchNorm a bias has gradient 0, which Adam would blow up
        self.bn = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc2 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(torch.relu(self.bn(self.fc1(x)))))


def normed() -> nn.Module:
    return Normed()


def dropping() -> nn.Module:
    return Normed(0.5)


def model(factory: Any = normed) -> SplitModel:
    return SplitModel(factory.__name__, factory, input_shape=(7,), classifier="fc2")


class Data:
    """A client's examples."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 7, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 4, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def batch(
        self, positions: Tensor, *, generator: Any = None, dtype: Any = torch.float32, device: Any = "cpu"
    ) -> Batch:
        return self.x[positions].to(dtype), self.labels[positions]


def a_loss(nets: Nets, batch: Batch) -> Tensor:
    return cross_entropy(nets["model"](batch[0]), batch)


def two_parts(nets: Nets, batch: Batch) -> Tensor:
    return cross_entropy(nets["model"](batch[0]) + nets["other"](batch[0]), batch)


def request(
    plan: LocalSGD,
    *,
    k: int = 0,
    n: int = 11,
    net: SplitModel | None = None,
    parts: int = 1,
    dtype: Any = None,
    weights: Tensor | None = None,
    **keys: Any,
) -> Fit:
    """What client ``k`` with ``n`` examples asks for."""
    net = net or model()
    models = {"model": net, "other": net} if parts == 2 else {"model": net}
    rng = Rng((0, "client", k))
    asked = None if weights is None else lambda: weights
    client = LocalClient(ClientInfo(k), models, Data(n, k), plan, rng, 1, class_weights=asked)  # type: ignore[arg-type]
    start = {
        part: {
            name: v.to(dtype) if dtype and v.is_floating_point() else v for name, v in net.init(Rng((k, part))).items()
        }
        for part in models
    }
    return next(fit(client, start, loss=two_parts if parts == 2 else a_loss, **keys))  # type: ignore[return-value]


def by_hand(asked: Fit, dtype: torch.dtype, fused: bool | None = None) -> dict[str, dict[str, Tensor]]:
    """The same training as anybody would write it: modules, torch.optim, clip_grad_norm_."""
    client, plan = asked.client, asked.client.plan
    modules = {part: normed().to(dtype) for part in asked.parts}
    for part, module in modules.items():
        module.load_state_dict(dict(asked.parts[part]))
    rates = {p: asked.lr.get(p, plan.lr) * plan.factor for p in modules}
    groups = [{"params": list(m.parameters()), "lr": rates[p]} for p, m in modules.items()]
    if plan.optimizer != "sgd":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[plan.optimizer]
        optimizer: torch.optim.Optimizer = kind(groups, weight_decay=plan.weight_decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=fused)
    for step in plan.schedule(len(client.train), client.rng.at("batches")):
        x, y = client.train.batch(step.rows, dtype=dtype)
        logits = (
            torch.stack([module(x) for module in modules.values()]).sum(0) if len(modules) > 1 else modules["model"](x)
        )
        optimizer.zero_grad()
        weight = None if client.weights is None else client.weights.to(dtype)
        functional.cross_entropy(logits, y, weight=weight, label_smoothing=plan.label_smoothing).backward()
        if plan.clip:
            for module in modules.values():
                torch.nn.utils.clip_grad_norm_(module.parameters(), plan.clip)
        optimizer.step()
        with torch.no_grad():
            for part, params in asked.correction.items():
                for name, value in params.items():
                    modules[part].get_parameter(name).sub_(rates[part] * value)
    return {part: module.state_dict() for part, module in modules.items()}


def check(
    got: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]], tolerance: float
) -> None:
    assert sorted(got) == sorted(expected)
    for part, params in expected.items():
        toy.close(got[part], params, tolerance)
