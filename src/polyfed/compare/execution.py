"""Running what a comparison, a sweep or a study asks for, each run once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyfed.base import files
from polyfed.base.errors import DataError, DivergedError, ModelError, RunDirError
from polyfed.base.text import csv_text
from polyfed.compare.runs import Callbacks, run_or_go_on
from polyfed.compare.specs import DIVERGED, FINISHED, RunSpec
from polyfed.report.tables import Summary
from polyfed.rounds.federation import misfits
from polyfed.rounds.identity import Content
from polyfed.storage.run_dir import RunDirInUseError


def play(cells: Sequence[RunSpec], root: Path, callbacks: Callbacks) -> list[RunSpec]:
    """Run every cell that is not done, in order; a cell that diverges is marked so and is done.

    Several processes may play the same cells: what one is at, the others leave to it.

    Args:
        cells: what is to be done.
        root: the cells lie in ``cells/`` of it.
        callbacks: who looks on.

    Returns:
        The cells that other processes are at.

    Raises:
        ModelError: networks that some cells' algorithms cannot train; before any cell is run.
        DataError: data or source changed after the command began, so that cells have other places now.
        PolyfedError: anything but divergence that ends a run.
    """
    cells = list({cell.folder: cell for cell in cells}.values())  # what two settings share is one run
    faults = misfits([cell.config for cell in cells if cell.state(root) not in FINISHED])
    if faults:
        raise ModelError("\n".join(faults))
    elsewhere: list[RunSpec] = []
    for done, cell in enumerate(cells):
        run_dir = cell.run_dir(root)
        if cell.state(root) in FINISHED:
            continue
        if changes := Content.of(cell.config).changes(cell.content):
            raise DataError(f"{cell.title}: {'; '.join(changes)} after the command began; give the command again")
        callback = callbacks(f"{cell.title} ({done + 1} of {len(cells)})")
        if why := cell.replaced(root):
            callback.note(why)
        try:
            run_or_go_on(cell.config, run_dir, callback)
        except DivergedError as error:
            files.write_json(run_dir / DIVERGED, {"error": str(error)})
        except RunDirInUseError:
            elsewhere.append(cell)
    return [cell for cell in elsewhere if cell.state(root) not in FINISHED]  # they may have finished meanwhile


def all_here(elsewhere: Sequence[RunSpec], waiting: int = 0) -> None:
    """Nothing is left to other processes.

    Args:
        elsewhere: what other processes are at.
        waiting: cells that cannot be begun before.

    Raises:
        RunDirError: something is; names it.
    """
    if elsewhere:
        titles = "; ".join(cell.title for cell in elsewhere)
        wait = f"; {waiting} more cells wait for them" if waiting else ""
        raise RunDirError(
            f"other processes are at {len(elsewhere)} of the cells ({titles}){wait}: all that could be done is done; "
            "give the command again when they have finished"
        )


def check_splits(cells: Sequence[RunSpec], root: Path) -> None:
    """Every algorithm of a setting and a seed ran on the same splits.

    Raises:
        DataError: the data changed between two runs.
    """
    first: dict[tuple[int, int], Summary] = {}
    for cell in cells:
        summary = cell.summary(root)
        if summary is None:
            continue
        other = first.setdefault((id(cell.setting), cell.seed), summary)
        if summary["partition_hash"] != other["partition_hash"]:
            raise DataError(
                f"{summary['run_dir']} ran on other splits than {other['run_dir']}: the data changed between the two; "
                "remove the older one, or choose another --out"
            )


def index(cells: Sequence[RunSpec], root: Path) -> str:
    """A CSV of which cell lies where."""
    rows = (
        (cell.setting.title, cell.label, cell.seed, cell.state(root), cell.run_dir(root).relative_to(root))
        for cell in cells
    )
    return csv_text(("setting", "algorithm", "seed", "state", "folder"), rows)
