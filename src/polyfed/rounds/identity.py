"""What the numbers of a run come from beside its configuration: data, own source, versions; content.json of a run.

Of the user's own networks and algorithms every module counts that importing them brings in and that lies outside the
standard library, site-packages and polyfed. Modules are compared as syntax without docstrings, so that comments and
layout count for nothing. What a module imports under a name made at run time, and files that it reads, are not seen.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from pathlib import Path

from polyfed.base import files
from polyfed.base.errors import CheckpointError, ModelError
from polyfed.base.imports import search_working_directory
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm
from polyfed.data.sources import file_digests
from polyfed.models.catalogue import ModelSpec

NAME = "content.json"

#: Raised whenever the code that all algorithms share gives other numbers for an unchanged configuration; what a single
#: algorithm changes is in its own `Algorithm.numbers`.
RESULTS = 2


@dataclass(frozen=True)
class Content:
    """What a run is bound to; two runs of one configuration have the same numbers if their contents are equal.

    Args:
        config: `Config.hash`.
        results: `RESULTS`.
        algorithms: the class of the algorithm and those it derives from -> its ``numbers``.
        data: name of a file -> SHA-256; empty where there are no files, or they are not at hand.
        source: name of a module of one's own -> SHA-256 of its syntax.
        packages: installed package that the configuration names -> version.
    """

    config: str
    results: int
    algorithms: Mapping[str, int]
    data: Mapping[str, str]
    source: Mapping[str, str]
    packages: Mapping[str, str]

    @classmethod
    def of(cls, config: Config, data: Mapping[str, str] | None = None, model: str | None = None) -> Content:
        """The content as it is now.

        Args:
            config: of the run.
            data: digests of the data's files; None looks at the files that ``config`` names.
            model: a network beside those that ``config`` names.

        Raises:
            PolyfedError: a file that cannot be read, or an algorithm that there is not.
        """
        section = config.data
        if data is None:
            data = file_digests(section.dataset, path=Path(section.path) if section.path else None)
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        classes = [kind for kind in type(algorithm).__mro__ if issubclass(kind, Algorithm) and kind is not Algorithm]
        asked = [model, config.algorithm.name, *vars(algorithm).values(), *map(str, config.clients.models)]
        source, packages = _own_code({name for value in asked if (name := _module(value))})
        numbers = {f"{kind.__module__}:{kind.__qualname__}": kind.numbers for kind in classes}
        return cls(config.hash(), RESULTS, numbers, dict(data), source, packages)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, *, mode: int = 0o666) -> None:
        """Write ``content.json``; ``mode`` is who may read it, as of `files.write`."""
        files.write(folder / NAME, (json.dumps(asdict(self), indent=2) + "\n").encode(), mode=mode)

    @classmethod
    def read(cls, folder: Path) -> Content:
        """What `write` wrote.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = folder / NAME
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no {NAME}, which says what data and code its numbers come from: an earlier version of "
                "polyfed began it; resume it with that version, or start a new run"
            )
        try:
            return cls(**files.read_json(path))
        except TypeError as error:
            raise CheckpointError(f"{path} is damaged ({error}); start a new run") from error

    def changes(self, before: Content) -> list[str]:
        """What is not as it was, the configuration apart; a phrase for each."""
        found = [] if self.results == before.results else ["polyfed's own arithmetic"]
        for what, was, now in (
            ("the numbers-version of algorithm", before.algorithms, self.algorithms),
            ("data file", before.data, self.data),
            ("module", before.source, self.source),
            ("package", before.packages, self.packages),
        ):
            for name in sorted({*was, *now}):
                old, new = was.get(name), now.get(name)
                if old != new:
                    how = "is new" if old is None else "is gone" if new is None else "changed"
                    short = what in ("package", "the numbers-version of algorithm") and how == "changed"
                    found.append(f"{what} {name} {how}{f' from {old} to {new}' if short else ''}")
        return found

    def check(self, folder: Path) -> None:
        """Refuse to go on in a folder that was begun with another content.

        Raises:
            CheckpointError: names what changed and what to do.
        """
        if changes := self.changes(Content.read(folder)):
            raise CheckpointError(
                f"{folder} was begun with another content: {'; '.join(changes)}. Bring that back to go on, or start a "
                "new run"
            )


def _module(value: object) -> str:
    """The module of ``package.module:attribute``, with options behind it or not; "" for any other value."""
    try:
        spec = ModelSpec.parse(value) if isinstance(value, str) and ":" in value else None
        if spec is not None and spec.own:
            spec.check()
            return spec.name.partition(":")[0]
    except ModelError:  # a string for something else
        pass
    return ""


# ------------------------------------------------------------------------------------------------------- own source

_INSTALLED = [Path(path).resolve() for key, path in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib")]

# Module -> its specification when it was loaded, digest, and what it imports. While a module stays loaded the code that
# runs is the one that was read then, whatever the file says now.
_read: dict[str, tuple[ModuleSpec, str, frozenset[str]]] = {}


def _own_code(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Digest of each own module that importing ``names`` brings in; version of each installed package among them."""
    search_working_directory()
    source: dict[str, str] = {}
    packages: dict[str, str] = {}
    for name in names:
        if (spec := _spec(name)) is not None and _installed(spec):
            distributions = metadata.packages_distributions().get(name.partition(".")[0], [])
            packages |= {package: metadata.version(package) for package in distributions if package != "polyfed"}
    waiting = set(names)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        spec = _spec(name)
        if spec is None or _installed(spec):
            continue
        parent = name.rpartition(".")[0]
        waiting |= {parent} - seen if parent else set()
        if spec.origin is not None:  # a namespace package has no file
            source[name], imports = _digest(name, spec)
            waiting |= imports - seen
    return source, packages


def _spec(name: str) -> ModuleSpec | None:
    """Where a module comes from, without importing anything; None if it is no module."""
    if (module := sys.modules.get(name)) is not None:
        return getattr(module, "__spec__", None) or _script(name, module)
    parent = name.rpartition(".")[0]
    path = None
    if parent:
        above = _spec(parent)
        if above is None or _installed(above) or above.submodule_search_locations is None:
            return None
        path = list(above.submodule_search_locations)
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def _script(name: str, module: object) -> ModuleSpec | None:
    """The script that runs as ``__main__``; None in a notebook."""
    file = getattr(module, "__file__", None)
    return None if file is None else ModuleSpec(name, None, origin=file)


def _installed(spec: ModuleSpec) -> bool:
    """Whether it is part of Python, of an installed package, or of polyfed."""
    if spec.name.partition(".")[0] == "polyfed" or spec.origin in ("built-in", "frozen"):
        return True
    places = [spec.origin] if spec.origin is not None else list(spec.submodule_search_locations or ())
    paths = [Path(place).resolve() for place in places]
    return any({"site-packages", "dist-packages"} & {*path.parts} for path in paths) or any(
        path.is_relative_to(root) for path in paths for root in _INSTALLED
    )


def _digest(name: str, spec: ModuleSpec) -> tuple[str, frozenset[str]]:
    """SHA-256 of a module's syntax, and the names that may be modules it imports."""
    kept = _read.get(name)
    if kept is not None and kept[0] is spec:
        return kept[1], kept[2]
    path = Path(str(spec.origin))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"module {name}: {path} cannot be read ({error.strerror or error})") from error
    imports = frozenset[str]()
    try:
        tree = ast.parse(data) if path.suffix == ".py" else None
    except (SyntaxError, ValueError):  # imported in a function that nobody called yet
        tree = None
    if tree is not None:
        imports = frozenset(_imports(tree, spec.parent or ""))
        data = ast.dump(_bare(tree)).encode()
    _read[name] = spec, hashlib.sha256(data).hexdigest(), imports
    return _read[name][1:]


def _imports(tree: ast.Module, package: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            try:
                base = resolve_name(base, package) if node.level else base
            except ImportError:  # from above the topmost package: importing it fails, which the module may catch
                continue
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _bare(tree: ast.Module) -> ast.Module:
    """The tree without docstrings. Changes it."""
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree
