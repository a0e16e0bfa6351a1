"""Break the code in small ways, one at a time, and print which faults no test notices.

    python tests/mutations/run.py                     # every fault of faults.toml, about an hour on one core
    python tests/mutations/run.py --only fedproto     # those whose file, name of a test, or new text has this in it

Each fault leaves finite numbers of the right shapes and no exception, so that only a test of a value can notice. It is
applied in a temporary copy of the tree, where the tests that it names have to fail; they have to pass without it. Run
this after a family of tests is written, and before a release. The exit status is the number of faults that survived.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faults.toml")
#: What a test may need beside the sources.
COPIED = ("src", "tests", "docs", "examples", "README.md", "pyproject.toml")
_SECONDS = 900  # a fault that makes a test run for so long is noticed


@dataclass(frozen=True)
class Fault:
    """One small fault.

    Args:
        file: relative to the root of the repository.
        old: text that occurs in it exactly once.
        new: what takes its place.
        tests: must fail: ``test_name`` or ``test_name[parameters]``, with the file and ``::`` before it where several
            files have that name.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def fits(self, words: str) -> bool:
        """Whether ``--only`` means this fault."""
        return any(words in text for text in (self.file, self.new, *self.tests))


def faults() -> list[Fault]:
    """All of faults.toml, in order."""
    tables = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]
    return [Fault(t["file"], t["old"], t["new"], tuple(t["tests"])) for t in tables]


def node(root: Path, test: str) -> str:
    """Where a test is: ``tests/....py::test_name[parameters]``.

    Raises:
        LookupError: no file, or more than one, defines it.
    """
    place, _, name = test.partition("[")[0].rpartition("::")
    defined = re.compile(rf"^def {name}\(", re.MULTILINE)
    files = sorted((root / "tests").rglob("test_*.py"))
    if place:
        files = [root / place]
    found = [path for path in files if defined.search(path.read_text(encoding="utf-8"))]
    if defined.search((root / "src/polyfed/testing/laws.py").read_text(encoding="utf-8")):
        imported = re.compile(r"^from polyfed\.testing\.laws import \*", re.MULTILINE)
        found += [path for path in files if imported.search(path.read_text(encoding="utf-8"))]
    if len(found) != 1:
        raise LookupError(f"{test} is defined in {len(found)} files: {', '.join(map(str, found)) or 'none'}")
    return test if place else f"{found[0].relative_to(root)}::{test}"


def run(root: Path, tests: list[str]) -> tuple[int, str]:
    """The exit status of pytest on some tests, 1 where it took too long; and the end of what it wrote."""
    env = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 1, ""
    return done.returncode, done.stdout[-2000:] + done.stderr[-2000:]


def main() -> int:
    """Apply the faults one at a time; returns how many survived."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a part of a file's or a test's name, or of the new text")
    asked = [fault for fault in faults() if fault.fits(parser.parse_args().only)]
    if not asked:
        sys.exit("no fault has this in it")
    survived: list[Fault] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, root / name)
        nodes = {test: node(root, test) for fault in asked for test in fault.tests}
        status, text = run(root, list(dict.fromkeys(nodes.values())))
        if status:
            sys.exit(f"{text}\nthese tests have to pass without any fault")
        for number, fault in enumerate(asked, 1):
            path = root / fault.file
            right = path.read_text(encoding="utf-8")
            if right.count(fault.old) != 1:
                sys.exit(f"{fault.file} has {fault.old!r} {right.count(fault.old)} times; expected once")
            path.write_text(right.replace(fault.old, fault.new), encoding="utf-8")
            started = time.monotonic()
            _stamp(path, 2 * number)
            status, text = run(root, [nodes[test] for test in fault.tests])
            path.write_text(right, encoding="utf-8")
            _stamp(path, 2 * number + 1)
            word = {0: "SURVIVED", 1: "killed"}.get(status, f"broken (pytest {status})")
            took = time.monotonic() - started
            print(
                f"{number} of {len(asked)}  {word}  {took:.0f} s  {fault.file}: {fault.new.strip()[:90]!r}", flush=True
            )
            if status != 1:
                survived.append(fault)
                print(text if status else "", end="")
    print(f"{len(asked) - len(survived)} of {len(asked)} faults are noticed")
    return len(survived)


def _stamp(path: Path, number: int) -> None:
    """Give a file a time of its own: Python takes bytecode for current by whole seconds and size."""
    moment = 1_600_000_000 + number
    os.utime(path, (moment, moment))


if __name__ == "__main__":
    sys.exit(main())
