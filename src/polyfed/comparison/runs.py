"""A run in a directory that may be new, interrupted or complete; and a run with its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyfed.base.errors import RunDirError
from polyfed.config import Config, canonical_name
from polyfed.data.dataset import Dataset
from polyfed.report.progress import close
from polyfed.report.results import summary_of
from polyfed.report.tables import Summary
from polyfed.rounds.callbacks import Callback, Interrupted, Quiet
from polyfed.rounds.identity import Content
from polyfed.simulation.simulate import resume, simulate

#: Makes the callback of a run from its label.
Reporter = Callable[[str], Callback]


def quiet(label: str) -> Callback:
    """Return a callback that ignores all events."""
    return Quiet()


def run_or_go_on(
    config: Config, out: Path, callback: Callback, dataset: Dataset | None = None, *, extend: bool = False
) -> Summary:
    """Return the summary of ``config`` in ``out``; if the run is not complete, resume or begin it.

    Args:
        config: the configuration to run.
        out: the run directory.
        callback: receives the events of the run, and is closed.
        dataset: the data, if a program gives them.
        extend: whether a run that differs only by having fewer rounds goes on after its end.

    Raises:
        RunDirError: the folder holds a run of another configuration.
    """
    stored = out / "config.toml"
    try:
        if not stored.exists():
            return simulate(config, dataset=dataset, callbacks=[callback], progress=False, out=out).summary
        found, rounds = Config.load(stored), config.run.rounds
        if extend and found.run.rounds < rounds and found.extended(rounds).hash() == config.hash():
            return resume(out, rounds=rounds, dataset=dataset, callbacks=[callback], progress=False).summary
        if found.hash() != config.hash():
            raise RunDirError(f"{out} holds a run of another configuration; choose another --out")
        if (found := summary_of(out)) is not None:
            return found
        return resume(out, dataset=dataset, callbacks=[callback], progress=False).summary
    finally:
        close(callback)


def described(name: str, keys: Mapping[str, Any]) -> str:
    """Return an algorithm with its keys as text: ``fedmrl share=false``."""
    told = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items())
    return " ".join([canonical_name(name), *told])


def run_with_controls(config: Config, *, out: Path | None = None, reporter: Reporter = quiet) -> dict[str, Summary]:
    """Run a configuration and then, if ``run.controls`` is set, its controls on the same splits.

    Args:
        config: the configuration to run.
        out: the run directory; each control gets ``controls/<label>`` in it.
        reporter: makes the callback of each run.

    Returns:
        The summary of each run by label, the main run first, whose label is the algorithm's name.

    Raises:
        Interrupted: Ctrl-C; it names the main run's directory, which `resume_with_controls` resumes.
    """
    label = _main(config)
    callback = reporter(label)
    try:
        summary = simulate(config, callbacks=[callback], progress=False, out=out).summary
    finally:
        close(callback)
    return {label: summary} | _controls(config, Path(summary["run_dir"]), reporter)


def resume_with_controls(run_dir: Path, *, rounds: int | None = None, reporter: Reporter = quiet) -> dict[str, Summary]:
    """Resume a run that `run_with_controls` began, wherever it stopped; same results.

    Args:
        run_dir: the run directory.
        rounds: the number of rounds to which the run and its controls go on; None keeps ``run.rounds``.
        reporter: makes the callback of each run.

    Raises:
        ConfigError: a run has more rounds already, or its numbers depend on their number; none has gone on then.
    """
    if not (run_dir / "config.toml").exists():
        raise RunDirError(f"{run_dir} holds no run: it has no config.toml; give the run directory of a run")
    config = Config.load(run_dir / "config.toml")
    if rounds is not None:
        for control in config.controls.values() if config.run.controls else ():
            config.with_algorithm(control.name, control.keys).extended(rounds)
        config = config.extended(rounds)
    label = _main(config)
    summary = run_or_go_on(config, run_dir, reporter(label), extend=True)
    return {label: summary} | _controls(config, run_dir, reporter)


def meanings(config: Config) -> list[str]:
    """Return a line for each control whose label is not its full description, with the keys that differ."""
    if not config.run.controls:
        return []
    main = config.resolved().algorithm  # resolved, so that it has all keys
    lines: list[str] = []
    for name, section in config.controls.items():
        known = main.keys if canonical_name(section.name) == main.name else {}
        keys = {key: value for key, value in section.keys.items() if key not in known or known[key] != value}
        if (text := described(section.name, keys)) != name:
            lines.append(f"{_control(config, name)} is {text}.")
    return lines


def _main(config: Config) -> str:
    """Return the label of the main run: the algorithm's name, or the class name of the user's own algorithm."""
    return canonical_name(config.algorithm.name).rpartition(":")[2]


def _control(config: Config, name: str) -> str:
    """Return the label of a control: its name, marked if it equals the main run's label."""
    return f"{name} (control)" if name == _main(config) else name


def _controls(config: Config, run_dir: Path, reporter: Reporter) -> dict[str, Summary]:
    found: dict[str, Summary] = {}
    for name, section in config.controls.items() if config.run.controls else ():
        label, folder = _control(config, name), run_dir / "controls" / name
        if summary_of(folder) is None:
            Content.of(config).check(run_dir)  # a control is comparable only on the data of the main run
        control = config.with_algorithm(section.name, section.keys)
        try:
            found[label] = run_or_go_on(control, folder, reporter(label), extend=True)
        except Interrupted:
            raise Interrupted(run_dir) from None
    return found
