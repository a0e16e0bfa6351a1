"""Text in LEAF's layout: what comes next after some characters, or after some words. Users are the groups.

A file is ``{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}``. An entry of ``x``
is a string, whose characters are the tokens, as in LEAF's Shakespeare (a role of a play is a user), or a list of words;
the entry of ``y`` is the character, or the word, that follows.

Reference:
    Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, https://arxiv.org/abs/1812.01097.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyfed.base.errors import DataError
from polyfed.data.arrays import coded
from polyfed.data.catalogue import VOCABULARY
from polyfed.data.dataset import Dataset

#: The class, and the token 1, of a character or word that the vocabulary lacks.
UNKNOWN = "<unknown>"


def leaf_files(place: Path) -> tuple[list[Path], list[Path]]:
    """Return the training files and the test files: those of ``train/`` and ``test/``; else all files, and none."""
    if place.is_file():
        return [place], []
    parts = [sorted((place / part).glob("*.json")) for part in ("train", "test")]
    return (parts[0], parts[1]) if parts[0] else (sorted(place.glob("*.json")), [])


def load_leaf(place: Path, *, vocabulary: int = VOCABULARY, length: int | None = None, bucket: int = 16) -> Dataset:
    """The data set at ``place``: tokens ``(N, length)``, and the next token as the class.

    Tokens are numbered from 2 by how often training rows have them; 0 is padding, 1 unknown. Class c is token c + 1.

    Args:
        place: a file, a folder of files, or a folder with ``train/`` and ``test/``.
        vocabulary: most tokens, padding and the unknown included; it is that of the training rows.
        length: most tokens of a row, of which the last are kept; None: as many as the longest row has.
        bucket: as of `Dataset`.

    Raises:
        DataError: there are no files, or one is damaged or of another layout.
    """
    files = leaf_files(place)
    if not files[0]:
        raise DataError(f"{place}: holds no *.json, nor does its folder train; expected files of LEAF's layout")
    parts = [[row for file in part for row in _rows(file)] for part in files]
    rows = [*parts[0], *parts[1]]
    counts = Counter(token for _, x, y in parts[0] for token in (*x, y))
    known = sorted(counts, key=lambda token: (-counts[token], token))[: vocabulary - 2]
    number = {token: at for at, token in enumerate(known, 2)}
    longest = length or max(len(x) for _, x, _ in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    for row, (_, x, _) in zip(tokens, rows, strict=True):
        kept = [number.get(token, 1) for token in x[-longest:]]
        row[: len(kept)] = kept
    groups, names = coded([user for user, _, _ in rows])
    return Dataset(
        place.stem,
        torch.from_numpy(tokens),
        torch.tensor([number.get(y, 1) - 1 for _, _, y in rows]),
        (UNKNOWN, *known),
        (),
        (),
        test_rows=np.arange(len(parts[0]), len(rows), dtype=np.int64) if parts[1] else None,
        groups=groups,
        group_names=names,
        declared="tokens",
        bucket=bucket,
    )


def _rows(path: Path) -> list[tuple[str, Sequence[str], str]]:
    """User, tokens and next token of each row."""
    try:
        found: Any = json.loads(path.read_bytes())
        data = found["user_data"]
        rows = [(user, x, y) for user in found["users"] for x, y in zip(data[user]["x"], data[user]["y"], strict=True)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not of LEAF's layout ({type(error).__name__}: {error}); expected a json object with users and "
            "user_data, and as many entries of x as of y for each user"
        ) from error
    for user, x, y in rows:
        words = isinstance(x, list) and all(isinstance(token, str) for token in x)
        if not (isinstance(y, str) and y and x and (words or isinstance(x, str))):
            raise DataError(
                f"{path}: user {user!r} has x = {str(x)[:60]!r} and y = {str(y)[:60]!r}; expected for x a text or a "
                "list of words, none empty, and for y the character or the word that follows"
            )
    return rows
