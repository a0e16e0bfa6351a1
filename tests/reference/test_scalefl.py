"""A round of ScaleFL against plain torch: narrow, shallow modules with heads, weights copied in and out by hand."""

import math
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.scalefl import ScaleFL
from polyfed.models.mlp import MLP
from polyfed.models.resnet import ResNet

#: (capacity, width, exits); clients 0 and 3 have the first.
LEVELS = {
    "mlp": ((1.0, 1.0, 2), (0.3, 0.5, 2), (0.1, 0.25, 1)),
    "batch": ((1.0, 1.0, 4), (0.3, 0.5, 3), (0.1, 0.5, 2)),
}
EXITS = {"mlp": 4, "batch": ("maxpool", "layer1", "layer2")}
SIZES = (11, 8, 6, 5)


class Head(nn.Module):
    """The mean over the map, and one layer; or, without a mean, two."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        if hidden:
            self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, 4)
        else:
            self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self
        if hasattr(self, "fc"):
            return layers.fc(x.mean((2, 3)) if x.dim() == 4 else x)
        return layers.fc2(torch.relu(layers.fc1(x)))


class Small(nn.Module):
    """The network of one level, in which a hook divides what hidden layers give by the width."""

    def __init__(self, net: str, s: float, e: int, hidden: int) -> None:
        super().__init__()
        self.kind, self.e, self.heads = net, e, nn.ModuleList()
        if net == "mlp":
            a, b = math.ceil(12 * s), math.ceil(6 * s)
            self.net: nn.Module = MLP((7,), hidden=(a, b), num_classes=4)
            self.heads.append(Head(a, math.ceil(hidden * s)))
            later = ["fc2", "fc3"] if e == 1 else []
        else:
            w = math.ceil(8 * s)
            self.net = ResNet((1, 8, 8), stem="plain", blocks=(1, 1, 1), width=w, norm="batch", num_classes=4)
            self.heads.extend(Head(width, 0) for width in (w, w, 2 * w)[:e])
            later = [f"layer{number}" for number in range(e, 4)] + (["fc"] if e < 4 else [])
        for name in later:
            delattr(self.net, name)
        self.hooks = [
            layer.register_forward_hook(lambda _, __, out: out / s if net == "mlp" else out)
            for name, layer in self.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
            and name not in ("net.fc", "net.fc3", "heads.0.fc", "heads.1.fc", "heads.2.fc", "heads.0.fc2")
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        net: Any = self.net
        if self.kind == "mlp":
            x = torch.relu(net.fc1(x))
            return [self.heads[0](x), *([net.fc3(torch.relu(net.fc2(x)))] if self.e > 1 else [])]
        x, out = torch.relu(net.bn1(net.conv1(x))), []
        for number in range(1, 4):
            out.append(self.heads[number - 1](x))
            if number == self.e:
                return out
            x = net.get_submodule(f"layer{number}")(x)
        return [*out, net.fc(x.mean((2, 3)))]


def corner(value: Tensor, like: Tensor) -> Tensor:
    """The leading block: in these networks the first channels of every dimension."""
    return value[tuple(slice(0, n) for n in like.shape)]


def train(small: Small, data: list[Any], settings: plain.Settings, gamma: float, temperature: float) -> None:
    """One client; SGD by hand."""
    optimizer = settings.optimizer(list(small.parameters()))
    for x, y in data:
        z = small(x)
        teacher = torch.softmax(z[-1] / temperature, 1).detach()
        loss = torch.zeros((), dtype=x.dtype)
        for j, z_j in enumerate(z, 1):
            l_j = -torch.log_softmax(z_j, 1)[torch.arange(len(y)), y].mean()
            if j < len(z):
                apart = (teacher * (teacher.log() - torch.log_softmax(z_j / temperature, 1))).sum(1).mean()
                l_j = l_j + gamma * temperature**2 * apart
            loss = loss + j * l_j / (len(z) * (len(z) + 1) / 2)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(small.parameters(), settings.clip)
        optimizer.step()


def follow(
    cls: type[ScaleFL], net: str, active: bool, training: str, precision: Any, driver: str, hidden: int = 0
) -> None:
    keys, settings = TRAINING[training]
    spec, shape = (toy.MLP, (7,)) if net == "mlp" else ("resnet8(norm=batch, width=8)", (1, 8, 8))
    levels = LEVELS[net]
    head = f"mlp(hidden=({hidden},))" if hidden else ""
    fed = toy.federation(
        cls(
            exits=EXITS[net], head=head, levels=levels,
            kd_weight=0.7, temperature=2.0, kd_start=0.25 if active else 0.5,
        ),
        models=(spec,), shape=shape, sizes=SIZES, train=keys, clients={"capacities": [row[0] for row in levels]},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    start, buffers = toy.copy(game.server.model), {c: toy.copy(b) for c, b in game.server.buffers.items()}
    game.round()
    sums = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in start.items()}
    counts = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in start.items()}
    moved: dict[str, list[plain.Weights]] = {c: [] for c in buffers}
    for k in range(len(SIZES)):
        c, s, e = levels[k % 3]
        with game.driver.placement.defaults():
            small = Small(net, s, e, hidden).train()
            held = {n: corner(start[n], v) for n, v in small.named_parameters()}
            small.load_state_dict({**held, **buffers[str(c)]})
            train(small, pairs(batches(game, k, 1)), settings, 0.7 if active else 0.0, 2.0)
        for n, value in small.named_parameters():
            corner(sums[n], value).add_(value.detach().double())
            corner(counts[n], value).add_(1)
        moved[str(c)].append({n: v.clone() for n, v in small.named_buffers()})
    expected = {
        n: torch.where(counts[n] > 0, sums[n] / counts[n].clamp(min=1), value.double()).to(value.dtype)
        for n, value in start.items()
    }
    tolerance = TOLERANCE[precision] * (100 if driver == "batched" else 1)
    toy.close(game.server.model, expected, tolerance)
    for c, found in moved.items():
        toy.close(game.server.buffers[c], plain.mean(found, [1] * len(found)), tolerance)


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(
    ("net", "active", "training"),
    [("mlp", True, "sgd"), ("mlp", False, "sgd"), ("mlp", True, "momentum, decay, clip"), ("batch", True, "sgd")],
)
def test_scalefl(net: str, active: bool, training: str, precision: Any, driver: str) -> None:
    """Catches a wrong exit, weight of an exit, distillation, Scaler or slice, a mean by examples, zeros averaged in."""
    follow(ScaleFL, net, active, training, precision, driver)


@pytest.mark.parametrize(("precision", "driver"), RUNS)
def test_scalefl_with_heads_of_two_layers(precision: Any, driver: str) -> None:
    """Catches a head whose hidden units are not narrowed, or not scaled."""
    follow(ScaleFL, "mlp", True, "sgd", precision, driver, hidden=6)


def kl_sums(z: list[Tensor], temperature: float, teacher: Tensor) -> list[Tensor]:
    return [functional.kl_div(torch.log_softmax(z_j / temperature, 1), teacher, reduction="sum") for z_j in z[:-1]]


class Faulty(ScaleFL):
    """The loss with its parts exposed, so that the released code's faults can be put in."""

    def teacher(self, z: Tensor) -> Tensor:
        return torch.softmax(z / self.temperature, 1).detach()

    def reduced(self, total: Tensor, z: Tensor) -> Tensor:
        return total / len(z)

    def loss(self, nets: Any, batch: Any) -> Tensor:
        rho, temperature = nets["rho"].params, self.temperature
        w = {n: v / rho[n] if n in rho else v for n, v in nets["model"].params.items()}
        z = list(type(nets["model"])(nets["model"].model, w)(batch[0]).split(4, 1))
        weights = torch.arange(1, len(z) + 1, dtype=z[0].dtype) / (len(z) * (len(z) + 1) / 2)
        kd = [self.reduced(total, z[0]) for total in kl_sums(z, temperature, self.teacher(z[-1]))]
        losses = torch.stack([functional.cross_entropy(z_j, batch[1]) for z_j in z])
        kd = [*kd, torch.zeros_like(losses[0])]
        return (weights * (losses + nets["kd"]["weight"] * temperature**2 * torch.stack(kd))).sum()


class MeanReduced(Faulty):
    """KLDivLoss's default also divides by the number of classes."""

    def reduced(self, total: Tensor, z: Tensor) -> Tensor:
        return total / z.numel()


class TeachersLearn(Faulty):
    """The teacher is not detached."""

    def teacher(self, z: Tensor) -> Tensor:
        return torch.softmax(z / self.temperature, 1)


class SharedStatistics(ScaleFL):
    """Running statistics are averaged over all clients, where the shapes of unlike widths allow it."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        new = yield from super().server_round(server, cohort)
        same = [c for c in new.buffers if server.chosen[c][0] == 0.5]
        common = new.buffers[same[0]].keys() & new.buffers[same[1]].keys()
        mean = plain.mean([{n: new.buffers[c][n] for n in common} for c in same], [1, 1])
        return replace(new, buffers={c: {**b, **mean} if c in same else b for c, b in new.buffers.items()})


def test_the_exposed_loss_is_the_loss() -> None:
    """Without a fault the copy above is ScaleFL, so that what the faults change is the fault."""
    follow(Faulty, "mlp", True, "sgd", "fp64", "sequential")


@pytest.mark.parametrize(("faulty", "net"), [(MeanReduced, "mlp"), (TeachersLearn, "mlp"), (SharedStatistics, "batch")])
def test_faults_are_seen(faulty: type[ScaleFL], net: str) -> None:
    """Catches a comparison that would pass whatever the distillation or the statistics do."""
    with pytest.raises(AssertionError, match=r"fc|running"):
        follow(faulty, net, True, "sgd", "fp64", "sequential")
