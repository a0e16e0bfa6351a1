"""The rows of each client, as flat arrays with offsets, stored with a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyfed.base.errors import ConfigError, DataError, StorageError
from polyfed.base.files import replacing
from polyfed.base.rng import Rng
from polyfed.data.partition.apportion import (
    Bools,
    Floats,
    Ints,
    draw_counts,
    draw_rows,
    draw_test,
    pick_test,
    size_of_test,
)
from polyfed.data.readers.cache import read_npz

#: Chooses the rows that leave training, from the dealt rows, the owner of each, the number of clients, the fraction and
#: the draws. Those of them that have a label are test rows.
Pick: TypeAlias = "Callable[[Ints, Ints, int, float, Rng], Bools]"

#: The parts of a client's rows, in the order of what is drawn for it.
_PARTS = ("train", "test")
_ARRAYS = ("train_rows", "train_offsets", "test_rows", "test_offsets")
#: The arrays of a partition whose clients hold validation rows beside their test rows.
_VALIDATION = ("validation_rows", "validation_offsets")


@dataclass(frozen=True, eq=False)
class Partition:
    """Rows of each client as two flat arrays with offsets: client k has ``rows[offsets[k]:offsets[k + 1]]``.

    Args:
        train_rows: ``(n,)`` int64 row numbers for training, client after client, ascending within a client.
        train_offsets: ``(clients + 1,)`` int64, from 0 to n.
        test_rows: ``(m,)`` int64 row numbers for testing.
        test_offsets: ``(clients + 1,)`` int64, from 0 to m.
        about: how the partition was made: data set, number of rows, kind, options, seed; JSON values only.
        validation_rows: ``(v,)`` row numbers that choose a round, where the test rows are kept for its end; else None.
        validation_offsets: ``(clients + 1,)`` int64, from 0 to v; else None.

    Raises:
        DataError: offsets that do not fit the rows, or a row that two clients hold.
    """

    train_rows: NDArray[np.int64]
    train_offsets: NDArray[np.int64]
    test_rows: NDArray[np.int64]
    test_offsets: NDArray[np.int64]
    about: Mapping[str, object]
    validation_rows: NDArray[np.int64] | None = None
    validation_offsets: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Check the arrays and make them read-only copies."""
        for name in self._arrays:
            array = np.array(getattr(self, name))
            if array.ndim != 1 or array.dtype != np.int64:
                raise DataError(
                    f"partition: {name} has shape {array.shape} and type {array.dtype}; expected flat int64"
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        parts = [name.removesuffix("_rows") for name in self._arrays if name.endswith("_rows")]
        for part in parts:
            rows, offsets = getattr(self, f"{part}_rows"), getattr(self, f"{part}_offsets")
            if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
                raise DataError(
                    f"partition: {part}_offsets do not rise from 0 to {len(rows)}, the number of {part} "
                    "rows; make the partition again"
                )
        if len(self.train_offsets) != len(self.test_offsets):
            raise DataError(
                f"partition: {len(self.train_offsets) - 1} clients train but {len(self.test_offsets) - 1} "
                "test; expected the same clients"
            )
        if self.validation_offsets is not None and len(self.validation_offsets) != len(self.test_offsets):
            raise DataError(
                f"partition: {len(self.validation_offsets) - 1} clients validate but {len(self.test_offsets) - 1} "
                "test; expected the same clients"
            )
        # np.sort is ten times faster than np.unique.
        rows = np.sort(np.concatenate([getattr(self, f"{part}_rows") for part in parts]))
        if len(rows) and (rows[0] < 0 or (rows[1:] == rows[:-1]).any()):
            raise DataError(
                "partition: a row number is negative or held twice; expected each row at most once; make "
                "the partition again"
            )
        object.__setattr__(self, "about", MappingProxyType(json.loads(_json(self.about))))

    @property
    def _arrays(self) -> tuple[str, ...]:
        return _ARRAYS if self.validation_rows is None else (*_ARRAYS, *_VALIDATION)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.train_offsets) - 1

    @property
    def smallest(self) -> int:
        """A client that has no more training rows than any other."""
        return int(np.argmin(np.diff(self.train_offsets)))

    def train(self, client: int) -> NDArray[np.int64]:
        """Training rows of a client, ascending; read-only."""
        return self._rows(client, "train")

    def test(self, client: int) -> NDArray[np.int64]:
        """Test rows of a client, ascending; read-only."""
        return self._rows(client, "test")

    def evaluated(self, client: int, *, final: bool) -> NDArray[np.int64]:
        """Rows by which a client is evaluated: its validation rows if it has any and this is not the end of the run.

        Args:
            client: number of the client.
            final: whether the evaluation chooses nothing any more.
        """
        return self._rows(client, "test" if final or self.validation_rows is None else "validation")

    def _rows(self, client: int, which: str) -> Ints:
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client}; expected 0 to {self.num_clients - 1}")
        return self._rows_of(client, which)

    def _rows_of(self, client: int, which: str) -> Ints:
        start, end = getattr(self, f"{which}_offsets")[client : client + 2]
        return getattr(self, f"{which}_rows")[start:end]

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the arrays and ``about``: equal if and only if two partitions are the same."""
        digest = hashlib.sha256(b"polyfed partition 1\n")
        for content in (
            _json(self.about).encode(),
            *(getattr(self, name).astype("<i8", copy=False).data for name in self._arrays),  # no copies
        ):
            digest.update(memoryview(content).nbytes.to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()

    def counts(
        self, y: ArrayLike, num_classes: int, which: str = "train", *, first: int | None = None
    ) -> NDArray[np.int64]:
        """``(clients, classes)`` number of rows of each class that each client holds.

        Args:
            y: ``(N,)`` classes of all rows of the data set (array or CPU tensor); rows of -1 are not counted.
            num_classes: number of classes.
            which: "train" or "test", or "validation" where there are such rows.
            first: number of clients to count, from client 0; None for all.
        """
        if f"{which}_rows" not in self._arrays:
            raise ConfigError(f"which: got {which!r}; expected 'train' or 'test'")
        clients = self.num_clients if first is None else min(first, self.num_clients)
        rows, sizes = self._held(clients, which)
        client, labels = np.repeat(np.arange(clients), sizes), np.asarray(y)[rows]
        flat = np.bincount((client * num_classes + labels)[labels >= 0], minlength=clients * num_classes)
        return flat.reshape(clients, num_classes).astype(np.int64)

    def unlabelled(self, y: ArrayLike, *, first: int | None = None) -> NDArray[np.int64]:
        """``(clients,)`` number of training rows without a label that each client holds; no test row is one.

        Args:
            y: ``(N,)`` classes of all rows of the data set, -1 for a row without a label.
            first: as for `counts`.
        """
        return self.counts(np.where(np.asarray(y) < 0, 0, -1), 1, first=first)[:, 0]

    def tested(self, y: ArrayLike, num_classes: int) -> NDArray[np.int64]:
        """``(classes,)`` number of test rows of each class in the clients that train on the class; -1 if none trains.

        Args:
            y: ``(N,)`` classes of all rows of the data set; rows of -1 are not counted.
            num_classes: number of classes.
        """
        labels = np.asarray(y)
        cells: list[Ints] = []
        for which in _PARTS:
            rows, sizes = self._held(self.num_clients, which)
            cells.append(
                (np.repeat(np.arange(self.num_clients), sizes) * num_classes + labels[rows])[labels[rows] >= 0]
            )
        train, test = cells
        counts = np.bincount(test[np.isin(test, train)] % num_classes, minlength=num_classes)
        return np.where(np.bincount(train % num_classes, minlength=num_classes) > 0, counts, -1)

    def _held(self, clients: int, which: str) -> tuple[Ints, Ints]:
        """Return the rows of the first ``clients``, client after client, and the number of each client."""
        offsets = getattr(self, f"{which}_offsets")[: clients + 1]
        return getattr(self, f"{which}_rows")[: offsets[-1]], np.diff(offsets)

    def validating(
        self,
        fraction: float,
        y: ArrayLike,
        rng: Rng,
        pick: Pick | None = None,
        *,
        first: int = 0,
        keep_test: bool = False,
    ) -> Partition:
        """Return the same clients with part of their training rows, class by class, in place of their test rows.

        For choosing hyper-parameters: a choice by these rows has not seen the test rows, which no client holds any
        more, unless ``keep_test`` keeps them for the end of a run.

        Args:
            fraction: fraction of each client's labelled training rows, above 0 and below 1.
            y: ``(N,)`` classes of all rows of the data set, -1 for a row without a label.
            rng: chooses the rows.
            pick: chooses by another rule than class by class, as `splitter` returns it.
            first: number of the client that client 0 stands for, as for `make_partition`; ``pick`` knows its own.
            keep_test: whether the rows become validation rows beside the test rows.

        Raises:
            DataError: a client has a single training row.
        """
        sizes = np.diff(self.train_offsets)
        if sizes.min() < 2:
            k = int(sizes.argmin())
            raise DataError(
                f"client {k} has {sizes[k]} training rows, too few to validate on a part of them; expected at least 2: "
                "raise partition.min_samples, or lower clients.count"
            )
        owner, labels = np.repeat(np.arange(self.num_clients), sizes), np.asarray(y)[self.train_rows]
        if pick is None:
            held = pick_test(owner, labels, self.num_clients, fraction, rng, first=first)
        else:
            held = pick(self.train_rows, owner, self.num_clients, fraction, rng)
        train = self.train_rows[~held], _offsets(owner[~held], self.num_clients)
        held &= labels >= 0  # what is left out with them has no label
        chosen = self.train_rows[held], _offsets(owner[held], self.num_clients)
        about = {**self.about, "validation_fraction": fraction}
        if keep_test:
            return Partition(*train, self.test_rows, self.test_offsets, about, *chosen)
        return Partition(*train, *chosen, about)

    def save(self, path: Path) -> None:
        """Write the partition to an .npz file, whole or not at all.

        Raises:
            StorageError: the file cannot be written; an older file is intact.
        """
        try:
            with replacing(Path(path)) as handle:
                np.savez_compressed(
                    handle,
                    about=np.array(_json(self.about)),
                    hash=np.array(self.hash),
                    **{name: getattr(self, name) for name in self._arrays},
                )
        except OSError as error:
            raise StorageError(
                f"{path}: the partition could not be written ({error}); free space or change the path"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Partition:
        """Read a partition that ``save`` wrote.

        Raises:
            DataError: the file is missing or damaged, or its content does not have the hash it names.
        """
        arrays = read_npz(Path(path))
        if arrays.keys() - {*_VALIDATION} != {*_ARRAYS, "about", "hash"} or len({*_VALIDATION} & arrays.keys()) == 1:
            raise DataError(
                f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; expected a partition written by polyfed"
            )
        try:
            about = json.loads(str(arrays["about"]))
        except ValueError as error:
            raise DataError(f"{path}: 'about' is not JSON ({error}); the file is damaged, make it again") from error
        if not isinstance(about, dict):
            raise DataError(f"{path}: 'about' is a {type(about).__name__}; expected a JSON object")
        kind = Resampled if about.get("kind") == "resampled" else cls  # pyright: ignore[reportUnknownMemberType]
        partition = kind(
            arrays["train_rows"],
            arrays["train_offsets"],
            arrays["test_rows"],
            arrays["test_offsets"],
            about,
            arrays.get("validation_rows"),
            arrays.get("validation_offsets"),
        )
        if partition.hash != str(arrays["hash"]):
            raise DataError(
                f"{path}: content has hash {partition.hash[:12]}, the file says {str(arrays['hash'])[:12]}; "
                "it was changed or damaged, make the partition again"
            )
        return partition


class Resampled(Partition):
    """Clients that draw their rows from two common pools, by formula: the partition stores nothing per client.

    The arrays are the pools, in order of class, and ``offsets`` say where each class begins: class c has
    ``rows[offsets[c]:offsets[c + 1]]``. Two clients may hold the same row; no client tests on a row that
    another trains on. A client's class mix is a draw from Dirichlet(alpha) over the classes that are in both
    pools, and it draws no row twice. All rows of client k follow from the seed and k.
    """

    @classmethod
    def of(cls, train: Ints, test: Ints, y: Ints, classes: int, fraction: float, about: Mapping[str, Any]) -> Resampled:
        """Return clients that each draw a fixed number of rows from two pools, which ``about`` states.

        Args:
            train: row numbers of the training pool.
            test: row numbers of the test pool.
            y: ``(N,)`` classes of all rows of the data set.
            classes: number of classes.
            fraction: fraction of a client's rows that are for testing.
            about: as for any partition; ``about["drawn"]`` becomes the numbers of rows that a client draws.

        Raises:
            DataError: the pools are too small, or a client would have too few rows to train.
        """
        drawn, least = about.get("drawn"), about["min_samples"]
        total: int = about["samples_per_client"] if drawn is None else drawn["train"]
        size = int(size_of_test(np.array([total]), fraction)[0])
        arrays: list[Ints] = []
        for pool in (train, test):
            rows = pool[np.lexsort((pool, y[pool]))]
            arrays += [rows, np.searchsorted(y[rows], np.arange(classes + 1)).astype(np.int64)]
        both = np.diff(arrays[1])[np.diff(arrays[3]) > 0].sum()
        if total > both or total - size < least:
            raise DataError(
                f"partition 'resampled': a client's {total} rows are {total - size} for training and {size} for "
                f"testing; expected at least {least} for training (min_samples), and at most {both} together, the "
                "training rows of the classes that have rows for both; change samples_per_client"
            )
        return cls(
            arrays[0],
            arrays[1],
            arrays[2],
            arrays[3],
            {**about, "drawn": {"train": total - size, "test": size}},
        )

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return int(self.about["num_clients"])  # pyright: ignore[reportArgumentType]

    def tested(self, y: ArrayLike, num_classes: int) -> NDArray[np.int64]:
        """As for any partition, with the rows of the test pool, from which all clients draw."""
        return np.where(np.diff(self.train_offsets) > 0, np.diff(self.test_offsets), -1)

    @property
    def smallest(self) -> int:
        """A client with the fewest training rows among the first hundred; all have nearly the same number."""
        return min(range(min(100, self.num_clients)), key=lambda client: len(self._draw(client)["train"]))

    def _rows_of(self, client: int, which: str) -> Ints:
        return self._drawn(client)[which]

    @cached_property
    def _drawn(self) -> Callable[[int], Mapping[str, Ints]]:
        return lru_cache(maxsize=1024)(self._draw)  # a round needs a client's rows several times

    def _draw(self, client: int) -> Mapping[str, Ints]:
        key, alpha, sizes, limits = self._constants
        rng = key.at("client", client).numpy()
        mix = np.zeros(len(limits))
        mix[limits > 0] = rng.dirichlet(alpha)
        counts = draw_counts(sizes.sum(), mix, limits, rng)
        rows, offsets = self._second
        second = draw_test(counts, sizes[1], np.diff(offsets), rng)
        found = {
            "train": draw_rows(self.train_rows, self.train_offsets, counts - second, rng),
            "test": draw_rows(rows, offsets, second, rng),
        }
        if self.validation_rows is not None:  # what is drawn above does not depend on the test rows beside them
            there = np.where(counts > 0, np.diff(self.test_offsets), 0)
            total = min(self._tests, int(there.sum()))
            tests = draw_counts(total, counts.astype(np.float64), there, rng)
            found |= {"validation": found["test"], "test": draw_rows(self.test_rows, self.test_offsets, tests, rng)}
        return found

    @property
    def _second(self) -> tuple[Ints, Ints]:
        """The pool beside the training pool from which the draw of a client's rows begins."""
        if self.validation_rows is None or self.validation_offsets is None:
            return self.test_rows, self.test_offsets
        return self.validation_rows, self.validation_offsets

    @property
    def _tests(self) -> int:
        return int(self.about["drawn"]["test"])  # pyright: ignore[reportIndexIssue,reportUnknownArgumentType]

    @cached_property
    def _constants(self) -> tuple[Rng, Floats, Ints, Ints]:
        """The constants of all draws: the key, alpha, rows for training and testing, and the most rows by class."""
        about: dict[str, Any] = dict(self.about)
        there = (np.diff(self._second[1]) > 0) & (np.diff(self.test_offsets) > 0)
        limits = np.where(there, np.diff(self.train_offsets), 0)
        alpha = np.full(np.count_nonzero(limits), float(about["options"]["alpha"]))
        second = "test" if self.validation_rows is None else "validation"
        sizes = np.array([about["drawn"]["train"], about["drawn"][second]])
        return Rng(tuple(about["seed"])), alpha, sizes, limits

    def validating(
        self,
        fraction: float,
        y: ArrayLike,
        rng: Rng,
        pick: Pick | None = None,
        *,
        first: int = 0,
        keep_test: bool = False,
    ) -> Partition:
        """Return the partition with part of the training pool, class by class, in place of the test pool, or beside it.

        Raises:
            DataError: too few rows are left.
        """
        labels, rows = np.asarray(y), self.train_rows
        held = pick_test(np.zeros_like(rows), labels[rows], 1, fraction, rng)
        about = {**self.about, "validation_fraction": fraction}
        found = self.of(rows[~held], rows[held], labels, len(self.train_offsets) - 1, fraction, about)
        if not keep_test:
            return found
        drawn: Mapping[str, int] = found.about["drawn"]  # pyright: ignore[reportAssignmentType]
        return Resampled(
            found.train_rows,
            found.train_offsets,
            self.test_rows,
            self.test_offsets,
            {
                **found.about,
                "drawn": {"train": drawn["train"], "validation": drawn["test"], "test": self._tests},
            },
            found.test_rows,
            found.test_offsets,
        )

    def _held(self, clients: int, which: str) -> tuple[Ints, Ints]:
        held = [self._draw(client)[which] for client in range(clients)]
        return np.concatenate(held), np.array([len(rows) for rows in held])


def _json(about: Mapping[str, object]) -> str:
    return json.dumps(dict(about), sort_keys=True, separators=(",", ":"), allow_nan=False)


def grouped(owner: Ints, mask: Bools, clients: int) -> tuple[Ints, Ints]:
    """Rows of the mask, client after client, and offsets."""
    rows = np.flatnonzero(mask).astype(np.int64)
    return rows[np.argsort(owner[rows], kind="stable")], _offsets(owner[rows], clients)  # stable: ascending rows


def _offsets(owner: Ints, clients: int) -> Ints:
    """Return where each client begins when rows of these owners lie client after client."""
    return np.cumsum(np.bincount(owner + 1, minlength=clients + 1), dtype=np.int64)
