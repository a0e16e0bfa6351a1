"""A run that goes on after its end is the run that had that many rounds from its start: bitwise, logs and summary."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import killing
import pytest
import running

from polyfed.algorithms.fedavg import FedAvg
from polyfed.base import files
from polyfed.base.errors import CheckpointError, ConfigError
from polyfed.comparison.runs import resume_with_controls, run_with_controls
from polyfed.config import Config, load_algorithm
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation import simulate as module
from polyfed.simulation.simulate import extend, resume, simulate

RUNS: Mapping[str, dict[str, dict[str, Any]]] = {
    # The last of 4 rounds is evaluated because it is the last: a longer run evaluates 3, 6 and 9.
    "off schedule": {"run": {"eval_every": 3}},
    "on schedule": {"run": {"eval_every": 2}},
    "metrics": {"run": {"eval_every": 3, "metrics": ["auroc", "brier"], "targets": [0.01, "auroc=0.4"]}},
    "a sample": {"run": {"eval_every": 3, "eval_clients": 2, "gradient_clients": 2, "predictions": True}},
    "devices": {"run": {"eval_every": 3}, "devices": {"dropout": 0.3, "deadline": 50000.0}},
    "the best round": {"run": {"eval_every": 1, "keep": "best"}, "data": {"validation_fraction": 0.3}},
}


def config(rounds: int, kind: str = "off schedule", **more: Any) -> Config:
    sections: dict[str, dict[str, Any]] = {"partition": {"samples_per_client": 24}, **RUNS[kind], **more}
    return running.config(**{**sections, "run": {"checkpoint_every": 3, **sections.get("run", {}), "rounds": rounds}})


def alike(folder: Path, other: Path) -> None:
    """Assert that two run directories are the same, the configuration and the content that it belongs to included."""
    running.same(folder, other)
    assert (folder / "config.toml").read_text() == (other / "config.toml").read_text()
    assert (folder / "content.json").read_text() == (other / "content.json").read_text()
    manifests = [json.loads((f / "checkpoint/manifest.json").read_text())["manifest"] for f in (folder, other)]
    assert running.essence({**manifests[0], "logs": 0}) == running.essence({**manifests[1], "logs": 0})
    for name in ("tests.jsonl", "predictions.parquet"):
        assert (folder / name).exists() == (other / name).exists()
        if (folder / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_goes_on_equals_one_that_ran_through(kind: str, tmp_path: Path) -> None:
    """Catches the evaluation of the old last round in logs, sums, targets and best values, and its majority class."""
    simulate(config(4, kind), out=tmp_path / "a")
    resume(tmp_path / "a", rounds=7)
    resume(tmp_path / "a", rounds=10)
    simulate(config(10, kind), out=tmp_path / "b")
    alike(tmp_path / "a", tmp_path / "b")


def test_a_run_that_was_interrupted_may_become_longer_before_its_end(tmp_path: Path) -> None:
    """Catches rounds that are played again, and a log that keeps lines of rounds that are."""

    class Stop(Quiet):
        def round_ended(self, row: Any) -> None:
            if row["round"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        simulate(config(4), out=tmp_path / "a", callbacks=[Stop()])
    with open(tmp_path / "a" / "rounds.jsonl", "ab") as log:  # killed in the round after
        log.write(b'{"round": 3, "rounds": 4}\n{"round": 4, "rou')
    resume(tmp_path / "a", rounds=10)
    simulate(config(10), out=tmp_path / "b")
    alike(tmp_path / "a", tmp_path / "b")


def test_killed_and_extended_and_killed_again(tmp_path: Path) -> None:
    """Catches a killed extension that is neither the shorter run nor the longer."""
    settings = config(10, "the best round", train={"epochs": None, "steps": 1})
    assert killing.ended(killing.start(settings, tmp_path / "b", counts=tmp_path / "counts.json")) == 0
    counts = json.loads((tmp_path / "counts.json").read_text())
    short = settings.lasting(4)
    assert killing.ended(killing.start(short, tmp_path / "a", moment=counts["rounds"] // 8)) == -signal.SIGKILL
    assert killing.ended(killing.start(short, tmp_path / "a")) == 0
    for share in (0.05, 0.2):
        job = killing.start(settings, tmp_path / "a", moment=int(counts["rounds"] * share), rounds=10)
        assert killing.ended(job) == -signal.SIGKILL
    assert killing.ended(killing.start(settings, tmp_path / "a")) == 0
    alike(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "moment", ["summary", "config", "first log", "second log", "manifest", "the states are restored"]
)
def test_an_extension_that_is_killed_at_each_of_its_steps(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a configuration, logs and a checkpoint of different lengths that no resume takes."""
    simulate(config(4), out=tmp_path / "a")
    folder = tmp_path / "a"
    with monkeypatch.context() as patch:

        class Killed(BaseException):
            pass

        def killed(*_: Any, **__: Any) -> None:
            raise Killed

        if moment == "summary":
            patch.setattr(module, "extend", lambda folder, config: ((folder / "summary.json").unlink(), killed()))
        elif moment == "config":
            patch.setattr(module, "extend", lambda folder, config: (extend(folder, config), killed()))
        elif moment == "the states are restored":
            patch.setattr(module.Store, "restore", killed)
        else:
            whole, left = files.replacing, [{"first log": 0, "second log": 1}.get(moment, 2)]

            def replacing(path: Path, **more: Any) -> Any:
                if path.name in ("rounds.jsonl", "clients.jsonl") or path.name == "manifest.json":
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                return whole(path, **more)

            patch.setattr(files, "replacing", replacing)
        with pytest.raises(Killed):
            resume(folder, rounds=10)
    assert not (folder / "summary.json").exists(), "it would count as complete"
    resume(folder, rounds=10)
    simulate(config(10), out=tmp_path / "b")
    alike(folder, tmp_path / "b")


def test_the_same_number_of_rounds_is_a_resume_and_fewer_are_refused(tmp_path: Path) -> None:
    """Catches a command that cannot be repeated, and rounds that are undone."""
    summary = simulate(config(4), out=tmp_path).summary
    log = (tmp_path / "rounds.jsonl").read_bytes()
    assert running.essence(resume(tmp_path, rounds=4).summary) == running.essence(summary)
    with pytest.raises(ConfigError, match=r"--rounds: got 3; the run has 4 rounds; expected more"):
        resume(tmp_path, rounds=3)
    assert (tmp_path / "rounds.jsonl").read_bytes() == log
    assert (tmp_path / "summary.json").exists()


def test_rounds_that_do_not_fit_the_choice_of_a_round_are_refused(tmp_path: Path) -> None:
    """Catches a best round that would depend on where the run ended."""
    settings = config(4, "the best round", run={**RUNS["the best round"]["run"], "eval_every": 2})
    simulate(settings, out=tmp_path)
    with pytest.raises(ConfigError, match=r"run\.rounds: got 7 with run\.eval_every = 2; expected a multiple"):
        resume(tmp_path, rounds=7)


def test_a_run_that_lost_its_patience_stays_where_it_is(tmp_path: Path) -> None:
    """Catches rounds after the end that a run of any length has."""
    run = {"eval_every": 1, "patience": 1, "min_delta": 1.0}
    settings = [config(n, "the best round", run={**run}) for n in (4, 10)]
    simulate(settings[0], out=tmp_path / "a")
    assert resume(tmp_path / "a", rounds=10).summary["selection"]["stopped"]["round"] == 1
    simulate(settings[1], out=tmp_path / "b")
    alike(tmp_path / "a", tmp_path / "b")


FEDKD = {"name": "fedkd", "auxiliary": "mlp(hidden=(8,))", "energy": [0.5, 0.9]}


def test_fedkd_names_its_horizon(tmp_path: Path) -> None:
    """Catches a share of energy that jumps back when the run goes on, and one that grows beyond its end."""
    simulate(config(4, algorithm=FEDKD), out=tmp_path / "a")
    text = (tmp_path / "a" / "config.toml").read_text()
    assert "horizon = 4" in text
    resume(tmp_path / "a", rounds=10)
    simulate(config(10, algorithm={**FEDKD, "horizon": 4}), out=tmp_path / "b")
    alike(tmp_path / "a", tmp_path / "b")
    simulate(config(10, algorithm=FEDKD), out=tmp_path / "c")
    assert running.outcome(tmp_path / "c")["files"] != running.outcome(tmp_path / "b")["files"]


def test_a_horizon_that_is_the_number_of_rounds_changes_no_hash() -> None:
    """Catches runs of before that count as others, and runs of another horizon that count as the same."""
    four, named = config(4, algorithm=FEDKD), config(4, algorithm={**FEDKD, "horizon": 4})
    assert four.hash() == named.hash() == four.resolved().hash()
    # As it was before there was the key.
    assert Config.parse({"algorithm": {"name": "fedkd"}}).hash().startswith("a66c94fbc8d86b27")
    ten = config(10, algorithm={**FEDKD, "horizon": 4})
    assert four.extended(10).hash() == ten.hash() != config(10, algorithm=FEDKD).hash()
    assert four.resolved().lasting(10).lasting(4).hash() == four.hash()


@dataclass(frozen=True, kw_only=True)
class Ending(FedAvg):
    """Somebody's algorithm whose numbers depend on the number of rounds."""

    name = "ending"
    uses_rounds: ClassVar[bool] = True


def test_numbers_that_depend_on_the_number_of_rounds_are_refused(tmp_path: Path) -> None:
    """Catches rounds of a shorter schedule that pass for those of a longer one."""
    simulate(config(4, algorithm={"name": f"{__name__}:Ending"}), out=tmp_path)
    before = (tmp_path / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"numbers of algorithm 'ending' depend on run\.rounds = 4"):
        resume(tmp_path, rounds=10)
    assert (tmp_path / "config.toml").read_text() == before
    assert (tmp_path / "summary.json").exists()


def test_controls_go_on_too(tmp_path: Path) -> None:
    """Catches controls that stay shorter, that begin anew, or whose horizon follows the main run's rounds."""
    controls = {"alone": {"name": "standalone"}, "taught": FEDKD}
    longer = {**controls, "taught": {**FEDKD, "horizon": 4}}
    made = [
        Config.parse({**config(n).to_dict(), "controls": some, "run": {**config(n).to_dict()["run"], "controls": True}})
        for n, some in ((4, controls), (10, longer))
    ]
    run_with_controls(made[0], out=tmp_path / "a")
    found = resume_with_controls(tmp_path / "a", rounds=10)
    assert [summary["rounds"] for summary in found.values()] == [10, 10, 10]
    run_with_controls(made[1], out=tmp_path / "b")
    for folder in ("", "controls/alone", "controls/taught"):
        alike(tmp_path / "a" / folder, tmp_path / "b" / folder)
    # Killed after the main run: a plain resume takes the controls along.
    shutil.rmtree(tmp_path / "a")
    run_with_controls(made[0], out=tmp_path / "a")
    resume(tmp_path / "a", rounds=10)
    assert [summary["rounds"] for summary in resume_with_controls(tmp_path / "a").values()] == [10, 10, 10]
    alike(tmp_path / "a" / "controls/taught", tmp_path / "b" / "controls/taught")


def test_a_log_that_lost_its_last_lines_is_refused(tmp_path: Path) -> None:
    """Catches a hole in the log that only the length of the shorter run's log would show."""
    simulate(config(4), out=tmp_path)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"ends with round 3, but the checkpoint is of round 4"):
        resume(tmp_path, rounds=10)
    assert (tmp_path / "rounds.jsonl").read_text() == "".join(lines[:-1])


def test_every_algorithm_that_has_a_horizon_says_so() -> None:
    """Catches a horizon that no rule needs, and FedKD without its declaration."""
    assert load_algorithm("fedkd").uses_rounds
    assert not load_algorithm("fedavg").uses_rounds
