"""Rows to predict: tables without a label, whose columns are found by name, arrays, image files and texts."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.text import nearest
from polyfed.data.catalogue import DATASET_OPTIONS
from polyfed.data.columns import ColumnKind
from polyfed.data.dataset import Kind
from polyfed.data.images import pad_or_resize, resize
from polyfed.data.readers.agnews import text_of
from polyfed.data.readers.cache import read_npz
from polyfed.data.readers.cells import Sheet, Table, read_cells
from polyfed.data.readers.csv import open_csv
from polyfed.data.readers.folder import image_files
from polyfed.data.readers.leaf import leaf_texts, leaf_tokens
from polyfed.data.readers.parquet_table import open_parquet
from polyfed.data.readers.pictures import decoded
from polyfed.data.readers.rules import Rules
from polyfed.data.readers.table import number_cells
from polyfed.data.readers.tokenizer import encoded

#: Options of a table that say how its cells are read, and not what its columns are.
_OF_CELLS = ("missing", "also_missing", "decimal", "thousands")


@dataclass(frozen=True)
class NewRows:
    """Rows to predict.

    Args:
        inputs: what a trained model takes, in order: numbers and codes of a table, or one array.
        kept: the cells of further columns, which the predictions are to show.
        unknown: by column, how many cells hold a category that training did not know, and one of them.
    """

    inputs: tuple[Tensor, ...]
    kept: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    unknown: Mapping[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.inputs[0])


def read_new_table(
    path: Path,
    columns: Mapping[str, tuple[str, ...] | None],
    options: Mapping[str, Any],
    *,
    header: bool = True,
    keep: Sequence[str] = (),
    reads: Collection[str] | None = None,
) -> NewRows:
    """Read a csv or parquet file of rows to predict.

    Columns are found by name, in any order; columns that are neither features nor kept, such as a label, are not read.
    Features that the model does not read are missing in every row, and need not be in the file.
    A cell is missing where training would have taken it for missing, and where it holds a category that training did
    not know.

    Args:
        path: the file.
        columns: the features of the training, in order: the levels of a category, None for a number.
        options: the options with which the training's table was read.
        header: whether the file names its columns; without, the columns are those of the training's file by number.
        keep: names of further columns to return as texts.
        reads: the features that the model reads; None for all.

    Raises:
        DataError: a column is missing, or a cell is no number where the training's were.
        ConfigError: a column to keep is not there.
    """
    rules = Rules(**{key: value for key, value in options.items() if key in _OF_CELLS})
    sheet = _opened(path, options, header, rules)
    names = list(sheet.names)
    wanted = [name for name in columns if reads is None or name in reads]
    if lacking := [name for name in wanted if name not in names]:
        raise DataError(
            f"{path}: lacks the column{'s' * (len(lacking) > 1)} {', '.join(map(repr, lacking))}"
            f"{nearest(lacking[0], names)}; expected every column that the model reads: {', '.join(wanted)}; "
            f"the file has {', '.join(names)}; a column whose values are not known may have empty cells"
        )
    _check_kept(path, names, keep)
    roles: dict[int, ColumnKind] = {}
    for at, name in enumerate(names):
        if name in wanted:
            if columns[name] is not None:
                roles[at] = "category"
        else:
            roles[at] = "unit" if name in keep else "ignored"
    table = read_cells([sheet], roles, rules, path)
    numbers, codes, unknown = list[NDArray[Any]](), list[NDArray[Any]](), dict[str, tuple[int, str]]()
    for name, levels in columns.items():
        at = names.index(name) if name in wanted else None
        if levels is None:
            numbers.append(np.full(table.starts[-1], np.nan) if at is None else number_cells(table, at))
        else:
            codes.append(np.full(table.starts[-1], -1) if at is None else _codes(table, at, levels, unknown))
    arrays = [np.stack(each, axis=1) for each in (numbers, codes) if each]
    inputs = tuple(torch.from_numpy(array) for array in arrays)
    second = table
    if doubled := [name for name in keep if name in wanted]:  # a feature is read again, as text
        again: dict[int, ColumnKind] = {at: "unit" if name in doubled else "ignored" for at, name in enumerate(names)}
        second = read_cells([sheet], again, rules, path)
    kept = {name: _texts(second if name in wanted else table, names.index(name)) for name in keep}
    return NewRows(inputs, kept, unknown)


def _opened(path: Path, options: Mapping[str, Any], header: bool, rules: Rules) -> Sheet:
    """Open a csv or parquet file of rows to predict."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (".csv", ".parquet"):
        what = "it has another ending" if path.is_file() else "there is no such file"
        raise DataError(f"{path}: {what}; expected a .csv or .parquet file of rows to predict")
    if suffix == ".parquet":
        return open_parquet(path)
    how = {key: options[key] for key in ("delimiter", "encoding") if key in options}
    return open_csv(path, header=header, rules=rules, **how)


def _check_kept(path: Path, names: Sequence[str], keep: Sequence[str]) -> None:
    """Refuse a column to keep that a file lacks."""
    if gone := [name for name in keep if name not in names]:
        raise ConfigError(f"keep: {path} has no column {gone[0]!r}{nearest(gone[0], names)}; it has {', '.join(names)}")


def _codes(table: Table, at: int, levels: Sequence[str], unknown: dict[str, tuple[int, str]]) -> NDArray[np.int64]:
    """The code of each cell, (N,), -1 where it is missing or unknown; unknown ones are counted."""
    numbers, texts = table.cells[at].joined(), list(table.cells[at].texts)
    code = {level: number for number, level in enumerate(levels)}
    strange = [number for number, text in enumerate(texts) if text not in code and text not in table.rules.missing]
    if strange:
        unknown[table.names[at]] = (int(np.isin(numbers, strange).sum()), texts[strange[0]])
    return np.asarray([*(code.get(text, -1) for text in texts), -1], dtype=np.int64)[numbers]


def _texts(table: Table, at: int) -> list[str]:
    numbers, texts = table.cells[at].joined(), [*table.cells[at].texts, ""]
    return [texts[number] for number in numbers]


def read_new_column(
    path: Path,
    column: str,
    tokenizer: str,
    length: int,
    options: Mapping[str, Any],
    *,
    header: bool = True,
    keep: Sequence[str] = (),
) -> NewRows:
    """Read the texts of a csv or parquet file, as tokens, as a table with the option ``text`` was read.

    Args:
        path: the file; of its columns only that of the texts, and those to keep, are read.
        column: the name of the column of the texts.
        tokenizer: the JSON text of the training's tokenizer.
        length: most tokens of a text.
        options: the options with which the training's table was read.
        header: as for `read_new_table`.
        keep: names of columns to return as texts.

    Raises:
        DataError: the column is missing, a text is empty, or the package ``tokenizers`` is not installed.
        ConfigError: a column to keep is not there.
    """
    rules = Rules(text=column)
    sheet = _opened(path, options, header, rules)
    names = list(sheet.names)
    if column not in names:
        raise DataError(
            f"{path}: lacks the column {column!r}{nearest(column, names)}; expected the column of texts that the "
            f"training had; the file has {', '.join(names)}"
        )
    _check_kept(path, names, keep)
    roles: dict[int, ColumnKind] = {at: "unit" if name in keep else "unused" for at, name in enumerate(names)}
    table = read_cells([sheet], {**roles, names.index(column): "text"}, rules, path)
    codes, texts = table.given(names.index(column), "text", ("",))
    tokens = encoded(texts, tokenizer, length, "the run's tokenizer.json")[codes]
    return NewRows((torch.from_numpy(tokens),), {name: _texts(table, names.index(name)) for name in keep})


def read_new_texts(path: Path, tokenizer: str, length: int, keep: Sequence[str] = ()) -> NewRows:
    """Read a csv file of texts, as tokens: of its columns title and description, or of its column text.

    Args:
        path: the file, whose first line names the columns.
        tokenizer: the JSON text of the training's tokenizer.
        length: most tokens of a text.
        keep: names of columns to return as texts.

    Raises:
        DataError: the file is damaged or lacks these columns, or the package ``tokenizers`` is not installed.
        ConfigError: a column to keep is not there.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            names, *rows = csv.reader(handle, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a csv file of texts ({error})") from error
    rows = [row for row in rows if row]  # an empty line
    wanted = next((some for some in (("title", "description"), ("text",)) if {*some} <= {*names}), None)
    if wanted is None:
        raise DataError(
            f"{path}: has the columns {', '.join(names)}; expected title and description, or text, in the first line"
        )
    _check_kept(path, names, keep)
    if wrong := [row for row in rows if len(row) != len(names)]:
        raise DataError(f"{path}: the row {wrong[0]!r} has {len(wrong[0])} cells; expected {len(names)}, as the header")
    if not rows:
        raise DataError(f"{path}: no rows below the header; expected at least one")
    texts = [text_of([row[names.index(name)] for name in wanted]) for row in rows]
    kept = {name: [row[names.index(name)] for row in rows] for name in keep}
    return NewRows((torch.from_numpy(encoded(texts, tokenizer, length, "the run's tokenizer.json")),), kept)


def read_new_leaf(path: Path, classes: Sequence[str], length: int) -> NewRows:
    """Read a file in LEAF's layout, whose users need no ``y``; predictions show the user of each row.

    Args:
        path: the file.
        classes: the classes of the training, which are its vocabulary.
        length: most tokens of a text.

    Raises:
        DataError: the file is damaged or of another layout, or has characters where the training had words.
    """
    users, texts = leaf_texts(path)
    # Of characters where the training had words, hardly a token would be known, and nothing would say so.
    words, had_words = not isinstance(texts[0], str), any(len(name) > 1 for name in classes[1:])
    if words != had_words and (had_words or any(len(word) > 1 for text in texts for word in text)):
        has, expected = ("lists of words" if kind else "texts of characters" for kind in (words, had_words))
        raise DataError(f"{path}: x has {has}; expected {expected}, as the model was trained on")
    return NewRows((torch.from_numpy(leaf_tokens(texts, classes, length)),), {"user": users})


def read_new_array(
    path: Path,
    kind: Kind,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: str | None = None,
    image_size: int | None = None,
) -> NewRows:
    """Read the array ``x`` of an .npz file, or the array of an .npy file.

    Args:
        path: the file.
        kind: what the rows of the training were.
        shape: shape of one row of the training.
        dtype: type of the rows of the training.
        layout: the option ``layout`` of the training: "NHWC" puts the channels last; None takes either.
        image_size: side to which the training's images were resized.

    Raises:
        DataError: a damaged file, or an array of another shape or type.
    """
    if path.suffix.lower() == ".npy":
        try:
            x: NDArray[Any] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as an .npy file ({error}); write it with numpy.save") from error
    else:
        arrays = read_npz(path)
        if "x" not in arrays:
            raise DataError(f"{path}: holds the arrays {', '.join(arrays) or 'none'}; expected x, the rows to predict")
        x = arrays["x"]
    got = f"{path}: x has shape {x.shape} and type {x.dtype}"
    images, words = kind == "image", kind == "tokens"
    # Without a layout, as of MedMNIST's files, the channels are last only where they can be nowhere else.
    if images and x.ndim == 4 and (layout == "NHWC" or (layout is None and x.shape[1] != shape[0] == x.shape[3])):
        x = x.transpose(0, 3, 1, 2)
    if (images and x.ndim == 3) or (kind == "series" and x.ndim == 2):
        x = x[:, None] if images else x[:, :, None]
    fits = "iu" if words or dtype == torch.uint8 else "fiub"
    right = x.dtype == np.uint8 if dtype == torch.uint8 else x.dtype.kind in fits
    if images and image_size is not None and right and x.ndim == 4:
        x = resize(torch.from_numpy(np.ascontiguousarray(x)), image_size).numpy()
    if not right or x.shape[1:] != shape or not len(x):
        what = {"iu": "whole numbers", "fiub": "numbers"}[fits] if dtype != torch.uint8 else "bytes (uint8)"
        raise DataError(f"{got}; expected {what} of shape {('N', *shape)}, as the model was trained on")
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=str(dtype).removeprefix("torch.") if images else None))
    values = values if images else values.long() if words else values.double()
    if values.is_floating_point() and bool((~values.isfinite() if images else values.isinf()).any()):
        raise DataError(f"{path}: x holds {'a number that is not finite' if images else 'an infinite number'}")
    return NewRows((values,))


def read_new_images(
    paths: Sequence[Path],
    shape: tuple[int, ...],
    *,
    dataset: str,
    channels: int | None = None,
    image_size: int | None = None,
) -> NewRows:
    """Read image files, or those of a folder, as bytes.

    Args:
        paths: image files and folders.
        shape: (C, H, W) of the training.
        dataset: the training's data set; files for a set that comes with a size of its own are brought to that size.
        channels: the option ``channels`` of the training.
        image_size: side to which the training's images were resized.

    Raises:
        DataError: an image that does not decode, or of another size or colour.
    """
    sources: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_dir():
            sources += [(name, path / name) for name in image_files(path)]
        elif path.is_file():
            sources.append((str(path), path))
        else:
            raise DataError(f"{path}: no such file or folder; expected an image, or a folder of images")
    sized = image_size is not None or "channels" not in DATASET_OPTIONS.get(dataset, ())
    pixels: list[Tensor] = []
    for where, image in decoded(((str(path), path) for _, path in sources), channels, None):
        x = torch.from_numpy(image)[None]
        if sized and tuple(x.shape[2:]) != shape[1:]:
            x = pad_or_resize(x, shape[1])
        if tuple(x.shape[1:]) != shape:
            got, expected = (f"{c} channel{'s' * (c > 1)} of {w}x{h} pixels" for c, h, w in (x.shape[1:], shape))
            raise DataError(f"{where} has {got}; expected {expected}, as the model was trained on; convert the image")
        pixels.append(x)
    names = [name for name, _ in sources]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{twice[0]} is named twice; name each image once")
    return NewRows((torch.cat(pixels),), {"file": names})
