"""The work of one client alone: the reference for every faster execution.

Weights are leaves that the optimizer updates in place, and a SplitModel binds them once, so that a step costs as much
as in a hand-written loop. Inputs are cloned first and never written.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import DivergedError, ModelError, PolyfedError
from polyfed.base.types import Params, Parts
from polyfed.core.net import Batch, Loss, Net, Nets
from polyfed.core.plan import LocalSGD
from polyfed.core.requests import Fit, Fitted, Reduce
from polyfed.execute.placement import Placement
from polyfed.execute.within import inside, places, whole
from polyfed.models.probe import fault, in_network
from polyfed.models.split import SplitModel

Grads = dict[str, dict[str, Tensor]]

#: Examples per forward pass without training; 250 to 500 were the fastest on 2 cores.
EVAL_BATCH = 500


def bind(models: Mapping[str, SplitModel], parts: Parts) -> dict[str, Net]:
    """Return a Net for every part."""
    return {part: Net(models.get(part), params) for part, params in parts.items()}


def buffers(models: Mapping[str, SplitModel], part: str) -> frozenset[str]:
    """Return the names in ``part`` that are buffers of its network, not weights."""
    return models[part].buffer_names if part in models else frozenset()


def set_training(models: Mapping[str, SplitModel], training: bool) -> None:
    """Put all networks into training or evaluation mode."""
    for model in models.values():
        model.train(training)


@contextmanager
def reported(whose: str) -> Generator[None]:
    """Turn an error of a network's forward into a ModelError that names the line; ``whose`` begins its text."""
    try:
        yield
    except (PolyfedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not in_network(error):
            raise
        raise ModelError(f"{whose}: its network fails on its data: {fault(error)}") from error


@dataclass
class Local:
    """The mutable state of one local training: leaves, optimizer, losses. It exists as long as its fit."""

    fit: Fit
    placement: Placement
    parts: Grads = field(init=False)
    losses: list[Tensor] = field(init=False, default_factory=list[Tensor])

    def __post_init__(self) -> None:
        models, placement = self.fit.client.models, self.placement
        put = tree.map_parts(lambda value: placement.put(value.detach(), copy=True), self.fit.parts)
        #: Of the tensors of which only some coordinates are trained, the values elsewhere and the places of these.
        self.bases = {part: tree.pick(put[part], own) for part, own in self.fit.within.items()}
        self.places = {
            part: {n: placement.put(places(mask, put[part][n])) for n, mask in own.items()}
            for part, own in self.fit.within.items()
        }
        for part, own in self.places.items():
            put[part] |= {n: inside(put[part][n], where) for n, where in own.items()}
        self.parts = {
            part: {
                name: value.requires_grad_(name not in buffers(models, part) and value.is_floating_point())
                for name, value in params.items()
            }
            for part, params in put.items()
        }
        # A frozen network in training mode updates its running statistics, too, hence copies of its buffers.
        frozen = {
            part: {
                name: placement.put(value.detach(), copy=name in buffers(models, part))
                for name, value in params.items()
            }
            for part, params in self.fit.frozen.items()
        }
        self.nets = bind(models, {**frozen, **self.parts})
        self.optimizer = optimizer(self.fit.client.plan, self.parts, self.fit.lr)
        rates = {part: self.fit.client.plan.rate(part, self.fit.lr.get(part)) for part in self.fit.correction}
        self.corrections = [
            (self.parts[part][name], placement.put(value.detach()), rates[part])
            for part, params in self.fit.correction.items()
            for name, value in params.items()
        ]

    def grad(self, batch: Batch, loss: Loss, **replace: Params) -> Grads:
        """Return the gradient of ``loss`` for every trainable part; see `polyfed.core.requests.Grad`."""
        leaves = {**self.parts, **{part: self._at(part, params) for part, params in replace.items()}}
        with torch.enable_grad(), self.placement.autocast():
            new = {part: self._whole(part, leaves[part]) for part in {*replace, *self.places}}
            nets: Nets = {**self.nets, **bind(self.fit.client.models, new)}
            value = loss(nets, batch)
        self.losses.append(value.detach())
        flat = [(part, name, leaf) for part, p in leaves.items() for name, leaf in p.items() if leaf.requires_grad]
        found = torch.autograd.grad(value, [leaf for *_, leaf in flat], allow_unused=True, materialize_grads=True)
        grads: Grads = {part: {} for part in leaves}
        for (part, name, _), g in zip(flat, found, strict=True):
            grads[part][name] = g
        return grads

    def _at(self, part: str, params: Params) -> dict[str, Tensor]:
        return {
            name: params[name].detach().requires_grad_() if leaf.requires_grad else leaf
            for name, leaf in self.parts[part].items()
        }

    def _whole(self, part: str, params: Params) -> Params:
        where = self.places.get(part)
        return whole(params, self.bases[part], where) if where else params

    def ended(self) -> Grads:
        """Return the parts as trained, at full shape."""
        return {part: dict(self._whole(part, tree.map_leaves(Tensor.detach, p))) for part, p in self.parts.items()}

    def see(self, drawn: Params) -> None:
        """Show the loss the tensors that were drawn for a step."""
        if drawn:
            self.nets["drawn"] = Net(None, tree.map_leaves(self.placement.put, drawn))

    def step(self, batch: Batch, due: int, drawn: Params) -> None:
        """Take one gradient and one optimizer step."""
        self.see(drawn)
        count = len(self.losses)
        # Recorded is the loss only: a gradient that is a function of the weights would hold their graph, and as their
        # `.grad` it would be a circle that nothing ever frees.
        with torch.no_grad():
            grads = self.fit.gradient(lambda loss, **replace: self.grad(batch, loss, **replace), self.nets, batch, due)
        del self.losses[count + 1 :]  # a step's loss is the first loss that its gradient evaluates
        for group in self.optimizer.param_groups:
            for leaf in group["params"]:
                leaf.grad = None  # a leaf without a gradient in this step does not move
        for part, params in grads.items():
            for name, g in clip(params, self.fit.client.plan.clip).items():
                leaf = self.parts[part][name]
                # torch's fused optimizers read both memories in order, so a gradient in another layout than its weight
                # would be applied to the wrong coordinates without an error (torch 2.13).
                leaf.grad = g if g.stride() == leaf.stride() else torch.empty_like(leaf).copy_(g)
        with torch.no_grad():
            free = {} if self.fit.moves is None else self.fit.moves(self.nets)
            before = {part: {name: self.parts[part][name].clone() for name in own} for part, own in free.items()}
            self.optimizer.step()
            for leaf, value, lr in self.corrections:
                leaf.sub_(value, alpha=lr)
            for part, own in free.items():
                for name, may in own.items():
                    self.parts[part][name].copy_(torch.where(may, self.parts[part][name], before[part][name]))


def clip(grads: Params, limit: float) -> Params:
    """Return ``grads`` scaled so that their common norm is at most ``limit``; 0 leaves them unchanged."""
    if not limit or not grads:
        return grads
    norm = torch.stack([g.pow(2).sum() for g in grads.values()]).sum().sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * scale for name, g in grads.items()}


def optimizer(plan: LocalSGD, parts: Parts, lr: Mapping[str, float]) -> torch.optim.Optimizer:
    """Return a new optimizer, without state of an earlier client or round."""
    groups = [
        {"params": leaves, "lr": plan.rate(part, lr.get(part))}
        for part, params in parts.items()
        if (leaves := [leaf for leaf in params.values() if leaf.requires_grad])
    ]
    if plan.optimizer != "sgd":
        kind = torch.optim.Adam if plan.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=True)


def run_fit(fit: Fit, placement: Placement) -> Fitted:
    """Train one client, by itself.

    Raises:
        DivergedError: a loss or a weight became NaN or infinite.
    """
    client = fit.client
    set_training(client.models, True)
    local = Local(fit, placement)
    augment = client.rng.at("augment").torch()
    weights = None if client.weights is None else placement.put(client.weights)  # a copy for each batch would wait
    with client.rng.at("layers").fork() if any(model.random for model in client.models.values()) else nullcontext():
        for step in client.plan.schedule(len(client.train), client.rng.at("batches")):
            batch = client.weigh(placement.batch(client.train, step.rows, augment), weights)
            with reported(f"client {client.info.id}, round {client.round}, a batch of {len(step.rows)}"):
                local.step(batch, fit.due(step.index, step.in_epoch), fit.drawn(step))
    return finish(fit, local.ended(), local.losses)


def finish(fit: Fit, parts: Grads, losses: list[Tensor], *, finite: bool = False) -> Fitted:
    """Return the outcome after a check that it is finite; ``finite`` says that the parts are known to be.

    Raises:
        DivergedError: a loss or a weight is NaN or infinite.
    """
    # States and messages are on the CPU and in the usual layout, wherever and however the work was done.
    parts = tree.map_parts(lambda value: value.cpu().contiguous(), parts)
    mean = float(torch.stack(losses).double().mean()) if losses else 0.0
    bad = None if finite else tree.first_not_finite(parts)
    if bad is not None or mean != mean or mean in (float("inf"), float("-inf")):
        where = f"tensor {bad!r}" if bad else "its loss"
        raise DivergedError(
            f"client {fit.client.info.id}, round {fit.client.round}: {where} is not finite (mean loss {mean}); "
            "lower train.lr or set train.clip"
        )
    return Fitted(parts, len(losses), mean)


@torch.no_grad()
def run_reduce(request: Reduce, placement: Placement) -> dict[str, Tensor]:
    """Return the sum of a function over one client's data, in evaluation mode.

    Raises:
        DivergedError: the sum is NaN or infinite.
    """
    client = request.client
    set_training(client.models, False)
    nets = bind(client.models, tree_to(request.parts, placement))
    rows = (request.rows,) if request.rows is not None else torch.arange(len(request.data)).split(EVAL_BATCH)
    out: dict[str, Tensor] = {}
    for some in rows:
        batch = client.weigh(placement.batch(request.data, some))
        with placement.autocast(), reported(f"client {client.info.id}, round {client.round}"):
            part = request.fn(nets, batch)
        out |= {name: out[name] + value if name in out else value for name, value in part.items()}
    bad = tree.first_not_finite({"sum": out})
    if bad is not None:
        raise DivergedError(
            f"client {client.info.id}, round {client.round}: {bad!r} over its data is not finite; lower train.lr or "
            "set train.clip"
        )
    return {name: value.cpu().contiguous() for name, value in out.items()}


def tree_to(parts: Parts, placement: Placement) -> Parts:
    """Return the parts on the device and in the layout of ``placement``; unchanged parts are returned themselves."""
    return tree.map_parts(placement.put, parts)
