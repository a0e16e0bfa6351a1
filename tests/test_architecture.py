"""The layout is the architecture: who may import whom, how long an algorithm may be, what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import polyfed
from polyfed.algorithms.catalogue import ALGORITHMS

SRC = Path(polyfed.__file__).parent
MODULES = sorted(SRC.rglob("*.py"))

#: Every folder of the package from the lowest to the highest: each imports those before it, and no other. What a row
#: holds together does not import one another.
LAYERS = (
    ("base",),
    ("metrics",),
    ("models", "data"),
    ("core",),
    ("blocks",),
    ("algorithms", "attacks"),
    ("execute", "storage"),
    ("config",),
    ("rounds",),
    ("trained",),
    ("report",),
    ("parallel",),
    ("simulation",),
    ("comparison",),
    ("deploy",),
    ("flower",),
    ("experiments", "testing"),
)
#: Why an import that LAYERS would allow is wrong all the same: package -> what it must not import.
FORBIDDEN = {
    "algorithms": ("algorithms", "a variant is a parameter or a block, not an import of another algorithm"),
}
#: Modules at the root: they may import everything.
ROOT = {"__init__", "__main__", "cli"}
LEVEL = {package: level for level, row in enumerate(LAYERS) for package in row}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def imported(path: Path) -> set[str]:
    """The folders of polyfed that a file imports, its own apart."""
    own = path.relative_to(SRC).parts[0]
    names = {name.split(".")[1] for name in imports(path) if name.startswith("polyfed.")}
    return {name for name in names & LEVEL.keys() if name != own}


def test_every_folder_has_its_place() -> None:
    assert {path.name for path in SRC.iterdir() if path.is_dir() and any(path.glob("*.py"))} == LEVEL.keys()
    assert {path.stem for path in SRC.glob("*.py")} == ROOT


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_layers_import_downwards_only(path: Path) -> None:
    own = path.relative_to(SRC).parts[0]
    if own in LEVEL:
        above = {name for name in imported(path) if LEVEL[name] >= LEVEL[own]}
        assert not above, f"{path.relative_to(SRC)} imports {sorted(above)}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_what_the_order_would_allow_and_the_design_does_not(package: str) -> None:
    banned, reason = FORBIDDEN[package]
    for path in (SRC / package).glob("*.py"):
        names = {name for name in imports(path) if name.startswith(f"polyfed.{banned}.")}
        assert not names, f"{path.name} imports {sorted(names)}: {reason}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Circles inside a folder, which the order of folders does not see; imports for type checkers count, too."""
    names = {".".join(("polyfed", *path.relative_to(SRC).with_suffix("").parts)): path for path in MODULES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items() if name != "polyfed.__init__"}
    arrows = {
        name: {other for other in imports(path) if other in names and other != name} for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_flower_is_imported_in_one_package_only() -> None:
    for path in MODULES:
        if path.relative_to(SRC).parts[0] != "flower":
            assert not any(name.split(".")[0] == "flwr" for name in imports(path)), path


#: Between a process and its children, as multiprocessing's own pipes do: nothing there comes from outside.
PICKLES = {"parallel/transfer.py"}


def test_nothing_from_outside_is_unpickled() -> None:
    for path in MODULES:
        banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        assert str(path.relative_to(SRC)) in PICKLES or not imports(path) & banned, path
        assert not re.search(r"(?<!safetensors\.)\btorch\.load\(", path.read_text()), path


@pytest.mark.parametrize("path", sorted((SRC / "algorithms").glob("*.py")), ids=lambda path: path.stem)
def test_an_algorithm_is_a_file_of_at_most_150_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 150


def test_the_public_names_are_listed_and_an_algorithm_is_one() -> None:
    """Catches completion in a notebook that offers nothing, or what cannot be imported."""
    classes = {name: path.partition(":")[2] for name, (path, _) in ALGORITHMS.items()}
    assert dir(polyfed) == sorted({*polyfed.__all__, *classes.values()})
    for name, cls in classes.items():
        assert getattr(polyfed, cls).name == name


def test_what_is_public_is_what_is_declared() -> None:
    assert set(polyfed.__all__) == {"__version__", *polyfed._PUBLIC}
    for name in polyfed.__all__:
        assert getattr(polyfed, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = polyfed.no_such_name  # type: ignore[attr-defined]


def test_the_import_and_the_list_of_names_load_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "scipy", "pydantic", "matplotlib", "rich", "pandas", "pyarrow"}
    code = f"import sys, polyfed; dir(polyfed); print(sorted({heavy!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_result_is_loaded_without_torch() -> None:
    code = "import sys, polyfed; polyfed.load_run, polyfed.RunResult; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "module", ["polyfed", "polyfed.cli", "polyfed.config", "polyfed.report.tables", "polyfed.testing.plugin"]
)
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()


def test_the_page_has_the_folders_in_their_order() -> None:
    rows = re.findall(r"^\| \d+ \| (.*?) \|", PAGE, re.MULTILINE)
    assert [tuple(re.findall(r"\[`(\w+)`\]", row)) for row in rows] == list(LAYERS)


@pytest.mark.parametrize("package", sorted(LEVEL.keys() - {"algorithms"}))  # every algorithm has a page of its own
def test_the_page_names_the_modules_that_there_are(package: str) -> None:
    section = re.search(rf"^### {package}\n(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, package
    named = set(re.findall(r"`([\w/]+)`", section[1]))
    folder = SRC / package
    modules = [path.relative_to(folder) for path in folder.rglob("*.py") if path.stem != "__init__"]
    missing = [str(path) for path in modules if not {path.stem, str(path.with_suffix(""))} & named]
    assert not missing, f"docs/architecture.md lacks {missing}"
    first = re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE)
    for name in {name for cell in first for name in re.findall(r"`([\w/]+)`", cell)}:
        assert (folder / name).is_dir() or (folder / name).with_suffix(".py").exists(), f"{package}/{name} is gone"


def test_the_page_names_files_that_there_are() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (SRC / name).exists() or (REPOSITORY / name).exists(), name
