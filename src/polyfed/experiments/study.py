"""The file format of a study: its algorithms, settings and scales, and the views that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationError

from polyfed.base.errors import ConfigError
from polyfed.base.ranges import Count, Positive
from polyfed.base.text import hint
from polyfed.comparison.specs import (
    SECTIONS,
    AlgorithmEntry,
    RunSpec,
    Setting,
    expand,
    grid,
    keys_of,
    overlaid,
    repeated,
)
from polyfed.config import Config
from polyfed.config.faults import by_key, dotted, sentence
from polyfed.config.sections import Section
from polyfed.config.toml import Table, read_toml

ViewName = (
    Literal["accuracy", "curves", "clients", "targets", "grid", "predictors", "gradient", "networks", "protocol"]
    | Literal["whole", "differences", "cka", "tsne", "conflict", "leakage"]
    | Literal["sizes", "unseen_sizes", "size_curves", "size_costs"]
    | Literal["histogram", "spent", "exploration", "convergence"]
)
Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class Tune(Section):
    """The choice of hyper-parameters: for each algorithm the best point of a grid, on validation rows.

    Args:
        grid: values by dotted key; keys of ``algorithm`` go to the algorithms that have them.
        widen: how many values beyond its grid a key may get, for an algorithm whose best value is at the grid's edge.
        seeds: seeds of the repetitions.
        setting: name of the setting for tuning; "" is the first. The chosen values apply in all settings.
        config: keys that differ from the study's; must set ``data.validation_fraction``.
    """

    grid: dict[str, Values]
    widen: Count = 3
    seeds: tuple[Count, ...] = (0,)
    setting: str = ""
    config: dict[str, Any] = Field(default_factory=dict)


class Attack(Section):
    """What the view "leakage" spends on each kept round of each algorithm and seed.

    Args:
        clients: clients that are attacked, of unlike networks where there are several; each costs a decoder.
        auxiliary: test images that the attacker has.
        decoder_steps: training steps of the decoder.
        width: channels of the decoder.
        search_steps: gradient steps of the white-box search, for the first client.
    """

    clients: Positive = 2
    auxiliary: Positive = 2000
    decoder_steps: Positive = 400
    width: Positive = 32
    search_steps: Positive = 600


class SettingKeys(Section):
    """The keys of a setting that are not sections of a configuration; None takes the study's value.

    Args:
        algorithms: as the study's.
        seeds: as the study's.
        grid: as the study's.
    """

    algorithms: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    grid: dict[str, Values] | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> SettingKeys:
        """Return these keys of a setting's table; pydantic's ValidationError names their faults."""
        return cls.model_validate({key: value for key, value in table.items() if key in cls.model_fields})


class Study(Section):
    """A study at one scale. `Study.load` reads it and reports all faults at once.

    Args:
        title: title of tables and figures.
        source: the item that it reproduces; "" for a study of your own.
        note: what a reader of the page must know first, as Markdown; "" for nothing.
        config: the common configuration of all cells.
        entries: algorithms by label: ``name``, their own keys, and keys of sections below the section's name.
        algorithms: labels of ``entries``, or such as ``"fedmrl:share=false"``; the first is the main algorithm.
        seeds: ``run.seed`` of the repetitions.
        settings: by name, keys of sections that differ; and ``algorithms``, ``seeds`` and ``grid`` where they differ.
        grid: values by dotted key; every setting is run at every point.
        tune: how hyper-parameters are chosen first; None keeps those of the file.
        show: the views beside the tables of accuracy and costs, each a CSV and a picture.
        pair: two labels whose accuracies the view "clients" compares client by client.
        attack: what the view "leakage" spends.
    """

    title: str
    source: str = ""
    note: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = Field(default_factory=dict)
    algorithms: tuple[str, ...] = ()
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, Values] = Field(default_factory=dict)
    tune: Tune | None = None
    show: tuple[ViewName, ...] = ()
    pair: tuple[str, str] | None = None
    attack: Attack = Attack()

    @classmethod
    def load(cls, path: Path, scale: str | None = None) -> Study:
        """Read a study at a scale and check everything that needs no data.

        Args:
            path: path of the file; its tables override those of the file that its ``base`` names, relative to it.
            scale: a table of ``scales`` that overrides the rest; None for a file without scales.

        Raises:
            ConfigError: all faults at once.
        """
        tables = _tables(path)
        scales = cast(Table, tables.pop("scales", {}))
        if scales and scale not in scales:
            raise ConfigError(f"{path}: --scale: got {scale!r}; expected one of {', '.join(scales)}")
        if scale and not scales:
            raise ConfigError(f"{path}: --scale: got {scale!r}; the file has no scales")
        tables = overlaid(tables, scales.get(scale or "", {}))
        try:
            study = cls.model_validate(tables)
        except ValidationError as error:
            raise ConfigError(
                *(f"{path}: {dotted(*where)}: {sentence(details)}" for where, details in by_key(error).items())
            ) from error
        if faults := study.faults():
            raise ConfigError(*(f"{path}: {fault}" for fault in faults))
        return study

    def faults(self) -> list[str]:
        """Return the faults of the values together; empty if there are none."""
        found: list[str] = []
        if self.tune is not None:
            if not cast(Table, self.tune.config.get("data", {})).get("validation_fraction"):
                found.append(
                    "tune.config.data.validation_fraction: missing; without it, test data would choose the values"
                )
            if self.tune.setting and self.tune.setting not in self.settings:
                found.append(f"tune.setting: got {self.tune.setting!r}; expected one of {', '.join(self.settings)}")
        if ("clients" in self.show) != (self.pair is not None):
            found.append('pair: expected two algorithms if, and only if, show has "clients"')
        own: dict[str, SettingKeys] = {}
        for name, table in self.settings.items():
            try:
                own[name] = SettingKeys.of(table)
            except ValidationError as error:
                found += [
                    f"{dotted('settings', name, *where)}: {sentence(details)}"
                    for where, details in by_key(error).items()
                ]
        known = {*self.algorithms, *(label for keys in own.values() for label in keys.algorithms or ())}
        found += [f"pair: {label!r} is not among the algorithms" for label in self.pair or () if label not in known]
        if not self.algorithms and self.show not in (("networks",), ("protocol",)):
            found.append("algorithms: got none; expected at least one")
        found += [
            f"{dotted('settings', name, key)}: unknown{hint(key, (*SECTIONS, *_OWN))} expected a section or one of "
            f"{', '.join(_OWN)}"
            for name, table in self.settings.items()
            for key in table
            if key not in (*SECTIONS, *_OWN, "algorithm")
        ]
        found += self._twice(own)
        if found:
            return found
        try:
            if self.tune is not None:
                found += self._tuning_faults()
            self.cells()
        except ConfigError as error:
            found += error.faults
        return found

    @property
    def configuration(self) -> Config:
        """The common configuration of all cells."""
        return Config.parse(self.config)

    def cells(self, tuned: Mapping[str, Mapping[str, Any]] | None = None) -> list[RunSpec]:
        """Return all cells, by setting, seed and algorithm.

        Args:
            tuned: the chosen values of an algorithm, by label and dotted key.
        """
        config, faults = self.configuration, list[str]()
        cells: list[RunSpec] = []
        for setting, keys in self._settings():
            try:
                entries = self._entries(keys.algorithms or self.algorithms)
                points = grid(setting, self.grid if keys.grid is None else keys.grid)
                cells += expand(config, entries, keys.seeds or self.seeds, points, tuned=tuned)
            except ConfigError as error:
                faults += [f"{f'settings.{setting.name}: ' if setting.name else ''}{fault}" for fault in error.faults]
        if faults:
            raise ConfigError(*dict.fromkeys(faults))
        return cells

    def tuning(self) -> list[RunSpec]:
        """Return the cells of the tuning's grid; their test rows are validation rows."""
        assert self.tune is not None
        labels = dict.fromkeys(label for _, keys in self._settings() for label in keys.algorithms or self.algorithms)
        return self._tuning(list(labels), grid(self._tuned_in(), self.tune.grid))

    def tuning_at(self, label: str, point: Mapping[str, Any]) -> list[RunSpec]:
        """Return the tuning cells of one algorithm at one point, which may be outside the grid.

        Args:
            label: label of the algorithm.
            point: values by dotted key, for keys that the algorithm has.

        Raises:
            ConfigError: a value is not valid.
        """
        setting = self._tuned_in()
        (entry,) = self._entries([label])
        takes = keys_of(self.configuration, entry)
        own = {k: v for k, v in cast(Table, setting.tables.get("algorithm", {})).items() if k in takes}
        return self._tuning([label], [replace(setting, tables={**setting.tables, "algorithm": own}).at(point)])

    def _tuned_in(self) -> Setting:
        assert self.tune is not None
        settings = [setting for setting, _ in self._settings()]
        setting = next((s for s in settings if s.name == self.tune.setting), settings[0])
        return Setting("tuning", overlaid(setting.tables, self.tune.config))

    def _tuning(self, labels: Sequence[str], points: Sequence[Setting]) -> list[RunSpec]:
        assert self.tune is not None
        return expand(
            Config.parse(overlaid(self.config, self.tune.config)), self._entries(labels), self.tune.seeds, points
        )

    def _tuning_faults(self) -> list[str]:
        assert self.tune is not None
        cells = self.tuning()
        faults = [
            f"tune: {cell.label} would be tuned with data.validation_fraction = 0, so test data would choose the values"
            for cell in cells
            if not cell.config.data.validation_fraction
        ]
        faults += [
            f"tune.grid.{section}.{name}: {entry.label} sets {name} itself, so there is nothing to choose"
            for entry in self._entries(list(dict.fromkeys(cell.label for cell in cells)))
            for section, _, name in (key.partition(".") for key in self.tune.grid)
            if name in (entry.keys if section == "algorithm" else cast(Table, entry.sections.get(section, {})))
        ]
        return list(dict.fromkeys(faults))

    def _twice(self, own: Mapping[str, SettingKeys]) -> list[str]:
        """Return a fault for each list that names an item twice, as the item would count twice."""
        tables: list[tuple[str, Sequence[Any], Sequence[Any], Mapping[str, Values]]] = [
            ("", self.algorithms, self.seeds, self.grid),
            *([("tune.", (), self.tune.seeds, self.tune.grid)] if self.tune is not None else []),
            *(
                (f"{dotted('settings', name)}.", keys.algorithms or (), keys.seeds or (), keys.grid or {})
                for name, keys in own.items()
            ),
        ]
        return [
            f"{at}{key}: {again[0]!r} is named twice"
            for at, algorithms, seeds, grid in tables
            for key, some in (
                ("algorithms", algorithms),
                ("seeds", seeds),
                *((f"grid.{key}", values) for key, values in grid.items()),
            )
            if (again := repeated(some))
        ]

    def _settings(self) -> list[tuple[Setting, SettingKeys]]:
        return [
            (Setting(name, {key: value for key, value in table.items() if key not in _OWN}), SettingKeys.of(table))
            for name, table in (self.settings or {"": {}}).items()
        ]

    def _entries(self, labels: Sequence[str]) -> list[AlgorithmEntry]:
        return [
            AlgorithmEntry.of(label, self.entries[label], f"entries.{label}")
            if label in self.entries
            else AlgorithmEntry.parse(label)
            for label in labels
        ]


#: Keys of a setting that are not sections of a configuration.
_OWN = tuple(SettingKeys.model_fields)


def _anchor(tables: Table, folder: Path) -> None:
    """Make paths start at ``folder``, wherever a configuration has keys of paths. Changes ``tables``."""
    for key, value in tables.items():
        if isinstance(value, dict):
            below = cast(Table, value)
            _anchor(below, folder)
            name = _PATHS.get(key)
            if name in below and isinstance(below[name], str) and (name == "path" or below[name].endswith(".csv")):
                below[name] = str((folder / Path(below[name]).expanduser()).absolute())


#: Keys that hold paths, by section.
_PATHS = {"data": "path", "devices": "profiles"}


def _tables(path: Path) -> Table:
    """Return a file's tables over those of its ``base``; a path is relative to the file that contains it."""
    tables = read_toml(path)
    _anchor(tables, path.parent)
    base = tables.pop("base", None)
    if base is None:
        return tables
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: got {base!r}; expected the name of a TOML file beside it")
    return overlaid(_tables(path.parent / base), tables)
