"""The stages of a network, and the blocks that a stage consists of."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.split import SplitModel

_RNG = Rng(("polyfed.blocks", "stages"))
#: Whose weights count as those of a convolution.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def new_module(model: SplitModel) -> nn.Module:
    """A new module in evaluation mode; no global generator is used."""
    with _RNG.fork():
        return model.new_module().eval()


def convolutions(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a submodule's convolutions, by the names of their weights."""
    found = ((name, child) for name, child in module.named_modules(prefix=prefix) if isinstance(child, CONVOLUTIONS))
    return {f"{name}.weight": tuple(child.weight.shape) for name, child in found}


def stages(model: SplitModel, named: Sequence[str] = (), key: str = "stages") -> dict[str, dict[str, nn.Module]]:
    """The stages of a network that consist of blocks, each with its blocks by their dotted names, in order.

    Args:
        model: the network.
        named: the submodules that are stages, each child of which is a block; by default, of those that the network's
            attribute ``stages`` lists, the sequences (`Sequential`, `ModuleList`) and those whose children have
            convolutions.
        key: the algorithm's key that ``named`` comes from, for messages.

    Raises:
        ModelError: the network has no such submodules, all of which the text names.
    """
    module = new_module(model)
    found = dict(module.named_modules())
    missing = [name for name in named if name not in found or not list(found[name].children())]
    if missing:
        raise ModelError(
            f"algorithm.{key} names {', '.join(map(repr, missing))}, which {model.name!r} lacks, or which has no "
            "blocks; expected submodules that consist of blocks, such as 'layer1'"
        )
    whole = named or [name for name in _declared(module) if _is_sequence(found[name])]
    return {stage: {f"{stage}.{name}": block for name, block in found[stage].named_children()} for stage in whole}


def blocks(model: SplitModel, named: Sequence[str] = (), key: str = "stages") -> tuple[tuple[str, ...], ...]:
    """The names of the blocks of each stage; blocks without tensors, such as activations, are left out.

    Where no submodule of the network's attribute ``stages`` consists of blocks, those that it lists are themselves the
    blocks of one stage, as in a transformer.

    Args:
        model: the network.
        named: as of `stages`.
        key: as of `stages`.

    Raises:
        ModelError: as of `stages`; or the network names no stages.
    """
    nested: Iterable[Iterable[str]] = stages(model, named, key).values() or [_declared(new_module(model))]
    found = [tuple(block for block in stage if within(block, model.shapes)) for stage in nested]
    if not any(found):
        raise ModelError(
            f"model {model.name!r} names no blocks; give the network an attribute `stages`, a list of its submodules "
            f"that consist of blocks, or set algorithm.{key} to them"
        )
    return tuple(stage for stage in found if stage)


def last_blocks(sizes: Mapping[str, Sequence[tuple[str, ...]]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The last block of each stage that some larger network has more blocks in.

    Args:
        sizes: the blocks of each stage, by network, the smallest first; each network begins with those before it.

    Returns:
        by network and last block, number L of its stage: the blocks L, L + 1, ... of that stage in the next network.

    Raises:
        ModelError: a network does not begin with the one before it; the text names both.
    """
    out: dict[str, dict[str, tuple[str, ...]]] = {}
    most = [len(stage) for stage in [*sizes.values()][-1]]
    for (name, own), (larger, deeper) in pairwise(sizes.items()):
        if len(own) != len(deeper) or any(b[: len(a)] != a for a, b in zip(own, deeper, strict=True)):
            raise ModelError(
                f"{larger!r} does not begin with the blocks of {name!r}, which has fewer parameters: expected in its "
                f"stages at least {_listed(own)}, got {_listed(deeper)}; choose models of one family, of which each "
                "is at least as deep as the smaller ones in every stage"
            )
        depths = zip(own, deeper, most, strict=True)
        out[name] = {a[-1]: b[len(a) - 1 :] for a, b, depth in depths if len(a) < depth}
    return out


def _listed(found: Iterable[Iterable[str]]) -> str:
    return " | ".join(", ".join(stage) for stage in found)


def within(block: str, names: Mapping[str, object] | Iterable[str]) -> list[str]:
    """Those of the names that lie in a submodule."""
    return [name for name in names if name.startswith(f"{block}.")]


def _declared(module: nn.Module) -> tuple[str, ...]:
    """The submodules that a network's attribute ``stages`` lists; none where it is something else."""
    found, own = getattr(module, "stages", ()), dict(module.named_modules())
    named = isinstance(found, list | tuple) and all(isinstance(name, str) and name in own for name in found)
    return tuple(found) if named else ()


def _is_sequence(module: nn.Module) -> bool:
    own = isinstance(module, nn.Sequential | nn.ModuleList)
    return own or any(convolutions(child, "") for child in module.children())
