"""Runs the cells of a comparison, a sweep or a study, each cell once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyfed.base import files
from polyfed.base.errors import DataError, DivergedError, ModelError, RunDirError
from polyfed.base.text import csv_text
from polyfed.comparison.runs import Reporter, run_or_go_on
from polyfed.comparison.specs import DIVERGED, FINISHED, RunSpec
from polyfed.report.tables import Summary
from polyfed.rounds.federation import misfits
from polyfed.storage.run_dir import RunDirInUseError


def play(cells: Sequence[RunSpec], root: Path, reporter: Reporter) -> list[RunSpec]:
    """Run every cell that is not done, in order; a cell that diverges is marked as diverged and is done.

    Several processes may run the same cells: a cell that one process runs, the others skip.

    Args:
        cells: the cells to run.
        root: the folder that contains ``cells/``.
        reporter: makes the callback of each run.

    Returns:
        The cells that other processes are running.

    Raises:
        ModelError: algorithms of the cells cannot train the networks; raised before any cell is run.
        DataError: data or source changed after the command began, so that cells have other folders now.
        PolyfedError: a run ended for a reason other than divergence.
    """
    cells = list({cell.folder: cell for cell in cells}.values())  # a cell that two settings share is run once
    waiting = [cell for cell in cells if cell.state(root) not in FINISHED]
    if faults := misfits([cell.config for cell in waiting], waiting[0].dataset if waiting else None):
        raise ModelError("\n".join(faults))
    elsewhere: list[RunSpec] = []
    for done, cell in enumerate(cells):
        run_dir = cell.run_dir(root)
        if cell.state(root) in FINISHED:
            continue
        if changes := cell.content_now().changes(cell.content):
            raise DataError(f"{cell.title}: {'; '.join(changes)} after the command began; give the command again")
        callback = reporter(f"{cell.title} ({done + 1} of {len(cells)})")
        if why := cell.replaced(root):
            callback.note(why)
        try:
            run_or_go_on(cell.config, run_dir, callback, cell.dataset)
        except DivergedError as error:
            files.write_json(run_dir / DIVERGED, {"error": str(error)})
        except RunDirInUseError:
            elsewhere.append(cell)
    return [cell for cell in elsewhere if cell.state(root) not in FINISHED]  # others may have finished


def all_here(elsewhere: Sequence[RunSpec], waiting: int = 0) -> None:
    """Check that no cell is left to other processes.

    Args:
        elsewhere: the cells that other processes are running.
        waiting: number of cells that can begin only after these.

    Raises:
        RunDirError: other processes are running cells; the text names them.
    """
    if elsewhere:
        titles = "; ".join(cell.title for cell in elsewhere)
        wait = f"; {waiting} more cells wait for these" if waiting else ""
        raise RunDirError(
            f"other processes are running {len(elsewhere)} of the cells ({titles}){wait}; all other cells are done; "
            "give the command again when these processes have finished"
        )


def check_splits(cells: Sequence[RunSpec], root: Path) -> None:
    """Check that all algorithms of a setting and a seed ran on the same splits.

    Raises:
        DataError: the data changed between two runs.
    """
    first: dict[tuple[int, int], Summary] = {}
    for cell in cells:
        if (summary := cell.summary(root)) is not None:
            other = first.setdefault((id(cell.setting), cell.seed), summary)
            if summary["partition_hash"] != other["partition_hash"]:
                raise DataError(
                    f"{summary['run_dir']} ran on other splits than {other['run_dir']}: the data changed between the "
                    "two; remove the older run, or choose another --out"
                )


def index(cells: Sequence[RunSpec], root: Path) -> str:
    """Return a CSV of the cells and their folders."""
    rows = (
        (cell.setting.title, cell.label, cell.seed, cell.state(root), cell.run_dir(root).relative_to(root))
        for cell in cells
    )
    return csv_text(("setting", "algorithm", "seed", "state", "folder"), rows)
