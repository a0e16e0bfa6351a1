"""The code of `polyfed.base.positions` in texts of zeros and ones, for masks of thousands of places at most."""

from collections.abc import Sequence


def gaps(held: Sequence[bool]) -> list[int]:
    """How many places lie between those of the rarer side."""
    rarer = 2 * sum(held) <= len(held)
    listed = [place for place, is_held in enumerate(held) if is_held == rarer]
    return [place - before - 1 for before, place in zip([-1, *listed], listed, strict=False)]


def bits(between: Sequence[int], k: int) -> str:
    """All remainders, then all quotients."""
    remainders = "".join(format(gap % 2**k, f"0{k}b") for gap in between) if k else ""
    return remainders + "".join("0" * (gap >> k) + "1" for gap in between)


def code(held: Sequence[bool]) -> bytes:
    """The bytes, of the best k of all."""
    if not (between := gaps(held)):
        return b""
    k = min(range(len(held).bit_length() + 1), key=lambda k: len(bits(between, k)))
    text = bits(between, k)
    text += "0" * (-len(text) % 8)
    return bytes([k, *(int(text[at : at + 8], 2) for at in range(0, len(text), 8))])
