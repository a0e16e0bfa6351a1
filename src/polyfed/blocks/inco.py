"""InCo Aggregation: at the server, the first update of a stage is mixed into the updates of its deeper layers.

    Y.-H. Chan, R. Zhou, R. Zhao, Z. Jiang, E. C.-H. Ngai: Internal Cross-layer Gradients for Extending Homogeneity to
    Heterogeneity in Federated Learning. ICLR 2024. https://arxiv.org/abs/2308.11464

With G_k the mean change of a layer in a round and G_0 that of a layer of the same shape at the stage's beginning,

    theta = <G_0, G_k> / <G_0, G_0>,   U_k = (G_k / ||G_k|| - theta G_0 / ||G_0||) (||G_k|| + ||G_0||) / 2,

and the layer changes by U_k in place of G_k. It needs nothing from clients, so it stacks on any mean of layers by name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params
from polyfed.blocks.gradients import inner
from polyfed.blocks.stages import CONVOLUTIONS, convolutions, new_module, stages
from polyfed.core.algorithm import raise_idle
from polyfed.models.split import SplitModel

_RNG = Rng(("polyfed.blocks", "inco"))
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


def references(model: SplitModel, named: Sequence[str] = ()) -> dict[str, str]:
    """The name of the reference of each convolution's weight that is mixed.

    A stage is a submodule of blocks. Its reference is the last convolution of the first block, as in the released code,
    where the paper says the first of the shape; all convolutions of its other blocks that have the same shape are
    mixed, so that a stage of one block mixes nothing. Where the network names
    no stages, the convolutions of one shape whose outputs have one size, in the order in which a forward runs them, are
    a stage; the first is the reference of the others.

    Args:
        model: the network.
        named: the submodules; by default those of the network's attribute ``stages`` that consist of blocks.

    Raises:
        ModelError: the network has no such submodules, all of which the text names.
    """
    found = [each for each in stages(model, named, "inco_stages").values() if named or any(_weights(each).values())]
    out = _of_blocks(found) if found else _of_forward(model)
    return {k: r for k, r in out.items() if {k, r} <= model.parameter_names}


def _weights(blocks: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the convolutions' weights by name, for each block of a stage."""
    return {name: convolutions(block, name) for name, block in blocks.items()}


def _of_blocks(found: Iterable[Mapping[str, nn.Module]]) -> dict[str, str]:
    out: dict[str, str] = {}
    for first, *others in (list(_weights(stage).values()) for stage in found):
        reference = {shape: name for name, shape in first.items()}  # the last stays
        for weights in others:
            out |= {weight: reference[shape] for weight, shape in weights.items() if shape in reference}
    return out


def _of_forward(model: SplitModel) -> dict[str, str]:
    module = new_module(model)
    seen: dict[tuple[object, ...], str] = {}
    out: dict[str, str] = {}

    def note(name: str, child: Any, output: Any) -> None:
        kind = (*child.weight.shape, "at", *output.shape[2:])
        reference = seen.setdefault(kind, name)
        if reference != name:
            out[name] = reference

    for name, child in module.named_modules():
        if isinstance(child, CONVOLUTIONS):
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

    def __post_init__(self) -> None:
        """No stages without a mixture."""
        raise_idle(self, self.inco_is_idle)

    @property
    def inco_is_idle(self) -> tuple[bool, str, set[str]]:
        """The rule of `raise_idle`."""
        return self.inco == "none", "inco = 'none' mixes nothing", {"inco_stages"}

    def mixes(
        self, family: Mapping[str, SplitModel], keys: Callable[[str], Mapping[str, str]] = lambda _: {}
    ) -> dict[str, str]:
        """The references of all networks together, by the server's keys; empty without InCo.

        Args:
            family: the networks by name.
            keys: of a network the server's key of each tensor whose key is not its name.

        Raises:
            ModelError: two networks give a layer different references, or none has any.
        """
        out: dict[str, tuple[str, str]] = {}
        for spec, model in family.items() if self.inco != "none" else ():
            own = keys(spec)
            for name, reference in references(model, self.inco_stages).items():
                key, reference = own.get(name, name), own.get(reference, reference)
                known, first = out.setdefault(key, (reference, spec))
                if known != reference:
                    raise ModelError(
                        f"algorithm.inco: {key!r} has the reference {known!r} in {first!r} but {reference!r} in "
                        f"{spec!r}; name the stages (inco_stages), or choose networks of one family"
                    )
        if self.inco != "none" and not out:
            raise ModelError(
                "algorithm.inco mixes convolutions of one shape within a stage, and no network of "
                f"{', '.join(family)} has two; choose deeper networks, or leave inco out"
            )
        return {key: reference for key, (reference, _) in out.items()}

    def incorporated(self, before: Params, mean: Params, mixes: Mapping[str, str]) -> Params:
        """The mean of the layers, with what InCo makes of the changes from ``before``."""
        if self.inco == "none":
            return mean
        names = {*mixes.keys(), *mixes.values()}
        changes = mixed(tree.sub(tree.pick(mean, names), before), mixes, self.inco)
        return {**mean, **tree.add(tree.pick(before, mixes), changes)}

    def moved(self, server: Any, mean: Params) -> Any:
        """A server's state whose ``model`` is the mean, as `incorporated` makes it of the references ``mixes``."""
        return replace(server, model=self.incorporated(server.model, mean, server.mixes))
