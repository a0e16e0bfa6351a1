"""The file of one client's own rows: how a site reads it with the settings that all sites share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyfed.base.errors import DataError
from polyfed.config import Config
from polyfed.data.catalogue import DATASET_OPTIONS, TABLES
from polyfed.data.dataset import Dataset
from polyfed.data.sources import load_dataset
from polyfed.rounds.federation import with_units

_KINDS = ("csv", "npz", "parquet", "images")


def kind_of_file(path: Path) -> str:
    """Return the kind of data set of a client's own file; a folder holds images by class.

    Raises:
        DataError: it is none of these.
    """
    kind = "images" if path.is_dir() else path.suffix.removeprefix(".").lower()
    if kind not in _KINDS:
        raise DataError(
            f"{path}: expected a .csv, .parquet or .npz file, or a folder of images by class; see `polyfed list "
            "datasets`"
        )
    return kind


def options_of_file(config: Config, kind: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the reader of a client's own file: the configuration's, and its own before them.

    The configuration's are for files of its own kind, or for any table if that kind is a table.

    Args:
        config: the configuration of the run.
        kind: the kind of the file.
        own: the client's own options.
    """
    told = config.data
    alike = kind == told.dataset or {kind, told.dataset} <= TABLES.keys()
    common = {name: value for name, value in told.options.items() if alike and name in DATASET_OPTIONS[kind]}
    return common | dict(own)


def read_own(config: Config, path: Path, options: Mapping[str, Any]) -> Dataset:
    """Return a client's own rows, with the classes and columns of ``config.data.agreed``.

    Args:
        config: the configuration of the run.
        path: the file, or a folder of images.
        options: of its reader, as `options_of_file` returns them.

    Raises:
        PolyfedError: the file cannot be read, or does not fit what was agreed.
    """
    kind = kind_of_file(path)
    read = load_dataset(
        kind,
        path=path,
        image_size=config.data.image_size if kind in ("npz", "images") else None,
        task=config.data.task,
        agreed=config.data.agreed,
        **options,
    )
    return with_units(read, config)
