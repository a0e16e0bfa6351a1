"""Rounds of neuron-wise FIARSE against plain torch: full networks with zeros, groups written down, autograd's gate."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, mlp, pairs, resnet8
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fiarse_neuron import FIARSENeuron
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.losses import supervised
from polyfed.blocks.neurons import gated, open_channels
from polyfed.core.requests import fit

#: Of each group the layers that make its channels, and those that read them; in the order of the networks' tensors.
GROUPS: dict[str, list[tuple[list[str], list[str]]]] = {
    "mlp": [(["fc1"], ["fc2"]), (["fc2"], ["fc3"])],
    "batch": [
        (
            ["conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2"],
            ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"],
        ),
        (["layer1.0.conv1", "layer1.0.bn1"], ["layer1.0.conv2"]),
        (["layer2.0.conv1", "layer2.0.bn1"], ["layer2.0.conv2"]),
        (
            ["layer2.0.conv2", "layer2.0.bn2", "layer2.0.downsample.0", "layer2.0.downsample.1"],
            ["layer3.0.conv1", "layer3.0.downsample.0"],
        ),
        (["layer3.0.conv1", "layer3.0.bn1"], ["layer3.0.conv2"]),
        (["layer3.0.conv2", "layer3.0.bn2", "layer3.0.downsample.0", "layer3.0.downsample.1"], ["fc"]),
    ],
}
CAPACITIES = (0.3, 1.0, 0.6)
DECAY = {"decay": ({"lr": 0.1, "weight_decay": 0.3}, plain.Settings(0.1, 0.0, 0.3))}


class ByHand:
    """One network, its groups, and the rules."""

    def __init__(self, net: str, keys: dict[str, Any]) -> None:
        self.make: Callable[[], nn.Module] = mlp if net == "mlp" else resnet8(net)
        self.groups, self.keys = GROUPS[net], keys
        module = self.make()
        self.shapes = {n: v.shape for n, v in module.state_dict().items()}
        self.trained = [n for n, _ in module.named_parameters()]
        self.size = [self.shapes[f"{rows[0]}.weight"][0] for rows, _ in self.groups]
        self.outputs = {"mlp": {}, "batch": {"conv1": 64, "layer1": 64, "layer2": 16, "layer3": 4}}[net]

    def tensors(self, layer: str) -> list[str]:
        return [n for n in self.shapes if n.rpartition(".")[0] == layer and self.shapes[n]]

    def mask(self, kept: list[Tensor]) -> plain.Weights:
        """1 where a slice with these channels, one bool each, has a weight."""
        out = {n: torch.ones(shape, dtype=torch.float64) for n, shape in self.shapes.items()}
        for (rows, reads), own in zip(self.groups, kept, strict=True):
            for name in (n for layer in rows for n in self.tensors(layer)):
                out[name] *= own.double().reshape(-1, *[1] * (out[name].dim() - 1))
            for layer in reads:
                out[f"{layer}.weight"] *= own.double().reshape(1, -1, *[1] * (out[f"{layer}.weight"].dim() - 2))
        return out

    def cost(self, counts: list[int]) -> float:
        masks = self.mask([torch.arange(n) < k for n, k in zip(self.size, counts, strict=True)])
        sums = {n: float(masks[n].sum()) for n in self.trained}
        if self.keys.get("capacity_in") == "macs":
            each = {n: next((v for k, v in self.outputs.items() if n.startswith(k)), 1) for n in sums}
            return sum(v * each[n] for n, v in sums.items() if len(self.shapes[n]) > 1)
        return sum(sums.values())

    def counts(self, capacity: float) -> list[int]:
        """One channel at a time to the group with the smallest share then, while it fits."""
        found, budget = [1] * len(self.size), capacity * self.cost(self.size)
        while found != self.size:
            shares = [(k + 1) / n if k < n else math.inf for k, n in zip(found, self.size, strict=True)]
            more = list(found)
            more[shares.index(min(shares))] += 1
            if self.cost(more) > budget + 1e-6:
                break
            found = more
        return found

    def scores(self, w: plain.Weights, kept: list[Tensor] | None = None) -> list[Tensor]:
        """sqrt(sum_l ||W_lc||^2 / z_l), of the channels that are kept."""
        return [s.sqrt() for s in self.squares(w, self.means(w, kept))]

    def means(self, w: plain.Weights, kept: list[Tensor] | None = None) -> dict[str, float]:
        """z_l."""
        out = {}
        for place, (rows, _) in enumerate(self.groups):
            for name in (f"{layer}.weight" for layer in rows if len(self.shapes[f"{layer}.weight"]) > 1):
                among = torch.ones(self.size[place], dtype=torch.bool) if kept is None else kept[place]
                each = w[name].detach().reshape(len(w[name]), -1).square().sum(1)[among]
                out[name] = float(each.mean()) if self.keys.get("normalise", True) else 1.0
        return out

    def squares(self, w: plain.Weights, z: dict[str, float]) -> list[Tensor]:
        return [
            sum((w[n].flatten(1).square().sum(1) / z[n] for n in (f"{one}.weight" for one in rows) if n in z),
                start=torch.zeros(()))
            for rows, _ in self.groups
        ]  # fmt: skip

    def choose(self, w: plain.Weights, before: dict[float, list[Tensor]] | None) -> dict[float, list[Tensor]]:
        """Of each capacity its channels, from the largest down, each within the next larger one."""
        scores, factor = self.scores(w), self.keys.get("hysteresis", 1.1)
        inside = [torch.ones(n, dtype=torch.bool) for n in self.size]
        out = {}
        for capacity in sorted(CAPACITIES, reverse=True):
            for g, k in enumerate(self.counts(capacity)):
                s = scores[g].double()
                if before is not None:
                    s = torch.where(before[capacity][g], s * factor, s)
                s[~inside[g]] = -1
                chosen = torch.zeros_like(inside[g])
                chosen[s.topk(k).indices] = True
                inside[g] = chosen
            out[capacity] = list(inside)
        return out

    def train(self, x0: plain.Weights, kept: list[Tensor], data: list[Any], settings: plain.Settings) -> plain.Weights:
        """A client: the surrogate is differentiated by autograd."""
        dtype = next(iter(x0.values())).dtype
        masks = {n: v.to(dtype) for n, v in self.mask(kept).items()}
        w = {n: (x0[n] * masks[n]).requires_grad_() for n in self.trained}
        state = {n: v.clone() for n, v in x0.items() if n not in w}
        z = self.means(w, kept)
        first = self.scores({n: v.detach() for n, v in w.items()}, kept)
        theta = []
        for s, own in zip(first, kept, strict=True):
            each = torch.full_like(s, 0.0 if bool(own.all()) else float(s[own].min()) * (1 - 1e-5))
            each[torch.where(own, s, -1).argmax()] = 0.0
            theta.append(each)
        optimizer = settings.optimizer(list(w.values()))
        module = self.make().to(dtype).train()
        for x, y in data:
            e, still = dict(w), dict[str, Tensor]()
            if self.keys.get("gate") != "frozen":
                for (rows, _), square, edge, own in zip(self.groups, self.squares(w, z), theta, kept, strict=True):
                    s = torch.where(own, square, 1.0).sqrt()
                    soft = ((s - edge) / (s + edge)).clamp(0, 1)
                    m = (own & (s.detach() >= edge)).to(dtype) + soft - soft.detach()
                    for name in (n for layer in rows for n in self.tensors(layer) if n in w):
                        m = m.reshape(-1, *[1] * (w[name].dim() - 1))
                        e[name], still[name] = w[name] * m, m.detach() == 0
            loss = functional.cross_entropy(torch.func.functional_call(module, {**e, **state}, (x,)), y)
            optimizer.zero_grad()
            loss.backward()
            for (
                n,
                v,
            ) in w.items():  # no weight that the slice lacks; what is closed has 0 as the surrogate is flat there
                assert v.grad is not None
                v.grad *= masks[n]
            if settings.clip:
                nn.utils.clip_grad_norm_(list(w.values()), settings.clip)
            before = {n: w[n].detach().clone() for n in still}
            optimizer.step()
            with torch.no_grad():
                for n, closed in still.items():  # neither momentum nor decay moves a closed channel
                    w[n].copy_(torch.where(closed, before[n], w[n]))
        out = {**{n: v.detach() for n, v in w.items()}, **state}
        if self.keys.get("gate") != "frozen":
            for (rows, _), square, edge in zip(self.groups, self.squares(w, z), theta, strict=True):
                for name in (n for layer in rows for n in self.tensors(layer) if n not in w):
                    out[name] = torch.where(square.detach().sqrt() >= edge, out[name], x0[name])
        return out


def follow(cls: type[FIARSENeuron], net: str, keys: dict[str, Any], training: str, precision: Any, driver: str) -> None:
    own, settings = {**TRAINING, **DECAY}[training]
    spec, shape = (toy.MLP, (7,)) if net == "mlp" else (f"resnet8(norm={net}, width=4)", (1, 8, 8))
    sizes = (11, 8, 6)
    fed = toy.federation(
        cls(**keys), models=(spec,), shape=shape, sizes=sizes, train=own, clients={"capacities": list(CAPACITIES)}
    )
    game = toy.play(fed, precision=precision, driver=driver)
    hand, kept = ByHand(net, keys), None
    x = toy.copy(game.server.model)
    for number in (1, 2):
        game.round()
        kept = hand.choose(x, kept)
        masks = {c: hand.mask(chosen) for c, chosen in kept.items()}
        with game.driver.placement.defaults():
            sent = [hand.train(x, kept[c], pairs(batches(game, k, number)), settings) for k, c in enumerate(CAPACITIES)]
        for n, before in x.items():
            held = torch.stack([masks[c][n] for c in CAPACITIES]).sum(0)
            total = torch.stack([w[n].double() * masks[c][n] for c, w in zip(CAPACITIES, sent, strict=True)]).sum(0)
            mean = torch.where(held > 0, total / held.clamp(min=1), before.double())
            x[n] = mean.to(before.dtype) if before.is_floating_point() else mean.round().to(before.dtype)
        # A small dense network sums in another order than a large one with zeros does.
        toy.close(game.server.model, x, TOLERANCE[precision] * (100 if driver == "batched" else 4))


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(
    ("net", "keys", "training"),
    [
        ("mlp", {}, "sgd"),
        ("mlp", {"gate": "frozen"}, "momentum, decay, clip"),
        ("mlp", {"normalise": False, "hysteresis": 1.0}, "sgd"),
        ("mlp", {}, "momentum, decay, clip"),
        ("batch", {}, "sgd"),
        ("batch", {"gate": "frozen", "capacity_in": "macs"}, "sgd"),
        ("mlp", {}, "decay"),
    ],
)
def test_fiarse_neuron(net: str, keys: dict[str, Any], training: str, precision: Any, driver: str) -> None:
    """Catches wrong sizes, scores, channels, gradients, statistics and means, and channels that are coupled wrongly."""
    follow(FIARSENeuron, net, keys, training, precision, driver)


class WithoutBias(FIARSENeuron):
    """The authors' code: the mask's own derivative never runs."""

    def gradient(self, grad: Any, nets: Any, batch: Any, due: bool) -> Any:
        parts = {name: net.params for name, net in nets.items()}
        found = grad(supervised, model=gated(nets))["model"]
        held = open_channels(nets["model"].params, parts)
        return {"model": {n: g * held[n] if n in parts["scale"] else g for n, g in found.items()}}


class Coasts(FIARSENeuron):
    """The authors' code under Adam: momentum and decay move what is closed."""

    def moves(self, nets: Any) -> Any:
        return {}


class ClosedStatistics(FIARSENeuron):
    """Running statistics of channels that are 0."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        parts = self.predictor_parts(private, msg, client)
        fitted = yield from fit(client, parts, gradient=self.gradient, frozen=self.gate_of(msg, client))
        return private, self.Upload(fitted.parts["model"])


class CountsMovements(FIARSENeuron):
    """The authors' code: a holder whose weight did not move, as those of a closed channel, does not count."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        steps = super().server_round(server, cohort)
        request: Any = next(steps)
        mean = request.gather["model"]

        class Movements(CoverageMean):
            def add(self, total: Any, client: Any, value: Any, upload: Any) -> Any:
                part = mean.part(client)
                full, held = part.put(value), part.coverage()
                moved = {n: held[n] & (full[n] != server.model[n]) for n in full}
                own = {n: full[n][m] for n, m in moved.items()}
                return CoverageMean(lambda _: moved, None, self.default).add(total, client, own, upload)

        got = yield replace(request, gather={"model": Movements(mean.part, None, mean.default)})
        try:
            steps.send(got)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize(
    ("faulty", "net", "training"),
    [
        (WithoutBias, "mlp", "sgd"),
        (CountsMovements, "mlp", "sgd"),
        (ClosedStatistics, "batch", "sgd"),
        (Coasts, "mlp", "momentum, decay, clip"),
        (Coasts, "mlp", "decay"),
    ],
)
def test_faults_are_seen(faulty: type[FIARSENeuron], net: str, training: str) -> None:
    """Catches a comparison that would pass whatever closed channels do and count, and rounds in which none closes."""
    with pytest.raises(AssertionError, match=r"fc|bn|conv|running"):
        follow(faulty, net, {}, training, "fp64", "sequential")
