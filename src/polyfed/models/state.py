"""What a module holds beside its parameters and buffers: plain attributes as values, and tensors inside them."""

from __future__ import annotations

import gc
import inspect
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from io import IOBase
from logging import Logger
from random import Random
from types import FunctionType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

#: The attributes that every module has, and a recurrent layer's list of the weights that are bound to it.
_OF_TORCH = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


def named(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Return the submodules by their places, the module itself as ""."""
    return cast("Iterable[tuple[str, nn.Module]]", module.named_modules())


def attributes(module: nn.Module) -> dict[str, object]:
    """Return the plain attributes of a module, its submodules and the user's own classes, as values to compare."""
    found: dict[str, object] = {}
    seen = set[int]()
    for path, child in named(module):
        dot = f"{path}." if path else ""
        found |= {dot + name: _value(value, 6, seen) for name, value in vars(child).items() if name not in _OF_TORCH}
        for kind in type(child).__mro__:
            if not kind.__module__.startswith(("torch.", "polyfed.", "builtins")):
                found |= {
                    f"{kind.__name__}.{name}": _value(value, 6, seen)
                    for name, value in vars(kind).items()
                    if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
                }
    return found


def _value(value: Any, depth: int, seen: set[int]) -> object:
    """Return a value that is equal exactly for equal contents, as deep as ``depth``; an object counts once."""
    match value:
        case Tensor():
            return ("tensor", value.dtype, tuple(value.shape), digest(value))
        case np.ndarray() | np.generic():
            return ("array", str(value.dtype), value.shape, value.tobytes())
        case torch.Generator():
            return digest(value.get_state())
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case Random():
            return value.getstate()
        case set() | frozenset():
            return sorted(map(repr, cast("set[Any]", value)))
        case nn.Module() | Logger() | IOBase() | type() | FunctionType() | ModuleType():
            return repr(type(value))
        case Mapping() if depth and id(value) not in seen:
            seen.add(id(value))
            entries = cast("Mapping[Any, Any]", value)
            return [(_value(key, 1, seen), _value(item, depth - 1, seen)) for key, item in entries.items()]
        case list() | tuple() | deque() if depth and id(value) not in seen:
            seen.add(id(value))
            return [_value(item, depth - 1, seen) for item in cast("Iterable[Any]", value)]
        case _ if hasattr(value, "__next__"):  # its position cannot be read: it counts as changed
            return object()
        case _ if depth and (state := _state(value)) is not None and id(value) not in seen:
            seen.add(id(value))
            return (type(value).__qualname__, [(name, _value(item, depth - 1, seen)) for name, item in state.items()])
        case Mapping() | list() | tuple() | deque():
            return type(value).__qualname__
        case _:  # numbers and strings as they are; other objects without their addresses
            return (type(value).__qualname__, re.sub(r" at 0x[0-9a-f]+", "", repr(value)))


def _state(value: object) -> dict[str, Any] | None:
    """Return what an object holds in its ``__dict__`` and its slots; None if it has neither."""
    slots = [name for kind in type(value).__mro__ for name, at in vars(kind).items() if inspect.ismemberdescriptor(at)]
    held = {name: getattr(value, name, None) for name in slots}
    return {**getattr(value, "__dict__", {}), **held} if held or hasattr(value, "__dict__") else None


def leaves(out: Tensor) -> list[Tensor]:
    """Return the tensors without a history that a backward pass from a tensor would reach."""
    found, seen, todo = list[Tensor](), set[Any](), [out.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            todo += [before for before, _ in node.next_functions]
    return found


def _inside(value: Any, depth: int, seen: set[int], what: str = "tensor") -> Iterator[tuple[str, Tensor]]:
    """Yield the trainable tensors that a value holds: in containers, objects, closures and bound methods."""
    if isinstance(value, Tensor):
        yield from [("Parameter" if isinstance(value, nn.Parameter) else what, value)]
    elif isinstance(value, nn.Module):
        yield from ((type(value).__name__, tensor) for tensor in value.parameters())
    elif depth and id(value) not in seen and not isinstance(value, type | ModuleType | Logger):
        seen.add(id(value))
        function = isinstance(value, FunctionType)  # its globals are not its own
        for item in (value.__closure__, value.__defaults__) if function else gc.get_referents(value):
            yield from _inside(item, depth - 1, seen, what)


def contents(module: nn.Module, depth: int, kinds: Any = object) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Yield name and value of each plain attribute, and each tensor in it with the class of what holds it."""
    for path, child in named(module):
        for name, value in vars(child).items():
            if name not in _OF_TORCH and isinstance(value, kinds):
                seen = {id(one) for one in module.modules()}
                found = _inside(value, depth, seen)
                yield from ((f"{path}.{name}" if path else name, value, what, tensor) for what, tensor in found)


def holder(module: nn.Module, leaf: Tensor) -> str:
    """Return " in 'name' (Class)" for the attribute that holds a tensor, or "" if it is not found."""
    found = (f" in {name!r} ({type(value).__name__})" for name, value, _, it in contents(module, 8) if it is leaf)
    return next(found, "")


def digest(tensor: Tensor) -> bytes:
    """Return a digest of the bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).clone(memory_format=torch.contiguous_format)
    return blake2b(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").digest()
