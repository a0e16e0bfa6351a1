"""The notebook of the examples: its cells run in order in a fresh namespace, and what ends a cell can be shown."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def shown(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)


def test_the_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a first page that does not work, and a result that a notebook cannot show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    values = [shown("".join(cell["source"]), namespace) for cell in CELLS if cell["cell_type"] == "code"]
    printed = capsys.readouterr().out
    assert "only this Python process can resume the run, since no module file holds Convolutions" in printed
    html = [value._repr_html_() for value in values if hasattr(value, "_repr_html_") and not isinstance(value, Figure)]
    assert ["The run lies in" in one for one in html] == [True, False, True]  # a run, a comparison, a run
    assert sum(isinstance(value, Figure) for value in values) == 2
    result, hospitals = namespace["result"], namespace["hospitals"]
    assert result.accuracy > result.rounds["accuracy.mean"][0]
    assert hospitals.clients["name"] == ["north", "south", "west"]
    assert all(hospitals.run_dir.parent == run.run_dir.parent for run in (result, namespace["own"]))
    assert len(namespace["table"].records()) == 6


def test_it_is_committed_without_outputs() -> None:
    """Catches numbers of another machine or another version."""
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
