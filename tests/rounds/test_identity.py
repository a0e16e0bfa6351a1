"""A run is bound to what its numbers come from: its data, the user's own source, the versions of algorithms."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyfed.algorithms.fedavg import FedAvg
from polyfed.base.errors import CheckpointError, DataError
from polyfed.comparison import compare, execution, resume_with_controls, run_with_controls
from polyfed.config import Config
from polyfed.rounds import identity
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.rounds.identity import Content
from polyfed.simulation.simulate import resume, simulate

NET = '''
"""My network."""
from torch import nn

from . import parts
from .parts import HIDDEN


class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.body = parts.body(input_shape[0], HIDDEN)
        self.head = nn.Linear(HIDDEN, num_classes)

    def forward(self, x):
        return self.head(self.body(x))
'''
PARTS = '''
from torch import nn

HIDDEN = 6

def body(inputs, hidden):
    """Make it."""
    from mine.late import activation
    return nn.Sequential(nn.Linear(inputs, hidden), activation())  # small
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table and a package of two networks' modules; fresh imports before and after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a second edit within a second would not be seen
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 4)) + y[:, None]
    rows = [",".join(f"{value:.4f}" for value in row) + f",{label}\n" for row, label in zip(x, y, strict=True)]
    (tmp_path / "table.csv").write_text("a,b,c,d,y\n" + "".join(rows))
    (tmp_path / "mine").mkdir()
    for name, text in (("__init__", ""), ("nets", NET), ("parts", PARTS), ("late", LATE)):
        (tmp_path / "mine" / f"{name}.py").write_text(text)
    forget()
    return tmp_path


LATE = "from torch.nn import ReLU as activation\n"


def forget() -> None:
    """As a new process begins."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def config(**sections: dict[str, Any]) -> Config:
    tables: dict[str, dict[str, Any]] = {
        "run": {"rounds": 2, "eval_every": 1, "checkpoint_every": 1, "threads": 1, "driver": "sequential"},
        "data": {"dataset": "csv", "path": str(Path("table.csv").absolute())},
        "partition": {"kind": "iid"},
        "clients": {"count": 3, "models": ["mine.nets:Net(classifier=head)"]},
        "train": {"epochs": 1, "batch_size": 8},
        "algorithm": {"name": "fedavg"},
    }
    for name, keys in sections.items():
        tables[name] = {**tables.get(name, {}), **keys}
    return Config.parse(tables)


class Stop(Quiet):
    """Presses Ctrl-C after round 1; keeps what it is told."""

    def __init__(self, round_: int | None = 1) -> None:
        self.round, self.notes = round_, list[str]()

    def round_ended(self, row: Any) -> None:
        """Look whether it is time."""
        if row["round"] == self.round:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def one_byte(home: Path) -> None:
    data = bytearray((home / "table.csv").read_bytes())
    at = data.index(b"\n") + 4  # a digit of the first number
    data[at] = ord("7") if data[at] != ord("7") else ord("3")
    (home / "table.csv").write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the data": (one_byte, r"data file table\.csv changed"),
    "the network": (
        lambda home: edit(home / "mine/nets.py", "return self", "return 2 * self"),
        r"module mine\.nets changed",
    ),
    "a helper": (lambda home: edit(home / "mine/parts.py", "HIDDEN = 6", "HIDDEN = 7"), r"module mine\.parts changed"),
    "what a helper imports late": (
        lambda home: edit(home / "mine/late.py", "ReLU", "Tanh"),
        r"module mine\.late changed",
    ),
    "its package": (lambda home: edit(home / "mine/__init__.py", "", "import math\n"), r"module mine changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_refused_by_name_on_resumption(change: str, home: Path) -> None:
    """Catches a run that goes on with other data or another network."""
    with pytest.raises(Interrupted):
        simulate(config(), out=home / "run", callbacks=[Stop()])
    edit_, says = CHANGES[change]
    edit_(home)
    forget()
    with pytest.raises(
        CheckpointError, match=rf"begun with another content: {says}\. Restore the earlier content to continue"
    ):
        resume(home / "run")


def test_what_changes_no_number_is_no_change(home: Path) -> None:
    """Catches a digest of dates, comments, docstrings, layout, or modules that nothing imports."""
    with pytest.raises(Interrupted):
        simulate(config(), out=home / "run", callbacks=[Stop()])
    os.utime(home / "table.csv", (1, 1))
    edit(home / "mine/parts.py", "# small", "# large")
    edit(home / "mine/parts.py", "Make it.", "Make it well.")
    edit(home / "mine/nets.py", "My network.", "My own network.")
    edit(home / "mine/nets.py", "class Net", "\n\nclass Net")
    (home / "mine/other.py").write_text("SPEED = 3\n")
    forget()
    assert resume(home / "run").summary["rounds"] == 2


def test_the_code_that_runs_counts_and_not_what_the_file_says_meanwhile(home: Path) -> None:
    """Catches cells of a long sweep that are filed under source which this process has not loaded."""
    before = Content.of(config())
    assert set(before.source) == {"mine", "mine.nets", "mine.parts", "mine.late"}
    edit(home / "mine/nets.py", "return self", "return 2 * self")
    assert Content.of(config()) == before
    forget()
    assert Content.of(config()).changes(before) == ["module mine.nets changed"]


def test_a_relative_import_that_leads_nowhere_is_no_failure(home: Path) -> None:
    """Catches a traceback where a module runs both within a package and beside its helper, as many scripts do."""
    (home / "alone.py").write_text(
        "try:\n    from .mine.nets import Net\nexcept ImportError:\n    from mine.nets import Net\n"
    )
    found = Content.of(config(clients={"models": ["alone:Net(classifier=head)"]}))
    assert set(found.source) == {"alone", "mine", "mine.nets", "mine.parts", "mine.late"}


def test_a_risen_numbers_version_is_refused_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint that is gone on with by other arithmetic; also of what an own algorithm derives from."""
    (home / "mine/ways.py").write_text(
        "from dataclasses import dataclass\nfrom polyfed.algorithms.fedavg import FedAvg\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(FedAvg):\n    numbers = 1\n"
    )
    for name, folder in (("fedavg", home / "a"), ("mine.ways:Mine", home / "b")):
        with pytest.raises(Interrupted):
            simulate(config(algorithm={"name": name}), out=folder, callbacks=[Stop()])
    monkeypatch.setattr(FedAvg, "numbers", 2)
    for folder in (home / "a", home / "b"):
        with pytest.raises(CheckpointError, match=r"algorithm polyfed\.algorithms\.fedavg:FedAvg changed from 1 to 2"):
            resume(folder)
    monkeypatch.setattr(FedAvg, "numbers", 1)
    monkeypatch.setattr(identity, "RESULTS", identity.RESULTS + 1)
    with pytest.raises(CheckpointError, match="polyfed's own arithmetic"):
        resume(home / "a")


def test_a_run_of_before_is_refused_and_so_is_a_damaged_one(home: Path) -> None:
    with pytest.raises(Interrupted):
        simulate(config(), out=home / "run", callbacks=[Stop()])
    path = home / "run" / "content.json"
    path.write_text(json.dumps({"data": {}}))
    with pytest.raises(CheckpointError, match=r"content\.json is damaged"):
        resume(home / "run")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no content\.json"):
        resume(home / "run")


def test_controls_are_not_run_on_other_data_than_the_main_run(home: Path) -> None:
    """Catches a control on new data beside a complete main run on old data."""
    told = config(run={"controls": True}, controls={"alone": {"name": "standalone"}})

    def reporter(label: str) -> Quiet:
        if label == "alone":
            raise KeyboardInterrupt  # between the main run and the control
        return Quiet()

    with pytest.raises(KeyboardInterrupt):
        run_with_controls(told, out=home / "run", reporter=reporter)
    assert (home / "run" / "summary.json").exists()
    one_byte(home)
    with pytest.raises(CheckpointError, match=r"table\.csv changed"):
        resume_with_controls(home / "run")


def test_a_comparison_computes_anew_and_says_why(home: Path) -> None:
    """Catches a table of before; and one that is computed again although nothing changed."""
    told: list[list[str]] = []  # the notes before each run

    class Each(Quiet):
        def started(self, run_dir: Path, config: Any, first_round: int) -> None:
            told.append(notes.copy())
            notes.clear()

        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []

    def folders() -> set[str]:
        return {path.name for path in (home / "out" / "cells").iterdir()}

    compare(config(), ["fedavg", "standalone"], [0], home / "out", callbacks=[Each()])
    first = folders()
    os.utime(home / "table.csv", (1, 1))
    compare(config(), ["fedavg", "standalone"], [0], home / "out", callbacks=[Each()])
    assert (folders(), len(told)) == (first, 2)
    assert not any(told)
    one_byte(home)
    compare(config(), ["fedavg", "standalone"], [0], home / "out", callbacks=[Each()])
    assert (len(folders()), len(told)) == (4, 4)
    for before in told[2:]:
        (note,) = before
        assert note.startswith("computed anew, as since ")
        assert note.partition("since ")[2].partition(" ")[0] in first
        assert note.endswith("data file table.csv changed")


def test_data_that_change_while_a_comparison_runs_end_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the second half of a table on other data than the first."""
    go_on = execution.run_or_go_on

    def then_change(*arguments: Any) -> Any:
        found = go_on(*arguments)
        one_byte(home)
        return found

    monkeypatch.setattr(execution, "run_or_go_on", then_change)
    with pytest.raises(DataError, match=r"standalone, seed 0: data file table\.csv changed after the command began"):
        compare(config(), ["fedavg", "standalone"], [0], home / "out")


def test_the_version_of_a_package_that_the_configuration_names_counts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an update of the package that a network comes from."""
    (home / "lib" / "site-packages").mkdir(parents=True)
    (home / "lib" / "site-packages" / "bought.py").write_text("from torch.nn import Linear as Net\n")
    monkeypatch.setattr(sys, "path", [str(home / "lib" / "site-packages"), *sys.path])
    monkeypatch.setattr(identity.metadata, "packages_distributions", lambda: {"bought": ["Bought"]})
    found: list[Content] = []
    for version in ("1.0", "1.1"):
        monkeypatch.setattr(identity.metadata, "version", {"Bought": version}.__getitem__)
        found.append(Content.of(config(clients={"models": ["bought:Net(in_features=4, out_features=3)"]})))
    sys.modules.pop("bought")
    assert found[1].source == {}
    assert found[1].changes(found[0]) == ["package Bought changed from 1.0 to 1.1"]
