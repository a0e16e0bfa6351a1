"""Compares algorithms over seeds on the same splits, also at every point of a grid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyfed.base.errors import ConfigError, StorageError
from polyfed.comparison.execution import all_here, check_splits, index, play
from polyfed.comparison.render import Comparison, tabulate
from polyfed.comparison.specs import AlgorithmEntry, RunSpec, Setting, expand, grid, repeated
from polyfed.config import Config
from polyfed.config.toml import parse_values
from polyfed.data.dataset import Dataset
from polyfed.report.progress import reporting
from polyfed.rounds.callbacks import Callback, Several
from polyfed.simulation.arguments import AlgorithmSource, ConfigSource, ModelSource, arranged


def compare(
    config: ConfigSource,
    algorithms: Sequence[AlgorithmSource],
    seeds: Sequence[int],
    out: Path | str | None = None,
    *,
    dataset: Dataset | str | None = None,
    models: Sequence[ModelSource] | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> Comparison:
    """Run every algorithm with every seed on the same splits and write tables of the results.

    A complete run is not run again, and an interrupted run is resumed. Runs with an object that no module file holds
    are run again by the next Python process. Writes table.md, table.csv and cells.csv.

    Args:
        config: the configuration but for algorithm and seed, as for `simulate`; its ``[algorithms.NAME]`` apply.
        algorithms: names, entries such as ``"fedmrl:share=false"``, instances such as ``FedMRL(share=False)``, or
            classes; the first is the main algorithm. An instance has its own values, whatever ``[algorithm]`` says.
        seeds: ``run.seed`` of the repetitions.
        out: directory of the tables, with the runs in ``cells/``; by default the tables go to a folder below ``runs/``
            and the runs to ``runs/cells/``, where other comparisons reuse them.
        dataset: in place of ``data.dataset``, as for `simulate`.
        models: in place of ``clients.models``, as for `simulate`.
        values: values of a grid by dotted key; every algorithm and seed is run at each point of the grid.
        callbacks: objects that receive the events of all runs.
        progress: whether the progress of each run is printed.

    Returns:
        The comparison. Each algorithm is compared with the best of all others in the same setting.

    Raises:
        ConfigError: the list is empty or repeats an entry, or an algorithm does not exist.
        DataError: the splits differ, because the data changed between two runs.
        RunDirError: other processes are running the remaining cells.
    """
    config, given = arranged(config, dataset=dataset, models=models)
    Several(callbacks)  # reports an entry that is no callback before the first run
    cells = planned(config, algorithms, seeds, values, given)
    root, folder = places(config, cells, None if out is None else Path(out), "sweep" if values else "compare")
    all_here(play(cells, root, lambda label: reporting(label, callbacks, progress)))
    check_splits(cells, root)
    table = tabulate(cells, root, folder)
    write(folder / "cells.csv", index(cells, root))
    write(folder / "table.md", table.to_markdown())
    write(folder / "table.csv", table.to_csv())
    return table


def places(config: Config, cells: Sequence[RunSpec], out: Path | None, what: str) -> tuple[Path, Path]:
    """Return the root of the cells and the folder of the tables; the same cells give the same folder."""
    if out is not None:
        return out, out
    key = hashlib.sha256(" ".join(cell.folder for cell in cells).encode()).hexdigest()[:8]
    return Path("runs"), Path("runs") / f"{config.run.name}-{what}-{key}"


def planned(
    config: Config,
    algorithms: Sequence[AlgorithmSource],
    seeds: Sequence[int],
    values: Mapping[str, Sequence[Any]] | None = None,
    dataset: Dataset | None = None,
) -> list[RunSpec]:
    """Return the cells; all their faults are reported before the first run."""
    faults: list[str] = []
    entries: list[AlgorithmEntry] = []
    for one in algorithms:
        try:
            entries.append(entry := AlgorithmEntry.parse(one) if isinstance(one, str) else AlgorithmEntry.given(one))
            if entry.label in {other.label for other in entries[:-1]}:
                faults.append(f"--algorithms: {entry.label!r} is named twice")
        except ConfigError as error:
            faults += error.faults
    if not algorithms:
        faults.append("--algorithms: got none; expected at least one, such as fedmrl,standalone")
    if not seeds or len(set(seeds)) < len(seeds):
        faults.append(f"--seeds: got {list(seeds)}; expected different numbers, such as 0,1,2")
    cells: list[RunSpec] = []
    try:
        cells = expand(config, entries, tuple(dict.fromkeys(seeds)), grid(Setting(), values or {}), dataset=dataset)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    return cells


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["train.lr=0.01,0.1"]`` -> ``{"train.lr": [0.01, 0.1]}``.

    Raises:
        ConfigError: a key or a value is missing or repeated.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        path, values = parse_values(text, "--grid")
        if not values or len(path) < 2 or ".".join(path) in found or repeated(values):
            raise ConfigError(
                f"--grid {text!r}: expected section.key=value,value, such as train.lr=0.01,0.1, each key and value once"
            )
        found[".".join(path)] = values
    return found


def write(path: Path, text: str) -> None:
    """Write a table.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"could not write {path}: {error.strerror or error}; make room or choose another --out"
        ) from error
