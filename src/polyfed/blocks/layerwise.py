"""Algorithms whose server keeps whole networks: one for all, one for each architecture, or layers shared by name.

Every tensor of the server has a key, and each architecture owns some keys. One mean serves all three: that of each key
over the clients of the round that own it. With one network the keys are the tensors' names, and all own all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName, RunningMean
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, State
from polyfed.core.net import Net, Nets
from polyfed.core.requests import Steps, exchange
from polyfed.models.compatibility import check_names_fit
from polyfed.models.split import SplitModel

#: Between which clients weights are averaged: all, who have one architecture; those of equal architectures; or, layer
#: by layer, those that have a layer of that name.
Average: TypeAlias = Literal["all", "architecture", "layer"]
#: The keys of each architecture; empty where every architecture owns every key.
Owns: TypeAlias = Mapping[str, tuple[str, ...]]


def first_layers(family: Mapping[str, SplitModel], rng: Rng) -> dict[str, Tensor]:
    """Every layer from the initialisation of the largest network that has it."""
    by_size = sorted(family.values(), key=lambda model: sum(shape.numel() for shape in model.shapes.values()))
    return {name: value for model in by_size for name, value in model.init(rng).items()}  # the largest is last


def _prefix(architecture: str) -> str:
    return f"{architecture}: "


def keys(owns: Owns, architecture: str) -> dict[str, str]:
    """The key of each of an architecture's own names; empty where names are keys."""
    return {key.removeprefix(_prefix(architecture)): key for key in owns.get(architecture, ())}


def held(params: Params, owns: Owns, architecture: str) -> dict[str, Tensor]:
    """What an architecture owns of the server's tensors ``params``, under its own names, in the server's order.

    Raises:
        ModelError: the server has no such architecture.
    """
    if not owns:
        return dict(params)
    if architecture not in owns:
        raise ModelError(
            f"the server has no network {architecture!r}, so it can send this client none; it has {', '.join(owns)}"
        )
    own = frozenset(owns[architecture])
    return {key.removeprefix(_prefix(architecture)): value for key, value in params.items() if key in own}


def counted(keys: Iterable[str], owns: Owns, clients: Mapping[str, int]) -> dict[str, int]:
    """How many clients own each key.

    Args:
        keys: the server's.
        owns: the keys of each architecture.
        clients: the number of clients by architecture.
    """
    if not owns:
        return dict.fromkeys(keys, sum(clients.values()))
    found = dict.fromkeys(keys, 0)
    for architecture, count in clients.items():
        for key in found.keys() & owns[architecture]:
            found[key] += count
    return found


def by_architecture(cohort: Cohort, make: Callable[[ClientInfo], Message]) -> Callable[[ClientInfo], Message]:
    """The message of a client, made once for all clients of an architecture."""
    made = {architecture: make(client) for architecture, client in {c.architecture: c for c in cohort}.items()}
    return lambda client: made[client.architecture]


@dataclass(frozen=True)
class MeanByKey(MeanByName):
    """`MeanByName` of uploads with their clients' own names, by the server's keys.

    Args:
        owns: the keys of each architecture.
        of: what is averaged, made of the upload; None is the field itself.
    """

    owns: Owns = field(default_factory=dict[str, tuple[str, ...]])
    of: Callable[[Any], Params] | None = None

    def add(self, total: RunningMean, client: ClientInfo, value: Params, upload: Message) -> RunningMean:
        """One more upload."""
        params = value if self.of is None else self.of(upload)
        own = keys(self.owns, client.architecture)
        return super().add(total, client, {own.get(name, name): v for name, v in params.items()}, upload)


@dataclass(frozen=True, kw_only=True)
class Layerwise(Algorithm):
    """An algorithm whose clients train the networks that the server sends, of one architecture or of several.

    Args:
        average: between which clients weights are averaged.
    """

    tasks = ("classification", "regression")
    own_networks = False
    average: Average = "all"

    class Server(State):
        """The tensors by key, and the keys of each architecture."""

        model: Params
        owns: Owns = field(default_factory=dict[str, tuple[str, ...]])

    class Broadcast(Message):
        """The client's network."""

        model: Params

    def check(self, task: Task) -> None:
        """One architecture; or, as ``average`` says, several, whose layers of one name have one shape."""
        family = task.family()
        if self.average == "all":
            task.common(self.name)
        elif not family:
            raise ModelError(f"{self.name} needs networks that the server knows; these are private")
        elif self.average == "layer":
            check_names_fit(family)

    def first(self, task: Task, rng: Rng) -> tuple[dict[str, Tensor], Owns]:
        """The tensors by key before round 1, and the keys of each architecture."""
        family = task.family()
        if self.average == "layer":
            layers = first_layers(family, rng.at("layers"))
            return layers, {k: tuple(model.shapes) for k, model in family.items()} if len(family) > 1 else {}
        drawn = {k: model.init(rng.at("model")) for k, model in family.items()}
        if len(drawn) == 1:
            return drawn[next(iter(drawn))], {}
        keyed = {k: {_prefix(k) + name: v for name, v in params.items()} for k, params in drawn.items()}
        return {key: v for own in keyed.values() for key, v in own.items()}, {k: tuple(own) for k, own in keyed.items()}

    def init_server(self, task: Task, rng: Rng) -> State:
        """One draw for all, or for each architecture; or every layer from the largest network that has it."""
        return self.Server(*self.first(task, rng))

    def server_round(self, server: Any, cohort: Cohort) -> Steps[State]:
        """Send each client its network, and average the uploads' ``model`` by their ``num_examples``."""
        down = by_architecture(cohort, lambda client: self.message_for(server, client))
        got = yield from exchange(cohort, down, gather={"model": MeanByKey("num_examples", server.model, server.owns)})
        return replace(server, model=got["model"])

    def message_for(self, server: Any, client: ClientInfo) -> Broadcast:
        """The network of the client's architecture."""
        return self.Broadcast(held(server.model, server.owns, client.architecture))

    def predictor_parts(self, private: Any, msg: Any, client: LocalClient) -> Parts:
        """The received network."""
        return {"model": msg.model}

    def predict(self, nets: Nets, x: Tensor) -> Mapping[str, Tensor]:
        """The logits of the network as it was received."""
        return {"global": nets["model"](x)}

    def global_nets(self, server: Any, task: Task) -> Mapping[str, Nets]:
        """The network; of several architectures one of each."""
        family = task.family()
        made: dict[str, Nets] = {k: {"model": Net(m, held(server.model, server.owns, k))} for k, m in family.items()}
        return made if len(made) > 1 else {"global": made[next(iter(made))]}
