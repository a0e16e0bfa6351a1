"""Which places of a tensor are held, in as few bytes as a mask without pattern allows: a Rice code of gaps.

    k u8 | of every listed place the remainder, k bits | of every listed place the quotient in unary | zeros to a byte

Of n places m are held. The rarer side is listed: the places that are held where 2 m <= n, else those that are not. The
gap of a listed place is the number of places since the one before it. Its remainder modulo 2^k takes k bits, its
quotient q is q zeros and a one; bits fill a byte from the highest. Where there is nothing to list, there are no bytes.
A reader knows n from its own network and m from the number of values.

The writer takes the k of the shortest code, so no other form is needed beside this one. k = 0 is the bitmap, without
the zeros at its end; where 2^k exceeds every gap, a place takes k + 1 bits, less than in a list of int32; and where
nothing is left out, there is nothing to send. Of a mask without pattern the code is within 4.3 % of the entropy of its
places, n H(m / n) bits, which is within 0.31 % of places and values of 4 bytes together.

    R. F. Rice: Some Practical Universal Noiseless Coding Techniques. JPL Publication 79-22, 1979.
"""

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import MessageError


def code(held: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the code of a mask.

    Args:
        held: (n,), whether each place is held.

    Returns:
        (bytes,), at most one more than of a bitmap, and than of an int32 for each place that is held.
    """
    listed = np.flatnonzero(held if 2 * int(np.count_nonzero(held)) <= held.size else ~held)
    if not listed.size:
        return np.empty(0, np.uint8)
    gaps = np.diff(listed, prepend=-1)
    gaps -= 1
    k = _parameter(gaps, held.size)
    ends = np.cumsum(gaps >> k)
    ends += np.arange(gaps.size)
    low, bits = gaps.size * k, np.zeros(gaps.size * k + int(ends[-1]) + 1, np.bool_)
    for bit in range(k):
        bits[bit:low:k] = gaps & (1 << (k - 1 - bit))
    bits[low:][ends] = True
    return np.concatenate((np.array([k], np.uint8), np.packbits(bits)))


def mask(code: NDArray[np.uint8], count: int, size: int) -> NDArray[np.bool_]:
    """Return the mask of a code.

    Args:
        code: (bytes,).
        count: how many places are held.
        size: how many places there are.

    Returns:
        (size,), of which ``count`` are true.

    Raises:
        MessageError: it is not the code of such a mask. Whatever came, memory is taken for ``size`` places at most.
    """
    listed, came = min(count, size - count), f"positions of {code.size:,} bytes came for {count:,} of {size:,} weights"
    if listed < 0:
        raise MessageError(f"{count:,} values came for {size:,} weights")
    if listed == 0:
        if code.size:
            raise MessageError(f"{came}; expected none")
        return np.full(size, count > 0)
    k = int(code[0]) if code.size else 0
    low, most = listed * k, listed * (k + 1) + (size >> k)  # as the quotients add up to at most size >> k
    if (listed << k) > 2 * size or not low + listed <= 8 * (code.size - 1) < most + 8:  # the best k is never so large
        raise MessageError(f"{came}; there is no code of this length with k = {k}")
    bits = np.unpackbits(code[1:]).view(np.bool_)  # nonzero of bools is ten times as fast as of numbers
    places = np.flatnonzero(bits[low:])
    if places.size != listed or low + int(places[-1]) < bits.size - 8:
        raise MessageError(f"{came}; they tell {places.size:,} places, expected {listed:,}, the last in the last byte")
    if k:
        order, rest = np.arange(listed), np.zeros(listed, np.int64)
        for bit in range(k):
            rest += rest
            rest += bits[bit:low:k]
        places -= order
        places <<= k
        places += np.cumsum(rest)
        places += order
    if places[-1] >= size:
        raise MessageError(f"{came}; the last of them is {int(places[-1]):,}")
    made = np.full(size, 2 * count > size)
    made[places] = 2 * count <= size
    return made


def _parameter(gaps: NDArray[np.int64], size: int) -> int:
    """The smallest k of the shortest code; the length is convex in k, so a walk downhill ends there."""

    def bits(k: int) -> int:
        return gaps.size * (k + 1) + int((gaps >> k).sum())

    k = max(0, (size // gaps.size).bit_length() - 2)
    while bits(k + 1) < bits(k):
        k += 1
    while k and bits(k - 1) <= bits(k):
        k -= 1
    return k
