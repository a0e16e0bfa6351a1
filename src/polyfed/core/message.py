"""Messages and states: frozen, typed records, and their bytes, without pickle.

A `Message` may hold tensors, mappings of tensors (`Params`), numbers, strings, other records, and tuples or mappings
of records; anything else is refused when the class is made. `encode` writes

    b"PLYF" | version u8 | 3 zero bytes | header length u64 | header (JSON) | tensors, each padded to 8 bytes

and `decode` reads it back into one of the declared classes, checking every length. `size` tells, without encoding,
how many bytes are *values* (weights, features), *indices* (which weights) and *header* (everything else);
``size(m).total == len(encode(m))`` is a law of the test suite.

A `State` is a record too, so that it can be checkpointed, but it is no `Message`: `encode` refuses it, hence what a
client keeps private cannot be put on the wire by mistake.
"""

import dataclasses
import json
import math
import struct
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias, dataclass_transform, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from polyfed.base.errors import MessageError

MAGIC = b"PLYF\x01\x00\x00\x00"
_PREFIX = struct.Struct("<8sQ")
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}

#: The longest header in bytes: of some 40 000 tensors. What reading it can cost is a multiple of its length.
_HEADER_LIMIT = 1 << 22
#: The most dimensions of a tensor.
_MOST_DIMENSIONS = 64

#: ``positions: Annotated[Tensor, INDICES]`` marks a field whose bytes are positions, counted apart from values.
INDICES = "indices"


@dataclass_transform(frozen_default=True)
class Record:
    """A frozen dataclass whose fields the wire and the checkpoint know. Subclassing applies ``@dataclass``.

    Raises:
        TypeError: when a subclass is defined with a field of a type that cannot travel.
    """

    #: Record classes that fields of this class may hold, by name; `decode` builds no others.
    nested: ClassVar[Mapping[str, type["Record"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True)(cls)
        found: dict[str, type[Record]] = {}
        for f in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            _check_type(f.type, f"{cls.__qualname__}.{f.name}", found)
        private = [name for name, inner in found.items() if issubclass(inner, State)]
        if private and issubclass(cls, Message):
            raise TypeError(f"{cls.__qualname__} is a Message but holds {private[0]}, a State, which is private")
        cls.nested = found

    def stands_for(self) -> "Record | Mapping[str, Tensor]":
        """Return the meaning of the record, in a form that is equal for records of equal meaning; by default itself.

        It is overridden if several records mean the same, such as factors whose product alone counts. A comparison
        within a bound uses it; a bitwise comparison uses the fields.
        """
        return self


class Message(Record):
    """A message from the server to a client, or from a client to the server."""


class State(Record):
    """The state of the server or a client between rounds: it is checkpointed and never sent."""


class Nothing(State):
    """The state of a server or client without memory."""


def _check_type(hint: Any, where: str, found: dict[str, type[Record]]) -> None:
    """Accept ``hint`` as a field's type or raise; collect the record classes in it into ``found``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        _check_type(args[0], where, found)
    elif isinstance(hint, str):
        raise TypeError(
            f"{where} is annotated with the string {hint!r}; a module that defines records must not use "
            "`from __future__ import annotations`, as their types are checked when the class is made"
        )
    elif isinstance(hint, type) and issubclass(hint, Record) and hint not in (Record, Message, State):
        found |= {hint.__name__: hint, **hint.nested}
    elif origin is tuple or origin in (types.UnionType, typing.Union):
        for arg in args:
            if arg is not Ellipsis:
                _check_type(arg, where, found)
    elif origin in (dict, Mapping) and args[0] in (str, int):
        _check_type(args[1], where, found)
    elif hint not in (int, float, str, bool, Tensor, type(None)):
        raise TypeError(
            f"{where} has type {hint!r}, which cannot travel; use Tensor, Params, int, float, bool, str, a Record, or "
            "a tuple or mapping of them"
        )


def _kind(hint: Any) -> str:
    return "indices" if get_origin(hint) is Annotated and INDICES in get_args(hint) else "values"


@dataclass(frozen=True)
class Size:
    """Bytes of one message: values, indices and header (everything that is neither)."""

    values: int = 0
    indices: int = 0
    header: int = 0

    @property
    def total(self) -> int:
        """All bytes that travel."""
        return self.values + self.indices + self.header

    def __add__(self, other: "Size") -> "Size":
        """Both together."""
        return Size(self.values + other.values, self.indices + other.indices, self.header + other.header)


def flatten(record: Record) -> tuple[Any, list[tuple[str, Tensor]]]:
    """Split a record into a JSON-able skeleton and its tensors.

    Returns:
        The skeleton, in which a tensor is ``{"t": its number}``, and the tensors with their kind, ``"values"`` or
        ``"indices"``, in that order.
    """
    tensors: list[tuple[str, Tensor]] = []
    return _skeleton(record, "values", record, tensors), tensors


def _skeleton(value: Any, kind: str, record: Record, tensors: list[tuple[str, Tensor]]) -> Any:
    """The skeleton of a part of ``record``; its tensors are added to ``tensors``.

    A function of the module, as `_built` is: a closure that calls itself would be a cycle, and keep the tensors until
    the garbage collector comes by.
    """
    if isinstance(value, Tensor):
        tensors.append((kind, value))
        return {"t": len(tensors) - 1}
    if isinstance(value, State) and isinstance(record, Message):
        raise MessageError(f"{type(value).__qualname__} is a State: it must not leave its owner")
    if isinstance(value, Record):
        fields = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
        inner = {f.name: _skeleton(getattr(value, f.name), _kind(f.type), record, tensors) for f in fields}
        return {"r": type(value).__name__, "f": inner}
    if isinstance(value, Mapping):
        entries = typing.cast(Mapping[Any, Any], value)
        integer = bool(entries) and all(isinstance(key, int) for key in entries)
        made = {str(key): _skeleton(item, kind, record, tensors) for key, item in entries.items()}
        return {"i" if integer else "m": made}
    if isinstance(value, tuple):
        return [_skeleton(item, kind, record, tensors) for item in typing.cast(tuple[Any, ...], value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise MessageError(f"{type(record).__qualname__} holds a {type(value).__qualname__}, which cannot travel")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a decoded value is of the type that its field declares."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0])
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        each = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else list(args)
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if origin in (dict, Mapping):
        entries = typing.cast(Mapping[Any, Any], value)
        return isinstance(value, Mapping) and all(
            isinstance(key, args[0]) and _fits(item, args[1]) for key, item in entries.items()
        )
    if hint is float:
        return isinstance(value, float) or (type(value) is int and abs(value) <= 2**53)
    return type(value) is hint if hint in (int, bool, str) else isinstance(value, hint)


def unflatten(skeleton: Any, tensors: list[Tensor], *known: type[Record]) -> Record:
    """Rebuild the record of `flatten`; only the classes ``known`` and those that their fields declare are built.

    Raises:
        MessageError: the skeleton names another class, another field, or a tensor that is not there, or does not use
            each tensor once.
    """
    unused = dict(enumerate(tensors))  # none twice: receivers take two names for two tensors, to be written apart
    classes = {name: cls for top in known for name, cls in ((top.__name__, top), *top.nested.items())}
    try:
        built = _built(skeleton, unused, classes)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise MessageError(f"the structure of the message is damaged ({type(error).__name__}: {error})") from error
    if unused:
        raise MessageError(f"got {len(unused)} tensors that the message does not name; expected each to be named")
    if not isinstance(built, Record):
        raise MessageError(f"the message is a {type(built).__name__}; expected one of {', '.join(sorted(classes))}")
    return built


def _built(node: Any, unused: dict[int, Tensor], classes: Mapping[str, type[Record]]) -> Any:
    """A part of a record from its skeleton; takes its tensors out of ``unused``."""
    if isinstance(node, list):
        return tuple(_built(item, unused, classes) for item in typing.cast(list[Any], node))
    if not isinstance(node, dict):
        return node
    entries = typing.cast(dict[str, Any], node)
    if "t" in entries:
        return unused.pop(entries["t"])
    if "m" in entries:
        return {key: _built(item, unused, classes) for key, item in entries["m"].items()}
    if "i" in entries:
        return {int(key): _built(item, unused, classes) for key, item in entries["i"].items()}
    cls = classes.get(entries["r"])
    if cls is None:
        raise MessageError(f"got a {entries['r']!r}; expected one of {', '.join(sorted(classes))}")
    got, expected = set(entries["f"]), {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    if got != expected:
        raise MessageError(f"{cls.__qualname__} came with fields {sorted(got)}; expected {sorted(expected)}")
    values = {key: _built(item, unused, classes) for key, item in entries["f"].items()}
    for f in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if not _fits(values[f.name], f.type):
            raise MessageError(
                f"{cls.__qualname__}.{f.name} came as {type(values[f.name]).__name__}, which is not what it declares: "
                f"{f.type}"
            )
    return cls(**values)


#: A record in pieces: its skeleton, and type, shape and memory of each tensor.
Pieces: TypeAlias = tuple[Any, list[tuple[torch.dtype, tuple[int, ...], np.ndarray]]]


def disassemble(record: Record) -> Pieces:
    """Return a record in pieces for another process of the run, without a copy: the arrays are the tensors' memory."""
    skeleton, tensors = flatten(record)
    return skeleton, [(tensor.dtype, tuple(tensor.shape), _memory(tensor)) for _, tensor in tensors]


def assemble(pieces: Pieces, *known: type[Record]) -> Any:
    """Return the record of `disassemble`, of a class in ``known``; its tensors are views of the arrays.

    Raises:
        MessageError: it is another record.
    """
    skeleton, parts = pieces
    tensors = [
        torch.from_numpy(raw).view(dtype).reshape(shape) if raw.nbytes else torch.empty(shape, dtype=dtype)
        for dtype, shape, raw in parts
    ]
    return unflatten(skeleton, tensors, *known)


def compact(value: Any) -> Any:
    """Return the same record, mapping, tuple or tensor, in which no tensor is a view of a larger tensor."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, Record):
        fields = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
        return type(value)(**{f.name: compact(getattr(value, f.name)) for f in fields})
    if isinstance(value, Mapping):
        return {key: compact(item) for key, item in typing.cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple):
        return tuple(compact(item) for item in typing.cast(tuple[Any, ...], value))
    return value


def _memory(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor in order, as bytes; its own memory where they lie so."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # a single number may keep any stride through contiguous()
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided(flat.shape, (1,))
    return flat.view(torch.uint8).numpy()


def _layout(message: Message) -> tuple[bytes, list[tuple[str, Tensor]]]:
    if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MessageError(f"{type(message).__qualname__} is not a Message: it must not leave its owner")
    skeleton, tensors = flatten(message)
    table = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for _, tensor in tensors]
    header = json.dumps({"tree": skeleton, "tensors": table}, separators=(",", ":")).encode()
    if len(header) > _HEADER_LIMIT or any(tensor.dim() > _MOST_DIMENSIONS for _, tensor in tensors):
        raise MessageError(
            f"{type(message).__qualname__} cannot travel: its names and numbers take {len(header):,} bytes beside the "
            f"tensors, at most {_HEADER_LIMIT:,} are read (put many numbers into a tensor); and a tensor has at most "
            f"{_MOST_DIMENSIONS} dimensions"
        )
    return header + b" " * (-len(header) % 8), tensors


def size(message: Message) -> Size:
    """Return the numbers of bytes that `encode` would write, by kind, without writing them."""
    header, tensors = _layout(message)
    counts = [(kind, tensor.numel() * tensor.element_size()) for kind, tensor in tensors]
    values = sum(count for kind, count in counts if kind == "values")
    indices = sum(count for kind, count in counts if kind == "indices")
    return Size(values, indices, _PREFIX.size + len(header) + sum(-count % 8 for _, count in counts))


def encode(message: Message) -> bytes:
    """Return the bytes of a message.

    Raises:
        MessageError: the value is not a `Message` (a `State`, say), or holds what cannot travel, or too much of it.
    """
    return b"".join(encoded(message))


def encoded(message: Message) -> Iterator[bytes | memoryview]:
    """Yield the bytes of `encode` piece by piece, without a second copy in memory; with the same errors."""
    header, tensors = _layout(message)
    yield _PREFIX.pack(MAGIC, len(header))
    yield header
    for _, tensor in tensors:
        raw = _memory(tensor)
        yield memoryview(raw.data)
        yield b"\0" * (-raw.nbytes % 8)


def _shape(told: Any) -> tuple[int, ...]:
    """A tensor's shape as it came.

    Raises:
        ValueError: it is not one that a tensor can have.
    """
    shape = tuple(told) if isinstance(told, list) else (-1,)
    if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError("a shape that no tensor has")
    if math.prod(n for n in shape if n) >= 2**63:  # also where another side is 0: strides are computed all the same
        raise ValueError("a shape of too many numbers")
    return shape


def decode(data: bytes | bytearray, *known: type[Message], limit: int | None = None) -> Message:
    """Rebuild a message from its bytes.

    Args:
        data: what `encode` wrote; a bytearray becomes the message's own memory.
        known: the message classes that may arrive here; nothing else is built.
        limit: the most bytes that are accepted.

    Returns:
        The message; its tensors are views of one private copy of ``data``, or of the bytearray itself.

    Raises:
        MessageError: foreign, truncated, oversized or damaged bytes, or a message that is not one of ``known``.
    """
    if limit is not None and len(data) > limit:
        raise MessageError(f"got {len(data):,} bytes; the limit is {limit:,} (raise it in the configuration)")
    if len(data) < _PREFIX.size or data[:8] != MAGIC:
        raise MessageError(
            f"not a polyfed message of this version: starts with {bytes(data[:8])!r}, expected {MAGIC!r}"
        )
    _, header_size = _PREFIX.unpack_from(data)
    start = _PREFIX.size + header_size
    if start > len(data):
        raise MessageError(f"truncated: the header needs {header_size:,} bytes, got {len(data) - _PREFIX.size:,}")
    if header_size > _HEADER_LIMIT + 7:
        raise MessageError(f"got a header of {header_size:,} bytes; expected at most {_HEADER_LIMIT:,}")
    try:
        header = json.loads(bytes(data[_PREFIX.size : start]))
        table = [(_DTYPES[name], _shape(shape)) for name, shape in header["tensors"]]
        skeleton = header["tree"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise MessageError(f"the header is damaged ({type(error).__name__}: {error})") from error
    # One writable buffer, shared by all tensors.
    buffer, offset = (data, start) if isinstance(data, bytearray) else (bytearray(memoryview(data)[start:]), 0)
    tensors: list[Tensor] = []
    for dtype, shape in table:
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if offset + nbytes > len(buffer):
            raise MessageError(
                f"truncated: tensor {len(tensors)} of shape {shape} needs {nbytes:,} bytes at {offset:,}, "
                f"got {len(buffer):,}"
            )
        tensors.append(
            torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
        offset += nbytes + (-nbytes % 8)
    if offset != len(buffer):
        raise MessageError(f"got {len(buffer) - offset:,} bytes after the last tensor; expected none")
    message = unflatten(skeleton, tensors, *known)
    if type(message) not in known:
        raise MessageError(
            f"got a {type(message).__qualname__}; expected one of {', '.join(cls.__qualname__ for cls in known)}"
        )
    return typing.cast(Message, message)
