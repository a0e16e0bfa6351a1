"""``load_dataset``: from a name to a checked ``Dataset``.

For a public data set polyfed uses the first of these places that exists: the given ``path``;
``$POLYFED_DATA/<name>``; the cache (``~/.cache/polyfed``, or ``$POLYFED_CACHE``), into which it downloads missing
files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.text import nearest
from polyfed.data.catalogue import DATASET_OPTIONS, DATASETS, option_fault
from polyfed.data.dataset import Dataset
from polyfed.data.images import check_image_size, pad_or_resize, pixel_stats, resize
from polyfed.data.readers.cache import Arrays, cached_arrays, file_digest, fingerprint
from polyfed.data.readers.cifar import CIFAR10, CIFAR100, CifarLayout, read_cifar_archive, read_cifar_folder
from polyfed.data.readers.class_names import CIFAR10_CLASSES, CIFAR100_CLASSES, FASHION_CLASSES
from polyfed.data.readers.csv import load_csv
from polyfed.data.readers.digits import DIGITS, load_digits
from polyfed.data.readers.download import OFFICIAL_FILES, fetch
from polyfed.data.readers.idx import IDX_NAMES, find_idx, read_mnist_layout
from polyfed.data.readers.npz import load_npz
from polyfed.data.readers.parquet import find_parquet, read_images

_CACHE_VERSION = 1  # raise it when decoding changes, so that older caches are not used


def load_dataset(
    name: str,
    *,
    path: Path | None = None,
    cache: Path | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Dataset:
    """Find, read and check a data set.

    Args:
        name: one of ``catalogue.DATASETS``.
        path: folder or file to read; required for "npz" and "csv".
        cache: folder for downloads and decoded pixels; None takes ``$POLYFED_CACHE`` or ``~/.cache/polyfed``.
        image_size: side of the images in pixels. None: 32 for the named image sets (28x28 images get a black
            frame of 2 pixels; 28 keeps them raw, any other side resizes), as stored for "npz".
        options: as listed in ``catalogue.DATASET_OPTIONS``; see ``load_npz`` and ``load_csv``.

    Raises:
        ConfigError: an unknown name or option.
        DataError: files are missing and cannot be fetched, or are damaged.
    """
    _check_arguments(name, path, image_size, options)
    before = file_digests(name, path=path, cache=cache)
    dataset = _read(name, path, _cache_root(cache), image_size, options)
    files = file_digests(name, path=path, cache=cache)
    if before and files != before:  # a file that was downloaded just now is not in `before`
        raise DataError(f"{path or name}: the files changed while they were read; try again when they no longer change")
    return replace(dataset, files=files)


def file_digests(name: str, *, path: Path | None = None, cache: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 of each existing file that `load_dataset` would read, by name; downloads nothing.

    Args:
        name: one of ``catalogue.DATASETS``.
        path: as for `load_dataset`.
        cache: as for `load_dataset`; digests of large files are kept there.

    Raises:
        DataError: a file cannot be read, or files are missing from the folder.
    """
    root = _cache_root(cache)
    return {file.name: file_digest(file, root) for file in _files(name, path, root)}


def _files(name: str, path: Path | None, root: Path) -> list[Path]:
    if name == "digits":
        return [DIGITS]
    place = _shared(name) if path is None else Path(path)
    if place is None or (path is None and not place.is_dir()):  # where it is downloaded to
        place = root / name / (OFFICIAL_FILES[name][0].name if name.startswith("cifar") else "")
    if not place.exists():
        return []
    if name in ("npz", "csv"):
        return [place] if place.is_file() else sorted(place.glob("*.csv"))
    if name.startswith("cifar"):
        return _cifar_reader(name, place, CIFAR10 if name == "cifar10" else CIFAR100, "")[0]
    return [file for part in IDX_NAMES if (file := find_idx(place, part)) is not None]


def _read(name: str, path: Path | None, root: Path, image_size: int | None, options: dict[str, Any]) -> Dataset:
    if name == "digits":
        return load_digits(image_size)
    if name == "npz" and path is not None:
        return load_npz(Path(path), image_size=image_size, **options)
    if name == "csv" and path is not None:
        return load_csv(Path(path), **options)
    side = check_image_size(image_size, 32)
    if name == "cifar10":
        return _load_cifar(name, path, root, side, CIFAR10, "label", CIFAR10_CLASSES)
    if name == "cifar100":
        return _load_cifar(name, path, root, side, CIFAR100, "fine_label", CIFAR100_CLASSES)
    classes = tuple("0123456789") if name == "mnist" else FASHION_CLASSES
    folder = _find(name, path, root)
    x, y, n_train = read_mnist_layout(folder)
    pixels = pad_or_resize(torch.from_numpy(x), side)
    mean, std = pixel_stats(pixels[:n_train])
    return _official(name, pixels, y, n_train, classes, mean, std, flip=name == "fashion-mnist")


def _check_arguments(name: str, path: Path | None, image_size: int | None, options: dict[str, Any]) -> None:
    if name not in DATASETS:
        near = nearest(name, DATASETS)
        raise ConfigError(f"dataset: got {name!r}; expected one of {', '.join(DATASETS)}{near}")
    faults = [
        f"{option}: not an option of dataset {name!r}; it has {', '.join(DATASET_OPTIONS[name]) or 'none'}"
        for option in sorted(options.keys() - set(DATASET_OPTIONS[name]))
    ]
    known = [option for option in DATASET_OPTIONS[name] if option in options]
    faults += [f"{option}: {fault}" for option in known if (fault := option_fault(option, options[option]))]
    if name in ("npz", "csv") and path is None:
        faults.append(f"path: missing; dataset {name!r} needs the path of your file")
    if name == "digits" and path is not None:
        faults.append(f"path: got {path}; dataset 'digits' comes with polyfed and takes no path")
    if name == "csv" and image_size is not None:
        faults.append(f"image_size: got {image_size}; dataset 'csv' has no images")
    if faults:
        raise ConfigError(*faults)


def _cache_root(cache: Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    named = os.environ.get("POLYFED_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "polyfed"


def _shared(name: str) -> Path | None:
    """Return the folder below ``$POLYFED_DATA``, which need not exist; None if the variable is not set."""
    shared = os.environ.get("POLYFED_DATA")
    if shared and not Path(shared).is_dir():
        raise DataError(f"POLYFED_DATA: got {shared!r}; expected a folder that exists; correct or unset it")
    return Path(shared) / name if shared else None


def _find(name: str, path: Path | None, root: Path) -> Path:
    """The folder (or archive) that holds a public data set, downloaded as a last resort."""
    if path is not None:
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected the files of {name!r}; correct the path")
        return path
    shared = _shared(name)
    if shared is not None and shared.is_dir():
        return shared
    looked = [] if shared is None else [str(shared)]
    folder = root / name
    try:
        fetched = [fetch(file, folder) for file in OFFICIAL_FILES[name]]
    except DataError as error:
        looked.append(str(folder))
        raise DataError(
            f"dataset {name!r} was not found in {' or '.join(looked)}, and the download failed: {error}. Set "
            f"the data path to a folder with its files, or POLYFED_DATA to a folder that holds {name}/"
        ) from error
    return fetched[0] if name.startswith("cifar") else folder


def _load_cifar(
    name: str,
    path: Path | None,
    root: Path,
    side: int,
    layout: CifarLayout,
    label: str,
    classes: tuple[str, ...],
) -> Dataset:
    place = _find(name, path, root)
    files, read = _cifar_reader(name, place, layout, label)

    def build() -> Arrays:
        x, y, n_train = read()
        pixels = resize(torch.from_numpy(x.copy()), side)
        if y.min() < 0 or y.max() >= len(classes):
            raise DataError(
                f"{place}: labels run from {y.min()} to {y.max()}; expected 0 to {len(classes) - 1}; is it "
                "another data set?"
            )
        mean, std = pixel_stats(pixels[:n_train])
        stats = np.asarray([mean, std])
        return {"x": pixels.numpy(), "y": y, "n_train": np.asarray(n_train), "stats": stats}

    def usable(arrays: Arrays) -> bool:
        if set(arrays) != {"x", "y", "n_train", "stats"}:
            return False
        x, y = arrays["x"], arrays["y"]
        return (
            x.dtype == np.uint8
            and x.shape == (len(y), 3, side, side)
            and y.dtype == np.int64
            and arrays["stats"].shape == (2, 3)
            and arrays["n_train"].shape == ()
        )

    key = fingerprint(_CACHE_VERSION, name, side, files=files)
    arrays = cached_arrays(root / "decoded" / f"{name}-{side}-{key}.npz", build, usable)
    mean, std = (tuple(float(v) for v in row) for row in arrays["stats"])
    return _official(
        name,
        torch.from_numpy(arrays["x"]),
        arrays["y"],
        int(arrays["n_train"]),
        classes,
        mean,
        std,
        flip=True,
    )


def _cifar_reader(
    name: str, place: Path, layout: CifarLayout, label: str
) -> tuple[list[Path], Callable[[], tuple[NDArray[np.uint8], NDArray[np.int64], int]]]:
    """The source files of a CIFAR set, and a function that decodes them."""
    if place.is_file():
        return [place], lambda: read_cifar_archive(place, layout)
    shards = find_parquet(place)
    if shards["train"]:
        train, test = shards["train"], shards["test"]

        def read() -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
            parts = [read_images(file, label, (32, 32)) for file in (*train, *test)]
            n_train = sum(len(y) for _, y in parts[: len(train)])
            return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), n_train

        return [*train, *test], read
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


def _official(
    name: str,
    x: torch.Tensor,
    y: NDArray[np.int64],
    n_train: int,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    flip: bool,
) -> Dataset:
    return Dataset(
        name=name,
        x=x,
        y=torch.from_numpy(y),
        classes=classes,
        mean=mean,
        std=std,
        test_rows=np.arange(n_train, len(y), dtype=np.int64),
        flip=flip,
    )
