"""InclusiveFL: networks of several depths share their layers, but for the last of each, which the deeper ones teach.

    R. Liu, F. Wu, C. Wu, Y. Wang, L. Lyu, H. Chen, X. Xie: No One Left Behind: Inclusive Federated Learning over
    Heterogeneous Devices. KDD 2022. https://arxiv.org/abs/2202.08036

Sizes 1, ..., S of one family are nested: in each stage size i has the first L_i of the blocks of size i + 1. Per round:

1. Each tensor: mean over the size's clients of the round, weighted by n_k.
2. Each tensor that sizes share: mean over these, weighted by their examples; with 1 that is one mean over all clients
   that own it. Not shared: the classifier, and in each stage the last block of a size if a larger one has more blocks
   there, as it does alone what those blocks do together.
3. With g the change that 1 and 2 make, and g' that of the round before, the last block of size i changes by

       (1 - beta) g_i,L_i + beta mean(g'_i+1,L_i, ..., g'_i+1,L_{i+1}),    blocks counted from 1.

The stated intent, not the released lines. Known from a summary; differences: docs/algorithms/inclusivefl.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.ranges import Fraction
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.blocks.layerwise import Keyed, MeanByKey, Owns, by_architecture, by_size, first_layers, key_of, keys
from polyfed.blocks.losses import supervised
from polyfed.blocks.stages import blocks, last_blocks, within
from polyfed.core.algorithm import Task, raise_idle
from polyfed.core.clients import Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.compatibility import check_names_fit
from polyfed.models.split import SplitModel


@dataclass(frozen=True, kw_only=True)
class InclusiveFL(Keyed):
    """Hyper-parameters, besides those of `InCo`.

    Args:
        beta: the share of the deeper blocks' changes in that of a last block; 0 is no distillation.
        own_last: whether last blocks stay out of the mean of sizes.
        own_classifier: whether classifiers do.
        stages: the submodules whose children are blocks; by default the network's own, see `blocks`.
    """

    name = "inclusivefl"
    exempt = {"idle_rounds_change_nothing": "the state holds the changes of a round, which last blocks follow"}
    beta: Fraction = 0.2
    own_last: bool = True
    own_classifier: bool = True
    stages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """No key without an effect."""
        raise_idle(self, (not self.own_last, "own_last is off", {"beta", "stages"}), self.inco_is_idle)

    class Server(Keyed.Server):
        """Beside the tensors: the keys that teach each key of a last block, and how these moved in the last round."""

        donors: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
        change: Params = field(default_factory=dict[str, Tensor])

    class Upload(Message):
        """The network as this client trained it, and n_k."""

        model: Params
        num_examples: int

    def check(self, task: Task) -> None:
        """Nested networks, with a classifier."""
        family = task.family()
        check_names_fit(family)
        for spec, model in family.items():
            if self.own_classifier and len(family) > 1 and model.cuts[0] is None:
                raise ModelError(
                    f"{self.name} keeps the classifier of each size apart, but {spec!r} names none; name the first "
                    'submodule of its classifier (classifier = "..."), or set algorithm.own_classifier = false'
                )
        super().check(task)

    def last(self, family: Mapping[str, SplitModel]) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """By size the last blocks that are not shared, each with the blocks of the next size that teach it."""
        alone = self.own_last and len(family) > 1
        return last_blocks({k: blocks(family[k], self.stages) for k in by_size(family)}) if alone else {}

    def owns(self, family: Mapping[str, SplitModel]) -> Owns:
        """A size's own key for what is not shared, and else the name."""
        last, out = self.last(family), dict[str, tuple[str, ...]]()
        for size, model in family.items() if len(family) > 1 else ():
            own = {name for block in last.get(size, ()) for name in within(block, model.shapes)}
            own |= model.classifier_names if self.own_classifier else set()
            out[size] = tuple(key_of(size, name) if name in own else name for name in model.shapes)
        return out

    def drawn(self, family: Mapping[str, SplitModel], owns: Owns, rng: Rng) -> dict[str, Tensor]:
        """Every layer from the largest network, also where sizes have copies of their own."""
        layers = first_layers(family, rng.at("layers"))
        return {keys(owns, k).get(name, name): layers[name] for k, model in family.items() for name in model.shapes}

    def init_server(self, task: Task, rng: Rng) -> State:
        """The networks, and the donors: of each weight of a last block those of the same name and shape."""
        (model, owns, mixes), family, donors = self.first(task, rng), task.family(), dict[str, tuple[str, ...]]()
        larger = dict(pairwise(by_size(family)))
        for size, last in self.last(family).items() if self.beta else ():
            own, shapes, theirs = family[size], family[larger[size]].shapes, keys(owns, larger[size])
            for block, teachers in last.items():
                for name in [name for name in within(block, own.shapes) if name in own.parameter_names]:
                    found = [donor + name.removeprefix(block) for donor in teachers]
                    same = tuple(theirs[donor] for donor in found if shapes.get(donor) == own.shapes[name])
                    donors[keys(owns, size)[name]] = same
        return self.Server(model, owns, mixes, donors)

    def server_round(self, server: Any, cohort: Cohort) -> Steps[State]:
        """Send networks, average each tensor over its owners, and blend the changes of last blocks."""
        down = by_architecture(cohort, lambda client: self.message_for(server, client))
        got = yield from exchange(cohort, down, gather={"model": MeanByKey("num_examples", server.model, server.owns)})
        new: InclusiveFL.Server = self.moved(server, got["model"])
        trained = {key for client in got.clients for key in server.owns.get(client.architecture, ())}
        taught = {donor for donors in server.donors.values() for donor in donors}
        change = tree.sub(tree.pick(new.model, trained & (taught | server.donors.keys())), server.model)
        blended: dict[str, Tensor] = {}
        for key, donors in server.donors.items():
            known = [server.change[donor] for donor in donors if donor in server.change]
            if known and key in change:
                blend = (1 - self.beta) * change[key] + self.beta * torch.stack(known).mean(0)
                blended[key] = server.model[key] + blend
        return replace(new, model={**new.model, **blended}, change=tree.pick(change, taught))

    def client_round(self, private: Nothing, msg: Any, client: LocalClient) -> Steps[ClientResult]:
        """E epochs of cross-entropy from the received network."""
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Upload(fitted.parts["model"], len(client.train))
