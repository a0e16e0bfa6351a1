"""The layout is the architecture: who may import whom, how long an algorithm may be, what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import polyfed

SRC = Path(polyfed.__file__).parent
MODULES = sorted(SRC.rglob("*.py"))

#: package or module -> what it must not import.
FORBIDDEN = {
    "algorithms": ["polyfed.execute", "polyfed.runtime", "polyfed.config", "polyfed.flower", "polyfed.algorithms"],
    "execute": ["polyfed.algorithms", "polyfed.runtime", "polyfed.config"],
    "models": ["polyfed.algorithms", "polyfed.execute", "polyfed.runtime", "polyfed.config", "polyfed.data"],
    "data": ["polyfed.algorithms", "polyfed.execute", "polyfed.runtime", "polyfed.config", "polyfed.models"],
    "config": ["polyfed.runtime", "polyfed.execute"],
    "runtime": ["polyfed.algorithms", "polyfed.flower"],
}
for _base in (
    "message",
    "submodel",
    "uploads",
    "aggregate",
    "align",
    "classes",
    "server",
    "generator",
    "losses",
    "lowrank",
    "matryoshka",
    "plan",
    "rng",
    "tree",
    "nets",
    "parties",
    "compute",
):
    FORBIDDEN[_base] = ["polyfed.algorithms", "polyfed.execute", "polyfed.runtime", "polyfed.config", "polyfed.data"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layers_import_downwards_only(layer: str) -> None:
    files = [path for path in MODULES if path.relative_to(SRC).parts[0] in (layer, f"{layer}.py")]
    assert files
    for path in files:
        for name in imports(path):
            for ban in FORBIDDEN[layer]:
                assert not f"{name}.".startswith(f"{ban}."), f"{path.relative_to(SRC)} imports {name}"


def test_flower_is_imported_in_one_package_only() -> None:
    for path in MODULES:
        if path.relative_to(SRC).parts[0] != "flower":
            assert not any(name.split(".")[0] == "flwr" for name in imports(path)), path


#: Between a process and its children, as multiprocessing's own pipes do: nothing there comes from outside.
PICKLES = {"runtime/parcel.py"}


def test_nothing_from_outside_is_unpickled() -> None:
    for path in MODULES:
        banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        assert str(path.relative_to(SRC)) in PICKLES or not imports(path) & banned, path
        assert not re.search(r"(?<!safetensors\.)\btorch\.load\(", path.read_text()), path


@pytest.mark.parametrize("path", sorted((SRC / "algorithms").glob("*.py")), ids=lambda path: path.stem)
def test_an_algorithm_is_a_file_of_at_most_150_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 150


def test_what_is_public_is_what_is_declared() -> None:
    assert set(polyfed.__all__) == {"__version__", *polyfed._PUBLIC}
    for name in polyfed.__all__:
        assert getattr(polyfed, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = polyfed.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "module", ["polyfed", "polyfed.cli", "polyfed.config", "polyfed.report.tables", "polyfed.testing.plugin"]
)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
