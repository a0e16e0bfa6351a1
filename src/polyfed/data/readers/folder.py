"""A user's own folder of image files: by class, by client and class, or with a table of classes and clients."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.arrays import Rows, coded, ranked
from polyfed.data.dataset import Dataset
from polyfed.data.readers.cache import fingerprint
from polyfed.data.readers.pictures import read_pictures

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")  # what desktops leave in folders
_PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "validation"
)


@dataclass
class _Listing:
    """Of each image the file, class and more; lists are empty where the source does not say."""

    files: list[str]
    labels: list[str]
    clients: list[str] = field(default_factory=list[str])
    tests: list[bool] = field(default_factory=list[bool])
    units: list[str] = field(default_factory=list[str])
    times: list[str] = field(default_factory=list[str])
    empty: set[str] = field(default_factory=set[str])  # classes without an image


def load_folder(
    path: Path,
    *,
    cache: Path,
    digest: str,
    image_size: int | None = None,
    channels: int | None = None,
    flip: bool = False,
    table: str | None = None,
    file: str | int | None = None,
    label: str | int | None = None,
    group: str | int | None = None,
    unit: str | int | None = None,
    time: str | int | None = None,
    known: Sequence[str] = (),
) -> Dataset:
    """The data set of a folder of images.

    Without a table the folders say it: ``<class>/*.png``, or ``<client>/<class>/*.png``, and either of them below
    ``train/`` and ``test/`` for an official split. Rows are in the order of the files' names, or of the table.

    Args:
        path: the folder.
        cache: folder of decoded pixels.
        digest: changes with the content of the folder.
        image_size: side to which images are resized; None if all are of one size.
        channels: 1 or 3, to which images are converted; None if all have as many.
        flip: whether a mirrored image keeps its class.
        table: name of a csv file in the folder, with a header, that has a line for each image.
        file: column of the table with the file's name; None: "file".
        label: column with the class; None: "label".
        group: column with the client; None: "client" if there is such a column.
        unit: column with the unit, such as the patient.
        time: column with the time.
        known: classes that other sites have.

    Raises:
        DataError: images in no class, or damaged or unequal images; the text names them.
        ConfigError: columns of a table without a table.
    """
    names = image_files(path)
    if table is not None:
        found = _by_table(path, names, table, file or "file", label or "label", group, unit, time)
    elif given := [
        key
        for key, value in {"file": file, "label": label, "group": group, "unit": unit, "time": time}.items()
        if value is not None
    ]:
        raise ConfigError(*(f"{key}: names a column of a table; set the option table too" for key in given))
    else:
        found = _by_folder(path, names)
    x = read_pictures(
        ((str(path / name), path / name) for name in found.files),
        len(found.files),
        channels=channels,
        side=image_size,
        cache=cache / f"images-{fingerprint(1, digest, found.files, image_size, channels)}.npz",
    )
    y, classes = coded(found.labels, sorted(found.empty.union(known)))
    groups, group_names = coded(found.clients) if found.clients else (None, ())
    return Rows(torch.from_numpy(x), "image").dataset(
        path.name,
        path,
        y=torch.from_numpy(y),
        classes=classes,
        test_rows=np.flatnonzero(found.tests).astype(np.int64) if found.tests else None,
        groups=groups,
        group_names=group_names,
        flip=flip,
        units=coded(found.units, units=True)[0] if found.units else None,
        times=ranked(np.array(found.times), len(y), f"{path / str(table)}: column {time!r}") if found.times else None,
    )


def image_files(path: Path) -> list[str]:
    """Return the image files below a folder, relative to it, in order; hidden files are left out.

    Raises:
        DataError: no folder, no image, or another file among the images.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a folder of images; correct the path")
    names: list[str] = []
    for file in path.rglob("*"):
        name = file.relative_to(path)
        if any(part.startswith(".") or part.lower() in _JUNK for part in name.parts) or file.is_dir():
            continue
        if file.suffix.lower() in _ENDINGS:
            names.append(name.as_posix())
        elif len(name.parts) > 1:
            raise DataError(
                f"{file} is no image ({', '.join(_ENDINGS)}); remove it, or move it to {path} itself, where other "
                "files may lie"
            )
    if not names:
        raise DataError(f"{path}: no image below this folder; expected <class>/*.png, or another of {_ENDINGS[1:]}")
    return sorted(names, key=lambda name: name.split("/"))


def _by_folder(path: Path, names: Sequence[str]) -> _Listing:
    parts = [name.split("/") for name in names]
    top = {part[0] for part in parts}
    tests: list[bool] = []
    named = {name: _PARTS[name.casefold()] for name in top if name.casefold() in _PARTS}
    if named:
        if len(named) < len(top) or sorted(named.values()) != ["test", "train"]:
            raise DataError(
                f"{path}: has the parts {', '.join(sorted(top))}; expected train and test beside no other folder, or "
                "no folder of such a name; move the others into one of the two, give the path of a single part, or "
                "rename a class"
            )
        tests = [named[part[0]] == "test" for part in parts]
    inner = [part[1:] if tests else part for part in parts]
    depth = max(map(len, inner))
    odd = next((at for at, part in enumerate(inner) if len(part) != depth), None)
    if depth not in (2, 3) or odd is not None:
        other = f" and {names[list(map(len, inner)).index(depth)]}" if odd is not None else ""
        raise DataError(
            f"{path}: got {names[odd or 0]}{other}; expected all images as <class>/FILE, or all as "
            "<client>/<class>/FILE, below train/ and test/ for an official split, or a table of classes (option table)"
        )
    level = depth - 1 + bool(tests)
    folders = {folder.name for folder in path.glob("/".join("*" * level)) if folder.is_dir()}
    return _Listing(
        list(names),
        [part[-2] for part in inner],
        [part[0] for part in inner] if depth == 3 else [],
        tests,
        empty={name for name in folders if not name.startswith(".") and name.lower() not in _JUNK},
    )


def _by_table(
    path: Path,
    names: Sequence[str],
    table: str,
    file: str | int,
    label: str | int,
    group: str | int | None,
    unit: str | int | None,
    time: str | int | None,
) -> _Listing:
    where = path / table
    if not where.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"table: got {table!r}; expected a file below {path}, as a run is bound to all files there")
    try:
        with where.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: cannot be read as csv in UTF-8 ({error}); correct the file or its name") from error
    (_, header), *rows = lines or [(0, [])]
    if group is None and "client" in header:
        group = "client"
    columns = {
        option: _column(header, column, option, where)
        for option, column in (("file", file), ("label", label), ("group", group), ("unit", unit), ("time", time))
        if column is not None
    }
    known = _by_any_name(names)
    found: dict[str, list[str]] = {option: [] for option in columns}
    seen: dict[str, int] = {}
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{where}, line {line}: {len(row)} cells; expected {len(header)} as in the header")
        for option, at in columns.items():
            if not row[at]:
                raise DataError(f"{where}, line {line}: {header[at]!r} is empty; fill it or remove the line")
            found[option].append(row[at])
        matches = known.get(PurePosixPath(row[columns["file"]].replace("\\", "/")).as_posix(), ())
        if len(matches) != 1:
            what = f"is the name of {' and '.join(sorted(matches)[:2])}" if matches else f"is no image in {path}"
            raise DataError(
                f"{where}, line {line}: {row[columns['file']]!r} {what}; correct the name or add its folder"
            )
        (name,) = matches
        if name in seen:
            raise DataError(f"{where}, line {line}: {name} is in line {seen[name]} already; remove one of the lines")
        seen[name] = line
    if missing := sorted(set(names) - seen.keys()):
        raise DataError(
            f"{where}: no line for {missing[0]}{f' and {len(missing) - 1} more images' if missing[1:] else ''}; add "
            "the lines, or move the images out of the folder"
        )
    return _Listing(
        list(seen),
        found["label"],
        found.get("group", []),
        units=found.get("unit", []),
        times=found.get("time", []),
    )


def _by_any_name(names: Sequence[str]) -> dict[str, set[str]]:
    """The files that a cell can mean: by path, or else by path without ending, name, and name without ending."""
    known: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        pure = PurePosixPath(name)
        for short in {pure.with_suffix("").as_posix(), pure.name, pure.stem}:
            known[short].add(name)
    return {**known, **{name: {name} for name in names}}


def _column(header: Sequence[str], column: str | int, option: str, where: Path) -> int:
    if isinstance(column, int) and -len(header) <= column < len(header):
        return column % len(header)
    if isinstance(column, str) and header.count(column) == 1:
        return header.index(column)
    raise DataError(
        f"{where}: no column {column!r} for option {option!r}; the columns are {', '.join(header) or 'none'}"
    )
