"""Algorithms whose clients hold single weights of one network: which weights, by which score, at which capacity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.base.ranges import Portion, Rate, Share
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId, Params
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.importance import (
    MeanSquare,
    Scope,
    best,
    competing,
    misplaced,
    paced,
    remembered,
    spread,
    thresholds,
)
from polyfed.blocks.submodel import Mask, Part, above, gates
from polyfed.core.algorithm import Algorithm, Task, idle_keys
from polyfed.core.checks import check_like
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.gather import Declared, Gathered
from polyfed.core.message import State
from polyfed.models.flops import multiplications
from polyfed.models.split import SplitModel


class Global(State):
    """The global model x and what the next choice of weights depends on.

    Args:
        model: x.
        masked: the names of the tensors whose weights compete: parameters that are not those of normalisation layers.
        buffers: the names of the tensors that are not trained.
        macs: multiplications per weight, where capacity is measured in them.
        scores: running means of uploaded changes or of their squares, where importance is not magnitude.
        paces: the capacity of each client that has answered, where capacities follow a deadline.
    """

    model: Params
    masked: tuple[str, ...]
    buffers: tuple[str, ...]
    macs: Mapping[str, float] = field(default_factory=dict[str, float])
    scores: Params = field(default_factory=dict[str, Tensor])
    paces: Mapping[int, float] = field(default_factory=dict[int, float])


S = TypeVar("S", bound=Global)


@dataclass(frozen=True, kw_only=True)
class WeightWise(Algorithm):
    """An algorithm whose clients hold single weights of one network.

    Args:
        scope: where the weights compete: ``"model"``, all together; ``"layer"``, within each tensor; ``"stage"``,
            within each submodule of the network itself; ``"groups"``, within each of ``groups``.
        groups: lists of beginnings of names of tensors; every masked tensor is in exactly one.
        capacity_in: what a capacity is a share of: masked ``"parameters"``, or their multiplications, ``"macs"``.
        importance: ``"magnitude"``; or from uploads, running means of the changes (their size, ``"gradient"``) or of
            their squares (``"fisher"``).
        memory: the share of a running mean that stays when a coordinate is covered.
        threshold: ``"top-k"``, at the declared capacity; ``"adaptive"``, at one that follows ``deadline``, never above.
        deadline: seconds that a client is to take for a round.
        least_capacity: the lower bound of a capacity that follows the deadline.
    """

    scope: Scope = "model"
    groups: tuple[tuple[str, ...], ...] = ()
    masks = True
    capacity_in: Literal["parameters", "macs"] = "parameters"
    importance: Literal["magnitude", "gradient", "fisher"] = "magnitude"
    memory: Share = 0.9
    threshold: Literal["top-k", "adaptive"] = "top-k"
    deadline: Rate | None = None
    least_capacity: Portion = 0.015625

    def __post_init__(self) -> None:
        """Refuse keys that contradict one another, all at once; with ``"adaptive"`` a message is for one client."""
        if faults := self.faults():
            raise ConfigError(*faults)
        object.__setattr__(self, "personal_message", self.threshold == "adaptive")

    def faults(self) -> list[str]:
        """One sentence for each contradiction among the keys, and for each key without effect."""
        missing = {
            "scope = 'groups' needs groups, lists of beginnings of names": self.scope == "groups" and not self.groups,
            "threshold = 'adaptive' needs a deadline in seconds": self.threshold == "adaptive" and not self.deadline,
        }
        return [
            *(text for text, wrong in missing.items() if wrong),
            *idle_keys(
                self,
                (self.scope != "groups", f"scope = {self.scope!r} takes no list", {"groups"}),
                (self.importance == "magnitude", "importance = 'magnitude' has no running means", {"memory"}),
                (self.threshold == "top-k", "threshold = 'top-k' follows no deadline", {"deadline", "least_capacity"}),
            ),
        ]

    def check(self, task: Task) -> None:
        """One architecture, a group for each tensor, multiplications that can be counted, no tensor that stays 0."""
        model, faults = task.common(self.name), list[str]()
        if not (names := masked_names(model)):
            raise ModelError(f"{self.name}: model {model.name!r} trains nothing but normalisation: nothing to choose")
        if self.scope == "groups":
            faults += [f"algorithm.groups: {f}; the model is {model.name!r}" for f in misplaced(names, self.groups)]
        macs: Mapping[str, float] = dict.fromkeys(names, 1.0)
        if self.capacity_in == "macs":
            try:
                macs = multiplications(model)
            except ModelError as error:
                faults.append(f"algorithm.capacity_in = 'macs': {error}")
        if faults:
            raise ModelError("\n".join(faults))
        if self.importance == "magnitude" and max(task.capacities) < 1 and (dead := self.dead(model, macs)):
            raise ModelError(
                f"{self.name}: all weights of {', '.join(map(repr, dead))} begin at 0, which is above no threshold, "
                "and no client has capacity 1, so none would ever train them; give a client capacity 1, or begin "
                "them with other values"
            )

    def dead(self, model: SplitModel, macs: Mapping[str, float]) -> list[str]:
        """Masked tensors, but biases, that begin with zeros alone in groups that a threshold cuts.

        Biases are left out as a layer works without one.

        Args:
            model: the network; which of its tensors begin at 0 usually does not depend on the draw.
            macs: what a weight counts for, by tensor; a group that counts for nothing is held whole.
        """
        names, params = masked_names(model), model.init(Rng((0,)))
        group = competing(names, self.scope, self.groups)
        cut = {g for name, g in zip(names, group, strict=True) if macs.get(name)}
        layers = [(n, g) for n, g in zip(names, group, strict=True) if "bias" not in n.rpartition(".")[2]]
        return [name for name, g in layers if g in cut and not params[name].any()]

    def begin(self, kind: type[S], task: Task, rng: Rng) -> S:
        """The state before round 1: x_0, without scores and paces."""
        model = task.common(self.name)
        params, masked = model.init(rng.at("model")), masked_names(model)
        macs = multiplications(model) if self.capacity_in == "macs" else {}
        scored = masked if self.importance != "magnitude" else ()
        scores = {name: params[name].new_zeros(params[name].shape) for name in scored}
        return kind(params, masked, tuple(sorted(model.buffer_names)), macs, scores)

    def reach(self, server: Global, client: ClientInfo) -> float:
        """The capacity of a client in this round."""
        return min(client.capacity, server.paces.get(client.id, client.capacity))

    def extract(self, server: Global) -> Callable[[float], tuple[dict[str, Tensor], tuple[float, ...]]]:
        """The submodels of a state, by capacity; one sort, where one is needed, serves all capacities.

        Returns:
            a function of the capacity: the mask M, and of each group the threshold theta, of which M is
            1[|x| >= theta]; a single 0 where M has no such form.
        """
        weights = tree.pick(server.model, server.masked)
        group = competing(server.masked, self.scope, self.groups)
        macs = server.macs if self.capacity_in == "macs" else None
        if self.importance != "magnitude":
            scores = {name: value.abs() for name, value in server.scores.items()}
            mask = best(scores, weights, group, macs)
            return lambda capacity: (mask(capacity), (0.0,))
        cut = thresholds(weights, group, macs)

        def at(capacity: float) -> tuple[dict[str, Tensor], tuple[float, ...]]:
            theta = cut(capacity)
            return above(weights, self.gates(weights, server.masked, theta)), theta

        return at

    def gates(self, params: Params, masked: tuple[str, ...], theta: tuple[float, ...]) -> dict[str, Tensor]:
        """The threshold of each masked tensor: that of its group."""
        return gates(params, masked, spread(theta, competing(masked, self.scope, self.groups)))

    def total(self, part: Callable[[ClientInfo], Part], *, nonzero: bool = False) -> Declared:
        """What changes add up to: their mean over those who hold a coordinate; for ``"fisher"`` that of squares, too.

        Args:
            part: what a client holds.
            nonzero: whether a change of 0 counts as if the client did not hold the coordinate.
        """
        mean = CoverageMean(part, nonzero=nonzero)
        return (mean, MeanSquare(part)) if self.importance == "fisher" else mean

    def check_upload(self, task: Task, client: ClientInfo, down: Any, up: Any) -> None:
        """The changes have the names, shapes and types of what was sent, whose names both ends know."""
        check_like("delta", up.delta, down.submodel.held(task.common(self.name).shapes))

    def learnt(
        self, server: S, cohort: Cohort, got: Gathered, at: Mapping[ClientId, float], masks: Mapping[float, Mask]
    ) -> tuple[Params, S]:
        """The mean change of a round; and the state with the new scores and paces.

        Args:
            server: the state.
            cohort: the clients that were asked.
            got: the totals, of the field ``delta``.
            at: the capacity of each client.
            masks: of each capacity the mask, nested.
        """
        step, new = got["delta"] if self.importance == "fisher" else (got["delta"], got["delta"])
        scores = server.scores
        if scores:
            widest = max(at[client.id] for client in got.clients)
            scores = remembered(scores, new, masks[widest], self.memory)
        return step, replace(self.void_round(server, cohort, got.seconds), scores=scores)

    def void_round(self, server: S, cohort: Cohort, seconds: Mapping[ClientId, float]) -> S:
        """The state with the new paces: who was late, in a void round too, gets less to do."""
        if self.deadline is None:
            return server
        new = {
            client.id: paced(
                self.reach(server, client), seconds[client.id], self.deadline, self.least_capacity, client.capacity
            )
            for client in cohort
            if client.id in seconds
        }
        return replace(server, paces={**server.paces, **new})


def masked_names(model: SplitModel) -> tuple[str, ...]:
    """The parameters of a network but those of normalisation layers, in its order."""
    return tuple(name for name in model.shapes if name in model.parameter_names - model.norm_names)
