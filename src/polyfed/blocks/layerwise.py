"""Algorithms whose server keeps whole networks: one for all, one for each architecture, or layers shared by name.

Every tensor of the server has a key, and each architecture owns some keys. One mean serves all three: that of each key
over the clients of the round that own it. With one network the keys are the tensors' names, and all own all.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import MeanByName, RunningMean
from polyfed.blocks.inco import InCo
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


def by_size(family: Mapping[str, SplitModel]) -> list[str]:
    """The names of networks, the smallest first; those of one size in their order."""
    return sorted(family, key=lambda name: sum(shape.numel() for shape in family[name].shapes.values()))


def first_layers(family: Mapping[str, SplitModel], rng: Rng) -> dict[str, Tensor]:
    """Every layer from the initialisation of the largest network that has it."""
    sizes = [family[name] for name in by_size(family)]
    return {name: value for model in sizes for name, value in model.init(rng).items()}  # the largest is last


def key_of(architecture: str, name: str) -> str:
    """The key of a tensor that no other architecture shares."""
    return f"{architecture}: {name}"


def keys(owns: Owns, architecture: str) -> dict[str, str]:
    """The key of each of an architecture's own names; empty where names are keys."""
    return {key.removeprefix(key_of(architecture, "")): key for key in owns.get(architecture, ())}


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
    return {key.removeprefix(key_of(architecture, "")): value for key, value in params.items() if key in own}


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
class Keyed(InCo, Algorithm):
    """An algorithm whose clients train the networks that the server sends, and whose server has each tensor by key.

    `owns` says which keys an architecture owns; with `InCo` the means of layers are mixed.
    """

    tasks = ("classification", "regression")
    own_networks = False

    class Server(State):
        """The tensors by key, the keys of each architecture, and by key what InCo mixes into a layer."""

        model: Params
        owns: Owns = field(default_factory=dict[str, tuple[str, ...]])
        mixes: Mapping[str, str] = field(default_factory=dict[str, str])

    class Broadcast(Message):
        """The client's network."""

        model: Params

    @abstractmethod
    def owns(self, family: Mapping[str, SplitModel]) -> Owns:
        """The keys of each architecture, in the order of its tensors; empty where every architecture owns all."""

    @abstractmethod
    def drawn(self, family: Mapping[str, SplitModel], owns: Owns, rng: Rng) -> dict[str, Tensor]:
        """The tensors by key before round 1."""

    def check(self, task: Task) -> None:
        """Networks that the server knows, and layers that InCo can mix."""
        if not task.family():
            raise ModelError(f"{self.name} needs networks that the server knows; these are private")
        _ = self.mixes(task.family(), partial(keys, self.owns(task.family())))

    def first(self, task: Task, rng: Rng) -> tuple[dict[str, Tensor], Owns, dict[str, str]]:
        """The tensors by key before round 1, the keys of each architecture, and by key what InCo mixes into a layer."""
        family = task.family()
        owns = self.owns(family)
        return self.drawn(family, owns, rng), owns, self.mixes(family, partial(keys, owns))

    def init_server(self, task: Task, rng: Rng) -> State:
        """The networks as they are drawn."""
        return self.Server(*self.first(task, rng))

    def server_round(self, server: Any, cohort: Cohort) -> Steps[State]:
        """Send each client its network, and average the uploads' ``model`` by their ``num_examples``."""
        down = by_architecture(cohort, lambda client: self.message_for(server, client))
        got = yield from exchange(cohort, down, gather={"model": MeanByKey("num_examples", server.model, server.owns)})
        return self.moved(server, got["model"])

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


@dataclass(frozen=True, kw_only=True)
class Layerwise(Keyed):
    """`Keyed` for networks of one architecture or of several.

    Args:
        average: between which clients weights are averaged.
    """

    average: Average = "all"

    def check(self, task: Task) -> None:
        """One architecture; or, as ``average`` says, several, whose layers of one name have one shape."""
        if self.average == "all":
            task.common(self.name, "or set algorithm.average to 'architecture' or 'layer'")
        elif self.average == "layer":
            check_names_fit(task.family())
        super().check(task)

    def owns(self, family: Mapping[str, SplitModel]) -> Owns:
        """None for one architecture; names layer by layer, or names behind the architecture."""
        if len(family) < 2:
            return {}
        shared = self.average == "layer"
        return {k: tuple(n if shared else key_of(k, n) for n in model.shapes) for k, model in family.items()}

    def drawn(self, family: Mapping[str, SplitModel], owns: Owns, rng: Rng) -> dict[str, Tensor]:
        """One draw for all, or for each architecture; or every layer from the largest network that has it."""
        if self.average == "layer":
            return first_layers(family, rng.at("layers"))
        apart = {k: model.init(rng.at("model")) for k, model in family.items()}
        return {keys(owns, k).get(name, name): value for k, own in apart.items() for name, value in own.items()}
