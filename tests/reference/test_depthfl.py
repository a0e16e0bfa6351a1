"""Rounds of DepthFL against plain torch: one module whose forward stops early, autograd of the whole objective."""

import math
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.depthfl import DepthFL
from polyfed.blocks import depths, feddyn
from polyfed.models.mlp import MLP
from polyfed.models.resnet import ResNet

CAPACITIES = (1.0, 0.5, 0.1)
TABLE = (3, 2, 1)
ALPHA, RAMP = 0.2, 2


class Staged(nn.Module):
    """All stages and classifiers; its forward runs the first ones."""

    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        self.kind, self.depth = kind, depth
        if kind == "mlp":
            self.net, widths = MLP((7,), hidden=(9, 8, 6), num_classes=4), (9, 8)
        else:
            norm = kind.removeprefix("resnet ")
            self.net = ResNet((1, 8, 8), stem="plain", blocks=(1, 1, 1), width=4, norm=norm, num_classes=4)
            widths = (4, 8)
        self.heads = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(width, 4)}) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        net: Any = self.net
        z: list[Tensor] = []
        if self.kind == "mlp":
            x = x.flatten(1)
            for layer, head in zip((net.fc1, net.fc2), self.heads, strict=True):
                x = torch.relu(layer(x))
                z.append(head["fc"](x))
                if len(z) == self.depth:
                    return z
            return [*z, net.fc4(torch.relu(net.fc3(x)))]
        x = torch.relu(net.bn1(net.conv1(x)))
        for layer, head in zip((net.layer1, net.layer2), self.heads, strict=True):
            x = layer(x)
            z.append(head["fc"](x.mean((2, 3))))
            if len(z) == self.depth:
                return z
        return [*z, net.fc(net.layer3(x).mean((2, 3)))]


def held(kind: str, depth: int) -> list[str]:
    """The names of the first stages, by hand."""
    names = list(Staged(kind, depth).state_dict())
    layers = ("fc1", "fc2", "fc3,fc4") if kind == "mlp" else ("conv1,bn1,layer1", "layer2", "layer3,fc")
    own = tuple(f"net.{layer}." for part in layers[:depth] for layer in part.split(","))
    return [n for n in names if n.startswith(own) or n.startswith(tuple(f"heads.{i}." for i in range(depth)))]


def train(
    kind: str, depth: int, start: plain.Weights, g: plain.Weights, weight: float, data: list[Any], settings: Any
) -> plain.Weights:
    """One client: SGD on the objective as it is written, the regulariser included."""
    module = Staged(kind, depth).to(next(iter(start.values())).dtype).train()
    trained = {n for n, _ in module.named_parameters()} & set(start)
    w = {n: start[n].clone().requires_grad_(n in trained) for n in start}
    leaves = [w[n] for n in w if n in trained]
    optimizer = settings.optimizer(leaves)
    for x, y in data:
        z = torch.func.functional_call(module, w, (x,))
        loss = torch.stack([functional.cross_entropy(own, y) for own in z]).sum()
        for i, own in enumerate(z):
            for j, other in enumerate(z):
                if i != j:
                    p = torch.softmax(other.detach(), 1)
                    kl = (p * (p.log() - torch.log_softmax(own, 1))).sum(1).mean()
                    loss = loss + weight * kl / (depth - 1)
        for n, own in g.items():
            loss = loss - (own * w[n]).sum() + ALPHA / 2 * (w[n] - start[n]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(leaves, settings.clip)
        optimizer.step()
    return {n: v.detach() for n, v in w.items()}


def follow(
    net: str, keys: dict[str, Any], training: str, precision: Any, driver: str, rounds: int = 3, cls: Any = DepthFL
) -> None:
    (train_keys, settings), kind = TRAINING[training], "mlp" if net == "mlp" else f"resnet {net}"
    spec, shape = ("mlp(hidden=(9, 8, 6))", (7,)) if net == "mlp" else (f"resnet8(norm={net}, width=4)", (1, 8, 8))
    idle = {key for key, switch in (("alpha", "feddyn"), ("ramp", "distill")) if not keys.get(switch, True)}
    own = {key: value for key, value in {"alpha": ALPHA, "ramp": RAMP}.items() if key not in idle}
    fed = toy.federation(
        cls(depths=TABLE, **own, **keys),
        models=(spec,), shape=shape, sizes=(11, 8, 6), train=train_keys, clients={"capacities": list(CAPACITIES)},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    w = toy.copy(game.server.model)
    parameters = {n for n, _ in Staged(kind, 3).named_parameters()} if fed.algorithm.feddyn else set[str]()
    h = {n: torch.zeros_like(w[n]) for n in parameters}
    g = [{n: torch.zeros_like(w[n]) for n in held(kind, d) if n in parameters} for d in TABLE]
    for t in range(1, rounds + 1):
        game.round()
        weight = math.exp(-5 * (1 - min(t, RAMP) / RAMP) ** 2) if fed.algorithm.distill else 0.0
        sent: list[plain.Weights] = []
        for k, depth in enumerate(TABLE):
            start = {n: w[n] for n in held(kind, depth)}
            with game.driver.placement.defaults():
                sent.append(train(kind, depth, start, g[k], weight, pairs(batches(game, k, t)), settings))
            g[k] = {n: v - ALPHA * (sent[k][n] - start[n]) for n, v in g[k].items()}
        new: plain.Weights = {}
        for n, old in w.items():
            own = [values[n] for values in sent if n in values]
            new[n] = plain.mean([{n: v} for v in own], [1] * len(own))[n]
            if n in h:
                h[n] = h[n] - ALPHA / 3 * sum(v - old for v in own)
                new[n] = new[n] - h[n] / ALPHA
        w = new
    tolerance = TOLERANCE[precision] * (100 if driver == "batched" else 10)
    toy.close(game.server.model, w, tolerance)
    toy.close(game.server.h, h, tolerance)
    for k, own in enumerate(g):
        toy.close(game.private(k).memory, own, tolerance)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("mlp", {}, "sgd"),
    ("mlp", {"feddyn": False}, "momentum, decay, clip"),
    ("mlp", {"distill": False}, "momentum, decay, clip"),
    ("batch", {}, "momentum, decay, clip"),
    ("group", {"feddyn": False}, "sgd"),
]


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(("net", "keys", "training"), CASES)
def test_depthfl(net: str, keys: dict[str, Any], training: str, precision: Any, driver: str) -> None:
    """Catches a wrong stage, head, loss, ramp or mean, and a memory that is another client's or another round's."""
    follow(net, keys, training, precision, driver)


def mutual_attached(z: Any) -> Tensor:
    """The teachers learn, too: not detached."""
    pairs_ = [depths.kl_divergence(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
    return torch.stack(pairs_).sum() / (len(z) - 1) if pairs_ else z[0].new_zeros(())


def mutual_by_mean(z: Any) -> Tensor:
    """torch's default reduction, which divides by the number of classes as well."""
    return mutual(z) / z[0].shape[1]


def mutual_undivided(z: Any) -> Tensor:
    """Not divided by d - 1."""
    return mutual(z) * max(1, len(z) - 1)


mutual = depths.mutual


@pytest.mark.parametrize("faulty", [mutual_attached, mutual_by_mean, mutual_undivided])
def test_faulty_distillation_is_seen(monkeypatch: pytest.MonkeyPatch, faulty: Any) -> None:
    """Catches a comparison that would pass whatever classifiers learn from one another."""
    monkeypatch.setattr("polyfed.algorithms.depthfl.mutual", faulty)
    with pytest.raises(AssertionError, match=r"net|heads"):
        follow("mlp", {"feddyn": False}, "sgd", "fp64", "sequential", rounds=1)


def forgetful(memory: Any, trained: Any, start: Any, alpha: float) -> Any:
    """A memory of the last round alone."""
    return feddyn.remembered({n: torch.zeros_like(v) for n, v in memory.items()}, trained, start, alpha)


def test_a_memory_of_one_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rounds too few to tell a sum from its last term."""
    monkeypatch.setattr("polyfed.algorithms.depthfl.remembered", forgetful)
    with pytest.raises(AssertionError, match=r"net|heads"):
        follow("mlp", {}, "sgd", "fp64", "sequential")
