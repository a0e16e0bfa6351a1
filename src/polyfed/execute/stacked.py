"""Training of many clients at once: their weights are stacked along a new first axis and step together by ``vmap``.

Clients of a group run in lock-step. At each step the clients with equally many examples in their batch (and equally
due) step together; their rows are taken out of the stack by index and put back. So no batch is padded and no update is
masked, and unequal numbers of examples change only the speed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.types import Params, Parts
from polyfed.core.algorithm import Algorithm
from polyfed.core.net import Batch, Loss, Nets
from polyfed.core.plan import LocalSGD, Step
from polyfed.core.requests import Fit, Fitted
from polyfed.data.client import send
from polyfed.execute.local_training import Grads, bind, buffers, clip, finish, set_training
from polyfed.execute.placement import Placement
from polyfed.execute.replay import AFTER, Product, Replays
from polyfed.execute.within import inside, places, whole
from polyfed.models.split import SplitModel

#: Sizes of stacks. The memory of a step should fit a processor's caches; and glibc maps tensors above 32 MB anew each
#: time, so that each of their pages faults again.
SIZES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class StackRule:
    """The sizes of stacks, and the steps that are replayed from a trace.

    Args:
        sizes: sizes of stacks of dense networks, ascending; a trace is made for each.
        after: how often a step of another size is taken before it is traced.
        images: whether networks that convolve are stacked and traced as dense networks are.
    """

    sizes: Sequence[int] = SIZES
    after: int = AFTER
    images: bool = False

    def even(self, models: Mapping[str, SplitModel]) -> bool:
        """Return whether clients with these networks are stacked in the usual sizes, not in equal sizes."""
        return self.images or all(len(shape) != 4 for model in models.values() for shape in model.shapes.values())


USUAL = StackRule()

#: Gradients of a stack: by part and name.
Gradients = Mapping[str, Mapping[str, Tensor | Product]]


def signature(fit: Fit) -> object:
    """Return a key that is equal for requests that may be stacked: same function, networks, shapes and plan."""
    counts = tuple((part, *(int(mask.sum()) for mask in own.values())) for part, own in fit.within.items())
    return kind_of(fit), counts, fit.client.plan, tuple(sorted(fit.lr.items()))


def kind_of(fit: Fit) -> object:
    """Return `signature` without learning rates, and without how many coordinates of a tensor are trained.

    It is equal for requests whose steps are counted once. A schedule changes the rates every round, and FIARSE its
    submodels; a new trace or count for each round would take longer than the round.
    """

    def shapes(parts: Parts) -> object:
        return tuple((part, tuple((n, tuple(v.shape), v.dtype) for n, v in p.items())) for part, p in parts.items())

    return (
        *(fit.identity, tuple((part, model.signature) for part, model in fit.client.models.items())),
        *(shapes(fit.parts), shapes(fit.frozen), shapes(fit.correction)),
        tuple((part, tuple(own)) for part, own in fit.within.items()),
        *(replace(fit.client.plan, lr=0.0, factor=1.0, parts=()), fit.client.weights is None),
        *(
            "by step" if callable(fit.every) else fit.every,
            fit.draw is not None,
            getattr(fit.moves, "__func__", fit.moves),
        ),
    )


def why_not(fit: Fit) -> str | None:
    """Return the reason why a request cannot be stacked, or None."""
    for part, model in fit.client.models.items():
        if model.random:
            return f"{model.name} ({part}) draws random numbers in its layers, and stacked draws would differ"
        if model.caches:
            return f"{model.name} ({part}) keeps values in attributes, and values of a stack would not fit one client"
    return None


def replayable(fit: Fit) -> object | None:
    """Return a key of the request's function, equal only for the same function; None if no key is safe.

    An algorithm is frozen and keeps no state, so its method always computes the same, and so does a plain function; a
    closure or partial may hold values that differ from round to round.
    """
    source = fit.loss if fit.loss is not None else fit.gradient
    if fit.within:  # its tensors have other lengths in each round, and a trace would serve one
        return None
    if fit.moves is not None and not isinstance(getattr(fit.moves, "__self__", None), Algorithm):
        return None
    plain = isinstance(source, FunctionType) and source.__closure__ is None
    # The function itself, not its id: it keeps its algorithm alive, so no other function can get the same id.
    return (source, kind_of(fit)) if plain or isinstance(getattr(source, "__self__", None), Algorithm) else None


def pieces(fits: Sequence[Fit], most: int, rule: StackRule = USUAL) -> Iterator[Sequence[Fit]]:
    """Divide requests with equal signatures into groups of at most ``most``.

    Dense networks form groups of the usual sizes and a rest, as steps are traced for each size; other networks form
    groups of nearly equal size.
    """
    start = 0
    if rule.even(fits[0].client.models):
        for size in reversed([size for size in rule.sizes if size <= most]):
            while len(fits) - start >= size:
                yield fits[start : start + size]
                start += size
    rest = fits[start:]
    count = -(-len(rest) // most)
    for k in range(count):
        yield rest[len(rest) * k // count : len(rest) * (k + 1) // count]


def run_stacked(
    fits: Sequence[Fit], placement: Placement, replays: Replays | None = None, rule: StackRule = USUAL
) -> list[Fitted]:
    """Train clients with equal signatures together and return the outcome of each.

    Args:
        fits: the requests.
        placement: device and precision.
        replays: traces of such steps from earlier groups.
        rule: the usual sizes.
    """
    with warnings.catch_warnings():
        # torch warns of operations that it runs client by client inside a stack, such as a recurrent layer's on a CPU.
        warnings.filterwarnings("ignore", ".*not yet implemented the batching rule")
        return _run(fits, placement, replays, rule)


def _run(fits: Sequence[Fit], placement: Placement, replays: Replays | None, rule: StackRule) -> list[Fitted]:
    set_training(fits[0].client.models, True)
    stack = Stack(fits, placement, replays, rule)
    schedules = [fit.client.plan.schedule(len(fit.client.train), fit.client.rng.at("batches")) for fit in fits]
    augment = [fit.client.rng.at("augment").torch() for fit in fits]
    for steps in zip_longest(*schedules):
        groups: dict[tuple[int, int], list[tuple[int, Step]]] = {}
        for k, step in enumerate(steps):
            if step is not None:
                kind = (len(step.rows), fits[k].due(step.index, step.in_epoch))
                groups.setdefault(kind, []).append((k, step))
        for (_, due), members in groups.items():
            who = [k for k, _ in members]
            data = [fits[k].client.train for k in who]
            batch = placement.batches(data, [step.rows for _, step in members], [augment[k] for k in who])
            weights = [w.to(batch[1].device, placement.dtype) for k in who if (w := fits[k].client.weights) is not None]
            draws = [fits[k].drawn(step) for k, step in members]
            drawn = {n: torch.stack([placement.put(d[n]) for d in draws]) for n in draws[0]}
            stack.step(who, batch, due, drawn, torch.stack(weights) if weights else None)
    return stack.outcomes()


class Stack:
    """The weights, buffers and optimizer state of a group: (K, ...) tensors.

    Args:
        fits: requests with equal signatures.
        placement: device and precision.
        replays: traces of such steps from earlier groups.
        rule: the usual sizes.
    """

    def __init__(
        self, fits: Sequence[Fit], placement: Placement, replays: Replays | None = None, rule: StackRule = USUAL
    ) -> None:
        self.fits, self.placement = fits, placement
        self.replays, self.name = replays, replayable(fits[0])
        models = self.models = fits[0].client.models
        # A full step of a group of usual size is traced at once, and gradients of dense layers are added to the weights
        # without being stored, which saves half of such a step. That changes the last bit of the result, so it depends
        # on the size, which a resumed run has too, and not on how often a step was taken.
        self.usual = len(fits) in rule.sizes and rule.even(models)

        def stacked(parts: Sequence[Parts]) -> Grads:
            return {
                # One copy to a GPU per tensor, not per client: small copies take as long as large copies.
                part: {n: send(torch.stack([p[part][n].detach() for p in parts]), placement.device) for n in params}
                for part, params in parts[0].items()
            }

        everything = stacked([fit.parts for fit in fits])
        #: Of the tensors of which only some coordinates are trained, the values elsewhere and the places of these.
        self.bases = {part: tree.pick(everything[part], own) for part, own in fits[0].within.items()}
        self.places = stacked(
            [
                {part: {n: places(mask, fit.parts[part][n]) for n, mask in own.items()} for part, own in w.items()}
                for fit in fits
                for w in (fit.within,)
            ]
        )
        for part, own in self.places.items():
            everything[part] |= {n: torch.func.vmap(inside)(everything[part][n], where) for n, where in own.items()}
        self.frozen = stacked([fit.frozen for fit in fits])
        self.correction = stacked([fit.correction for fit in fits])
        fixed = {
            part: {n for n, v in params.items() if n in buffers(models, part) or not v.is_floating_point()}
            for part, params in everything.items()
        }
        self.fixed = {part: tree.pick(params, fixed[part]) for part, params in everything.items()}
        self.weights = {part: tree.drop(params, fixed[part]) for part, params in everything.items()}
        self.update = Update(fits[0].client.plan, self.weights, fits[0].lr, len(fits))
        self.losses: list[list[Tensor]] = [[] for _ in fits]

    def step(self, members: list[int], batch: Batch, due: int, drawn: Params, weights: Tensor | None = None) -> None:
        """Take one gradient and one update of the clients ``members``, whose class weights are ``weights`` (K, L)."""
        rows = None if len(members) == len(self.fits) else send(torch.tensor(members), self.placement.device)
        every = (self.weights, self.fixed, self.frozen, self.bases, self.places)
        state = every if rows is None else tuple(tree.map_parts(lambda value: value[rows], parts) for parts in every)
        one: Any = torch.func.vmap(partial(self._one, due))
        given = (*batch, *(() if weights is None else (weights,)))  # tensors all, as the weights differ by client
        if self.replays is None or self.name is None:
            grads, moved, losses, free = one(*state, given, drawn)
        else:
            products = self.usual and rows is None and batch[1].shape[1] == self.fits[0].client.plan.batch_size
            kind = (self.name, due, self.placement)
            grads, moved, losses, free = self.replays.call(kind, one, *state, given, drawn, products=products)
        before = {part: {name: state[0][part][name].clone() for name in own} for part, own in free.items()}
        self.update.step(self.weights, grads, rows)
        self.correct(rows)
        for part, own in free.items():
            for name, may in own.items():
                value, where = self.weights[part][name], slice(None) if rows is None else rows
                value[where] = torch.where(may, value[where], before[part][name])
        for part, params in moved.items():
            for name, value in params.items():
                if rows is None:
                    self.fixed[part][name] = value
                else:
                    self.fixed[part][name][rows] = value
        for k, loss in zip(members, losses.unbind(), strict=True):
            self.losses[k].append(loss)

    def correct(self, rows: Tensor | None) -> None:
        """Take the clients' corrections, times the learning rate, off their weights (at ``rows``, or all)."""
        for part, params in self.correction.items():
            lr = self.update.plan.rate(part, self.update.lr.get(part))
            for name, value in params.items():
                weight = self.weights[part][name]
                if rows is None:
                    weight.sub_(value, alpha=lr)
                else:
                    weight[rows] = weight[rows].sub_(value[rows], alpha=lr)

    def _one(
        self,
        due: int,
        weights: Grads,
        fixed: Grads,
        frozen: Grads,
        bases: Grads,
        places: Grads,
        given: Sequence[Tensor],
        drawn: Params,
    ) -> Any:
        """Return the step of one client, as vmap sees it: its gradients, its new buffers, its loss, what may move.

        ``given`` are inputs, labels and, if the clients have them, class weights.
        """
        client = self.fits[0].client
        x, y, *own = given
        batch = client.weigh((x, y), *own)
        fixed = tree.map_parts(torch.clone, fixed)
        losses: list[Tensor] = []

        def nets(weights: Grads, fixed: Grads) -> Nets:
            held = {
                part: {n: v.clone() if n in buffers(self.models, part) else v for n, v in params.items()}
                for part, params in frozen.items()
            }
            if drawn:
                held["drawn"] = dict(drawn)
            return bind(client.models, {**held, **{part: {**weights[part], **fixed[part]} for part in weights}})

        def grad(loss: Loss, **replace: Params) -> Grads:
            at = {**weights, **{p: tree.pick(new, weights[p]) for p, new in replace.items()}}

            def objective(w: Grads) -> tuple[Tensor, tuple[Tensor, Grads]]:
                state = tree.map_parts(torch.clone, fixed)  # grad() forbids writing to captured tensors
                with self.placement.autocast():
                    value = loss(nets({**w, **{p: whole(w[p], bases[p], places[p]) for p in places}}, state), batch)
                return value, (value, state)

            grads, (value, state) = torch.func.grad(objective, has_aux=True)(at)
            fixed.update(state)
            losses.append(value)
            return grads

        here, moves = nets(weights, fixed), self.fits[0].moves
        free = {} if moves is None else {part: dict(own) for part, own in moves(here).items()}
        grads = self.fits[0].gradient(grad, here, batch, due)
        clipped = {part: dict(clip(params, client.plan.clip)) for part, params in grads.items()}
        return clipped, fixed, losses[0], free

    def outcomes(self) -> list[Fitted]:
        """Return the outcome of each client as views of the stack; copy a view to keep it (`core.message.compact`)."""
        finite = self._finite()
        # One copy from a GPU per tensor, not per client: each copy waits for the GPU.
        spread = torch.func.vmap(whole)
        weights = {**self.weights, **{p: spread(self.weights[p], self.bases[p], self.places[p]) for p in self.places}}
        ended = {part: tree.map_leaves(Tensor.cpu, {**weights[part], **self.fixed[part]}) for part in weights}
        return [
            finish(
                fit,
                {part: {name: ended[part][name][k] for name in params} for part, params in fit.parts.items()},
                self.losses[k],
                finite=finite[k],
            )
            for k, fit in enumerate(self.fits)
        ]

    def _finite(self) -> list[bool]:
        """Return for each client whether all weights and buffers are certainly finite, by one test of the stack."""
        values = (v for parts in (self.weights, self.fixed) for params in parts.values() for v in params.values())
        # A finite sum shows that all terms are finite; as a sum may overflow, the caller checks the others one by one.
        sums = [v.flatten(1).sum(1).double() if v.dim() > 1 else v.double() for v in values if v.is_floating_point()]
        return torch.stack(sums).isfinite().all(0).tolist() if sums else [True] * len(self.fits)


class Update:
    """torch's SGD, Adam and AdamW on stacked tensors, each client with its own state and step count."""

    def __init__(self, plan: LocalSGD, weights: Parts, lr: Mapping[str, float], clients: int) -> None:
        self.plan, self.lr = plan, lr
        adam = plan.optimizer != "sgd"
        slots = 2 if adam else int(plan.momentum != 0)
        self.slots = [tree.map_parts(torch.zeros_like, weights) for _ in range(slots)]
        # Number of updates of each client, which only Adam and AdamW need.
        self.count = tree.map_parts(
            lambda v: torch.zeros(clients, dtype=torch.float64, device=v.device),
            weights if adam else {},
        )

    def step(self, weights: Grads, grads: Gradients, rows: Tensor | None) -> None:
        """Move ``weights`` (at ``rows`` of the stack, or all) against ``grads``."""
        # A factor may be another weight, as in W = U V, which is updated below: then the product is computed first.
        own = {value.untyped_storage().data_ptr() for params in weights.values() for value in params.values()}
        grads = {
            part: {n: g.multiplied() if isinstance(g, Product) and g.within(own) else g for n, g in params.items()}
            for part, params in grads.items()
        }
        for part, params in grads.items():
            lr = self.plan.rate(part, self.lr.get(part))
            for name, g in params.items():
                whole = [weights[part][name], *(slot[part][name] for slot in self.slots)]
                # All clients: in place. A part of them: taken out by index, updated, and put back.
                some = whole if rows is None else [value[rows] for value in whole]
                count = self.count.get(part, {}).get(name)
                if count is not None:
                    count[slice(None) if rows is None else rows] += 1
                    count = count if rows is None else count[rows]
                self._move(some[0], g, some[1:], lr, count)
                if rows is not None:
                    for value, moved in zip(whole, some, strict=True):
                        value[rows] = moved

    def _move(self, weight: Tensor, g: Tensor | Product, slots: list[Tensor], lr: float, count: Tensor | None) -> None:
        if isinstance(g, Product):
            if not slots:
                weight.baddbmm_(g.left, g.right, beta=1 - lr * self.plan.weight_decay, alpha=-lr)
                return
            g = g.multiplied()
        if self.plan.optimizer == "adamw":
            weight.mul_(1 - lr * self.plan.weight_decay)  # decoupled: the moments do not see it
        elif self.plan.weight_decay:
            g = g.add(weight, alpha=self.plan.weight_decay)
        if count is not None:
            first, second = slots
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            count = count.reshape(-1, *[1] * (g.dim() - 1))
            mean, spread = first / (1 - 0.9**count).to(g.dtype), second / (1 - 0.999**count).to(g.dtype)
            g = mean / (spread.sqrt_() + 1e-8)
        elif slots:
            g = slots[0].mul_(self.plan.momentum).add_(g)
        weight.add_(g, alpha=-lr)
