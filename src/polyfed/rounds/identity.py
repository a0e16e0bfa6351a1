"""All that the numbers of a run depend on beside its configuration: data, the user's source, versions (content.json).

For the user's own networks and algorithms, every module counts that their import loads and that is outside the
standard library, site-packages and polyfed. Modules are compared as syntax without docstrings, so comments and layout
do not count. Imports by a name that is made at run time, and files that a module reads, are not detected.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from pathlib import Path

from polyfed.base import files, given
from polyfed.base.errors import CheckpointError, ModelError
from polyfed.base.imports import search_working_directory
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm
from polyfed.data.sources import file_digests
from polyfed.models.catalogue import ModelSpec
from polyfed.models.weights import weights_digest

NAME = "content.json"

#: To be raised by 1 when the code that all algorithms share gives other numbers for an unchanged configuration; for a
#: change of a single algorithm there is `Algorithm.numbers`.
RESULTS = 3


@dataclass(frozen=True)
class Content:
    """The content of a run; two runs of one configuration have the same numbers if their contents are equal.

    Args:
        config: `Config.hash`.
        results: `RESULTS`.
        algorithms: the class of the algorithm and those it derives from -> its ``numbers``.
        data: name of a file of data or of weights -> SHA-256; empty if the run has no files, or they are not on this
            machine.
        source: name of a user's module -> SHA-256 of its syntax; name of an object that a program gave -> its token.
        packages: installed package that the configuration names -> version.
    """

    config: str
    results: int
    algorithms: Mapping[str, int]
    data: Mapping[str, str]
    source: Mapping[str, str]
    packages: Mapping[str, str]

    @classmethod
    def of(
        cls,
        config: Config,
        data: Mapping[str, str] | None = None,
        model: str | None = None,
        weights: Iterable[str] | None = None,
    ) -> Content:
        """Return the current content.

        Args:
            config: the configuration of the run.
            data: digests of the data's files; None computes those of the files that ``config`` names.
            model: a network in addition to those that ``config`` names.
            weights: the files of weights that networks start with; None takes those that ``config`` names. Their
                digests stand among those of the data.

        Raises:
            PolyfedError: a file cannot be read, or the algorithm does not exist.
        """
        if data is None:
            path = Path(config.data.path) if config.data.path else None
            data = file_digests(config.data.dataset, path=path, options=config.data.options)
        if weights is None:
            weights = (spec.weights for spec in config.clients.models if spec.weights is not None)
        starts = {path: weights_digest(Path(path)) for path in weights if Path(path).exists()}
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        asked = [model, config.algorithm.name, *vars(algorithm).values(), *map(str, config.clients.models)]
        names = {name for value in asked if (name := _own_name(value))}
        source, packages = _own_code({name.partition(":")[0] for name in names if not given.is_given(name)})
        source |= {name: found.token for name in sorted(names) if (found := given.find(name)) is not None}
        numbers = {
            f"{kind.__module__}:{kind.__qualname__}": kind.numbers
            for kind in type(algorithm).__mro__
            if issubclass(kind, Algorithm) and kind is not Algorithm
        }
        return cls(config.hash(), RESULTS, numbers, {**data, **starts}, source, packages)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole content."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, *, mode: int = 0o666) -> None:
        """Write ``content.json``; ``mode`` gives its permissions, as in `files.write`."""
        files.write(folder / NAME, (json.dumps(asdict(self), indent=2) + "\n").encode(), mode=mode)

    @classmethod
    def read(cls, folder: Path) -> Content:
        """Read the content that `write` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = folder / NAME
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no {NAME}, which names the data and code that its numbers depend on: an earlier version "
                "of polyfed began it; resume it with that version, or start a new run"
            )
        try:
            return cls(**files.read_json(path))
        except TypeError as error:
            raise CheckpointError(f"{path} is damaged ({error}); start a new run") from error

    def changes(self, before: Content) -> list[str]:
        """Return a phrase for each difference to an earlier content, apart from the configuration."""
        found = [] if self.results == before.results else ["polyfed's own arithmetic"]
        for what, was, now in (
            ("the numbers-version of algorithm", before.algorithms, self.algorithms),
            ("data file", before.data, self.data),
            ("module", before.source, self.source),
            ("package", before.packages, self.packages),
        ):
            for name in sorted(name for name in {*was, *now} if was.get(name) != now.get(name)):
                old, new = was.get(name), now.get(name)
                how = "is new" if old is None else "is gone" if new is None else "changed"
                short = what in ("package", "the numbers-version of algorithm") and how == "changed"
                found.append(f"{what} {name} {how}{f' from {old} to {new}' if short else ''}")
        return found

    def check(self, folder: Path) -> None:
        """Refuse to continue in a folder that was begun with another content.

        Raises:
            CheckpointError: the content changed; the text names each change.
        """
        if changes := self.changes(Content.read(folder)):
            raise CheckpointError(
                f"{folder} was begun with another content: {'; '.join(changes)}. Restore the earlier content to "
                "continue, or start a new run"
            )


def _own_name(value: object) -> str:
    """Return ``package.module:attribute`` without its options; "" for any other value."""
    try:
        spec = ModelSpec.parse(value) if isinstance(value, str) and ":" in value else None
        if spec is not None and spec.own:
            spec.check()
            return spec.name
    except ModelError:  # a string with another meaning
        pass
    return ""


# ------------------------------------------------------------------------------------------------------- own source

_INSTALLED = [Path(path).resolve() for key, path in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib")]

# Module -> its specification when it was loaded, its digest, and its imports. While a module stays loaded, its code is
# the code that was read then, whatever the file contains now.
_read: dict[str, tuple[ModuleSpec, str, frozenset[str]]] = {}


def _own_code(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of the user's modules that importing ``names`` loads, and the versions of other packages."""
    search_working_directory()
    source: dict[str, str] = {}
    packages: dict[str, str] = {}
    for name in names:
        if (spec := _spec(name)) is not None and _installed(spec):
            packages |= {
                package: metadata.version(package)
                for package in metadata.packages_distributions().get(name.partition(".")[0], [])
                if package != "polyfed"
            }
    waiting = set(names)
    seen = {""}  # the parent of a module without one
    while waiting:
        name = waiting.pop()
        seen.add(name)
        spec = _spec(name)
        if spec is None or _installed(spec):
            continue
        waiting |= {name.rpartition(".")[0]} - seen
        if spec.origin is not None:  # a namespace package has no file
            source[name], imports = _digest(name, spec)
            waiting |= imports - seen
    return source, packages


def _spec(name: str) -> ModuleSpec | None:
    """Return the specification of a module without importing it; None if it is no module."""
    if (module := sys.modules.get(name)) is not None:
        file = getattr(module, "__file__", None)  # of a script that runs as ``__main__``; None in a notebook
        return getattr(module, "__spec__", None) or (None if file is None else ModuleSpec(name, None, origin=file))
    parent = name.rpartition(".")[0]
    path = None
    if parent:
        above = _spec(parent)
        if above is None or _installed(above) or above.submodule_search_locations is None:
            return None
        path = list(above.submodule_search_locations)
    return next(filter(None, (finder.find_spec(name, path) for finder in sys.meta_path)), None)


def _installed(spec: ModuleSpec) -> bool:
    """Return whether the module is part of Python, of an installed package, or of polyfed."""
    if spec.name.partition(".")[0] == "polyfed" or spec.origin in ("built-in", "frozen"):
        return True
    places = [spec.origin] if spec.origin is not None else list(spec.submodule_search_locations or ())
    return any(
        {"site-packages", "dist-packages"} & {*path.parts} or any(map(path.is_relative_to, _INSTALLED))
        for path in (Path(place).resolve() for place in places)
    )


def _digest(name: str, spec: ModuleSpec) -> tuple[str, frozenset[str]]:
    """Return the SHA-256 of a module's syntax, and the names that may be modules that it imports."""
    kept = _read.get(name)
    if kept is not None and kept[0] is spec:
        return kept[1], kept[2]
    path = Path(str(spec.origin))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"module {name}: {path} cannot be read ({error.strerror or error})") from error
    imports = frozenset[str]()
    if path.suffix == ".py":
        with suppress(SyntaxError, ValueError):  # such a module is imported in a function that was not called yet
            tree = ast.parse(data)
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
    """Return the tree without docstrings. Changes the tree."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return tree
