"""Text for several folders: the nearest known word, and tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_BEGINNING = 3  # letters of a word from which its beginning names it


def nearest(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return ``"; did you mean 'x'?"`` for a near known word, ``"; did you mean 'x' or 'y'?"`` for two, else ``""``.

    Capitals do not count. Without a near word, a known word that begins with the given word is meant.

    Args:
        word: the given word.
        known: the known words.
        most: the largest number of suggestions.
    """
    near = _near(word, list(known), most, 0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def hint(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return `nearest`, or else a semicolon; a list of the known words is to follow."""
    return nearest(word, known, most) or ";"


def alternatives(word: str, known: Iterable[str]) -> str:
    """Return the three known words nearest to ``word``, else the first eight; ``""`` if there are no known words."""
    names = list(known)
    return ", ".join(map(repr, _near(word, names, 3, 0.4) or names[:8]))


def _near(word: str, known: Sequence[str], most: int, cutoff: float) -> list[str]:
    """Return the known words nearest to ``word``, or else those that begin with it, whatever their capitals."""
    small = word.lower()
    lowered = dict.fromkeys(name.lower() for name in known)
    near = get_close_matches(small, lowered, n=most, cutoff=cutoff)
    near = near or [name for name in lowered if len(small) >= _BEGINNING and name.startswith(small)]
    return [name for low in near for name in known if name.lower() == low][:most]


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV with line feeds; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()
