"""UCI HAR: nine signals of a phone at the waist of 30 subjects; its zip file as UCI gives it, or the unpacked folder.

A window is a line of 128 numbers in the text file of each signal: 2.56 seconds at 50 Hz, half of which the next window
of the subject repeats. The 561 features that others computed from the windows are not read; asked for, the reader makes
a table of five plain statistics of each signal.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Container, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.data.arrays import numbered
from polyfed.data.catalogue import STEPS
from polyfed.data.columns import Column
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cache import Arrays, cached_arrays, fingerprint
from polyfed.data.readers.class_names import HAR_CLASSES

#: The signals in the order of the channels: acceleration without and with gravity in g, angular velocity in rad/s.
SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
SUBJECTS = 30
FOLDER = "UCI HAR Dataset"

_VERSION = 1  # raise it when decoding changes, so that older caches are not used
_LENGTH = STEPS["uci-har"]
_PARTS = ("train", "test")
_NAMES = tuple(
    f"{part}/{name}_{part}.txt"
    for part in _PARTS
    for name in ("subject", "y", *(f"Inertial Signals/{s}" for s in SIGNALS))
)
_ODD = "it is damaged or another file"
# What zipfile raises on a damaged, foreign or encrypted archive.
_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def har_files(place: Path) -> list[Path]:
    """Return the source files at ``place``: a zip file, or those of the unpacked folder.

    Args:
        place: the zip file; or a folder with it, with ``train/`` and ``test/``, or with the folder "UCI HAR Dataset".

    Raises:
        DataError: none of these is there, or there are several zip files.
    """
    if place.is_file():
        return [place]
    for folder in (place, place / FOLDER):
        if any((folder / part).is_dir() for part in _PARTS):
            return [path for name in _NAMES if (path := folder / name).is_file()]
    archives = sorted(place.glob("*.zip"))
    if len(archives) == 1:
        return archives
    raise DataError(
        f"{place}: holds {len(archives) or 'no'} zip files and no folders train/ and test/; expected the zip file of "
        f"UCI HAR, or its folder {FOLDER!r}; correct the path, or name the zip file itself"
    )


def load_har(place: Path, cache: Path, *, statistics: bool = False) -> Dataset:
    """The data set at ``place``: series ``(N, 9, 128)``, subjects as groups, the windows of nine subjects as test rows.

    Args:
        place: as for `har_files`.
        cache: folder of decoded data sets.
        statistics: whether a row is a table's instead: ``(N, 45)`` mean, standard deviation, smallest and largest value
            and mean step of each signal.

    Raises:
        DataError: files are missing, damaged, of another layout, or disagree.
    """
    files = har_files(place)
    kept = cache / f"uci-har-{fingerprint(_VERSION, 'uci-har', files=files)}.npz"
    arrays = cached_arrays(kept, lambda: read_har(place), _usable)
    groups, names = numbered(arrays["subjects"], len(arrays["y"]), f"{place}: subjects")
    x, columns = _statistics(arrays["x"]) if statistics else (arrays["x"], ())
    return Dataset(
        "uci-har",
        torch.from_numpy(x),
        torch.from_numpy(arrays["y"]),
        HAR_CLASSES,
        (),
        (),
        test_rows=np.arange(int(arrays["n_train"]), len(arrays["y"]), dtype=np.int64),
        groups=groups,
        group_names=names,
        columns=columns,
        declared="features" if statistics else "series",
        channels_first=not statistics,
    )


def _statistics(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], tuple[Column, ...]]:
    """Signals ``(N, 9, 128)`` -> ``(N, 45)`` features, and their columns."""
    step = np.abs(np.diff(x, axis=2)).mean(2)
    each = {"mean": x.mean(2), "deviation": x.std(2), "smallest": x.min(2), "largest": x.max(2), "step": step}
    found = np.stack([*each.values()], axis=2).reshape(len(x), -1)  # (N, 9 * 5)
    names = [f"{signal} {what}" for signal in SIGNALS for what in each]
    ends = zip(names, found.min(0).tolist(), found.max(0).tolist(), strict=True)
    features = (Column(name, "number", low=low, high=high) for name, low, high in ends)
    return found, (*features, Column("activity", "label", HAR_CLASSES))


def read_har(place: Path) -> dict[str, NDArray[Any]]:
    """Return ``x`` ``(N, 9, 128)`` float32, ``y`` and ``subjects`` ``(N,)`` int64, and ``n_train``, the training rows.

    Args:
        place: as for `har_files`.

    Raises:
        DataError: files are missing, damaged, of another layout, or disagree.
    """
    with _opened(place) as read:
        x, y, subjects = zip(*(_part(read, part, place) for part in _PARTS), strict=True)
    return {
        "x": np.concatenate(x),
        "y": np.concatenate(y),
        "subjects": np.concatenate(subjects),
        "n_train": np.asarray(len(y[0])),
    }


def _usable(arrays: Arrays) -> bool:
    return (
        set(arrays) == {"x", "y", "subjects", "n_train"}
        and arrays["x"].dtype == np.float32
        and arrays["x"].shape == (len(arrays["y"]), len(SIGNALS), _LENGTH)
        and arrays["y"].dtype == arrays["subjects"].dtype == np.int64
        and arrays["n_train"].shape == ()
    )


@contextmanager
def _opened(place: Path) -> Generator[Callable[[str], bytes]]:
    """Yield what reads one of ``_NAMES``; nothing is unpacked to disk."""
    files = har_files(place)
    if files == [place] or [file.suffix for file in files[:1]] == [".zip"]:
        try:
            with zipfile.ZipFile(files[0]) as archive:
                yield _reader(archive, files[0])
        except _DAMAGED as error:
            what = "it is truncated, as the list of files at its end is missing" if _cut(files[0], error) else _ODD
            raise DataError(f"{files[0]}: cannot be read as a zip file ({error}); {what}; fetch it again") from error
        return
    found = {name: path for name in _NAMES for path in files if path.as_posix().endswith(f"/{name}")}
    _check_names(found, place)

    def read(name: str) -> bytes:
        try:
            return found[name].read_bytes()
        except OSError as error:
            raise DataError(f"{found[name]}: cannot be read ({error}); correct its permissions") from error

    yield read


def _cut(path: Path, error: Exception) -> bool:
    """Whether a file begins as a zip file and lacks the end of one."""
    if not isinstance(error, zipfile.BadZipFile) or zipfile.is_zipfile(path):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reader(archive: zipfile.ZipFile, where: Path) -> Callable[[str], bytes]:
    members = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    found = {name: member for name in _NAMES for member in members if f"/{member}".endswith(f"/{name}")}
    inner = [name for name in members if name.endswith(".zip")]
    if not found and len(inner) == 1:  # UCI's own download is a zip file in a zip file
        return _reader(zipfile.ZipFile(io.BytesIO(archive.read(inner[0]))), where)
    _check_names(found, where)
    return lambda name: archive.read(found[name])


def _check_names(found: Container[str], where: Path) -> None:
    missing = [name for name in _NAMES if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{where}: {missing[0]}{more} not found; expected the layout of UCI's zip file: for train and test the "
            f"subjects, the labels y, the {len(SIGNALS)} files of 'Inertial Signals' (the 561 features of X_train.txt "
            "are not read); fetch it again, or correct the path"
        )


def _part(
    read: Callable[[str], bytes], part: str, place: Path
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The windows, classes from 0 and subjects of the part "train" or "test"."""
    y = _whole(read, f"{part}/y_{part}.txt", len(HAR_CLASSES), place)
    subjects = _whole(read, f"{part}/subject_{part}.txt", SUBJECTS, place)
    x = np.empty((len(y), len(SIGNALS), _LENGTH), dtype=np.float32)
    lengths = {f"subject_{part}.txt": len(subjects)}
    for channel, signal in enumerate(SIGNALS):
        values = _table(read, f"{part}/Inertial Signals/{signal}_{part}.txt", _LENGTH, place)
        lengths[f"{signal}_{part}.txt"] = len(values)
        if len(values) == len(y):
            x[:, channel] = values
    for name, length in lengths.items():
        if length != len(y):
            raise DataError(
                f"{place}: {name} has {length} lines but y_{part}.txt has {len(y)}; the files do not belong together, "
                "or one is truncated; fetch them again"
            )
    return x, y - 1, subjects


def _table(read: Callable[[str], bytes], name: str, columns: int, place: Path) -> NDArray[np.float64]:
    """The numbers of a text file, ``(lines, columns)``."""
    raw = read(name)
    if not raw.strip() or not raw.endswith(b"\n"):  # a number that is cut short would still be a number
        raise DataError(f"{place}: {name} is empty or ends inside a line; it is truncated, fetch it again")
    try:
        values = np.loadtxt(io.BytesIO(raw), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(
            f"{place}: {name} is no table of numbers ({error}); it is damaged or another file; fetch it again"
        ) from error
    if values.shape[1] != columns or not np.isfinite(values).all():
        finite = "" if np.isfinite(values).all() else ", not all finite"
        raise DataError(
            f"{place}: {name} has {values.shape[1]} numbers in a line{finite}; expected {columns} finite numbers; is "
            "it another file under this name?"
        )
    return values


def _whole(read: Callable[[str], bytes], name: str, highest: int, place: Path) -> NDArray[np.int64]:
    """The numbers from 1 to ``highest`` of a text file with one in each line, ``(lines,)``."""
    values = _table(read, name, 1, place)[:, 0]
    wrong = np.flatnonzero((values != np.floor(values)) | (values < 1) | (values > highest))
    if len(wrong):
        raise DataError(
            f"{place}: line {wrong[0] + 1} of {name} is {values[wrong[0]]:g}; expected a whole number from 1 to "
            f"{highest}; the file is damaged or another one, fetch it again"
        )
    return values.astype(np.int64)
