"""A study from its file to its page: what is to be done, doing it, and the page with tables, pictures and the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyfed.compare.cells import Cell, check_splits, chosen, index, play
from polyfed.compare.grid import write
from polyfed.compare.runs import Watches, quiet
from polyfed.compare.table import Comparison, Line, differences, markdown, standard_error, tabulate
from polyfed.experiments import tuning
from polyfed.experiments.catalogue import folder
from polyfed.experiments.figures import draw
from polyfed.experiments.known import TAGS, Known
from polyfed.experiments.plan import rates, seconds
from polyfed.experiments.study import Study
from polyfed.experiments.views import VIEWS, Results, View
from polyfed.report import percent

#: What notes.md holds until somebody writes it.
NOTES = """<!-- Three sentences by hand, in the place of the lines below; this file is never overwritten. -->
- What agrees with the paper:
- What does not, and why:
- What is too small to tell (see the differences below two standard errors above):
"""


@dataclass(frozen=True)
class Job:
    """A study with its places.

    Args:
        path: of its file.
        scale: "" where the file has none.
        out: directory of pages, in a folder for each study and scale, and of ``cells/``.
        study: what the file says at this scale.
        known: what the paper says.
    """

    path: Path
    scale: str
    out: Path
    study: Study
    known: Known

    @classmethod
    def load(cls, path: Path, scale: str | None = None, out: Path | None = None) -> Job:
        """Read the study, and ``known.toml`` beside it.

        Raises:
            ConfigError: all its faults.
        """
        known = Known.load(path.parent / "known.toml", path.stem)
        return cls(path, scale or "", out or Path("runs"), Study.load(path, scale), known)

    @property
    def item(self) -> str:
        """``fedmrl/table1`` of a committed study, else the name of the file."""
        committed = self.path.is_relative_to(folder())
        name = self.path.relative_to(folder()) if committed else Path(self.path.name)
        return name.with_suffix("").as_posix()

    @property
    def page(self) -> Path:
        """The folder of tables and pictures."""
        return self.out / f"{self.item}{f'.{self.scale}' if self.scale else ''}"

    def tuning(self) -> list[Cell]:
        """The cells of the tuning, if there is one."""
        return self.study.tuning() if self.study.tune else []

    def tuned(self) -> dict[str, dict[str, Any]] | None:
        """What was chosen; None while the tuning is not done."""
        cells = self.tuning()
        if any(cell.state(self.out) not in ("done", "diverged") for cell in cells):
            return None
        return tuning.choose(cells, self.out)

    def plan(self, only: Sequence[str] = ()) -> list[tuple[Cell, str, float | None]]:
        """Every cell with its state and the seconds that it is thought to need; those of the tuning first.

        Before the tuning is done, the cells after it are those with the values of the file.
        """
        first, after = self.tuning(), self.study.cells(self.tuned())
        known = rates([*first, *after], self.out)
        asked = chosen(after, only)
        labels = {cell.label for cell in asked}
        cells = [*(cell for cell in first if cell.label in labels), *asked]
        rows: dict[str, tuple[Cell, str, float | None]] = {}
        for cell in cells:
            state = cell.state(self.out)
            left = 0.0 if state in ("done", "diverged") else seconds(cell, known)
            rows.setdefault(cell.folder, (cell, state, left))
        return list(rows.values())


def reproduce(
    path: Path,
    scale: str | None = None,
    out: Path | None = None,
    *,
    only: Sequence[str] = (),
    watches: Watches = quiet,
) -> tuple[Comparison, Path]:
    """Do what is not done of a study, and write its page: page.md, table.csv, cells.csv, and CSV and PNG of each view.

    The page is of all cells that are done, also of those that ``only`` left out. Its last section is notes.md, which
    is yours to write.

    Args:
        path: of the study; `find` knows those of papers.
        scale: of the study.
        out: directory of pages and of ``cells/``; ``runs`` if not given.
        only: patterns, all of which a cell must fit to be run; see `polyfed.compare.cells.chosen`.
        watches: who looks on.

    Returns:
        The tables, and the folder of the page.

    Raises:
        ConfigError: faults of the study, or ``only`` fits nothing.
        PolyfedError: what ended a run; everything before it is kept.
    """
    job = Job.load(path, scale, out)
    asked = chosen(job.study.cells(), only)
    labels = {cell.label for cell in asked}
    first = job.tuning()
    play([cell for cell in first if cell.label in labels], job.out, watches)
    check_splits(first, job.out)
    tuned = tuning.choose([cell for cell in first if cell.label in _whole(first, job.out)], job.out)
    cells = job.study.cells(tuned)
    play(chosen(cells, only), job.out, watches)
    check_splits(cells, job.out)
    return _page(job, cells, tuned), job.page


def _whole(cells: Sequence[Cell], root: Path) -> set[str]:
    """The algorithms whose tuning is done."""
    open_ = {cell.label for cell in cells if cell.state(root) not in ("done", "diverged")}
    return {cell.label for cell in cells} - open_


def _page(job: Job, cells: Sequence[Cell], tuned: Mapping[str, Mapping[str, Any]]) -> Comparison:
    study, page = job.study, job.page
    table = tabulate(cells, job.out, page)
    results = Results(study, cells, job.out)
    views = [VIEWS[name](results) for name in study.show]
    parts = [f"# {study.title}", _head(job, cells)]
    if cells:
        parts += [table.to_markdown().rstrip()]
    if study.tune is not None:
        chosen_ = "\n".join(f"* {line}" for line in tuning.told(tuned))
        parts += [f"Chosen on validation rows, which come out of the training rows:\n\n{chosen_}"]
    for view in views:
        write(page / f"{view.name}.csv", view.to_csv())
        pictured = draw(view, page / f"{view.name}.png", study.title)
        parts += [_shown(view, pictured)]
    if study.source:
        parts += [_paper(job.known, table)]
    if cells:
        parts += ["## Below two standard errors\n\n" + "\n".join(f"* {line}" for line in undecided(table.lines))]
    notes = page / "notes.md"
    if not notes.exists():
        write(notes, NOTES)
    parts += [f"## In three sentences\n\n{notes.read_text(encoding='utf-8').strip()}"]
    write(page / "page.md", "\n\n".join(parts) + "\n")
    write(page / "table.csv", table.to_csv())
    write(page / "cells.csv", index(cells, job.out))
    return table


def _head(job: Job, cells: Sequence[Cell]) -> str:
    lines = [f"Reproduces {job.study.source}."] if job.study.source else []
    lines += [f"Made by `polyfed reproduce {job.item}{f' --scale {job.scale}' if job.scale else ''}`."]
    states = [cell.state(job.out) for cell in cells]
    missing = len(states) - states.count("done") - states.count("diverged")
    lines += [f"**{missing} of {len(states)} cells are not done yet.**"] if missing else []
    return " ".join(lines)


def _shown(view: View, pictured: bool) -> str:
    parts = [f"## {view.name.capitalize()}", f"{view.caption} Numbers: [{view.name}.csv]({view.name}.csv)."]
    if pictured:
        parts += [f"![{view.name}]({view.name}.png)"]
    if view.cells is not None and view.cells[1]:
        headings, rows = view.cells
        parts += [markdown(headings, rows, left=("setting", "algorithm", "predictor", "network"))]
    return "\n\n".join(parts)


def _paper(known: Known, table: Comparison) -> str:
    parts = ["## Beside the paper"]
    if known.values:
        ours = {(line.setting, line.label): line.told for line in table.lines}
        rows = [
            (
                v.setting or "-",
                v.algorithm,
                ours.get((v.setting, v.algorithm), "-"),
                percent(v.accuracy, 2),
                TAGS[v.tag],
            )
            for v in known.values
        ]
        parts += [markdown(("setting", "algorithm", "ours", "paper", "read in"), rows, left=("setting", "algorithm"))]
    parts += ["\n".join(f"* {claim.text} ({TAGS[claim.tag]})" for claim in known.claims)] if known.claims else []
    missing = known.missing or ("" if known.values or known.claims else "anything of this item.")
    parts += [f"Not available: {missing}"] if missing else []
    return "\n\n".join(parts)


def undecided(lines: Sequence[Line]) -> list[str]:
    """Which differences to the algorithm under examination are below two standard errors, by setting."""
    told: list[str] = []
    for setting in dict.fromkeys(line.setting for line in lines):
        main, *others = (line for line in lines if line.setting == setting)
        small: list[str] = []
        single: list[str] = []
        compared = False
        for other in others:
            found = differences(main, other)
            error = standard_error(found)
            if not found:
                continue
            compared = True
            mean = sum(found) / len(found)
            if error is None:
                single.append(f"{other.label} ({100 * mean:+.1f})")
            elif abs(mean) < 2 * error:
                small.append(f"{other.label} ({100 * mean:+.1f} ± {100 * error:.1f})")
        where = f"{setting}: " if setting else ""
        if small:
            told.append(f"{where}{main.label} minus {', '.join(small)}; points ± standard error of the paired mean")
        if single:
            told.append(f"{where}one seed, so no standard error: {main.label} minus {', '.join(single)}")
        if not small and not single:
            told.append(f"{where}{'none' if compared else 'nothing to compare yet'}")
    return told
