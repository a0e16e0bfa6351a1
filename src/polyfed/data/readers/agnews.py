"""AG News in its csv layout, ``ag_news_csv``: a line is a class from 1, a title and a description.

The data set is Zhang, Zhao and LeCun's, "Character-level Convolutional Networks for Text Classification", NeurIPS 2015;
the labels of people are those of Huang et al., "NoisyAG-News", 2024, https://arxiv.org/abs/2407.06579.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from polyfed.base.errors import DataError
from polyfed.data.catalogue import LENGTH, VOCABULARY
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cache import Arrays, cached_arrays, fingerprint
from polyfed.data.readers.class_names import AGNEWS_CLASSES
from polyfed.data.readers.tokenizer import Tokens, read_utf8

NOISY = "train_noisy_labels.txt"
#: Name of a data set -> its files, training rows first; the last has the test rows.
FILES = {
    "agnews": ("train.csv", "test.csv"),
    "agnews-noisy": ("train.csv", NOISY, "test.csv"),
    "agnews-extra": ("train.csv", "train_extra_joined.csv", "test.csv"),
}

_VERSION = 3  # raise it when decoding changes, so that older caches are not used


def agnews_files(name: str, place: Path) -> list[Path]:
    """Return the files of the data set ``name`` that are in the folder ``place``."""
    return [path for file in FILES[name] if (path := place / file).is_file()]


def load_agnews(
    name: str,
    place: Path,
    cache: Path,
    *,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
    tokenizer: str | None = None,
    bucket: int = 16,
) -> Dataset:
    """The data set ``name``: tokens ``(N, length)`` of title and description, with the official test rows.

    Args:
        name: a key of `FILES`.
        place: the folder of its files.
        cache: folder of decoded data sets and learnt tokenizers.
        vocabulary: most tokens that the tokenizer learns from the training rows, at least 258.
        length: most tokens of a text.
        tokenizer: a ``tokenizer.json`` to take in place of a learnt one.
        bucket: as of `Dataset`.

    Raises:
        DataError: files are missing or damaged, or the package ``tokenizers`` is needed and not installed.
    """
    files = agnews_files(name, place)
    if missing := [file for file in FILES[name] if place / file not in files]:
        raise DataError(
            f"{place}: {', '.join(missing)} not found; {name!r} has {', '.join(FILES[name])}; correct the path"
        )
    how = Tokens(cache, vocabulary, length, tokenizer, bucket)
    given = how.given
    sources = [*files, *([given] if given else [])]

    def build() -> Arrays:
        parts = [_rows(file) for file in files if file.suffix == ".csv"]
        texts = [text for part, _ in parts for text in part]
        labels = [label for _, part in parts for label in part]
        n_train = len(texts) - len(parts[-1][0])
        if name == "agnews-noisy":
            labels[:n_train] = _labels(place / NOISY, n_train)
        x, text = how.of(texts, texts[:n_train])
        whole = np.frombuffer(text.encode(), dtype=np.uint8)
        return {"x": x.astype(np.int32), "y": np.array(labels) - 1, "n_train": np.asarray(n_train), "tokenizer": whole}

    def usable(arrays: Arrays) -> bool:
        return (
            set(arrays) == {"x", "y", "n_train", "tokenizer"}
            and arrays["tokenizer"].dtype == np.uint8
            and arrays["x"].dtype == np.int32
            and arrays["x"].shape == (len(arrays["y"]), length)
            and arrays["y"].dtype == np.int64
            and arrays["n_train"].shape == ()
        )

    key = fingerprint(_VERSION, name, vocabulary if given is None else "given", length, files=sources)
    arrays = cached_arrays(cache / f"{name}-{key}.npz", build, usable)
    return Dataset(
        name,
        torch.from_numpy(arrays["x"].astype(np.int64)),
        torch.from_numpy(arrays["y"]),
        AGNEWS_CLASSES,
        (),
        (),
        test_rows=np.arange(int(arrays["n_train"]), len(arrays["y"]), dtype=np.int64),
        declared="tokens",
        bucket=bucket,
        tokenizer=arrays["tokenizer"].tobytes().decode(),
    )


def text_of(cells: Sequence[str]) -> str:
    """Return the text of a title and a description."""
    # A backslash stands for a line end, and before "$" or another backslash for nothing.
    return " ".join(" ".join(cells).replace("\\", " ").split())


def _rows(path: Path) -> tuple[list[str], list[int]]:
    """The texts and the classes, from 1, of a file."""
    texts, labels = list[str](), list[int]()
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            for number, cells in enumerate(csv.reader(handle, strict=True), 1):
                if len(cells) != 3 or cells[0] not in ("1", "2", "3", "4"):
                    raise DataError(
                        f"{path}: row {number} is {cells!r}; expected a class from 1 to 4, a title and a description; "
                        "the file is truncated or another one, fetch it again"
                    )
                labels.append(int(cells[0]))
                texts.append(text_of(cells[1:]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); it is damaged or another file, fetch it again") from error
    if not texts:
        raise DataError(f"{path}: is empty; fetch it again")
    return texts, labels


def _labels(path: Path, rows: int) -> list[int]:
    lines = read_utf8(path).split()
    if len(lines) != rows or not {*lines} <= {"1", "2", "3", "4"}:
        raise DataError(
            f"{path}: holds {len(lines)} labels; expected one from 1 to 4 for each of the {rows} rows of train.csv; "
            "do the files belong together?"
        )
    return [int(line) for line in lines]
