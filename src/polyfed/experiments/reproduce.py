"""Runs a study and writes its page, with tables, pictures and the paper's results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyfed.base.errors import RunDirError
from polyfed.base.text import csv_text
from polyfed.comparison.compare import write
from polyfed.comparison.execution import all_here, check_splits, index, play
from polyfed.comparison.render import Comparison, markdown, tabulate
from polyfed.comparison.runs import Reporter, quiet
from polyfed.comparison.specs import FINISHED, RunSpec, chosen
from polyfed.comparison.statistics import Line, differences, standard_error
from polyfed.config.toml import to_toml
from polyfed.experiments import tuning
from polyfed.experiments.catalogue import FOLDER
from polyfed.experiments.figures import draw
from polyfed.experiments.inside import needs_tsne
from polyfed.experiments.inside_views import INSIDE
from polyfed.experiments.known import TAGS, Known
from polyfed.experiments.plan import rates, seconds
from polyfed.experiments.sizes import SIZES, named_values
from polyfed.experiments.study import Study
from polyfed.experiments.submodels import SUBMODELS
from polyfed.experiments.views import VIEWS, Results, View
from polyfed.report.units import percent

#: The first content of notes.md, which a person replaces.
NOTES = """<!-- Three sentences by hand, in the place of the lines below; this file is never overwritten. -->
- What agrees with the paper:
- What does not, and why:
- What is too small to tell (see the differences below two standard errors above):
"""


@dataclass(frozen=True)
class Job:
    """A study with its file and folders.

    Args:
        path: path of the file.
        scale: the scale; "" for a file without scales.
        out: directory of pages, in a folder for each study and scale, and of ``cells/``.
        study: the study at this scale.
        known: the paper's results.
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
            ConfigError: all faults of the study.
        """
        known = Known.load(path.parent / "known.toml", path.stem)
        return cls(path, scale or "", out or Path("runs"), Study.load(path, scale), known)

    @property
    def item(self) -> str:
        """``fedmrl/table1`` for a committed study, else the name of the file."""
        name = self.path.relative_to(FOLDER) if self.path.is_relative_to(FOLDER) else Path(self.path.name)
        return name.with_suffix("").as_posix()

    @property
    def page(self) -> Path:
        """The folder of tables and pictures."""
        return self.out / f"{self.item}{f'.{self.scale}' if self.scale else ''}"

    def claim(self) -> None:
        """Claim the folder of the page: study.txt names the file of a study that is not committed.

        Raises:
            RunDirError: the folder has the page of another study with a file of the same name.
        """
        if self.path.is_relative_to(FOLDER):
            return
        note, mine = self.page / "study.txt", f"{self.path.absolute()}\n"
        if note.exists() and note.read_text(encoding="utf-8") != mine:
            raise RunDirError(
                f"{self.page} has the page of {note.read_text(encoding='utf-8').strip()}; choose another --out, or "
                f"remove {note} if that study is this one and was moved"
            )
        write(note, mine)

    def tuning(self) -> list[RunSpec]:
        """Return the known cells of the tuning; empty without a tuning."""
        return tuning.search(self.study, self.out)[0] if self.study.tune else []

    def edges(self) -> dict[str, dict[str, str]]:
        """Return by label and key why the best value is at the edge of the tried values."""
        return tuning.search(self.study, self.out)[1] if self.study.tune else {}

    def tuned(self) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Return the chosen values, by label, and the labels whose tuning is not done.

        A label that is in neither result diverged at every point: it keeps the values of the file.
        """
        cells = self.tuning()
        waiting = {cell.label for cell in cells if cell.state(self.out) not in FINISHED}
        return tuning.choose([cell for cell in cells if cell.label not in waiting], self.out), waiting

    def plan(self, only: Sequence[str] = ()) -> list[tuple[RunSpec, str, float | None]]:
        """Return every cell with its state and an estimate of its seconds; the cells of the tuning come first.

        Before an algorithm is tuned, its cells have the values of the file.
        """
        first, after = self.tuning(), self.study.cells(self.tuned()[0])
        known = rates([*first, *after], self.out)
        asked = chosen(after, only)
        labels = {cell.label for cell in asked}
        rows: dict[str, tuple[RunSpec, str, float | None]] = {}
        for cell in (*(cell for cell in first if cell.label in labels), *asked):
            state = cell.state(self.out)
            rows.setdefault(cell.folder, (cell, state, 0.0 if state in FINISHED else seconds(cell, known)))
        return list(rows.values())


def reproduce(
    path: Path,
    scale: str | None = None,
    out: Path | None = None,
    *,
    only: Sequence[str] = (),
    reporter: Reporter = quiet,
) -> tuple[Comparison, Path]:
    """Run the cells of a study that are not done, and write its page: page.md, table.csv, cells.csv, and the views.

    The page shows all cells that are done, also those that ``only`` leaves out; each view is a CSV and a PNG. The last
    section is notes.md, which you write.

    Args:
        path: path of the study; `find` returns the path of a paper's study.
        scale: scale of the study.
        out: directory of pages and of ``cells/``; ``runs`` if not given.
        only: patterns, all of which a cell must match to be run; see `polyfed.comparison.specs.chosen`.
        reporter: makes the callback of each run.

    Returns:
        The tables, and the folder of the page.

    Raises:
        ConfigError: faults of the study, no cell matches ``only``, or a view needs a package that is missing.
        RunDirError: other processes are running the remaining cells; the page shows the cells that are done.
        PolyfedError: a run ended with an error; the results of earlier runs are kept.
    """
    job = Job.load(path, scale, out)
    if "tsne" in job.study.show:
        needs_tsne()
    job.claim()
    labels = {cell.label for cell in chosen(job.study.cells(), only)}
    elsewhere: list[RunSpec] = []
    # The results of the tuning may need more cells; cells that other processes run are counted once.
    while _left(first := [cell for cell in job.tuning() if cell.label in labels], elsewhere, job.out):
        elsewhere = play(first, job.out, reporter)
    check_splits(first, job.out)
    tuned, waiting = job.tuned()
    cells = job.study.cells(tuned)
    asked = chosen(cells, only)
    elsewhere += play([cell for cell in asked if cell.label not in waiting], job.out, reporter)
    check_splits(cells, job.out)
    table = _page(job, cells, tuned, waiting)
    all_here(elsewhere, sum(cell.label in waiting for cell in asked))
    return table, job.page


def _left(cells: Sequence[RunSpec], elsewhere: Sequence[RunSpec], root: Path) -> bool:
    """Return whether any of the cells can be begun."""
    theirs = {cell.folder for cell in elsewhere}
    return any(cell.state(root) not in FINISHED and cell.folder not in theirs for cell in cells)


def _page(
    job: Job, everything: Sequence[RunSpec], tuned: Mapping[str, dict[str, Any]], waiting: set[str]
) -> Comparison:
    study, page = job.study, job.page
    # Before an algorithm is tuned, its cells have the values of the file; other studies may have run such cells.
    cells = [cell for cell in everything if cell.label not in waiting]
    table = tabulate(cells, job.out, page)
    results = Results(study, cells, job.out)
    parts = [
        f"# {study.title}",
        _head(job, everything, waiting),
        *filter(None, [study.note]),
        *([table.to_markdown().rstrip()] if cells else []),
    ]
    if study.tune is not None and everything:
        what = _chosen(cells, tuned, job.edges(), waiting)
        parts += [f"Chosen on validation rows, which come out of the training rows:\n\n{what}"]
    for view in [{**VIEWS, **INSIDE, **SIZES, **SUBMODELS}[name](results) for name in study.show]:
        write(page / f"{view.name}.csv", csv_text(view.headings, view.rows))
        ordered = replace(view, algorithms=study.algorithms)
        parts += [_shown(view, draw(ordered, page / f"{view.name}.png", study.title))]
    notes = page / "notes.md"
    if not notes.exists():
        write(notes, NOTES)
    parts += [
        *([_run(job, cells)] if cells else []),
        *([_paper(job.known, table, results, everything, job.scale)] if study.source else []),
        *below(job.study.show, table.lines),
        f"## In three sentences\n\n{notes.read_text(encoding='utf-8').strip()}",
    ]
    write(page / "page.md", "\n\n".join(parts) + "\n")
    write(page / "table.csv", table.to_csv())
    write(page / "cells.csv", index(cells, job.out))
    return table


def _run(job: Job, cells: Sequence[RunSpec]) -> str:
    """Return the section with the common configuration and the seeds."""
    seeds = ", ".join(map(str, dict.fromkeys(cell.seed for cell in cells)))
    return (
        "## What was run\n\nShared by all, but for what a setting, an algorithm or the tuning changes; the whole "
        "configuration of a cell is config.toml in its folder, which [cells.csv](cells.csv) names. "
        f"Seeds: {seeds}.\n\n"
        f"```toml\n{to_toml(job.study.config).strip()}\n```"
    )


def _chosen(
    cells: Sequence[RunSpec],
    tuned: Mapping[str, dict[str, Any]],
    edges: Mapping[str, Mapping[str, str]],
    waiting: set[str],
) -> str:
    """Return the chosen values of each algorithm, and the algorithms without chosen values."""
    lost = [label for label in dict.fromkeys(cell.label for cell in cells) if label not in tuned]
    lines = (
        *tuning.told(tuned, edges),
        *(f"{label}: diverged at every point; the values of the file" for label in lost),
        *([f"{', '.join(sorted(waiting))}: not tuned yet, and not shown"] if waiting else []),
    )
    return "\n".join(f"* {line}" for line in lines)


def _head(job: Job, cells: Sequence[RunSpec], waiting: set[str]) -> str:
    item = job.item if job.path.is_relative_to(FOLDER) else shlex.quote(str(job.path))
    left = sum(cell.label in waiting or cell.state(job.out) not in FINISHED for cell in cells)
    sentences = (
        *([f"Reproduces {job.study.source}."] if job.study.source else []),
        f"Made by `polyfed reproduce {item}{f' --scale {job.scale}' if job.scale else ''}`.",
        *(["**At this scale a study shows that it works; its numbers mean nothing.**"] if job.scale == "smoke" else []),
        *([f"**{left} of {len(cells)} cells are not done yet.**"] if left else []),
    )
    return " ".join(sentences)


def _shown(view: View, pictured: bool) -> str:
    headings, rows = view.cells or ((), [])
    parts = [
        f"## {view.name.replace('_', ' ').capitalize()}",
        f"{view.caption} Numbers: [{view.name}.csv]({view.name}.csv).",
        *([f"![{view.name}]({view.name}.png)"] if pictured else []),
        *(
            [
                markdown(
                    headings,
                    rows,
                    left=(
                        "setting",
                        "algorithm",
                        "predictor",
                        "network",
                        "network by network",
                        "pairs",
                        "stage",
                        "on",
                        "own keys",
                    ),
                )
            ]
            if rows
            else []
        ),
    ]
    return "\n\n".join(parts)


def _paper(known: Known, table: Comparison, results: Results, cells: Sequence[RunSpec], scale: str) -> str:
    """Return the section of what is known, with the accuracies of the settings and rows that the page has."""
    rowed = {(cell.setting.title, cell.label) for cell in cells}
    ours = {(line.setting, line.label, ""): line.accuracy_text for line in table.lines}
    several = any(v.of for v in known.values)
    ours |= named_values(results) if several else {}
    # Rows with fewer seeds are in a setting of their own, "S, one seed" beside "S".
    found = [
        (v, next((title for title in (v.setting, f"{v.setting}, one seed") if (title, v.algorithm) in rowed), None))
        for v in known.values
    ]
    rows = [
        (
            title or "-",
            v.algorithm,
            *((v.of or "-",) if several else ()),
            ours.get((title, v.algorithm, v.of), "-"),
            percent(v.accuracy, 2),
            TAGS[v.tag],
        )
        for v, title in found
        if title is not None
    ]
    headings = ("setting", "algorithm", *(("of",) if several else ()), "ours", "known", "read in")
    claims = "\n".join(f"* {claim.text} ({TAGS[claim.tag]})" for claim in known.claims)
    missing = known.missing or ("" if known.values or claims else "anything of this item.")
    smaller = rows and scale in ("smoke", "cpu")
    left = len(known.values) - len(rows)
    parts = [
        "## Beside the paper",
        *(["This scale is smaller than the paper's: compare orders, not values."] if smaller else []),
        *([markdown(headings, rows, left=("setting", "algorithm", "of"))] if rows else []),
        *([f"Known, too, are {left} accuracies of settings or rows that this page does not have."] if left else []),
        *([claims] if claims else []),
        *([f"Not available: {missing}"] if missing else []),
    ]
    return "\n\n".join(parts)


def below(shown: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """Return the section of `undecided`; none where nothing is compared, or masks are the subject and not accuracy."""
    told = [] if {"convergence", "exploration"} & {*shown} else undecided(lines)
    some = any(not line.endswith(_NOTHING) for line in told)
    return ["## Below two standard errors\n\n" + "\n".join(f"* {line}" for line in told)] if some else []


#: What `undecided` says of a setting with one algorithm.
_NOTHING = "nothing to compare yet"


def undecided(lines: Sequence[Line]) -> list[str]:
    """Return the differences to the main algorithm that are below two standard errors, by setting."""
    told: list[str] = []
    for setting in dict.fromkeys(line.setting for line in lines):
        main, *others = (line for line in lines if line.setting == setting)
        compared = [
            (other.label, sum(found) / len(found), standard_error(found))
            for other in others
            if (found := differences(main, other))
        ]
        single = [f"{label} ({100 * mean:+.1f})" for label, mean, error in compared if error is None]
        small = [
            f"{label} ({100 * mean:+.1f} ± {100 * error:.1f})"
            for label, mean, error in compared
            if error is not None and (not mean or abs(mean) < 2 * error)
        ]
        where = f"{setting}: " if setting else ""
        if small:
            told.append(f"{where}{main.label} minus {', '.join(small)}; points ± standard error of the paired mean")
        if single:
            told.append(f"{where}one seed, so no standard error: {main.label} minus {', '.join(single)}")
        if not small and not single:
            told.append(f"{where}{'none' if compared else _NOTHING}")
    return told
