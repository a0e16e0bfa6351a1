"""InCo Aggregation: at the server, the first update of a stage is mixed into the updates of its deeper layers.

    Y.-H. Chan, R. Zhou, R. Zhao, Z. Jiang, E. C.-H. Ngai: Internal Cross-layer Gradients for Extending Homogeneity to
    Heterogeneity in Federated Learning. ICLR 2024. https://arxiv.org/abs/2308.11464

With G_k the mean change of a layer in a round and G_0 that of the stage's first layer of the same shape,

    theta = <G_0, G_k> / <G_0, G_0>,   U_k = (G_k / ||G_k|| - theta G_0 / ||G_0||) (||G_k|| + ||G_0||) / 2,

and the layer changes by U_k in place of G_k. It needs nothing from clients, so it stacks on any mean of layers by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.blocks.gradients import inner
from polyfed.models.split import SplitModel

_RNG = Rng(("polyfed.blocks", "inco"))
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: The largest coefficient, the largest change of a weight, and the least denominator of the released code.
_CAP, _CLAMP, _EPS = 5.0, 0.1, 1e-7

#: ``paper``: the formula above, for each tensor. ``released``: what the authors' code computes, for each kernel: with
#: + min(|<G_0, G_k>| / (<G_0, G_0> + 1e-7), 5) in place of - theta, and U_k clamped to 0.1 at each weight. Where
#: <G_0, G_k> > 0 it adds what the paper subtracts.
Form: TypeAlias = Literal["paper", "released"]


def mixed(changes: Params, references: Mapping[str, str], form: Form = "paper") -> dict[str, Tensor]:
    """The changes of a round, with U_k where a layer has a reference.

    Args:
        changes: by name of the tensor.
        references: the name of G_0 by that of G_k; layers that are not in ``changes`` are left out.
        form: see `Form`.

    Returns:
        all changes. A layer whose reference did not move (in ``released`` a kernel) keeps its own; one that did not
        move itself, such as a layer without owner in the round, does not move either.
    """
    both = {k: (changes[k], changes[r]) for k, r in references.items() if k in changes and r in changes}
    return {**changes, **{name: _mix(g_k, g_0, form) for name, (g_k, g_0) in both.items()}}


def _mix(g_k: Tensor, g_0: Tensor, form: Form) -> Tensor:
    """U_k."""
    axes, tiny = () if form == "paper" else tuple(range(2, g_k.dim())), torch.finfo(g_k.dtype).tiny
    a, b = inner(g_0, g_0, axes), inner(g_0, g_k, axes)
    n_0, n_k = a.sqrt(), inner(g_k, g_k, axes).sqrt()
    factor = -b / a.clamp_min(tiny) if form == "paper" else (b.abs() / (a + _EPS)).clamp(max=_CAP)
    u = (g_k / n_k.clamp_min(tiny) + factor * g_0 / n_0.clamp_min(tiny)) * (n_k + n_0) / 2
    return torch.where(n_0 > 0, u if form == "paper" else u.clamp(-_CLAMP, _CLAMP), g_k)


def references(model: SplitModel, stages: Sequence[str] = ()) -> dict[str, str]:
    """The name of the reference of each convolution's weight that is mixed.

    A stage is a submodule of blocks. Its reference is the last convolution of the first block; all convolutions of its
    other blocks that have the same shape are mixed, so that a stage of one block mixes nothing. Where the network names
    no stages, the convolutions of one shape whose outputs have one size, in the order in which a forward runs them, are
    a stage; the first is the reference of the others.

    Args:
        model: the network.
        stages: the submodules; by default those of the network's attribute ``stages`` that consist of blocks.

    Raises:
        ModelError: the network has no such submodules, all of which the text names.
    """
    with _RNG.fork():
        module = model.new_module().eval()
    found = dict(module.named_modules())
    missing = [name for name in stages if name not in found or not list(found[name].children())]
    if missing:
        raise ModelError(
            f"algorithm.inco_stages names {', '.join(map(repr, missing))}, which {model.name!r} lacks, or which has no "
            "blocks; expected submodules that consist of blocks, such as 'layer1'"
        )
    own: Any = getattr(module, "stages", ())
    named = stages or [name for name in own if any(_weights(block, "") for block in found[name].children())]
    out = _of_blocks(found, named) if named else _of_forward(module, model)
    return {k: r for k, r in out.items() if {k, r} <= model.parameter_names}


def _weights(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a submodule's convolutions, by the names of their weights."""
    convolutions = (
        (name, child) for name, child in module.named_modules(prefix=prefix) if isinstance(child, _CONVOLUTIONS)
    )
    return {f"{name}.weight": tuple(child.weight.shape) for name, child in convolutions}


def _of_blocks(found: Mapping[str, nn.Module], stages: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for stage in stages:
        first, *others = found[stage].named_children()
        reference = {shape: name for name, shape in _weights(first[1], f"{stage}.{first[0]}").items()}  # the last stays
        for name, block in others:
            weights = _weights(block, f"{stage}.{name}")
            out |= {weight: reference[shape] for weight, shape in weights.items() if shape in reference}
    return out


def _of_forward(module: nn.Module, model: SplitModel) -> dict[str, str]:
    seen: dict[tuple[object, ...], str] = {}
    out: dict[str, str] = {}

    def note(name: str, child: Any, output: Any) -> None:
        kind = (*child.weight.shape, "at", *output.shape[2:])
        reference = seen.setdefault(kind, name)
        if reference != name:
            out[name] = reference

    for name, child in module.named_modules():
        if isinstance(child, _CONVOLUTIONS):
            child.register_forward_hook(lambda child, _, output, name=name: note(f"{name}.weight", child, output))
    with _RNG.fork(), torch.no_grad():
        module(model.inputs(0))
    return out


@dataclass(frozen=True, kw_only=True)
class InCo:
    """InCo Aggregation as an option of an algorithm whose server averages layers by name.

    Args:
        inco: what the server mixes after the mean; see `Form`.
        inco_stages: the submodules whose layers are mixed; see `references`.
    """

    inco: Literal["none", "paper", "released"] = "none"
    inco_stages: tuple[str, ...] = ()

    def mixes(self, family: Mapping[str, SplitModel]) -> dict[str, str]:
        """The references of all networks together; empty without InCo.

        Raises:
            ModelError: two networks give a layer different references, or none has any.
        """
        out: dict[str, tuple[str, str]] = {}
        for spec, model in family.items() if self.inco != "none" else ():
            for name, reference in references(model, self.inco_stages).items():
                known, first = out.setdefault(name, (reference, spec))
                if known != reference:
                    raise ModelError(
                        f"algorithm.inco: {name!r} has the reference {known!r} in {first!r} but {reference!r} in "
                        f"{spec!r}; name the stages (inco_stages), or choose networks of one family"
                    )
        if self.inco != "none" and not out:
            raise ModelError(
                "algorithm.inco mixes convolutions of one shape within a stage, and no network of "
                f"{', '.join(family)} has two; choose deeper networks, or leave inco out"
            )
        return {name: reference for name, (reference, _) in out.items()}

    def incorporated(self, before: Params, mean: Params, mixes: Mapping[str, str]) -> Params:
        """The mean of the layers, with what InCo makes of the changes from ``before``."""
        if self.inco == "none":
            return mean
        names = {*mixes.keys(), *mixes.values()}
        changes = mixed(tree.sub(tree.pick(mean, names), before), mixes, self.inco)
        return {**mean, **tree.add(tree.pick(before, mixes), changes)}
