"""The depths of one network: how many stages a capacity allows, which tensors they have, and their logits."""

import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.blocks.losses import kl_divergence
from polyfed.core.message import Record
from polyfed.core.net import Net
from polyfed.models.exits import depth_of, each_depth
from polyfed.models.split import SplitModel


class Depths(Record):
    """The depths 1, 2, ... of a network, each of which has all tensors of those before it.

    Args:
        names: the names of the tensors of each depth.
        least: the least capacity that allows each depth, ascending; the first is 0, and what none allows is above 1.
    """

    names: tuple[tuple[str, ...], ...]
    least: tuple[float, ...]

    def at(self, capacity: float) -> int:
        """The largest depth that a capacity allows, at least 1."""
        return sum(bound <= capacity + 1e-9 for bound in self.least)

    def names_at(self, capacity: float) -> tuple[str, ...]:
        """The names of the tensors of that depth."""
        return self.names[self.at(capacity) - 1]


def staged(
    own: SplitModel, exits: tuple[str, ...], head: str, capacities: tuple[float, ...], table: tuple[int, ...]
) -> tuple[tuple[SplitModel, ...], Depths]:
    """The networks of all depths, with a classifier after each stage.

    Args:
        own: the network.
        exits: where it has classifiers besides its own: see `polyfed.models.exits.stage_ends`.
        head: the network of these: see `polyfed.models.exits.with_exits`.
        capacities: those that occur, the largest first.
        table: the depth of each; empty: the deepest whose parameters are at most that share of those of all stages.

    Raises:
        ModelError: the network cannot be cut there; it has a single stage, and capacities differ; the table has not one
            depth for each capacity, one that there is not, or less for a larger capacity.
    """
    nets = each_depth(own, exits, head)
    if len(nets) == 1 and len(capacities) > 1:
        raise ModelError(
            f"model {own.name!r} has a single stage, so capacities {', '.join(f'{c:g}' for c in capacities)} would all "
            "be given the whole of it; name the submodules that its stages end with in an attribute `stages` of the "
            "network, or set algorithm.exits to submodules after which it has further classifiers"
        )
    sizes = [sum(net.shapes[name].numel() for name in net.parameter_names) for net in nets]
    least = [size / sizes[-1] for size in sizes[1:]]
    if table:
        if len(table) != len(capacities) or list(table) != sorted(table, reverse=True) or table[0] > len(nets):
            raise ModelError(
                f"algorithm.depths is {list(table)}; expected for each of the capacities "
                f"{', '.join(f'{c:g}' for c in capacities)} one of the "
                f"depths 1 to {len(nets)} of {own.name}, none above the one before it"
            )
        pairs = list(zip(capacities, table, strict=True))
        least = [min([c for c, depth in pairs if depth > number], default=2.0) for number in range(1, len(nets))]
    return nets, Depths(tuple(tuple(net.shapes) for net in nets), (0.0, *least))


def each_logits(net: Net, x: Tensor) -> tuple[Tensor, ...]:
    """The logits (B, L) of each classifier of one of these networks, the shallowest first."""
    if net.model is None:
        raise TypeError("this part has no network, so it has no classifiers")
    return net(x).chunk(depth_of(net.model), 1)


def mutual(z: Sequence[Tensor]) -> Tensor:
    """``sum_i sum_{j != i} KL(sg softmax(z_j) || softmax(z_i)) / (d - 1)`` of d classifiers' logits (B, L); 0 of one's.

    What teaches is detached: each classifier moves towards the others, and none is moved by teaching.
    """
    pairs = [kl_divergence(own, other.detach()) for own, other in permutations(z, 2)]
    return torch.stack(pairs).sum() / (len(z) - 1) if pairs else z[0].new_zeros(())


def rampup(t: int, rounds: int) -> float:
    """``exp(-5 (1 - min(t, R) / R)^2)``: from 0.0067 at t = 0 to 1 at R = ``rounds`` and after."""
    return math.exp(-5.0 * (1.0 - min(t, rounds) / rounds) ** 2)
