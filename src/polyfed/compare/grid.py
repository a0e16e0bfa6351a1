"""Algorithms times seeds, on the same splits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from polyfed.compare.runs import Watches, quiet, run_or_go_on
from polyfed.compare.table import Comparison, tabulate
from polyfed.config import Config
from polyfed.config.reading import parse_override
from polyfed.errors import ConfigError, DataError, StorageError
from polyfed.report import Summary


@dataclass(frozen=True)
class Entry:
    """One algorithm of a comparison.

    Args:
        label: what the table calls it.
        name: of the algorithm, or a label of ``[algorithms]``.
        keys: that differ.
    """

    label: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read ``fedmrl``, ``fedmrl:share=false:rep_dim=50`` or ``my_package.my_file:MyAlgorithm:key=1``.

        Raises:
            ConfigError: a key without a name before it.
        """
        head, *settings = re.split(r":(?=[^:=]+=)", text.strip())
        if not head or "=" in head:
            raise ConfigError(f"--algorithms {text!r}: expected a name, or name:key=value")
        keys: dict[str, Any] = {}
        for setting in settings:
            (key, *deeper), value = parse_override(setting)
            if deeper:
                raise ConfigError(f"--algorithms {text!r}: expected name:key=value, got a dotted key")
            keys[key] = value
        return cls(text.strip(), head, keys)

    @property
    def folder(self) -> str:
        """The label as a name of a directory."""
        return re.sub(r"[^\w.=-]+", "-", self.label)


def compare(
    config: Config,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    watches: Watches = quiet,
) -> Comparison:
    """Run every algorithm with every seed on the same splits and set them side by side.

    A run that is complete in ``out`` is not run again, an interrupted one goes on. Writes table.md and table.csv.

    Args:
        config: all but algorithm and seed; its ``[algorithms.NAME]`` apply.
        algorithms: names, or entries such as ``"fedmrl:share=false"``; the first is the one under examination.
        seeds: ``run.seed`` of the repetitions.
        out: directory of the runs, each in ``<algorithm>/seed-<s>``; by default ``runs/<name>-compare-<time>``.
        watches: who looks on.

    Returns:
        The table. Each algorithm is compared with the best of all others.

    Raises:
        ConfigError: nothing to compare, something twice, or an algorithm that does not exist.
        RunDirError: ``out`` holds runs of another configuration.
        DataError: the splits differ, because the data changed between two runs.
    """
    entries, plans = _planned(config, algorithms, seeds)
    folder = out or Path("runs") / f"{config.run.name}-compare-{datetime.now():%Y%m%d-%H%M%S}"
    summaries: dict[tuple[str, int], Summary] = {}
    for done, (seed, entry) in enumerate(product(seeds, entries)):
        label = f"{entry.label}, seed {seed} ({done + 1} of {len(plans)})"
        run_dir = folder / entry.folder / f"seed-{seed}"
        summary = run_or_go_on(plans[entry.label, seed], run_dir, watches(label))
        first = summaries.get((entries[0].label, seed), summary)
        if summary["partition_hash"] != first["partition_hash"]:
            raise DataError(
                f"{run_dir} ran on other splits than {first['run_dir']}: the data changed between the two; "
                "choose another --out"
            )
        summaries[entry.label, seed] = summary
    table = tabulate(
        {entry.label: [summaries[entry.label, seed] for seed in seeds] for entry in entries}, seeds, folder
    )
    _write(folder / "table.md", table.to_markdown())
    _write(folder / "table.csv", table.to_csv())
    return table


def _planned(
    config: Config, algorithms: Sequence[str], seeds: Sequence[int]
) -> tuple[list[Entry], dict[tuple[str, int], Config]]:
    """What is to be run, every fault of it found before the first run."""
    faults: list[str] = []
    entries: list[Entry] = []
    plans: dict[tuple[str, int], Config] = {}
    for text in algorithms:
        try:
            entry = Entry.parse(text)
            if entry.folder in {other.folder for other in entries}:
                raise ConfigError(f"--algorithms: {text!r} is named twice")
            entries.append(entry)
            chosen = config.with_algorithm(entry.name, entry.keys)
            plans |= {(entry.label, seed): chosen.replace("run", seed=seed) for seed in dict.fromkeys(seeds)}
        except ConfigError as error:
            faults += error.faults
    if not algorithms:
        faults.append("--algorithms: got none; expected at least one, such as fedmrl,standalone")
    if not seeds or len(set(seeds)) < len(seeds):
        faults.append(f"--seeds: got {list(seeds)}; expected different numbers, such as 0,1,2")
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    return entries, plans


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}") from error
