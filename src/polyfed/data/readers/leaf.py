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
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

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
    if not place.exists():
        raise DataError(f"{place}: no such file or folder; expected files of LEAF's layout; correct the path")
    files = leaf_files(place)
    if not files[0]:
        raise DataError(f"{place}: holds no *.json, nor does its folder train; expected files of LEAF's layout")
    read = {file: _rows(file) for part in files for file in part}
    of_words = [file for file, found in read.items() if isinstance(found[0][1], list)]
    if of_words and len(of_words) < len(read):
        other = next(file for file in read if file not in of_words)
        raise DataError(f"{of_words[0]}: its texts are lists of words, and those of {other} are not; expected one kind")
    parts = [[row for file in part for row in read[file]] for part in files]
    rows = [*parts[0], *parts[1]]
    counts = Counter(token for _, x, y in parts[0] for token in (*x, y))
    known = sorted(counts, key=lambda token: (-counts[token], token))[: vocabulary - 2]
    classes = (UNKNOWN, *known)
    number = {token: at for at, token in enumerate(known, 1)}
    groups, names = coded([user for user, _, _ in rows])
    return Dataset(
        place.stem,
        torch.from_numpy(leaf_tokens([x for _, x, _ in rows], classes, length or max(len(x) for _, x, _ in rows))),
        torch.tensor([number.get(y, 0) for _, _, y in rows]),
        classes,
        (),
        (),
        test_rows=np.arange(len(parts[0]), len(rows), dtype=np.int64) if parts[1] else None,
        groups=groups,
        group_names=names,
        declared="tokens",
        bucket=bucket,
    )


def leaf_tokens(texts: Sequence[Sequence[str]], classes: Sequence[str], length: int) -> NDArray[np.int64]:
    """Return the tokens ``(N, length)`` of texts, of which the last are kept; class c of ``classes`` is token c + 1."""
    number = {token: at for at, token in enumerate(classes[1:], 2)}
    tokens = np.zeros((len(texts), length), dtype=np.int64)
    for row, text in zip(tokens, texts, strict=True):
        kept = [number.get(token, 1) for token in text[-length:]]
        row[: len(kept)] = kept
    return tokens


def leaf_texts(path: Path) -> tuple[list[str], list[Sequence[str]]]:
    """Return user and ``x`` of each row of a file, whose users need no ``y``.

    Raises:
        DataError: it is damaged or of another layout.
    """
    rows = _rows(path, labelled=False)
    return [user for user, _, _ in rows], [x for _, x, _ in rows]


def _entry(value: Any, key: str) -> Any:
    """What a json object has under a key; None if it lacks the key, or is another json value."""
    return cast("dict[str, Any]", value).get(key) if isinstance(value, dict) else None


def of_leaf(dataset: Dataset) -> bool:
    """Return whether the classes of a data set are the vocabulary of its tokens, class c being token c + 1."""
    return dataset.kind == "tokens" and dataset.classes[:1] == (UNKNOWN,)


def _rows(path: Path, *, labelled: bool = True) -> list[tuple[str, Sequence[str], str]]:
    """User, tokens and next token of each row; "" for the next token if it is not wanted."""
    rows: list[tuple[str, Any, Any]] = []
    keys = ("x", "y") if labelled else ("x",)
    layout = f"expected a json object with users and user_data, and for each user lists {' and '.join(keys)}"
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not of LEAF's layout, as it is no json file ({error}); {layout}") from error
    users, data = _entry(found, "users"), _entry(found, "user_data")
    if not isinstance(users, list) or not isinstance(data, dict):
        raise DataError(f"{path}: is not of LEAF's layout, as it lacks users or user_data; {layout}")
    named, known = [str(user) for user in cast("list[Any]", users)], cast("dict[str, Any]", data)
    if odd := [*(user for user, n in Counter(named).items() if n > 1), *(user for user in known if user not in named)]:
        what = "is named twice in users" if odd[0] in named else "is not named in users"
        raise DataError(f"{path}: is not of LEAF's layout, as user {odd[0]!r} {what}; {layout}")
    counts: list[int] = []
    for user in cast("list[Any]", users):
        own = _entry(data, user) if isinstance(user, str) else None
        x, y = _entry(own, "x"), _entry(own, "y")
        if not isinstance(x, list) or (labelled and not isinstance(y, list)):
            raise DataError(f"{path}: is not of LEAF's layout, as user {user!r} has no {' and '.join(keys)}; {layout}")
        texts = cast("list[Any]", x)
        following = cast("list[Any]", y) if labelled else [""] * len(texts)
        if len(texts) != len(following):
            raise DataError(
                f"{path}: is not of LEAF's layout, as user {user!r} has {len(texts)} entries of x and {len(following)} "
                f"of y; {layout} of one length"
            )
        rows += zip([user] * len(texts), texts, following, strict=True)
        counts.append(len(texts))
    if (declared := _entry(found, "num_samples")) is not None and declared != counts:
        raise DataError(
            f"{path}: num_samples is {declared}, and users have {counts} rows; the file is damaged, make it anew"
        )
    for user, x, y in rows:
        words = isinstance(x, list) and all(isinstance(token, str) for token in x)
        following = isinstance(y, str) and (not labelled or (bool(y) if words else len(y) == 1))
        if not (following and x and (words or isinstance(x, str)) and isinstance(x, type(rows[0][1]))):
            raise DataError(
                f"{path}: user {user!r} has x = {repr(x)[:60]} and y = {repr(y)[:60]}; expected for x a text or a list "
                "of words, one kind in a file, none empty, and for y the character or the word that follows; classes "
                "of texts are not read from LEAF's layout: put such texts into a csv or parquet file, and name their "
                "column by its option `text`"
            )
    if not rows:
        raise DataError(f"{path}: has no rows; {layout}")
    return rows
