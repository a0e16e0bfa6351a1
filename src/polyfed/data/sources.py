"""``load_dataset``: from a name to a checked ``Dataset``.

For a public data set polyfed uses the first of these places that exists: the given ``path``;
``$POLYFED_DATA/<name>``; the cache (``~/.cache/polyfed``, or ``$POLYFED_CACHE``), into which it downloads missing
files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.text import nearest
from polyfed.data.catalogue import (
    DATASET_OPTIONS,
    DATASETS,
    IMAGELESS,
    INSIDE,
    NUMERIC,
    SIZES,
    TABLES,
    TEXTS,
    TOKENS,
    option_fault,
    option_misfits,
)
from polyfed.data.conform import conform
from polyfed.data.dataset import Dataset
from polyfed.data.images import check_image_size, pad_or_resize, pixel_stats, resize
from polyfed.data.readers.agnews import agnews_files, load_agnews
from polyfed.data.readers.breast_cancer import BREAST_CANCER, load_breast_cancer
from polyfed.data.readers.cache import Arrays, cached_arrays, file_digest, fingerprint, folder_digest
from polyfed.data.readers.cifar import CIFAR10, CIFAR100, joined, read_cifar_archive, read_cifar_folder
from polyfed.data.readers.class_names import CIFAR10_CLASSES, CIFAR100_CLASSES, FASHION_CLASSES
from polyfed.data.readers.csv import load_csv
from polyfed.data.readers.digits import DIGITS, load_digits
from polyfed.data.readers.download import OFFICIAL_FILES, fetch
from polyfed.data.readers.folder import load_folder
from polyfed.data.readers.har import har_files, load_har
from polyfed.data.readers.huggingface import load_huggingface
from polyfed.data.readers.idx import IDX_NAMES, find_idx, read_mnist_layout
from polyfed.data.readers.leaf import leaf_files, load_leaf
from polyfed.data.readers.medmnist import load_medmnist
from polyfed.data.readers.npz import load_npz
from polyfed.data.readers.parquet import find_parquet, read_images
from polyfed.data.readers.parquet_table import load_parquet
from polyfed.data.readers.svhn import load_svhn, svhn_names
from polyfed.data.readers.table import table_files
from polyfed.data.readers.tokenizer import Tokens
from polyfed.data.schema import Schema
from polyfed.metrics.catalogue import TaskKind

#: Data sets that are a folder, known by a digest of all its files.
_FOLDERS: Mapping[str, Callable[..., Dataset]] = {"images": load_folder, "huggingface": load_huggingface}

_CACHE_VERSION = 1  # raise it when decoding changes, so that older caches are not used


def load_dataset(
    name: str,
    *,
    path: Path | None = None,
    cache: Path | None = None,
    image_size: int | None = None,
    task: TaskKind = "classification",
    agreed: Schema | None = None,
    **options: Any,
) -> Dataset:
    """Find, read and check a data set.

    Args:
        name: one of ``catalogue.DATASETS``.
        path: folder or file to read; required for data of your own, such as "npz" and "csv".
        cache: folder for downloads and decoded pixels; None takes ``$POLYFED_CACHE`` or ``~/.cache/polyfed``.
        image_size: side of the images in pixels. None: 32 for the named image sets (28x28 images get a black
            frame of 2 pixels; 28 keeps them raw, any other side resizes), as stored for images of your own.
        task: with "regression" the label is a number to predict; for files of the user's own only.
        agreed: what all sites agreed on; a table of one of them may lack a class, even all but one.
        options: as listed in ``catalogue.DATASET_OPTIONS``; see ``load_npz``, ``load_medmnist``, ``load_csv``,
            ``table.Rules``, ``load_folder`` and ``load_huggingface``.

    Raises:
        ConfigError: an unknown name or option.
        DataError: files are missing and cannot be fetched, or are damaged.
    """
    _check_arguments(name, path, image_size, options)
    before = file_digests(name, path=path, cache=cache, options=options)
    if task == "regression" and name not in NUMERIC:
        raise ConfigError(f"task: got 'regression'; the labels of data set {name!r} are classes")
    if path is not None and name in TABLES:
        read = load_csv if name == "csv" else load_parquet
        if agreed is not None and agreed.classes:
            options.setdefault("classes", list(agreed.classes))
        rules = {option: value for option, value in options.items() if option not in TOKENS}
        how = {option: value for option, value in options.items() if option in TOKENS}
        tokens = None if options.get("text") is None else Tokens(_cache_root(cache) / "decoded", **how)
        columns = agreed.features() if agreed is not None and tokens is None else None
        dataset = read(Path(path), task=task, agreed=columns, tokens=tokens, **rules)
    else:
        given = {**options, "task": task} if name == "npz" else options
        if agreed is not None and name in ("npz", *_FOLDERS):
            given["known"] = agreed.classes
        dataset = _read(name, path, _cache_root(cache), image_size, given, "".join(before.values()))
    files = file_digests(name, path=path, cache=cache, options=options)
    known = {file: files.get(file) for file in before} if name in SIZES else files
    if before and known != before:  # a file that was downloaded just now is not in `before`
        raise DataError(f"{path or name}: the files changed while they were read; try again when they no longer change")
    dataset = replace(dataset, files=files)
    return dataset if agreed is None else conform(dataset, agreed)


def file_digests(
    name: str, *, path: Path | None = None, cache: Path | None = None, options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return the SHA-256 of each existing file that `load_dataset` would read, by name; downloads nothing.

    Args:
        name: one of ``catalogue.DATASETS``.
        path: as for `load_dataset`.
        cache: as for `load_dataset`; digests of large files are kept there.
        options: as for `load_dataset`; one of them may name a file.

    Raises:
        DataError: a file cannot be read, or files are missing from the folder.
    """
    root = _cache_root(cache)
    if name in _FOLDERS and path is not None and Path(path).is_dir():
        files = (file.relative_to(path) for file in sorted(Path(path).rglob("*")) if file.is_file())
        names = [file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)]
        return {Path(path).name: folder_digest(Path(path), names, root)}
    extra = bool((options or {}).get("extra"))
    digests = {file.name: file_digest(file, root) for file in _files(name, path, root, extra)}
    pretrained = (options or {}).get("tokenizer")
    if pretrained is not None and Path(pretrained).is_file():
        digests["tokenizer"] = file_digest(Path(pretrained), root)
    test = (options or {}).get("test")
    if path is not None and name in TABLES and Path(path).exists():
        apart = table_files(Path(path), TABLES[name], test)[1:] if Path(path).is_file() else []
        digests |= {str(test): file_digest(file, root) for file in apart}
    return digests


def _files(name: str, path: Path | None, root: Path, extra: bool) -> list[Path]:
    if name in INSIDE:
        return [DIGITS if name == "digits" else BREAST_CANCER]
    if name == "python":
        return []
    place = _find(name, path, root, download=False)
    if not place.exists():
        return []
    if name in TABLES:
        return table_files(place, TABLES[name])
    if name == "leaf":
        return [file for part in leaf_files(place) for file in part]
    if name not in SIZES:
        return [place]
    if name in TEXTS:
        return agnews_files(name, place)
    if name.startswith("cifar"):
        return _cifar_reader(name, place)[0]
    if name == "uci-har":
        return har_files(place)
    if name == "svhn":
        return [path for file in svhn_names(extra=extra) if (path := place / file).is_file()]
    return [file for part in IDX_NAMES if (file := find_idx(place, part)) is not None]


def _read(
    name: str, path: Path | None, root: Path, image_size: int | None, options: dict[str, Any], digest: str
) -> Dataset:
    if name == "digits":
        return load_digits(image_size)
    if name == "breast-cancer":
        return load_breast_cancer()
    if name in _FOLDERS and path is not None:
        cache = root / "decoded"
        return _FOLDERS[name](Path(path), cache=cache, digest=digest, image_size=image_size, **options)
    if name == "npz" and path is not None:
        return load_npz(Path(path), image_size=image_size, **options)
    if name == "medmnist" and path is not None:
        return load_medmnist(Path(path), image_size=image_size, **options)
    if name == "leaf" and path is not None:
        return load_leaf(Path(path), **options)
    side = check_image_size(image_size, 32)
    place = _find(name, path, root, download=True, extra=bool(options.get("extra")))
    if name == "uci-har":
        return load_har(place, root / "decoded", **options)
    if name in TEXTS:
        return load_agnews(name, place, root / "decoded", **options)
    if name == "svhn":
        return load_svhn(place, side, **options)
    if name.startswith("cifar"):
        return _load_cifar(name, place, root, side)
    x, y, n_train = read_mnist_layout(place)
    pixels = pad_or_resize(torch.from_numpy(x), side)
    return Dataset(
        name,
        pixels,
        torch.from_numpy(y),
        tuple("0123456789") if name == "mnist" else FASHION_CLASSES,
        *pixel_stats(pixels[:n_train]),
        test_rows=np.arange(n_train, len(y), dtype=np.int64),
        flip=name == "fashion-mnist",
    )


def _check_arguments(name: str, path: Path | None, image_size: int | None, options: dict[str, Any]) -> None:
    if name not in DATASETS:
        raise ConfigError(f"dataset: got {name!r}; expected one of {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    if name == "python":
        raise ConfigError(
            "dataset: got 'python', data that a program gives; start and resume such a run in Python, with "
            "polyfed.simulate(config, dataset=...) and polyfed.resume(folder, dataset=...)"
        )
    known = DATASET_OPTIONS[name]
    faults = [
        f"{option}: not an option of dataset {name!r}; it has {', '.join(known) or 'none'}"
        for option in sorted(options.keys() - set(known))
    ]
    faults += [
        f"{option}: {fault}"
        for option in known
        if option in options and (fault := option_fault(name, option, options[option]))
    ]
    faults += [f"{option}: {fault}" for option, fault in option_misfits(name, options)]
    if name not in SIZES and path is None:
        faults.append(f"path: missing; dataset {name!r} needs the path of your file")
    if name in INSIDE and path is not None:
        faults.append(f"path: got {path}; dataset {name!r} comes with polyfed and takes no path")
    if name in (*TABLES, *IMAGELESS) and image_size is not None:
        faults.append(f"image_size: got {image_size}; dataset {name!r} has no images")
    if faults:
        raise ConfigError(*faults)


def _cache_root(cache: Path | None) -> Path:
    return Path(cache or os.environ.get("POLYFED_CACHE") or Path.home() / ".cache" / "polyfed")


def _find(name: str, path: Path | None, root: Path, *, download: bool, extra: bool = False) -> Path:
    """The folder (or archive) that holds a data set; if ``download``, a public one is fetched as a last resort.

    Of SVHN's files the largest is fetched with ``extra`` alone.
    """
    if path is not None:
        if download and not Path(path).exists():
            raise DataError(f"{path}: no such file or folder; expected the files of {name!r}; correct the path")
        return Path(path)
    shared = os.environ.get("POLYFED_DATA")
    if shared and not Path(shared).is_dir():
        raise DataError(f"POLYFED_DATA: got {shared!r}; expected a folder that exists; correct or unset it")
    folders = [Path(place) / TEXTS.get(name, name) for place in (shared, root) if place]
    if shared and folders[0].is_dir():
        return folders[0]
    if download and name not in OFFICIAL_FILES:
        if not folders[-1].is_dir():
            raise DataError(
                f"dataset {name!r} was not found in {' or '.join(map(str, folders))}, and polyfed downloads "
                f"{', '.join(OFFICIAL_FILES)} alone; set the data path to a folder with its files"
            )
        return folders[-1]
    if download:
        try:
            for file in OFFICIAL_FILES[name]:
                if name != "svhn" or file.name in svhn_names(extra=extra):
                    fetch(file, folders[-1])
        except DataError as error:
            raise DataError(
                f"dataset {name!r} was not found in {' or '.join(map(str, folders))}, and the download failed: "
                f"{error}. Set the data path to a folder with its files, or POLYFED_DATA to a folder that holds {name}/"
            ) from error
    official = OFFICIAL_FILES.get(name, ())
    return folders[-1] / (official[0].name if len(official) == 1 else "")


def _load_cifar(name: str, place: Path, root: Path, side: int) -> Dataset:
    classes = CIFAR10_CLASSES if name == "cifar10" else CIFAR100_CLASSES
    files, read = _cifar_reader(name, place)

    def build() -> Arrays:
        x, y, n_train = read()
        pixels = resize(torch.from_numpy(x.copy()), side)
        if y.min() < 0 or y.max() >= len(classes):
            raise DataError(
                f"{place}: labels run from {y.min()} to {y.max()}; expected 0 to {len(classes) - 1}; is it "
                "another data set?"
            )
        stats = np.asarray(pixel_stats(pixels[:n_train]))
        return {"x": pixels.numpy(), "y": y, "n_train": np.asarray(n_train), "stats": stats}

    def usable(arrays: Arrays) -> bool:
        return (
            set(arrays) == {"x", "y", "n_train", "stats"}
            and arrays["x"].dtype == np.uint8
            and arrays["x"].shape == (len(arrays["y"]), 3, side, side)
            and arrays["y"].dtype == np.int64
            and arrays["stats"].shape == (2, 3)
            and arrays["n_train"].shape == ()
        )

    arrays = cached_arrays(
        root / "decoded" / f"{name}-{side}-{fingerprint(_CACHE_VERSION, name, side, files=files)}.npz", build, usable
    )
    mean, std = (tuple(float(v) for v in row) for row in arrays["stats"])
    return Dataset(
        name,
        torch.from_numpy(arrays["x"]),
        torch.from_numpy(arrays["y"]),
        classes,
        mean,
        std,
        test_rows=np.arange(int(arrays["n_train"]), len(arrays["y"]), dtype=np.int64),
        flip=True,
    )


def _cifar_reader(
    name: str, place: Path
) -> tuple[list[Path], Callable[[], tuple[NDArray[np.uint8], NDArray[np.int64], int]]]:
    """The source files of a CIFAR set, and a function that decodes them."""
    layout, label = (CIFAR10, "label") if name == "cifar10" else (CIFAR100, "fine_label")
    if place.is_file():
        return [place], lambda: read_cifar_archive(place, layout)
    train, test = find_parquet(place)
    if train:
        return [*train, *test], lambda: joined(
            [read_images(file, label, (32, 32)) for file in (*train, *test)], len(train)
        )
    for folder in (place, *sorted(p for p in place.iterdir() if p.is_dir())):
        if (folder / layout.test).is_file():
            found = [folder / file for file in (*layout.train, layout.test)]
            return [p for p in found if p.is_file()], partial(read_cifar_folder, folder, layout)
    archive = place / layout.archive
    if archive.is_file():
        return [archive], lambda: read_cifar_archive(archive, layout)
    raise DataError(
        f"{place}: no files of {name!r}; expected train-*.parquet and test-*.parquet, or {layout.test} and "
        f"its companions, or {layout.archive}; correct the path"
    )
