"""The five algorithms as one would write them in an afternoon: modules, torch.optim, loops. Nothing of polyfed's
drivers, aggregation, submodels or alignment is used; only its networks' modules, and the batches that are handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Weights = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """How clients train."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = 0.0
    adam: bool = False

    def optimizer(self, groups: Any) -> torch.optim.Optimizer:
        """A new optimizer."""
        if self.adam:
            return torch.optim.Adam(groups, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def load(make: Callable[[], nn.Module], weights: Weights) -> nn.Module:
    """A module in training mode with copies of these weights."""
    module = make().to(next(v.dtype for v in weights.values() if v.is_floating_point()))
    module.load_state_dict({name: value.clone() for name, value in weights.items()})
    return module.train()


def saved(module: nn.Module) -> Weights:
    """Copies of a module's weights and buffers: the released FedMRL's fault B1 was to keep references."""
    return deepcopy({name: value.detach() for name, value in module.state_dict().items()})


def mean(models: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The weighted mean, name by name; counters are rounded."""
    out = {}
    for name, like in models[0].items():
        total = sum(share * model[name].double() for share, model in zip(shares, models, strict=True)) / sum(shares)
        out[name] = total.to(like.dtype) if like.is_floating_point() else total.round().to(like.dtype)
    return out


def cross_entropy(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(module(x), y)


def local_sgd(
    make: Callable[[], nn.Module],
    weights: Weights,
    batches: Batches,
    settings: Settings,
    loss: Callable[[Any, Tensor, Tensor], Tensor] = cross_entropy,
    after: Callable[[nn.Module], None] = lambda _: None,
) -> Weights:
    """Plain training; ``after`` follows each update."""
    module = load(make, weights)
    optimizer = settings.optimizer(module.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        loss(module, x, y).backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        optimizer.step()
        after(module)
    return saved(module)


# ------------------------------------------------------------------------------------------------------------- FedMRL


def represent(cnn: nn.Module, x: Tensor) -> Tensor:
    """All of a CNN before its last layer."""
    x = functional.max_pool2d(functional.relu(cnn.conv1(x)), 2)
    x = functional.max_pool2d(functional.relu(cnn.conv2(x)), 2)
    x = functional.relu(cnn.fc1(x.flatten(1)))
    return functional.relu(cnn.fc2(x))


def project(P: Weights, R: Tensor) -> Tensor:  # noqa: N803
    """One linear layer, or two with a ReLU between."""
    out = R @ P["fc1.weight"].T + P["fc1.bias"]
    return out if "fc2.weight" not in P else torch.relu(out) @ P["fc2.weight"].T + P["fc2.bias"]


def fedmrl_client(
    make_small: Callable[[], nn.Module],
    make_large: Callable[[], nn.Module],
    theta: Weights,
    w: Weights,
    phi: Weights,
    batches: Batches,
    settings: Settings,
    *,
    rates: Sequence[float] | None = None,
    m: tuple[float, float] = (1.0, 1.0),
    mrl: bool = True,
) -> tuple[Weights, Weights, Weights]:
    """E epochs of l = m_G CE(coarse) + m_F CE(fine) over theta, w and phi together."""
    small, large = load(make_small, theta), load(make_large, w)
    P = {name: value.clone().requires_grad_() for name, value in phi.items()}  # noqa: N806
    learnt = [list(small.parameters()), list(large.parameters()), list(P.values())]
    rates = rates or [settings.lr] * 3
    optimizers = [replace_lr(settings, lr).optimizer(params) for lr, params in zip(rates, learnt, strict=True)]
    for x, y in batches:
        for params in learnt:
            for p in params:
                p.grad = torch.zeros_like(p)  # what no loss reaches decays all the same: fedmrl.md, Pitfalls
        r_small, r_large = represent(small, x), represent(large, x)
        fused = project(P, torch.cat([r_small, r_large], dim=1))
        loss = (
            m[1] * functional.cross_entropy(large.fc3(fused), y)
            if mrl
            else functional.cross_entropy(large.fc3(fused), y)
        )
        if mrl:
            loss = loss + m[0] * functional.cross_entropy(small.fc3(fused[:, : r_small.shape[1]]), y)
        loss.backward()
        for params, optimizer in zip(learnt, optimizers, strict=True):
            if settings.clip:
                nn.utils.clip_grad_norm_(params, settings.clip)
            optimizer.step()
    return saved(small), saved(large), {name: value.detach() for name, value in P.items()}


def replace_lr(settings: Settings, lr: float) -> Settings:
    """The same with another rate."""
    return Settings(lr, settings.momentum, settings.weight_decay, settings.clip, settings.adam)


# ------------------------------------------------------------------------------------------------------------- FIARSE


def norm_names(module: nn.Module) -> set[str]:
    """Parameters of normalisation layers."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    return {
        f"{path}.{name}"
        for path, child in module.named_modules()
        if isinstance(child, kinds)
        for name, _ in child.named_parameters()
    }


def masked_names(module: nn.Module) -> list[str]:
    """What competes: every parameter but those of norms."""
    return [name for name, _ in module.named_parameters() if name not in norm_names(module)]


def thresholds(
    x: Weights,
    masked: Sequence[str],
    capacity: float,
    scope: str,
    groups: Sequence[Sequence[str]] = (),
    macs: dict[str, int] | None = None,
) -> dict[str, float]:
    """theta_i for each masked tensor, by torch.topk; or where multiplications are counted, weight by weight."""

    def top(names: Sequence[str]) -> float:
        values = torch.cat([x[name].flatten() for name in names])
        if capacity == 1.0:
            return 0.0
        if macs is None:
            return float(values.abs().topk(math.floor(capacity * values.numel())).values[-1])
        each = sorted(((abs(v), macs.get(n, 0)) for n in names for v in x[n].flatten().tolist()), reverse=True)
        total, spent, theta = sum(cost for _, cost in each), 0, each[0][0]
        if total == 0:
            return 0.0  # biases alone: nothing to save
        for magnitude, cost in each:
            spent += cost
            if spent > capacity * total:
                break
            theta = magnitude
        return theta

    if scope == "layer":
        return {name: top([name]) for name in masked}
    if scope == "stage":
        groups = [[name] for name in sorted({name.split(".")[0] for name in masked})]
    if scope == "model":
        groups = [[""]]
    found = {}
    for beginnings in groups:
        names = [name for name in masked if any(name.startswith(one) for one in beginnings)]
        found |= dict.fromkeys(names, top(names))
    return found


def fiarse_client(
    make: Callable[[], nn.Module],
    x0: Weights,
    theta: dict[str, float],
    batches: Batches,
    settings: Settings,
    gate: str,
    sticky: bool = True,
    held: dict[str, Tensor] | None = None,
) -> Weights:
    """K steps from the submodel, which is ``held`` if that is given; returns x_K."""
    held = {name: x0[name].abs() >= theta[name] for name in theta} if held is None else held
    start = {name: v * held[name] if name in held else v for name, v in x0.items()}
    module = load(make, start)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    optimizer = settings.optimizer(list(leaves.values()))
    for x, y in batches:
        masks = held if gate == "frozen" else {name: leaves[name].detach().abs() >= theta[name] for name in theta}
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(leaves[name] * masks[name] if name in masks else leaves[name])
                p.grad = None
        functional.cross_entropy(module(x), y).backward()
        for name, p in module.named_parameters():
            g = p.grad
            assert g is not None
            if name in masks:
                g = g * masks[name]
                if gate == "biased":
                    a, t = leaves[name].detach().abs(), theta[name]
                    g = torch.where((a + t) > 0, g * (1 + 2 * a * t / (a + t).square()), g)
            leaves[name].grad = g
        if settings.clip:
            norm = (
                torch.stack([leaf.grad.pow(2).sum() for leaf in leaves.values() if leaf.grad is not None]).sum().sqrt()
            )
            for leaf in leaves.values():
                assert leaf.grad is not None
                leaf.grad *= min(1.0, settings.clip / (float(norm) + 1e-6))
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items() if sticky else ():
                leaves[name][~mask] = before[name][~mask]
    return {**saved(module), **{name: leaf.detach() for name, leaf in leaves.items()}}


def fiarse_server(
    x0: Weights,
    after: Sequence[Weights],
    theta: Sequence[dict[str, float]],
    eta: float,
    nonzero: bool = False,
    masks: Sequence[dict[str, Tensor]] | None = None,
) -> Weights:
    """Each coordinate averaged over the clients whose mask held it at the start, or over those where it moved."""
    out = {}
    for name, value in x0.items():
        total = torch.zeros(value.shape, dtype=torch.float64).flatten()
        count = torch.zeros(value.shape).flatten()
        for k, ended in enumerate(after):
            held = torch.ones(value.shape, dtype=torch.bool)
            if masks is not None:
                held = masks[k].get(name, held)
            elif name in theta[k]:
                held = value.abs() >= theta[k][name]
            start = torch.where(held, value, torch.zeros_like(value))
            total += ((ended[name] - start).double() * held).flatten()
            count += (held & (ended[name] != start) if nonzero else held).flatten()
        step = torch.where(count > 0, total / count.clamp(min=1), torch.zeros_like(total)).reshape(value.shape)
        rate = 1.0 if "running_" in name or name.endswith("num_batches_tracked") else eta  # statistics: as they are
        moved = value.double() + rate * step
        out[name] = moved.to(value.dtype) if value.is_floating_point() else moved.round().to(value.dtype)
    return out


def by_score(x: Weights, scores: Weights, masked: Sequence[str], capacity: float) -> dict[str, Tensor]:
    """The floor(capacity d) weights of the largest scores, of equal ones the largest weights."""
    each = [
        (abs(float(scores[name].flatten()[i])) if scores else 0.0, abs(v), name, i)
        for name in masked
        for i, v in enumerate(x[name].flatten().tolist())
    ]
    out = {name: torch.zeros(x[name].numel(), dtype=torch.bool) for name in masked}
    for *_, name, i in sorted(each, reverse=True)[: math.floor(capacity * len(each))]:
        out[name][i] = True
    return {name: mask.reshape(x[name].shape) for name, mask in out.items()}


def scored(
    x0: Weights,
    scores: Weights,
    after: Sequence[Weights],
    masks: Sequence[dict[str, Tensor]],
    squares: bool,
    memory: float,
) -> Weights:
    """The running means of changes, or of their squares, over those who held a coordinate."""
    out = {}
    for name in masks[0]:
        old = scores.get(name, torch.zeros_like(x0[name])).flatten().clone()
        for i in range(old.numel()):
            own = [
                float(ended[name].flatten()[i]) - float(x0[name].flatten()[i])
                for ended, mask in zip(after, masks, strict=True)
                if mask[name].flatten()[i]
            ]
            if own:
                new = sum(change**2 if squares else change for change in own) / len(own)
                old[i] = new if old[i] == 0 else memory * old[i] + (1 - memory) * new
        out[name] = old.reshape(x0[name].shape)
    return out


# -------------------------------------------------------------------------------------------------------------- FedIN


def extract(resnet: nn.Module, x: Tensor) -> Tensor:
    """The stem."""
    return resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))


def inner(resnet: nn.Module, s_in: Tensor) -> Tensor:
    """The stages, and pooling."""
    for name in resnet.stages:
        s_in = getattr(resnet, name)(s_in)
    return s_in.mean((2, 3))


def fedin_client(
    make: Callable[[], nn.Module],
    weights: Weights,
    batches: Sequence[tuple[Tensor, Tensor, bool]],
    pair: tuple[Tensor, Tensor] | None,
    settings: Settings,
    *,
    align: str,
    weight: float,
    level: str = "step",
    granularity: str = "tensor",
    vectors: bool = False,
    norm: str = "batch",
    distance: str = "mse",
) -> Weights:
    """Local steps; where one is due, an IN step with the foreign pair joins it, or all of them do at the end."""
    module = load(make, weights)
    optimizer = settings.optimizer(module.parameters())
    names = [n for n, p in module.named_parameters() if n.startswith("layer") and (vectors or p.dim() > 1)]

    def foreign(of: nn.Module) -> Weights:
        assert pair is not None
        other = deepcopy(of)  # its running statistics may move, the client's must not
        other.train(norm == "batch").zero_grad()
        far(inner(other, pair[0]), pair[1], distance).backward()
        return {n: p.grad.clone() for n, p in other.named_parameters() if n in names}

    def join(g: Weights, r: Weights) -> Weights:
        if granularity == "whole":
            b, a_g, a_r = (sum(float((x[n] * y[n]).sum()) for n in names) for x, y in ((g, r), (g, g), (r, r)))
            return {n: mixed(g[n], r[n], align, weight, b, a_g, a_r) for n in names}
        out = {}
        for n in names:
            if granularity == "kernel" and g[n].dim() == 4:
                rows = [
                    torch.stack([aligned(g[n][o, i], r[n][o, i], align, weight) for i in range(g[n].shape[1])])
                    for o in range(g[n].shape[0])
                ]
                out[n] = torch.stack(rows)
            else:
                out[n] = aligned(g[n], r[n], align, weight)
        return out

    for x, y, due in batches:
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        if due and pair is not None and level == "step":
            local = dict(module.named_parameters())
            for n, g in join({n: local[n].grad for n in names}, foreign(module)).items():
                local[n].grad = g
        optimizer.step()
    out = saved(module)
    if pair is None or level == "step":
        return out
    learner = load(make, weights)
    trained = dict(learner.named_parameters())
    optimizer = replace(settings, weight_decay=0.0).optimizer([trained[n] for n in names])
    for _, _, due in batches:
        if due:
            for n, g in foreign(learner).items():
                trained[n].grad = g
            optimizer.step()
    deltas = ({n: after[n].detach() - weights[n] for n in names} for after in (out, trained))
    return {**out, **{n: weights[n] + moved for n, moved in join(*deltas).items()}}


def far(made: Tensor, target: Tensor, distance: str) -> Tensor:
    """How far features are from their targets, row by row or feature by feature."""
    if distance == "cosine":
        cosines = [(a @ b) / (a.norm() * b.norm()) for a, b in zip(made, target, strict=True)]
        return 1 - sum(cosines) / len(cosines)
    error = made - target
    if distance == "smooth_l1":
        return torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5).mean()
    if distance == "standardised":
        variances = [((column - column.mean()) ** 2).mean() for column in target.T]
        least = 0.01 * float(sum(variances) / len(variances))
        return torch.stack([error[:, d] ** 2 / max(float(v), least) for d, v in enumerate(variances)]).mean()
    return error.square().mean()


def aligned(g: Tensor, r: Tensor, align: str, weight: float) -> Tensor:
    """The four ways of section 2.5 of the method card, for one vector."""
    return mixed(g, r, align, weight, float((g * r).sum()), float((g * g).sum()), float((r * r).sum()))


def mixed(g: Tensor, r: Tensor, align: str, weight: float, b: float, a_g: float, a_r: float) -> Tensor:
    """The same for a piece of a vector, with ordinary branches; b = <g, r>, a_g = <g, g> and a_r = <r, r> of all."""
    if align == "none":
        return g + weight * r
    if align == "always":
        return g - b / a_r * r if a_r else g
    if align == "local_primary":
        return g if b >= 0 else g - b / a_r * r
    return g + weight * (r if b >= 0 else r - b / a_g * g)


@torch.no_grad()
def features(make: Callable[[], nn.Module], weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """(s_in, s_out) in evaluation mode."""
    module = load(make, weights).eval()
    s_in = extract(module, x)
    return s_in, inner(module, s_in)


def fedin_server(layers: Weights, models: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """Each layer averaged over its owners; one that nobody owns stays."""
    out = dict(layers)
    for name in layers:
        owners = [(m, s) for m, s in zip(models, shares, strict=True) if name in m]
        if owners:
            out |= mean([{name: m[name]} for m, _ in owners], [s for _, s in owners])
    return out
