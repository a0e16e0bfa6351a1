"""The cells of a comparison, a sweep or a study. A cell is one run, and is never computed twice.

A hash of all that determines its numbers names its folder. So two studies that need the same run share it, and an
interrupted command continues where it stopped when it is given again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from glob import escape
from itertools import product
from pathlib import Path
from typing import Any, cast

from polyfed.base.errors import CheckpointError, ConfigError
from polyfed.config import Config, algorithm_class, algorithm_fields, canonical_name
from polyfed.config.toml import Table, apply, parse_override
from polyfed.core.algorithm import Algorithm
from polyfed.data.catalogue import PARTITION_OPTIONS
from polyfed.data.dataset import Dataset
from polyfed.report.results import summary_of
from polyfed.report.tables import Summary
from polyfed.rounds.identity import NAME, Content
from polyfed.simulation.arguments import algorithm_choice

#: Sections of a configuration that an entry, a setting or a grid may change.
SECTIONS = tuple(name for name in Config.model_fields if name not in ("algorithm", "algorithms", "controls"))

#: Keys on which the splits depend, by section; None stands for all keys of the section.
SPLITS: Mapping[str, tuple[str, ...] | None] = {
    "partition": None,
    "data": ("dataset", "path", "split", "test_fraction", "validation_fraction"),
    "clients": ("count",),
    "run": ("seed",),
}

#: States of a cell that is done.
FINISHED = ("done", "diverged")

DIVERGED = "diverged.json"


@dataclass(frozen=True)
class AlgorithmEntry:
    """One algorithm of a comparison.

    Args:
        label: the label in tables.
        name: name of the algorithm, or a label of ``[algorithms]``.
        keys: keys of the algorithm that differ.
        sections: keys of other sections that differ, such as ``{"train": {"epochs": 2}}``.
        whole: whether the keys are all that differ from the defaults, so that the configuration's keys of the same
            algorithm do not apply.
    """

    label: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sections: Mapping[str, Any] = field(default_factory=dict[str, Any])
    whole: bool = False

    @classmethod
    def given(cls, algorithm: Algorithm | type[Algorithm]) -> AlgorithmEntry:
        """Return an entry for an instance, with the values of its fields, or for a class, with its defaults.

        The label is what `parse` would read: ``fedmrl:share=false``.

        Raises:
            ConfigError: it is no algorithm.
        """
        name, keys = algorithm_choice(algorithm)
        told = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items())
        return cls(":".join((name.removeprefix("python:"), *told)), name, keys, whole=True)

    @classmethod
    def parse(cls, text: str) -> AlgorithmEntry:
        """Read ``fedmrl``, ``fedmrl:share=false``, ``standalone:train.epochs=2`` or ``my_package.my_file:Mine:key=1``.

        Raises:
            ConfigError: a key has no name before it, belongs to an unknown section, or changes the splits.
        """
        head, *settings = re.split(r":(?=[^:=]+=)", text.strip())
        if not head or "=" in head:
            raise ConfigError(f"--algorithms {text!r}: expected a name, or name:key=value")
        tables: Table = {"name": head}
        for setting in settings:
            apply(tables, *parse_override(setting))
        return cls.of(text.strip(), tables, f"--algorithms {text!r}")

    @classmethod
    def of(cls, label: str, table: Mapping[str, Any], where: str) -> AlgorithmEntry:
        """Return an entry from a table of ``name``, keys of the algorithm, and tables of keys by section."""
        name = table.get("name", label)
        sections = {key: value for key, value in table.items() if key in SECTIONS and isinstance(value, Mapping)}
        keys = {key: value for key, value in table.items() if key != "name" and key not in sections}
        odd = [key for key, value in keys.items() if isinstance(value, Mapping)]
        if odd or not isinstance(name, str):
            what = f"{odd[0]}.*" if odd else f"name = {name!r}"
            raise ConfigError(
                f"{where}: got {what}; expected keys of the algorithm, or of the sections {', '.join(SECTIONS)}"
            )
        changing = [
            f"{section}.{key}"
            for section, names in SPLITS.items()
            for key in cast(Table, sections.get(section, {}))
            if names is None or key in names
        ]
        if changing:
            raise ConfigError(
                f"{where}: got {changing[0]}, which changes the splits; algorithms are compared on the same splits: "
                "put the key into the configuration, or into a setting of its own"
            )
        return cls(label, name, keys, sections)


@dataclass(frozen=True)
class Setting:
    """A setting in which algorithms are compared.

    Args:
        name: the name in tables; "" if there is a single setting.
        tables: keys that differ, by section; those of "algorithm" apply to the algorithms that have them.
        point: the values of the grid, by dotted key.
    """

    name: str = ""
    tables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    point: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def at(self, point: Mapping[str, Any]) -> Setting:
        """Return this setting at a point of a grid."""
        tables: Table = deepcopy(dict(self.tables))
        for key, value in point.items():
            apply(tables, key.split("."), value)
        return Setting(self.name, tables, {**self.point, **point})

    @property
    def words(self) -> tuple[str, ...]:
        """The name, and the values of the point such as ``epochs = 2``."""
        return (
            *((self.name,) if self.name else ()),
            *(
                f"{key.rpartition('.')[2]} = {str(value).lower() if isinstance(value, bool) else value}"
                for key, value in self.point.items()
            ),
        )

    @property
    def title(self) -> str:
        """The name and the point in one line."""
        return ", ".join(self.words)


def repeated(values: Sequence[Any]) -> list[Any]:
    """Return the values that occur twice; 1 and 1.0 are the same, 1 and true are not."""
    told = [(isinstance(value, bool), value) for value in values]
    return [value for place, (_, value) in enumerate(told) if told[place] in told[:place]]


def grid(setting: Setting, values: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Return the setting at every point of a grid; the last key varies fastest."""
    return [setting.at(dict(zip(values, point, strict=True))) for point in product(*values.values())]


@dataclass(frozen=True, eq=False)
class RunSpec:
    """One run of a study.

    Args:
        setting: the setting of the run.
        label: the label of the entry.
        seed: ``run.seed``.
        config: the full configuration.
        dataset: the data, if a program gives them; their digest is part of the content.
    """

    setting: Setting
    label: str
    seed: int
    config: Config
    dataset: Dataset | None = None

    @cached_property
    def content(self) -> Content:
        """The content on which its numbers depend, as of the first access."""
        return self.content_now()

    def content_now(self) -> Content:
        """Return the content on which its numbers depend."""
        return Content.of(self.config, None if self.dataset is None else {self.dataset.name: self.dataset.digest})

    @property
    def folder(self) -> str:
        """The name of its run directory, with a hash of all that determines its numbers."""
        return f"{self._prefix}{self.content.digest[:12]}"

    @property
    def _prefix(self) -> str:
        return f"{canonical_name(self.config.algorithm.name).rpartition(':')[2]}-seed-{self.seed}-"

    def replaced(self, root: Path) -> str:
        """Return why an older run of the same configuration does not count as this run; "" without an older run."""
        found: list[tuple[float, Path, Content]] = []
        for path in (root / "cells").glob(f"{escape(self._prefix)}*/{NAME}"):
            with suppress(CheckpointError, OSError):
                found.append((path.stat().st_mtime, path.parent, Content.read(path.parent)))
        others = [(when, path, content) for when, path, content in found if content.config == self.content.config]
        if not others or self.run_dir(root) in (path for _, path, _ in others):
            return ""
        _, path, last = max(others, key=lambda other: other[0])
        return f"computed anew, as since {path.name} {'; '.join(self.content.changes(last))}"

    @property
    def words(self) -> tuple[str, ...]:
        """The words that `chosen` matches."""
        return (*self.setting.words, self.label, f"seed {self.seed}")

    @property
    def title(self) -> str:
        """Setting, label and seed in one line."""
        return ", ".join(self.words)

    def state(self, root: Path) -> str:
        """Return ``"done"``, ``"diverged"``, ``"begun"`` or ``"to do"``."""
        run_dir = self.run_dir(root)
        states = {"summary.json": "done", DIVERGED: "diverged", "config.toml": "begun"}
        return next((state for name, state in states.items() if (run_dir / name).exists()), "to do")

    def run_dir(self, root: Path) -> Path:
        """Return its run directory."""
        return root / "cells" / self.folder

    def summary(self, root: Path) -> Summary | None:
        """Return its results; None if it is not complete or diverged."""
        return summary_of(self.run_dir(root))


def chosen(cells: Sequence[RunSpec], only: Sequence[str]) -> list[RunSpec]:
    """Return the cells that match every pattern of ``only``: a setting, a value of the grid, an algorithm or a seed.

    Args:
        cells: the cells to choose from.
        only: such as ``"fedmrl"``, ``"fed*,standalone"`` (either of two), ``"seed 0"`` or ``"alpha = 0.1"``.

    Raises:
        ConfigError: no cell matches.
    """
    words = dict.fromkeys(word for cell in cells for word in cell.words)
    alternatives = [  # a pattern that matches as a whole is a name with commas
        [pattern] if any(fnmatchcase(word, pattern) for word in words) else [one.strip() for one in pattern.split(",")]
        for pattern in only
    ]
    found = [
        cell
        for cell in cells
        if all(any(fnmatchcase(word, one) for one in some for word in cell.words) for some in alternatives)
    ]
    if cells and not found:
        raise ConfigError(f"--only {' --only '.join(only)}: fits no cell; there are {', '.join(words)}")
    return found


def expand(
    config: Config,
    entries: Sequence[AlgorithmEntry],
    seeds: Sequence[int],
    settings: Sequence[Setting] = (Setting(),),
    *,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: Dataset | None = None,
) -> list[RunSpec]:
    """Return the cells of settings times seeds times algorithms, in this order.

    Args:
        config: the common configuration; its ``[algorithms.NAME]`` apply.
        entries: the algorithms.
        seeds: the seeds of the repetitions.
        settings: the settings of the comparison.
        tuned: the tuned values by dotted key, by label of the entry; they apply in every setting.
        dataset: the data of all cells, if a program gives them.

    Raises:
        ConfigError: all faults of all cells.
    """
    faults: list[str] = []
    cells: list[RunSpec] = []
    for setting in settings:
        special = cast(Table, setting.tables.get("algorithm", {}))
        lost = set(special)
        fitting: list[tuple[str, Config]] = []
        for entry in entries:
            try:
                lost -= keys_of(config, entry)
                fitting.append((entry.label, _at(config, entry, setting, (tuned or {}).get(entry.label, {}))))
            except ConfigError as error:
                faults += error.faults
        faults += [
            f"algorithm.{key}: none of {', '.join(entry.label for entry in entries)} has this key"
            for key in special
            if key in lost
        ]
        cells += [
            RunSpec(
                setting,
                label,
                seed,
                fits.model_copy(update={"run": fits.run.model_copy(update={"seed": seed})}),
                dataset,
            )
            for seed in seeds
            for label, fits in fitting
        ]
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    return cells


def keys_of(config: Config, entry: AlgorithmEntry) -> set[str]:
    """Return the keys of an entry's algorithm."""
    return set(algorithm_fields(algorithm_class(config.algorithm_table(entry.name)["name"])))


def _at(config: Config, entry: AlgorithmEntry, setting: Setting, tuned: Mapping[str, Any]) -> Config:
    """Return the configuration of an entry in a setting."""
    theirs = dict(Setting().at(tuned).tables)
    special = {**cast(Table, theirs.pop("algorithm", {})), **cast(Table, setting.tables.get("algorithm", {}))}
    plain = {name: table for name, table in setting.tables.items() if name != "algorithm"}
    base = {name: table for name, table in config.to_dict().items() if name in SECTIONS}
    tables = overlaid(overlaid(overlaid(base, theirs), plain), entry.sections)
    tables["run"]["controls"] = False
    takes = keys_of(config, entry)
    # The keys of an entry take precedence: fedmrl:rep_dim=50 keeps its rep_dim along a grid of rep_dim.
    keys = {key: value for key, value in special.items() if key in takes} | dict(entry.keys)
    algorithm = {"name": entry.name, **keys} if entry.whole else config.algorithm_table(entry.name, keys)
    return Config.parse({**tables, "algorithm": algorithm})


def overlaid(tables: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """Return ``tables`` overridden by ``over``, table by table; a new kind of partition drops the keys of the old."""
    out: Table = dict(tables)
    for key, value in over.items():
        before = out.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if key == "partition" and "kind" in value and value["kind"] != before.get("kind"):
                options = {option for options in PARTITION_OPTIONS.values() for option in options}
                before = {name: old for name, old in before.items() if name not in options}
            out[key] = overlaid(before, value)
        else:
            out[key] = value
    return out
