"""What a submodel of single weights is chosen by: which weights compete, for which budget, and by which score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.blocks.aggregate import CoverageMean
from polyfed.blocks.submodel import Mask, check_capacity, flat, tiny, top_k_threshold
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message

#: Where weights compete: everywhere, within a tensor, within a submodule of the network itself, or as a list says.
Scope: TypeAlias = Literal["model", "layer", "stage", "groups"]


def competing(names: Sequence[str], scope: Scope, prefixes: Sequence[Sequence[str]] = ()) -> tuple[int, ...]:
    """The number, from 0, of the group in which each tensor competes.

    Args:
        names: of the tensors.
        scope: ``"stage"`` is the first part of a name, such as ``layer1`` of ``layer1.0.conv1.weight``.
        prefixes: of the scope ``"groups"``: of each group the beginnings of its names; see `misplaced`.
    """
    if scope == "groups":
        return tuple(next((g for g, few in enumerate(prefixes) if name.startswith(tuple(few))), 0) for name in names)
    keys = {"model": [""] * len(names), "layer": list(names), "stage": [name.split(".")[0] for name in names]}[scope]
    order = list(dict.fromkeys(keys))
    return tuple(map(order.index, keys))


def misplaced(names: Sequence[str], prefixes: Sequence[Sequence[str]]) -> list[str]:
    """One sentence for each fault of a list of groups: a group or prefix of no tensor; tensors in none, or in several.

    Tensors whose names have the same first part, and the same fault, share a sentence.
    """
    unused = [p for few in prefixes for p in few if not any(name.startswith(p) for name in names)]
    lost: dict[tuple[str, str], list[str]] = {}
    for name in names:
        groups = [g for g, few in enumerate(prefixes) if name.startswith(tuple(few))]
        if len(groups) != 1:
            what = f"groups {groups[0]} and {groups[1]} both have" if groups else "no group has"
            lost.setdefault((what, name.split(".")[0]), []).append(name)
    return [
        *(f"no masked tensor begins with {prefix!r}" for prefix in unused),
        *(f"group {g} is empty; expected beginnings of names" for g, few in enumerate(prefixes) if not few),
        *(
            f"{what} {some[0]!r}" + f" and {len(some) - 1} more tensors of {part!r}" * (len(some) > 1)
            for (what, part), some in lost.items()
        ),
    ]


def thresholds(
    weights: Params, group: Sequence[int], macs: Mapping[str, float] | None
) -> Callable[[float], tuple[float, ...]]:
    """By capacity the threshold of each group: that of its k largest weights, or of those whose multiplications fit.

    Args:
        weights: the weights that compete.
        group: of each tensor the number of its group, as of `competing`.
        macs: multiplications per weight, by tensor, if these are what fits; None: what fits is a number of weights.

    Returns:
        a function of the share of each group that fits, in (0, 1]; with ``macs`` one sort serves all its calls. It
        raises ValueError for other shares.
    """
    each = apart(weights, group)
    cuts = [partial(top_k_threshold, few) if macs is None else budget_threshold(few, macs) for few in each]
    return lambda capacity: tuple(cut(capacity) for cut in cuts)


def budget_threshold(weights: Params, macs: Mapping[str, float]) -> Callable[[float], float]:
    """By capacity the smallest magnitude from which on weights have at most that share of all multiplications.

    Weights of equal magnitude are kept together or not at all; the largest are kept in any case. It costs a sort for
    all capacities together: 1.6 s at 11 million weights, where `polyfed.blocks.submodel.top_k_threshold` takes 0.06 s
    for each.

    Args:
        weights: the weights that compete.
        macs: multiplications per weight, by tensor; a tensor that is not there costs nothing, such as a bias.

    Returns:
        a function of the fraction that fits, in (0, 1]; 1 gives the threshold 0, which keeps everything, and so do
        weights that all cost nothing. It raises ValueError for other fractions.
    """

    @cache
    def order() -> tuple[np.ndarray, np.ndarray]:
        """The magnitudes, from the largest down, and what the weights from each one on cost."""
        sizes, costs = flat({name: value.detach().abs() for name, value in weights.items()}), _costs(weights, macs)
        places = np.argsort(-sizes)  # the order of equal ones does not matter
        sizes, spent = sizes[places], costs[places].cumsum()
        last = np.flatnonzero(np.append(sizes[1:] != sizes[:-1], True))  # of each run of equal magnitudes
        return sizes[last], spent[last]

    def threshold(capacity: float) -> float:
        check_capacity(capacity)
        if capacity == 1.0:
            return 0.0
        sizes, spent = order()
        if spent[-1] == 0:
            return 0.0
        fit = int(np.searchsorted(spent, capacity * spent[-1] * (1 + 1e-12), side="right"))
        return max(tiny(weights), float(sizes[max(0, fit - 1)]))

    return threshold


def best(
    scores: Params, weights: Params, group: Sequence[int], macs: Mapping[str, float] | None
) -> Callable[[float], dict[str, Tensor]]:
    """By capacity the mask of the largest scores; of equal ones the larger magnitude, then the earlier place.

    Exactly as many weights as fit are kept of each group, at least one; masks of smaller capacities are inside those of
    larger ones. It costs a sort by two keys for all capacities together: 2 s at 11 million weights.

    Args:
        scores: of the same names and shapes as the weights.
        weights: the weights that compete.
        group: as of `thresholds`, and so ``macs``.
        macs: see there.

    Returns:
        a function of the share of each group that fits, in (0, 1]. It raises ValueError for other shares.
    """
    ordered: list[tuple[dict[str, Tensor], np.ndarray, np.ndarray]] = []
    for few in apart(weights, group):
        costs = np.ones(sum(value.numel() for value in few.values())) if macs is None else _costs(few, macs)
        order = np.lexsort((-np.abs(flat(few)), -flat({name: scores[name] for name in few})))
        ordered.append((few, order, costs[order].cumsum()))

    def mask(capacity: float) -> dict[str, Tensor]:
        check_capacity(capacity)
        found: dict[str, Tensor] = {}
        for few, order, spent in ordered:
            kept = np.zeros(len(order), dtype=bool)
            fit = int(np.searchsorted(spent, capacity * spent[-1] * (1 + 1e-12), side="right"))
            kept[order[: max(1, fit)]] = True
            pieces = torch.from_numpy(kept).split([value.numel() for value in few.values()])
            found |= {n: piece.reshape(few[n].shape) for n, piece in zip(few, pieces, strict=True)}
        return {name: found[name] for name in weights}

    return mask


def spread(threshold: tuple[float, ...], group: Sequence[int]) -> tuple[float, ...]:
    """The threshold of each tensor, of those of the groups; one number stands for all.

    Raises:
        MessageError: there are neither one nor as many as groups.
    """
    groups = max(group, default=0) + 1
    if len(threshold) not in (1, groups):
        raise MessageError(f"{len(threshold)} thresholds came for {groups} groups of weights")
    return tuple(threshold[g if len(threshold) > 1 else 0] for g in group)


def remembered(scores: Params, new: Params, covered: Mask, memory: float) -> dict[str, Tensor]:
    """Running means: ``memory`` of the old and the rest of the new where a round covers a coordinate.

    A coordinate whose score is 0 takes the new value whole, as it was never covered; where nothing is covered the score
    stays bit by bit.
    """
    mixed = {n: torch.where(s == 0, new[n], memory * s + (1 - memory) * new[n]) for n, s in scores.items()}
    return {n: torch.where(covered[n], mixed[n], s) for n, s in scores.items()}


def paced(capacity: float, seconds: float, deadline: float, least: float, most: float) -> float:
    """The next capacity of a client that took ``seconds``: in proportion to the deadline, at most halved or doubled.

    Args:
        capacity: the one that it trained at.
        seconds: infinite for a client that was late.
        deadline: the seconds that it is to take.
        least: a lower bound, where ``most`` is not below it.
        most: the capacity that the client declared.
    """
    ratio = deadline / seconds if seconds else 2.0
    return min(most, max(least, capacity * min(2.0, max(0.5, ratio))))


@dataclass(frozen=True)
class MeanSquare(CoverageMean):
    """`CoverageMean` of the squares: the diagonal of an empirical Fisher matrix, if changes stand for gradients."""

    def add(self, total: Any, client: ClientInfo, value: Params, upload: Message) -> Any:
        """One more upload; errors as of `CoverageMean`."""
        squares = {name: v.double().square().to(v.dtype) for name, v in value.items() if v.is_floating_point()}
        return super().add(total, client, squares, upload)


def apart(weights: Params, group: Sequence[int]) -> list[dict[str, Tensor]]:
    """The weights of each group."""
    return [dict(compress(weights.items(), (g == number for g in group))) for number in range(max(group) + 1)]


def _costs(weights: Params, macs: Mapping[str, float]) -> np.ndarray:
    return np.repeat([macs.get(name, 0.0) for name in weights], [value.numel() for value in weights.values()])
