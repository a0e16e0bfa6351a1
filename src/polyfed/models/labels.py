"""Which channels meet in a forward pass: every operation of PyTorch is followed with labels in place of numbers.

Each position along a dimension of a weight or buffer is an element. A label of a tensor says which element a number of
it belongs to, such as the output channel that made it; label 0 stands for what is always there. Operations unite
elements: an addition those of its two terms, a matrix product the columns of the one and the rows of the other. What is
united can only be kept or left out together.

Views need no rules, as they move labels as they move numbers. A matrix product is an elementwise product and a sum. So
few rules cover attention, residual streams, concatenations and flattened maps.

The idea of finding coupled layers by following a forward pass is that of Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900; the labels are this file's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polyfed.base.errors import ModelError

#: Operations that move numbers and compute none: they are run on labels as they are.
_MOVES = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "cat",
        "stack",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "chunk",
        "unsafe_chunk",
        "unbind",
        "clone",
        "detach",
        "alias",
        "contiguous",
        "flip",
        "roll",
        "repeat",
        "index",
        "index_select",
        "constant_pad_nd",
        "_to_copy",
        "lift_fresh",
        "lift_fresh_copy",
        "diagonal",
        "unfold",
        "narrow",
        "movedim",
        "unflatten",
    ]
)
#: Sums and the like over some dimensions.
_REDUCTIONS = frozenset(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "any",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "logsumexp",
        "linalg_vector_norm",
        "norm",
    ]
)
#: Operations along the places of a map, one channel at a time.
_POOLS = [
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "upsample",
    "reflection_pad",
    "replication_pad",
    "mkldnn_adaptive_avg_pool",
]
#: Elementwise as far as labels go, though not tagged so: a normalisation reads its neighbours, and keeps its shape.
_ELEMENTWISE = frozenset(
    [
        "_softmax",
        "_safe_softmax",
        "_log_softmax",
        "softmax",
        "log_softmax",
        "native_layer_norm",
        "_fused_rms_norm",
        "rms_norm",
        "copy_",
        "cumsum",
        "native_dropout",
        "dropout",
        "fill",
        "zero",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "elu",
        "silu",
        "mish",
        "gelu",
        "softplus",
        "hardsigmoid",
        "_prelu_kernel",
    ]
)
_PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm", "addbmm", "matmul", "linear", "mv", "dot"])

Labels = list[Tensor]  # each broadcasts to the shape of its tensor; dimensions along which it does not vary have size 1


class Follower(TorchDispatchMode):
    """Follows the forward passes inside its block.

    Args:
        model: the model's name, for messages.

    Attributes:
        used: the tensors of `element` that an operation read.
        outputs: of those that a product or a convolution read, the dimension whose positions are outputs of its first.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.used: set[int] = set()
        self.outputs: dict[int, int] = {}
        self._elements: dict[int, Tensor] = {}  # by storage, as views have that of their tensor
        self._parent = np.zeros(1, dtype=np.int64)
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # holds the tensor too, so that its id stays its own

    # -------------------------------------------------------------------------------------------- elements

    def element(self, tensor: Tensor) -> list[Tensor]:
        """Give each position of each dimension of a tensor an element; return them, by dimension."""
        axes: list[Tensor] = []
        for size in tensor.shape:
            start = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(start, start + size)])
            axes.append(torch.arange(start, start + size))
        placed = [_at(axis, dim, tensor.dim()) for dim, axis in enumerate(axes) if len(axis) > 1]
        self._labels[id(tensor)] = (tensor, placed)
        self._elements[storage(tensor)] = tensor
        return axes

    def _outputs(self, factor: Tensor, dim: int) -> None:
        """Note that the outputs of a factor are along ``dim``, if it is a tensor of `element` or a view of one."""
        whole = self._elements.get(storage(factor))
        if whole is None:
            return
        step, size = factor.stride(dim), factor.shape[dim]  # a view may have split, joined or turned dimensions
        strides = zip(whole.stride(), whole.shape, strict=True)
        along = [at for at, (stride, n) in enumerate(strides) if n > 1 and step <= stride < step * size]
        if along:
            self.outputs.setdefault(id(whole), along[0])

    def roots(self, elements: Tensor) -> Tensor:
        """Return for each element the one that stands for all that it is united with; 0 for what is always there."""
        while True:
            above = self._parent[self._parent]
            if np.array_equal(above, self._parent):
                return torch.from_numpy(self._parent)[elements]
            self._parent = above

    def unite(self, a: Tensor, b: Tensor | int = 0) -> None:
        """Unite the elements of ``a`` with those of ``b``, which broadcast; by default with what is always there."""
        left, right = torch.broadcast_tensors(a, torch.as_tensor(b))
        few = tuple(
            slice(0, 1) if s == t == 0 else slice(None) for s, t in zip(left.stride(), right.stride(), strict=True)
        )
        left, right = self.roots(left[few]), self.roots(right[few])
        count = len(self._parent)
        pairs = torch.unique((left * count + right)[left != right])
        parent = self._parent
        for pair in pairs.tolist():
            x, y = divmod(pair, count)
            while parent[x] != x:
                x = int(parent[x])
            while parent[y] != y:
                y = int(parent[y])
            parent[max(x, y)] = min(x, y)  # 0 stays its own root

    # ---------------------------------------------------------------------------------------------- labels

    def labels(self, tensor: object) -> Labels:
        """Return the labels of a tensor that vary, by the elements that stand for them now."""
        found = self._labels.get(id(tensor), (None, cast("Labels", [])))[1]
        thin = [self._thin(self.roots(label)) for label in found]
        for label in thin:
            if not _varying(label):
                self.unite(label)  # all that is there is one channel, so it cannot go
        return [label for label in thin if _varying(label)]

    def fix(self, values: object) -> None:
        """Keep all channels of these tensors: they reach what cannot be sliced."""
        for value in tensors_in(values):
            for label in self.labels(value):
                self.unite(label)

    def _set(self, tensor: Tensor, labels: Labels) -> None:
        self._labels[id(tensor)] = (tensor, labels)

    @staticmethod
    def _thin(label: Tensor) -> Tensor:
        """Give every dimension along which a label does not vary the size 1."""
        expanded = [size > 1 and stride == 0 for size, stride in zip(label.shape, label.stride(), strict=True)]
        label = label[tuple(slice(0, 1) if one else slice(None) for one in expanded)]  # else == makes all of the tensor
        for dim, size in enumerate(label.shape):
            first = label.narrow(dim, 0, min(size, 1))
            if size > 1 and bool((label == first).all()):
                label = first
        return label

    def _entire(self, label: Tensor, dims: Iterable[int]) -> Tensor:
        """Unite a label along ``dims``, where all or nothing is kept: all, where it varies along no other dimension."""
        dims = tuple(dims)
        rest = label
        for dim in dims:
            rest = rest.narrow(dim, 0, 1)
        if rest.shape != label.shape:
            self.unite(label, rest if _varying(rest) else 0)
        return self._thin(self.roots(rest))

    def _summed(self, label: Tensor, dims: Sequence[int]) -> Tensor | None:
        """Return what is left of a label of a tensor that is summed over ``dims``; None if nothing selects any more."""
        varying = _varying(label)
        if varying <= set(dims):
            return None  # a sum over fewer channels
        return self._entire(label, varying & set(dims))

    def _axis(self, tensor: Tensor | None, dim: int, size: int) -> Tensor:
        """Return the elements along one dimension, (size,); 0 without a label."""
        out = torch.zeros(size, dtype=torch.int64)
        for label in self.labels(tensor):
            varying = _varying(label)
            if dim in varying:
                out = self._entire(label, varying - {dim}).reshape(-1).expand(size)
        return out

    def _channels(self, x: Tensor, dim: int) -> Tensor:
        """Return the elements along the dimension of the channels; keep what varies along others alone, such as places.

        Neighbours along those meet in each result, and how many there are decides which.
        """
        for label in self.labels(x):
            if dim not in _varying(label):
                self.unite(label)
        return self._axis(x, dim, x.shape[dim])

    def _joined(self, operands: Sequence[tuple[tuple[int, ...], Labels]], dims: int) -> Labels:
        """Return the labels of an elementwise result of tensors, given as shape and labels, aligned at the right."""
        merged: Labels = []
        aligned = [
            (_padded(shape, dims), [label.reshape(_padded(label.shape, dims)) for label in labels])
            for shape, labels in operands
        ]
        for _, labels in aligned:
            for label in labels:
                meets = [other for other in merged if _varying(other) & _varying(label)]
                merged = [other for other in merged if not any(other is one for one in meets)]
                for other in meets:
                    self.unite(label, other)
                    label = self._thin(self.roots(torch.broadcast_tensors(label, other)[0]))
                merged.append(label)
        merged = [self._thin(self.roots(label)) for label in merged]
        for label in merged:
            if not _varying(label):
                self.unite(label)
        for shape, labels in aligned:  # a term that has a number for each channel, but no label, needs all channels
            for index, label in enumerate(merged):
                varying = _varying(label)
                if not any(_varying(self._thin(self.roots(own))) & varying for own in labels):
                    merged[index] = self._entire(label, [dim for dim in varying if shape[dim] > 1])
        return merged

    # ---------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and give its results labels."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = tensors_in((args, kwargs))
        self.used |= {id(value) for value in inputs}
        if not any(self.labels(value) for value in inputs):
            for value in tensors_in(out):
                self._labels.pop(id(value), None)
            return out
        name = func._schema.name.removeprefix("aten::")
        plain = name.removesuffix("_") if name not in _ELEMENTWISE else name
        rule = self._rule(func, plain)
        if rule is None:
            raise ModelError(
                f"model {self.model!r} cannot be sliced: its forward calls {name!r} on channels, and polyfed does not "
                "know which channels that needs together; put the call into a submodule and name that submodule in "
                'the network\'s attribute unsliced, such as unsliced = ("block",)'
            )
        rule(func, args, kwargs, out)
        return out

    def _rule(self, func: Any, name: str) -> Callable[..., None] | None:
        """Return the method that follows an operation."""
        if name in _MOVES:
            return self._move
        if "batch_norm" in name or name == "native_group_norm":
            return self._norm
        if "convolution" in name or name.startswith("conv"):
            return self._convolution
        if name in _PRODUCTS:
            return self._product
        if name in _REDUCTIONS:
            return self._reduction
        if name == "embedding":
            return self._embedding
        if any(name.lstrip("_").startswith(pool) for pool in _POOLS):
            return self._pool
        if name in _ELEMENTWISE or torch.Tag.pointwise in func.tags:
            return self._elementwise
        return (lambda *_: None) if name == "_local_scalar_dense" else None  # a number for Python

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs = tensors_in((args, kwargs))
        if func._schema.name in ("aten::cat", "aten::stack"):  # pieces are of one size along all other dimensions
            along = (
                (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % inputs[0].dim()
                if "cat" in func._schema.name
                else -1
            )
            apart = [[label for label in self.labels(value) if along not in _varying(label)] for value in inputs]
            shapes = [tuple(1 if dim == along else size for dim, size in enumerate(value.shape)) for value in inputs]
            self._joined(list(zip(shapes, apart, strict=True)), inputs[0].dim())
        found = {id(value): self.labels(value) for value in inputs}
        results = tensors_in(out)
        made: list[Labels] = [[] for _ in results]
        for number in range(max(map(len, found.values()))):

            def swap(value: Any, number: int = number) -> Any:
                if isinstance(value, Tensor):
                    labels = found[id(value)]
                    if not labels and not value.is_floating_point():
                        return value  # positions
                    label = labels[number] if number < len(labels) else torch.zeros((), dtype=torch.int64)
                    return label.expand(value.shape)
                if isinstance(value, list | tuple):
                    items = cast("Sequence[Any]", value)
                    return [swap(item) for item in items]
                return None if isinstance(value, torch.dtype | torch.device | torch.layout) else value

            keys = {
                key: value for key, value in kwargs.items() if key not in ("dtype", "device", "layout", "pin_memory")
            }
            # A repeated label has no view of every shape; and what is padded is always there, whatever its value.
            how = torch.reshape if func._schema.name in ("aten::view", "aten::_unsafe_view") else func
            given = args[:2] if func._schema.name == "aten::constant_pad_nd" else args
            moved = how(*swap(given), **{key: swap(value) for key, value in keys.items()})
            for labels, label in zip(made, tensors_in(moved), strict=True):
                labels.append(self._thin(label))
        for value, labels in zip(results, made, strict=True):
            self._set(value, labels)

    def _elementwise(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs = tensors_in((args, kwargs))
        result = tensors_in(out)[0]
        self._set(result, self._joined([(value.shape, self.labels(value)) for value in inputs], result.dim()))

    def _reduction(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = _arguments(func, args, kwargs)
        x: Tensor = given["self"]
        asked = given.get("dim")
        dims = range(x.dim()) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
        dims = [dim % x.dim() for dim in dims]
        kept = [label for label in (self._summed(label, dims) for label in self.labels(x)) if label is not None]
        for value in tensors_in(out):
            if value.dim() != x.dim():
                rest = [dim for dim in range(x.dim()) if dim not in dims]
                self._set(value, [label.reshape([label.shape[dim] for dim in rest]) for label in kept])
            else:
                self._set(value, kept)

    def _product(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name
        tensors = tensors_in(args)
        added, (a, b) = (
            (tensors[0], tensors[1:3]) if name.startswith(("aten::addmm", "aten::baddbmm")) else (None, tensors[:2])
        )
        if "linear" in name:
            added, b = (tensors[2] if len(tensors) > 2 else None), b.t()
        if a.dim() < 2 or b.dim() < 2:
            raise ModelError(
                f"model {self.model!r} cannot be sliced: it multiplies a matrix and a vector; use nn.Linear"
            )

        def left(shape: Sequence[int]) -> tuple[int, ...]:  # (.., n, k) -> (.., n, 1, k)
            return (*shape[:-1], 1, shape[-1])

        self._outputs(a, -2)
        self._outputs(b, -1)
        labels_b = self.labels(tensors[1]) if "linear" in name else [label.mT for label in self.labels(b)]  # (.., m, k)
        turned = (*b.shape[:-2], 1, b.shape[-1], b.shape[-2])
        labels_b = [label.reshape(*label.shape[:-2], 1, *label.shape[-2:]) for label in labels_b]
        labels_a = [label.reshape(left(label.shape)) for label in self.labels(a)]
        dims = max(a.dim(), b.dim()) + 1
        joined = self._joined([(left(a.shape), labels_a), (turned, labels_b)], dims)
        kept = [label for label in (self._summed(label, [dims - 1]) for label in joined) if label is not None]
        result = tensors_in(out)[0]
        terms: list[tuple[tuple[int, ...], Labels]] = [(tuple(result.shape), [label.squeeze(-1) for label in kept])]
        if added is not None:
            terms.append((tuple(added.shape), self.labels(added)))
        self._set(result, self._joined(terms, result.dim()))

    def _convolution(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = _arguments(func, args, kwargs)
        x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
        into, made = (0, 1) if given.get("transposed") else (1, 0)
        channels, result = self._channels(x, 1), tensors_in(out)[0]
        columns = self._axis(weight, into, weight.shape[into])
        for dim in range(2, weight.dim()):
            self.unite(self._axis(weight, dim, weight.shape[dim]))  # a kernel keeps its size
        if groups == 1:
            self._outputs(weight, made)
            rows = self._axis(weight, made, weight.shape[made])
            self.unite(channels, columns)
        else:  # a group's inputs and outputs stand and fall together, so a group is one channel
            every = channels.reshape(groups, -1)
            self.unite(every, every[:, :1])
            if into == 0:
                self.unite(channels, columns)
                self.unite(self._axis(weight, 1, weight.shape[1]))
                rows = every[:, :1].expand(groups, weight.shape[1]).reshape(-1)
            else:
                self.unite(columns)
                rows = self._axis(weight, 0, weight.shape[0])
                self.unite(rows.reshape(groups, -1), every[:, :1])
        if bias is not None:
            self.unite(rows, self._axis(bias, 0, len(bias)))
        self._set(result, [_at(self.roots(rows), 1, result.dim())])

    def _norm(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = _arguments(func, args, kwargs)
        x: Tensor = given["input"]
        rows = self._channels(x, 1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if given.get(name) is not None:
                self.unite(rows, self._axis(given[name], 0, x.shape[1]))
        if "group" in given:  # its statistics are those of a whole group
            every = rows.reshape(given["group"], -1)
            self.unite(every, every[:, :1])
        self._set(tensors_in(out)[0], [_at(self.roots(rows), 1, x.dim())])

    def _embedding(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        weight: Tensor = args[0]
        self.unite(self._axis(weight, 0, weight.shape[0]))  # the data choose the row
        self._set(out, [_at(self._axis(weight, 1, weight.shape[1]), out.dim() - 1, out.dim())])

    def _pool(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        x: Tensor = tensors_in(args)[0]
        result, name = tensors_in(out)[0], func._schema.name
        places = next(d for d in (1, 2, 3) if f"{d}d" in name)
        dim = x.dim() - 1 - places  # 0 of a single example, as which a tensor (B, F) is taken
        self._set(result, [_at(self._channels(x, dim), dim, result.dim())])


def storage(value: Tensor) -> int:
    """Return what tells the memory of a tensor, which it shares with its views, from that of others."""
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  # the only identity a storage has


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of an operation by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in a value, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return [tensor for value in cast("dict[str, Any]", values).values() for tensor in tensors_in(value)]
    if isinstance(values, list | tuple):
        return [tensor for value in cast("Sequence[Any]", values) for tensor in tensors_in(value)]
    return []


def _at(axis: Tensor, dim: int, dims: int) -> Tensor:
    """Return a vector as the label of one of ``dims`` dimensions."""
    return axis.reshape([-1 if place == dim else 1 for place in range(dims)])


def _padded(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    return (*([1] * (dims - len(shape))), *shape)


def _varying(label: Tensor) -> set[int]:
    return {dim for dim, size in enumerate(label.shape) if size > 1}
