"""``preprocessing.json`` and its tensors: what was fitted to the training data, so that nobody needs them later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyfed.base import files
from polyfed.base.errors import CheckpointError
from polyfed.base.types import ClientId
from polyfed.data.client import Standardise
from polyfed.data.columns import Column
from polyfed.data.dataset import Dataset, Kind
from polyfed.metrics.catalogue import TaskKind
from polyfed.rounds.federation import Federation

NAME = "preprocessing.json"
#: Options of a reader that new rows are read by, too; the others say which column is what.
_OF_READING = (
    "union",
    "delimiter",
    "encoding",
    "decimal",
    "thousands",
    "missing",
    "also_missing",
    "layout",
    "channels",
)
#: Beside it, for data that each client standardises.
STATISTICS = "preprocessing.safetensors"
#: Beside it, for texts: what made tokens of them, as the package ``tokenizers`` reads it.
TOKENIZER = "tokenizer.json"


class InputColumn(BaseModel, frozen=True, extra="forbid"):
    """A feature of a table.

    Args:
        name: the name of the column.
        categories: the levels of a category, in order of their codes; None for a number.
    """

    name: str
    categories: tuple[str, ...] | None = None


class Preprocessing(BaseModel, frozen=True, extra="forbid"):
    """What turns the rows of a file into the input of a network, apart from the statistics of each client.

    Args:
        kind: what the rows are.
        task: whether labels are classes or numbers to predict.
        input_shape: shape of one row after its categories became zeros and ones.
        dtype: type of the rows as the data set holds them: "uint8", "float32", "float64" or "int64".
        classes: the name of each class; empty for a regression.
        columns: the features of a table in order; empty if the data are no table.
        header: whether the first line of the table names the columns.
        mean: of each channel of images; empty for other kinds.
        std: likewise.
        channels_first: whether series are (C, T).
        target_offset: for a regression: a network's output times the scale, plus the offset, is the prediction.
        target_scale: likewise.
        clients: the clients' names in order of their numbers; empty if they have none.
        dataset: the name of the data set, which says what kind of file was read.
        options: the options of its reader that say how cells and arrays are read, and which column has texts, by name.
        image_size: side to which images were resized; None if they were not.
        tokenizer: of texts: the JSON text of their tokenizer, which is a file of its own; empty if there is none.
    """

    kind: Kind
    task: TaskKind
    input_shape: tuple[int, ...]
    dtype: str
    classes: tuple[str, ...] = ()
    columns: tuple[InputColumn, ...] = ()
    header: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels_first: bool = False
    target_offset: float = 0.0
    target_scale: float = 1.0
    clients: tuple[str, ...] = ()
    dataset: str
    options: dict[str, Any] = {}
    image_size: int | None = None
    tokenizer: str = Field(default="", exclude=True)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        name: str,
        options: Mapping[str, Any],
        *,
        image_size: int | None = None,
        clients: Sequence[str] = (),
    ) -> Preprocessing:
        """Return the preprocessing of a data set.

        Args:
            dataset: the data set.
            name: its name in the configuration.
            options: the options of its reader.
            image_size: as the configuration has it.
            clients: the clients' names.
        """
        columns = dataset.columns
        texts = [column.name for column in columns if column.kind == "text"]
        return cls(
            kind=dataset.kind,
            task=dataset.task,
            input_shape=dataset.input_shape,
            dtype=str(dataset.x.dtype).removeprefix("torch."),
            classes=dataset.classes,
            columns=tuple(_input(column) for column in columns if column.kind in ("number", "category")),
            # without a header, a reader names columns by their numbers
            header=any(column.name != f"column {at}" for at, column in enumerate(columns)),
            mean=dataset.mean,
            std=dataset.std,
            channels_first=dataset.channels_first,
            target_offset=dataset.target_offset,
            target_scale=dataset.target_scale,
            clients=tuple(clients),
            dataset=name,
            options={option: options[option] for option in _OF_READING if option in options}
            | ({"text": texts[0]} if texts else {}),
            image_size=image_size,
            tokenizer=dataset.tokenizer,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 for a regression."""
        return len(self.classes) or 1

    @property
    def feature_columns(self) -> tuple[tuple[str, int], ...]:
        """Name and number of features of each column of a table, in order."""
        return tuple((c.name, 1 if c.categories is None else len(c.categories)) for c in self.columns)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """`Task.dtype`: int64 for tokens; else None, the type of new tensors."""
        return torch.int64 if self.kind == "tokens" else None

    @property
    def type(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    @property
    def numbers(self) -> list[str]:
        """Names of the columns of numbers, in order."""
        return [column.name for column in self.columns if column.categories is None]

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """The levels of each column of categories, in order."""
        return {column.name: column.categories for column in self.columns if column.categories is not None}

    def write(self, folder: Path, *, mode: int = 0o666) -> None:
        """Write ``preprocessing.json``, and before it the tokenizer if there is one.

        Args:
            folder: where.
            mode: its permissions, as in `files.write`.

        Raises:
            StorageError: the disk is full.
        """
        if self.tokenizer:
            files.write(folder / TOKENIZER, self.tokenizer.encode(), mode=mode)
        files.write(folder / NAME, (self.model_dump_json(indent=2) + "\n").encode(), mode=mode)

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """Read the files that `write` wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = folder / NAME
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no {NAME}, which says what was fitted to the training data. A deployed server has no "
                "data: take the client's own folder, STATE_DIR/EXPERIMENT/client-K. If an earlier version of polyfed "
                f"began the run, `polyfed resume {folder}` writes it where the data are at hand"
            )
        beside = folder / TOKENIZER
        try:
            tokenizer = {"tokenizer": beside.read_text("utf-8")} if beside.exists() else {}
            return cls.model_validate(files.read_json(path) | tokenizer)
        except ValidationError as error:
            raise CheckpointError(f"{path} is damaged ({error.errors()[0]['msg']}); restore it") from error


def _input(column: Column) -> InputColumn:
    return InputColumn(name=column.name, categories=column.categories if column.kind == "category" else None)


def keep_preprocessing(federation: Federation, folder: Path) -> None:
    """Write what was fitted to the data of a simulation's clients, unless it is there.

    Raises:
        StorageError: the disk is full.
    """
    if (folder / NAME).exists():
        return
    data = federation.data
    if federation.dataset.is_standardised:
        each = [data.stats(client) for client in (*range(data.num_clients), None)]
        keep_statistics([stats for stats in each if stats is not None], folder)
    given, names = federation.config.data, federation.client_names
    about = Preprocessing.of(
        federation.dataset, given.dataset, given.options, image_size=given.image_size, clients=names
    )
    about.write(folder)  # last: it says that both files are whole


def keep_statistics(stats: Sequence[Standardise], folder: Path, *, mode: int = 0o666) -> None:
    """Write ``preprocessing.safetensors``.

    Args:
        stats: of each client in order of its number, then of all clients together.
        folder: where.
        mode: as in `files.write`.
    """
    tensors: dict[str, Tensor] = {}
    for field in ("mean", "inverse"):
        rows = torch.stack([getattr(one, field).cpu() for one in stats])
        tensors |= {field: rows[:-1].contiguous(), f"{field}.all": rows[-1].clone()}
    files.write(folder / STATISTICS, safetensors.torch.save(tensors), mode=mode)


def statistics(folder: Path, client: ClientId | None) -> Standardise:
    """Read how a client's rows are standardised; None stands for the training rows of all clients together.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / STATISTICS
    try:
        # Any: safetensors has no types for its slices.
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            if client is None:
                return Standardise(file.get_tensor("mean.all"), file.get_tensor("inverse.all"))
            return Standardise(*(file.get_slice(name)[client : client + 1][0] for name in ("mean", "inverse")))
    except (OSError, SafetensorError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it from a copy") from error
