"""Records and their bytes: nothing is lost, nothing private leaves, and damaged bytes only ever raise MessageError."""

import json
import math
import pickle
import struct
from collections.abc import Mapping
from typing import Annotated, Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.core.message import (
    INDICES,
    MAGIC,
    Message,
    Nothing,
    Record,
    Size,
    State,
    assemble,
    compact,
    decode,
    disassemble,
    encode,
    flatten,
    size,
    unflatten,
)

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Leaf(Record):
    x: Tensor
    n: int
    where: Annotated[Tensor, INDICES]


class Everything(Message):
    params: Mapping[str, Tensor]
    positions: Annotated[Tensor, INDICES]
    leaf: Leaf
    leaves: tuple[Leaf, ...]
    by_id: Mapping[int, Leaf]
    maybe: Tensor | None
    tags: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ratio: float
    flag: bool


class Small(Message):
    x: Tensor
    n: int


class Secret(State):
    x: Tensor


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of two values that may travel, types included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(raw(a), raw(b))
    if isinstance(a, Record):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def raw(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    if dtype is torch.bool:
        flat = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    else:
        content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    x = flat.reshape(shape)
    return x.movedim(0, -1) if len(shape) > 1 and draw(st.booleans()) else x  # not contiguous


names = st.text(max_size=6)
leaves = st.builds(Leaf, x=tensors(), n=st.integers(), where=tensors())
records = st.builds(
    Everything,
    params=st.dictionaries(names, tensors(), max_size=3),
    positions=tensors(),
    leaf=leaves,
    leaves=st.lists(leaves, max_size=2).map(tuple),
    by_id=st.dictionaries(st.integers(-5, 10**12), leaves, max_size=2),
    maybe=st.none() | tensors(),
    tags=st.lists(names, max_size=2).map(tuple),
    shapes=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
    ratio=st.floats(),
    flag=st.booleans(),
)


def tally(value: Any, kind: str = "values") -> dict[str, int]:
    """Bytes of a record's tensors by kind, counted without the codec."""
    if isinstance(value, Tensor):
        return {"values": 0, "indices": 0} | {kind: value.numel() * value.element_size()}
    inner: list[tuple[Any, str]] = []
    if isinstance(value, Record):
        fields = value.__dataclass_fields__
        inner = [(getattr(value, f), "indices" if INDICES in get_args(fields[f].type) else "values") for f in fields]
    elif isinstance(value, Mapping):
        inner = [(item, kind) for item in value.values()]
    elif isinstance(value, tuple):
        inner = [(item, kind) for item in value]
    parts = [tally(item, k) for item, k in inner]
    return {k: sum(part[k] for part in parts) for k in ("values", "indices")}


@settings(max_examples=60, deadline=None)
@given(records)
def test_what_is_decoded_is_bitwise_what_was_encoded_and_as_long_as_size_says(record: Everything) -> None:
    """Catches a lost dtype, shape, key type, NaN payload, empty or strided tensor, and a size that is estimated."""
    data = encode(record)
    assert same(decode(data, Everything), record)
    told = size(record)
    assert told.total == len(data)
    assert {"values": told.values, "indices": told.indices} == tally(record)


@settings(max_examples=30, deadline=None)
@given(records)
def test_what_is_assembled_is_bitwise_what_was_disassembled(record: Everything) -> None:
    """Catches what the codec keeps and the way between two processes of ours loses."""
    pieces = pickle.loads(pickle.dumps(disassemble(record), protocol=5))
    assert same(assemble(pieces, Everything), record)
    told = [(dtype, shape, raw.nbytes) for dtype, shape, raw in disassemble(record)[1]]
    assert told == [(tensor.dtype, tuple(tensor.shape), tensor.nbytes) for _, tensor in flatten(record)[1]]


def test_tensors_that_lie_oddly_are_assembled() -> None:
    """Catches a single number with the stride of the table that it was cut out of, and tensors without numbers."""
    for odd in (
        torch.arange(12.0).view(4, 3)[:, 0][:1],
        torch.zeros(0, 3),
        torch.ones(2, 3).T,
        torch.ones(1).expand(4),
    ):
        got = assemble(disassemble(Small(odd, 1)), Small)
        assert torch.equal(got.x, odd)


def test_disassembling_copies_nothing_that_lies_in_order() -> None:
    """Catches a copy of every upload before the one that is needed."""
    x = torch.zeros(3, 4)
    (_, _, raw), *_ = disassemble(Small(x, 1))[1]
    raw[:] = 255
    assert bool(x.isnan().all())


def test_what_is_compact_keeps_nothing_alive_but_itself() -> None:
    """Catches a client's row of a stack that keeps the whole stack in memory for as long as it is a state."""
    stack, own = torch.randn(50, 3, 4), torch.randn(5)
    kept = compact(
        Everything({"w": stack[7], "t": stack[3].T}, own, Leaf(own, 1, own), (), {}, None, (), (), 0.5, True)
    )
    assert torch.equal(kept.params["w"], stack[7])
    assert torch.equal(kept.params["t"], stack[3].T)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in flatten(kept)[1])
    assert kept.positions is own, "what is whole is not copied"


def test_a_tensor_without_dimensions_and_one_that_learns_both_travel() -> None:
    """Catches 0-dim tensors that come back as (1,), and leaves that drag their graph along."""
    x = torch.tensor(2.5, requires_grad=True)
    got = decode(encode(Small(x * 1, 1)), Small)
    assert got.x.shape == ()  # type: ignore[attr-defined]
    assert not got.x.requires_grad  # type: ignore[attr-defined]


def test_decoded_tensors_are_private_and_writable() -> None:
    """Catches views of the received bytes: training in place must not write into a shared buffer."""
    data = bytearray(encode(Small(torch.zeros(3), 1)))
    before = bytes(data)
    got = decode(bytes(data), Small)
    got.x.add_(1)  # type: ignore[attr-defined]
    assert bytes(data) == before
    assert same(decode(before, Small).x, torch.zeros(3))  # type: ignore[attr-defined]


def test_positions_are_counted_apart_from_values() -> None:
    """Catches a meter that books FIARSE's positions as weights."""
    leaf = Leaf(torch.zeros(4), 1, torch.zeros(3, dtype=torch.int32))

    class Wrapped(Message):
        leaf: Leaf

    told = size(Wrapped(leaf))
    assert (told.values, told.indices) == (16, 12)
    assert told.header == len(encode(Wrapped(leaf))) - 28


def test_sizes_add_up() -> None:
    """Catches a sum that drops one of the three kinds."""
    assert Size(1, 2, 3) + Size(10, 20, 30) == Size(11, 22, 33)
    assert Size(1, 2, 3).total == 6


GOOD = encode(Small(torch.arange(5, dtype=torch.float32), 7))
HEADER = struct.unpack_from("<Q", GOOD, 8)[0]


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_every_truncation_is_refused(length: int) -> None:
    """Catches a prefix, header, tensor or padding whose length nobody checks."""
    with pytest.raises(MessageError):
        decode(GOOD[:length], Small)


@pytest.mark.parametrize("more", [1, 7, 8, 64])
def test_bytes_too_many_are_refused(more: int) -> None:
    """Catches trailing bytes that are ignored: what is metered must be what is used."""
    with pytest.raises(MessageError, match=f"got {more} bytes after the last tensor; expected none"):
        decode(GOOD + b"\0" * more, Small)


def test_foreign_bytes_are_refused() -> None:
    """Catches a reader that trusts its input: another program's file, and another version of ours."""
    for data in (b"", b"PK\x03\x04" + GOOD, b"PLYF\x02" + GOOD[5:]):
        with pytest.raises(MessageError, match="not a polyfed message of this version"):
            decode(data, Small)


def test_more_bytes_than_the_limit_are_refused() -> None:
    """Catches a limit that is not enforced, or is off by one."""
    assert same(decode(GOOD, Small, limit=len(GOOD)).n, 7)  # type: ignore[attr-defined]
    with pytest.raises(MessageError, match="the limit is"):
        decode(GOOD, Small, limit=len(GOOD) - 1)


def test_a_class_that_is_not_expected_is_not_built() -> None:
    """Catches a decoder that builds whatever class the bytes name."""
    for known in (Everything,), ():
        with pytest.raises(MessageError):
            decode(GOOD, *known)


def test_a_nested_record_is_no_message_by_itself() -> None:
    """Catches a decoder that accepts any class it may build inside, at the top."""
    data = forge({"r": "Leaf", "f": {"x": {"t": 0}, "n": 1, "where": {"t": 1}}}, [["float32", [1]]] * 2, b"\0" * 16)
    with pytest.raises(MessageError, match="got a Leaf"):
        decode(data, Everything)


def forge(tree: Any, table: Any, body: bytes = b"", raw_header: bytes | None = None) -> bytes:
    header = json.dumps({"tree": tree, "tensors": table}).encode() if raw_header is None else raw_header
    return struct.pack("<8sQ", MAGIC, len(header)) + header + body


def small(x: Any = None, n: Any = 1) -> Any:
    return {"r": "Small", "f": {"x": {"t": 0} if x is None else x, "n": n}}


BAD = {
    "no JSON": forge(None, None, raw_header=b"{" * 16),
    "no UTF-8": forge(None, None, raw_header=b"\xff\xfe" * 8),
    "JSON of another shape": forge(None, None, raw_header=b"[1, 2]"),
    "no table": forge(small(), None),
    "unknown dtype": forge(small(), [["complex64", [1]]], b"\0" * 8),
    "dtype that is no string": forge(small(), [[["float32"], [1]]], b"\0" * 8),
    "shape that is no list": forge(small(), [["float32", 3]], b"\0" * 16),
    "one negative side": forge(small(), [["float32", [-1]]], b"\0" * 8),
    "two negative sides": forge(small(), [["float32", [-1, -2]]], b"\0" * 8),
    "negative beside zero": forge(small(), [["float32", [-1, 0]]]),
    "infinite side": forge(None, None, b"\0" * 8, b'{"tree": 1, "tensors": [["float32", [Infinity]]]}'),
    "side that is not a number": forge(None, None, b"\0" * 8, b'{"tree": 1, "tensors": [["float32", [NaN]]]}'),
    "more than there is": forge(small(), [["float32", [2**40]]], b"\0" * 8),
    "more than an int64": forge(small(), [["float32", [2**40, 2**40]]], b"\0" * 8),
    "empty with a side beyond int64": forge(small(), [["float32", [0, 2**80]]]),
    "empty beside what fills an int64": forge(small(), [["float32", [0, 2**62, 2**62]]]),
    "more dimensions than there are": forge(small(), [["float32", [1] * 65]], b"\0" * 8),
    "a product that takes minutes": forge(small(), [["float32", [2**62] * 60_000]], b"\0" * 8),
    "side that is a fraction": forge(small(), [["float32", [1.5]]], b"\0" * 8),
    "side that is true": forge(small(), [["float32", [True]]], b"\0" * 8),
    "sides in a string": forge(small(), [["float32", "11"]], b"\0" * 8),
    "tensor from behind": forge(small({"t": -1}), [["float32", [1]]], b"\0" * 8),
    "tensor under two names": forge(small(n={"t": 0}), [["float32", [1]]], b"\0" * 8),
    "tensor without a name": forge(small(), [["float32", [1]]] * 2, b"\0" * 16),
    "longer than any header": forge(None, None, raw_header=b'{"tree":[' + b"[]," * (1 << 21) + b'[]],"tensors":[]}'),
    "tensor that is not there": forge(small({"t": 1}), [["float32", [1]]], b"\0" * 8),
    "tensor by a name": forge(small({"t": "x"}), [["float32", [1]]], b"\0" * 8),
    "unknown class": forge({"r": "Other", "f": {}}, []),
    "class that is no string": forge({"r": ["Small"], "f": {}}, []),
    "field missing": forge({"r": "Small", "f": {"n": 1}}, []),
    "field too many": forge({"r": "Small", "f": {"n": 1, "x": 2, "y": 3}}, []),
    "fields that are no table": forge({"r": "Small", "f": 3}, []),
    "node of no kind": forge(small({"q": 1}), []),
    "key that is no number": forge(small({"i": {"one": 1}}), []),
    "mapping that is none": forge(small({"m": 3}), []),
    "not a record": forge([1, 2], []),
    "nothing": forge(None, []),
    **{
        f"lists in lists, {n} deep": forge(None, None, b"", b'{"tree":' + b"[" * n + b"]" * n + b',"tensors":[]}')
        for n in (300, 450, 600, 750, 900)
    },
    "deeper than Python goes": forge(None, None, raw_header=b"[" * 10**5),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_header_is_a_message_error(fault: str) -> None:
    """Catches KeyError, OverflowError, RecursionError and their kind reaching the server, and huge allocations."""
    with pytest.raises(MessageError):
        decode(BAD[fault], Small)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 16 + HEADER - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_in_prefix_and_header_raise_nothing_but_message_errors(flips: list[tuple[int, int]]) -> None:
    """Catches any other exception from damaged bytes."""
    data = bytearray(GOOD)
    for where, mask in flips:
        data[where] ^= mask
    decodes_or_refuses(bytes(data))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["Small", "x", "0", "float32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["t", "m", "i", "r", "f", "x", "n", "0"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(trees, st.lists(st.tuples(st.sampled_from(["float32", "bool", "int8", "?"]), trees), max_size=2), st.binary())
def test_forged_headers_raise_nothing_but_message_errors(tree: Any, table: Any, body: bytes) -> None:
    """Catches any other exception from a header that is JSON and nothing else."""
    decodes_or_refuses(forge(tree, [list(row) for row in table], body))
    decodes_or_refuses(forge(small(tree), [list(row) for row in table], body))


class Plain(Message):
    text: str


def test_no_more_is_encoded_than_is_decoded() -> None:
    """Catches a limit that only the receiver knows."""
    for message in (Small(torch.zeros([1] * 65), 1), Plain("x" * (1 << 22))):
        with pytest.raises(MessageError, match="cannot travel"):
            encode(message)


class Rates(Message):
    rate: float


@pytest.mark.parametrize("value", [10**400, 2**53 + 1, True, "1", None])
def test_a_float_that_is_an_integer_beyond_floats_is_refused(value: Any) -> None:
    """Catches an OverflowError in whoever computes with it."""
    with pytest.raises(MessageError, match=r"Rates\.rate came as"):
        decode(forge({"r": "Rates", "f": {"rate": value}}, []), Rates)
    assert decode(forge({"r": "Rates", "f": {"rate": 2}}, []), Rates) == Rates(2)


def replaced(node: Any, path: list[int], value: Any) -> Any:
    """A tree of JSON with another value at the place to which the numbers lead."""
    if not path or not isinstance(node, list | dict) or not node:
        return value
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    at = keys[path[0] % len(keys)]
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[at] = replaced(node[at], path[1:], value)
    return copy


@settings(max_examples=150, deadline=None)
@given(records, st.lists(st.integers(0, 20), max_size=6), trees)
def test_one_lie_in_an_honest_header_raises_nothing_but_message_errors(record: Any, path: list[int], lie: Any) -> None:
    """Catches lies that random headers never reach: one field, side, number or class that is not what it was."""
    data = encode(record)
    length = struct.unpack_from("<Q", data, 8)[0]
    header = json.dumps(replaced(json.loads(data[16 : 16 + length]), path, lie)).encode()
    try:
        got = decode(struct.pack("<8sQ", MAGIC, len(header)) + header + data[16 + length :], Everything)
    except MessageError:
        return
    assert size(got).total == len(encode(got))


def decodes_or_refuses(data: bytes) -> None:
    try:
        decode(data, Small)
    except MessageError:
        return


def test_a_state_never_gets_bytes() -> None:
    """Catches the leak that matters most: a client's private state on the wire."""
    for call in (encode, size):
        with pytest.raises(MessageError, match="must not leave its owner"):
            call(Secret(torch.zeros(2)))  # type: ignore[arg-type]
        with pytest.raises(MessageError, match="must not leave its owner"):
            call(Nothing())  # type: ignore[arg-type]


def test_a_state_inside_a_message_never_gets_bytes_either() -> None:
    """Catches a private state that travels in a field, declared so or put there against the declaration."""
    with pytest.raises(TypeError, match="holds Secret, a State, which is private"):

        class Leak(Message):
            secret: Secret

    with pytest.raises(TypeError, match="holds Secret, a State, which is private"):

        class DeepLeak(Message):
            secrets: Mapping[str, tuple[Secret, ...]]

    for smuggled in (Secret(torch.zeros(2)), (Secret(torch.zeros(2)),), {"a": Secret(torch.zeros(2))}):
        with pytest.raises(MessageError, match="State: it must not leave its owner"):
            encode(Small(smuggled, 1))  # type: ignore[arg-type]


def test_a_state_may_hold_records_and_states_for_the_checkpoint() -> None:
    """Catches a guard against leaks that also forbids checkpoints."""

    class Outer(State):
        inner: Secret
        leaf: Leaf

    state = Outer(Secret(torch.ones(2)), Leaf(torch.ones(1), 3, torch.ones(1)))
    assert same(unflatten(flatten(state)[0], [t for _, t in flatten(state)[1]], Outer), state)


@pytest.mark.parametrize("hint", [object, bytes, list[int], set[int], dict[float, int], Any, Record, Message, complex])
def test_a_field_that_cannot_travel_is_refused_when_the_class_is_made(hint: Any) -> None:
    """Catches a fault that would otherwise show in the first round of a deployment."""
    with pytest.raises(TypeError, match=r"Bad\.x has type .* which cannot travel"):
        type("Bad", (Message,), {"__annotations__": {"x": hint}, "__qualname__": "Bad"})


def test_string_annotations_are_refused_with_the_reason() -> None:
    """Catches `from __future__ import annotations`, under which nothing could be checked."""
    with pytest.raises(TypeError, match="from __future__ import annotations"):
        type("Bad", (Message,), {"__annotations__": {"x": "Tensor"}})


def test_a_value_against_its_declaration_is_refused() -> None:
    """Catches a list or an object in a field: dataclasses do not check, the codec does."""
    for value in ([1, 2], object(), b"x"):
        with pytest.raises(MessageError, match="cannot travel"):
            encode(Small(value, 1))  # type: ignore[arg-type]


class Told(Message):
    model: Params
    num_examples: int
    note: str | None
    rates: tuple[float, ...]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("num_examples", "many"),
        ("num_examples", 1.5),
        ("note", 7),
        ("rates", ("a",)),
        ("model", {"a": 1}),
    ],
)
def test_fields_of_another_type_do_not_decode(field: str, value: object) -> None:
    """Catches a reply that decodes and fails in the middle of the server's round."""
    good: dict[str, Any] = {"model": {"w": torch.ones(2)}, "num_examples": 3, "note": None, "rates": (0.5, 1.0)}
    assert isinstance(decode(encode(Told(**good)), Told), Told)
    with pytest.raises(MessageError, match=rf"Told\.{field} came as"):
        decode(encode(Told(**{**good, field: value})), Told)
