"""``predictions.parquet``: the label and the scores of every test row of the last evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfed.base import files
from polyfed.base.errors import StorageError
from polyfed.base.types import ClientId
from polyfed.metrics.tallies import Predictions

NAME = "predictions.parquet"

#: By client: the row numbers of its test rows in the data, (n,), and the predictions by predictor.
Held = Mapping[ClientId, tuple[NDArray[np.int64], Mapping[str, Predictions]]]


def write(path: Path, held: Held, classes: Sequence[str], names: Sequence[str] = (), *, mode: int = 0o666) -> None:
    """Write the file at once: an older one is replaced whole or not at all.

    Args:
        path: the file.
        held: the predictions.
        classes: the classes' names; empty for a regression.
        names: the clients' names; may be empty.
        mode: see `files.replacing`.

    Raises:
        StorageError: pyarrow is not installed, the disk is full, or the folder is not writable.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise StorageError(f"run.predictions needs pyarrow ({error}); run: pip install pyarrow") from error
    columns: dict[str, list[Any]] = {}
    for client, (rows, found) in sorted(held.items()):
        for predictor, seen in found.items():
            count = len(rows)
            known = list(classes if len(set(classes)) == len(classes) else map(str, range(len(classes))))
            label = np.asarray(known, dtype=object)[seen.y] if known else seen.y
            heads = [f"score {name}" for name in known] or ["prediction"]
            piece = {
                "client": np.full(count, client),
                **({"name": np.full(count, names[client], dtype=object)} if names else {}),
                "row": rows,
                "predictor": np.full(count, predictor, dtype=object),
                "label": label,
                **dict(zip(heads, seen.scores.T, strict=True)),
            }
            for name, values in piece.items():
                columns.setdefault(name, []).append(values)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: np.concatenate(parts) for name, parts in columns.items()}), sink)
    files.write(path, sink.getvalue().to_pybytes(), mode=mode)
