"""Predictions for new rows, read from files as the training's rows were."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyfed.base.errors import DataError
from polyfed.base.text import csv_text
from polyfed.data.readers.new_rows import (
    NewRows,
    read_new_array,
    read_new_column,
    read_new_images,
    read_new_leaf,
    read_new_table,
    read_new_texts,
)
from polyfed.execute.local_training import EVAL_BATCH, reported
from polyfed.trained.load import run_folder
from polyfed.trained.model import TrainedModel
from polyfed.trained.preprocessing import Preprocessing

_ARRAYS = (".npz", ".npy")


def read_rows_to_predict(
    run_dir: Path, paths: Sequence[Path], keep: Sequence[str] = (), *, reads: Collection[str] | None = None
) -> NewRows:
    """Read files as the training of a run read its own.

    Args:
        run_dir: the run directory, which names the columns and how cells are read.
        paths: for a table one .csv or .parquet file; for arrays one .npz or .npy file; image files or folders of them;
            for texts one .csv file, or one .json file in LEAF's layout.
        keep: for a table or a .csv file of texts: columns to return as texts.
        reads: for a table: the columns that the file must have, ``TrainedModel.reads``; None takes all of the training.

    Raises:
        DataError: files that do not fit the training.
        ConfigError: a column to keep is not there.
    """
    about = Preprocessing.read(run_folder(run_dir))
    array = len(paths) == 1 and paths[0].suffix.lower() in _ARRAYS
    suffix = paths[0].suffix.lower() if len(paths) == 1 else ""
    if (column := about.options.get("text")) is not None and about.tokenizer:
        if len(paths) != 1:
            raise DataError(f"got {len(paths)} files; expected one table of texts, a .csv or .parquet file")
        length, options = about.input_shape[0], about.options
        return read_new_column(paths[0], column, about.tokenizer, length, options, header=about.header, keep=keep)
    if suffix == ".csv" and about.tokenizer:
        return read_new_texts(paths[0], about.tokenizer, about.input_shape[0], keep)
    if keep and not about.columns:
        raise DataError(
            f"keep: got {', '.join(keep)}; the model was trained on {about.kind} data, which has no columns"
        )
    if about.columns:
        if len(paths) != 1:
            raise DataError(f"got {len(paths)} files; expected one table, a .csv or .parquet file")
        columns = {column.name: column.categories for column in about.columns}
        return read_new_table(paths[0], columns, about.options, header=about.header, keep=keep, reads=reads)
    if about.kind == "image" and about.dtype == "uint8" and not array:
        return read_new_images(
            paths,
            about.input_shape,
            dataset=about.dataset,
            channels=about.options.get("channels"),
            image_size=about.image_size,
        )
    if suffix == ".json" and about.dataset == "leaf":
        return read_new_leaf(paths[0], about.classes, about.input_shape[0])
    if not array:
        texts = ", or one .json file in LEAF's layout" if about.dataset == "leaf" else ""
        texts = ", or one .csv file of texts" if about.tokenizer else texts
        raise DataError(
            f"got {', '.join(map(str, paths))}; the model was trained on {about.kind} data of shape "
            f"{about.input_shape}: expected one .npz file with the array x, or one .npy file{texts}"
        )
    layout = about.options.get("layout")
    return read_new_array(
        paths[0], about.kind, about.input_shape, about.type, layout=layout, image_size=about.image_size
    )


@torch.no_grad()
def predicted(model: TrainedModel, rows: NewRows) -> Tensor:
    """Return the probabilities (N, L), or the predictions (N, 1), of rows, some at a time."""
    x = rows.inputs[0]
    about = f" of tokens from {int(x.min())} to {int(x.max())}" if _tokens(model) else ""

    def each() -> Iterator[Tensor]:
        for at in torch.arange(len(rows)).split(EVAL_BATCH):
            with reported(f"a prediction{about}"):
                yield model(*(value[at] for value in rows.inputs))

    return torch.cat(list(each()))


def _tokens(model: TrainedModel) -> bool:
    """Whether the model reads tokens."""
    return [given.name for given in model.inputs] == ["tokens"]


def predictions_csv(model: TrainedModel, rows: NewRows) -> str:
    """Return the predictions as CSV, a line for each row in their order.

    First come the columns that were kept, or ``file`` for images; then ``class`` and ``score NAME`` for each class, or
    ``prediction`` for a regression. Classes whose names repeat have their numbers as names.

    Args:
        model: the model.
        rows: the rows.

    Raises:
        ModelError: the network fails on them.
        DataError: an output is no number.
    """
    found = predicted(model, rows)
    if bool(found.isnan().any()):
        at = int(found.isnan().any(dim=1).nonzero()[0])
        cause = "is the row padding alone" if _tokens(model) else "is a value far too large"
        raise DataError(f"row {at + 1} has no prediction: the network's output is not finite; {cause}?")
    names = model.classes if len(set(model.classes)) == len(model.classes) else [*map(str, range(len(model.classes)))]
    heads = ["class", *(f"score {name}" for name in names)] if names else ["prediction"]
    lines: list[list[object]] = []
    for row, scores in enumerate(found.tolist()):
        chosen = [names[scores.index(max(scores))]] if names else []
        lines.append([*(texts[row] for texts in rows.kept.values()), *chosen, *scores])
    return csv_text([*rows.kept, *heads], lines)
