"""Text that several folders make: the nearest known word, and tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def nearest(word: str, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean 'x'?"`` where a known word is near, ``"; did you mean 'x' or 'y'?"`` for several, else ``""``.

    Args:
        word: what was given.
        known: what is expected.
        most: how many suggestions to make at most.
    """
    near = get_close_matches(word, list(known), n=most)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def hint(word: str, known: Iterable[str], most: int = 1) -> str:
    """`nearest`, or a mere semicolon, for a list of what is known to follow."""
    return nearest(word, known, most) or ";"


def alternatives(word: str, known: Iterable[str]) -> str:
    """The three known words nearest to ``word``, else the first eight; ``""`` if there are none."""
    names = list(known)
    return ", ".join(map(repr, get_close_matches(word, names, n=3, cutoff=0.4) or names[:8]))


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV, its lines ended by a line feed; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()
