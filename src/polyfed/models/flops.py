"""Counts the floating-point operations of products and convolutions: of a block of code, or of each weight.

It runs under torch's FLOP counter, with formulas for what that counter leaves out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.binding import places
from polyfed.models.channels import example
from polyfed.models.labels import storage, tensors_in
from polyfed.models.split import SplitModel

_RNG = Rng(("polyfed.models", "flops"))

#: Operations with products that have no formula.
_UNKNOWN = re.compile(
    r"_?(sparse|linalg_(?!vector_norm)|fft|native_multi_head|transformer|triton|miopen|thnn_fused|cholesky|lu_|qr|ormqr|"
    r"triangular_solve|int_mm|grouped_mm|fused_sdp|flex_attention)"
)


def _formula(name: str, given: Sequence[Any]) -> float:
    """Return the FLOPs of an operation for which torch's counter has no formula; NaN if none is known."""
    match name:
        case "mkldnn_rnn_layer":
            return _recurrent(given[0], given[1:3])
        case "mkldnn_rnn_layer_backward":
            return 2 * _recurrent(given[0], given[1:3])
        case "_cudnn_rnn":
            return _recurrent(given[0], given[1])
        case "_cudnn_rnn_backward":
            return 2 * _recurrent(given[0], given[1])
        case "_scaled_dot_product_flash_attention_for_cpu":
            return sdpa_flop_count(*(value.shape for value in given[:3]))
        case "_scaled_dot_product_flash_attention_for_cpu_backward":
            return sdpa_backward_flop_count(*(value.shape for value in given[:4]))
        case "mv" | "dot" | "vdot":
            return 2 * given[0].numel()
        case "addmv":
            return 2 * given[1].numel()
        case "addbmm":
            return 2 * given[1].numel() * given[2].shape[-1]
        case "_cdist_forward" | "_euclidean_dist":
            batch = torch.broadcast_shapes(given[0].shape[:-2], given[1].shape[:-2])
            return 2 * batch.numel() * given[0].shape[-2] * given[1].shape[-2] * given[0].shape[-1]
        case "_cdist_backward":
            return 2 * given[0].numel() * given[1].shape[-1]
        case "_trilinear":
            return _trilinear(given[:3], given[3:6])
        case _:
            return math.nan if _UNKNOWN.match(name) else 0


def _recurrent(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Return the FLOPs of a recurrent layer: the products with its matrices, at each position of the series."""
    return 2 * (x.numel() // x.shape[-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _trilinear(values: Sequence[Tensor], expanded: Sequence[Sequence[int]]) -> int:
    """Return the FLOPs of products of three tensors, of which each lacks some of the dimensions of all."""
    lengths: list[torch.Size] = []
    for value, lacking in zip(values, expanded, strict=True):
        for dim in sorted(lacking):
            value = value.unsqueeze(dim)
        lengths.append(value.shape)
    return 2 * torch.broadcast_shapes(*lengths).numel()


class _Counting(TorchDispatchMode):
    """Adds to a counter the FLOPs of each operation, in parts where it consists of others."""

    def __init__(self, counter: Flops) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula: Any = flop_registry.get(packet)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name = getattr(packet, "__name__", "")
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
        elif func.namespace in ("aten", "prim", "prims", "profiler"):
            flops = _formula(name, args)
        else:
            flops = math.nan
        self.counter.total += flops
        if self.counter.followed:
            if flops:
                self.counter.share(flops, _factors(name, args))
            self.counter.trace(name, tensors_in((args, kwargs)), tensors_in(out), bool(flops))
        return out


def _factors(name: str, given: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that an operation multiplies: without a bias or another term that it adds."""
    if "convolution" in name:
        given = given[:2]
    elif name.startswith(("add", "baddbmm")):
        given = given[1:3]
    return [value for value in tensors_in(given) if value.dim() > 1 or name in ("dot", "vdot", "mv")]


class Flops:
    """Counts in a ``with`` block the FLOPs of products and convolutions.

    Unlike torch's counter it does not follow modules, which fails where a parameter is fed to a submodule.

    Args:
        weights: tensors whose part in the count is told apart.
        data: the input; what is computed from ``weights`` alone, without it, is a weight that was changed.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None, data: Tensor | None = None) -> None:
        #: The number; NaN if an operation with products has no formula.
        self.total: float = 0
        #: The FLOPs of the products in which a tensor of ``weights``, or a view of it, is a factor; NaN likewise.
        self.of: dict[str, float] = dict.fromkeys(weights or {}, 0.0)
        self.followed = {storage(value): name for name, value in (weights or {}).items()}
        #: The tensors of ``weights`` that were changed before a product: it is missing in `of`.
        self.changed: set[str] = set()
        self._made: dict[int, frozenset[str]] = {}  # of what, by storage, if of weights alone
        self._data = set[int]() if data is None else {storage(data)}
        self._copies: list[Tensor] = []  # kept, so that their storage stays their own

    def share(self, flops: float, factors: Sequence[Tensor]) -> None:
        """Add the FLOPs of an operation to the followed tensors among its factors, by their number of elements."""
        found = {self.followed[storage(f)]: f.numel() for f in factors if storage(f) in self.followed}
        for name, size in found.items():
            self.of[name] += flops * size / sum(found.values())
        if not found:
            self.changed.update(*(self._made.get(storage(f), ()) for f in factors))

    def trace(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], product: bool) -> None:
        """Note what the results of an operation were computed from."""
        places = [storage(value) for value in inputs]
        weights = frozenset(
            n for at in places for n in ({self.followed[at]} if at in self.followed else self._made.get(at, ()))
        )
        data = any(at in self._data for at in places)
        for out in outputs:
            at = storage(out)
            if at in self.followed:
                continue  # a view
            if name in ("clone", "_to_copy") and places[0] in self.followed and out.numel() == inputs[0].numel():
                self.followed[at] = self.followed[places[0]]
                self._copies.append(out)
                continue
            self._data.discard(at)  # a storage may have been another's before
            self._made.pop(at, None)
            if data:
                self._data.add(at)
            elif weights and not product:
                self._made[at] = weights

    def __enter__(self) -> Flops:
        self._open = ExitStack()
        # In evaluation a transformer's layer is a single operation, unless its fast path is switched off.
        self._open.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self._open.enter_context(_Counting(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def multiplications(model: SplitModel) -> dict[str, float]:
    """Count the multiply-accumulates of one example per weight of each tensor that is a factor of a product.

    It is the number of positions at which a weight is used: of a convolution those of its output, of a linear layer 1
    or the number of tokens. A tensor with that number times its number of weights gives the layer's. A bias, an affine
    parameter and a table of embeddings are no factors.

    Args:
        model: the network; it runs once in evaluation mode, and the result is kept.

    Returns:
        the numbers by the names of the tensors, in the order of the network.

    Raises:
        ModelError: a weight is a factor of an operation of which the number is unknown, or is changed before its
            product, as by a weight normalisation; or no weight is a factor.

    Example:
        >>> from polyfed import build
        >>> multiplications(build("cnn1(rep_dim=20)", input_shape=(3, 32, 32), num_classes=10))["conv1.weight"]
        784.0
    """
    return dict(_multiplications(model))


@lru_cache(maxsize=256)
def _multiplications(model: SplitModel) -> dict[str, float]:
    with _RNG.fork():
        module = model.new_module().eval()
    weights = {place.name: place.tensor for place in places(module) if place.name in model.parameter_names}
    x = example(model)
    with torch.no_grad(), Flops(weights, x) as counter:
        module(x)
    if unknown := [name for name, flops in counter.of.items() if math.isnan(flops)]:
        raise ModelError(
            f"model {model.name!r}: the multiplications of {unknown[0]!r} cannot be counted, as its forward calls an "
            "operation that polyfed has no formula for; measure capacities in parameters instead"
        )
    if changed := [name for name in weights if name in counter.changed and weights[name].dim() > 1]:
        raise ModelError(
            f"model {model.name!r}: the multiplications of {changed[0]!r} cannot be counted, as its forward multiplies "
            "by what it computes from that weight, and not by the weight; measure capacities in parameters instead"
        )
    found = {name: counter.of[name] / (2 * len(x) * weights[name].numel()) for name in model.shapes if name in weights}
    if not any(found.values()):
        raise ModelError(
            f"model {model.name!r} has no multiplications: no weight that it trains is a factor of a product or a "
            "convolution; measure capacities in parameters instead"
        )
    return {name: value for name, value in found.items() if value}
