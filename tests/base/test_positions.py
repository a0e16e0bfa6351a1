"""The code of positions: every mask comes back, in no more bytes than it must take, and nothing else is believed."""

import tracemalloc
from typing import Any

import gaps_by_hand
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base.errors import MessageError
from polyfed.base.positions import code, mask


def drawn(size: int, density: float, seed: int) -> Any:
    return np.random.default_rng(seed).random(size) < density


masks = st.one_of(
    st.builds(drawn, st.integers(0, 400), st.floats(0, 1), st.integers(0, 99)),
    st.lists(st.booleans(), max_size=60).map(lambda flags: np.array(flags, np.bool_)),
    st.builds(lambda size, step: np.arange(size) % step == step - 1, st.integers(0, 900), st.integers(1, 300)),
    st.builds(lambda size, start: np.arange(size) >= start, st.integers(0, 900), st.integers(0, 900)),
)


@settings(max_examples=300, deadline=None)
@given(masks)
def test_every_mask_comes_back_from_the_bytes_that_the_format_says(held: Any) -> None:
    """Catches another format than the documented one, a k that is not the best, and a place that is lost or moved."""
    made = code(held)
    assert made.tobytes() == gaps_by_hand.code(held.tolist())
    assert np.array_equal(mask(made, int(held.sum()), held.size), held)


@settings(max_examples=200, deadline=None)
@given(masks)
def test_no_other_form_is_shorter_by_more_than_a_byte(held: Any) -> None:
    """Catches patterns for which a bitmap or a list would pay, and bytes where all or nothing is held."""
    size, count = code(held).size, int(held.sum())
    assert size <= 1 + min(-(-held.size // 8), 4 * count)
    assert size == 0 or 0 < count < held.size


@pytest.mark.parametrize(
    "density", [0.001, 1 / 64, 1 / 32, 0.05, 1 / 16, 1 / 8, 0.2, 0.25, 0.382, 0.45, 0.6, 0.9, 0.99]
)
def test_positions_take_little_more_than_their_entropy(density: float) -> None:
    """Catches a k that does not follow the density, at all densities: so that layers may have unlike ones."""
    held = drawn(200_000, density, 0)
    share = held.mean()
    entropy = -held.size / 8 * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert entropy < code(held).size < 1.043 * entropy + 2
    assert code(held).size - entropy < 0.0031 * (4 * held.sum() + entropy) + 2


def test_large_gaps_are_exact() -> None:
    """Catches numbers that are too narrow for places beyond 2^16, and a walk to the best k that ends too early."""
    for places in ([0], [99_999], [3, 70_000, 70_001, 99_999], [99_998, 99_999]):
        held = np.zeros(100_000, np.bool_)
        held[places] = True
        for flags in (held, ~held):
            made = code(flags)
            assert np.array_equal(mask(made, int(flags.sum()), flags.size), flags)
            assert made.size <= 1 + -(-len(places) * 18 // 8)


@settings(max_examples=100, deadline=None)
@given(masks, st.data())
def test_damaged_codes_are_a_message_error_or_as_many_places(held: Any, data: st.DataObject) -> None:
    """Catches another exception, another number of places than of values, and two codes of one mask at one k."""
    made, count = bytearray(code(held)), int(held.sum())
    for _ in range(data.draw(st.integers(1, 3)) if made else 0):
        made[data.draw(st.integers(0, len(made) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    believed(bytes(made), count, held.size)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 200))
def test_random_bytes_are_a_message_error_or_as_many_places(data: bytes, count: int, size: int) -> None:
    """Catches the same for bytes of nobody's."""
    believed(data, count, size)


def believed(data: bytes, count: int, size: int) -> None:
    """Check that bytes are refused, or are the one way to write as many places with their k."""
    try:
        got = mask(np.frombuffer(data, np.uint8), count, size)
    except MessageError:
        return
    assert got.shape == (size,)
    assert int(got.sum()) == count
    text = gaps_by_hand.bits(gaps_by_hand.gaps(got.tolist()), data[0] if data else 0)
    assert len(data) == (1 + -(-len(text) // 8) if text else 0)
    assert "".join(format(byte, "08b") for byte in data[1:])[: len(text)] == text


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.8])
def test_truncated_and_lengthened_codes_are_refused(density: float) -> None:
    """Catches places that are lost with the end of a message, and bytes that nobody reads."""
    held = drawn(300, density, 1)
    made, count = code(held), int(held.sum())
    for end in range(made.size):
        with pytest.raises(MessageError, match=r"positions of \d+ bytes came for"):
            mask(made[:end], count, held.size)
    for more in (b"\0", b"\x80", b"\xff" * 9):
        with pytest.raises(MessageError, match="came"):
            mask(np.concatenate((made, np.frombuffer(more, np.uint8))), count, held.size)


@pytest.mark.parametrize(
    ("data", "count", "size", "says"),
    [
        (b"", 5, 4, "5 values came for 4 weights"),
        (b"\0", 4, 4, "expected none"),
        (b"\0", 0, 4, "expected none"),
        (b"", 1, 4, "no code of this length"),
        (b"\xff\x80", 1, 4, "with k = 255"),
        (b"\4\0\1", 1, 4, "with k = 4"),
        (b"\4\x28", 1, 4, "with k = 4"),
        (b"\x46" + 8 * b"\0" + b"\6", 1, 4, "with k = 70"),
        (b"\0\xc0", 1, 4, "2 places, expected 1"),
        (b"\0\0", 1, 4, "0 places, expected 1"),
        (b"\0\x08", 1, 4, "the last of them is 4"),
        (b"\2\xe0", 1, 3, "the last of them is 3"),
    ],
)
def test_a_lie_is_told(data: bytes, count: int, size: int, says: str) -> None:
    """Catches a place beyond the end, too few or too many places, and a k of which a shift would overflow."""
    with pytest.raises(MessageError, match=says):
        mask(np.frombuffer(data, np.uint8), count, size)


@pytest.mark.parametrize(("k", "count"), [(0, 2), (3, 2), (0, 50), (255, 50)])
def test_a_lie_costs_no_memory(k: int, count: int) -> None:
    """Catches bits that are unpacked, eight times as large as what came, before it is known how many there can be."""
    data = np.zeros(4_000_000, np.uint8)
    data[0] = k
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="no code of this length"):
            mask(data, count, 100)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
