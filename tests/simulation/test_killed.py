"""Killed at any moment, a run goes on to where it would have come: bitwise, and with the same logs and results."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import killing
import pytest
import running

from polyfed.base.errors import RunDirError
from polyfed.simulation.simulate import resume

ROUNDS = 16
MOMENTS = 20


def config(store: str = "memory", every: int = 1) -> Any:
    return running.config(
        run={"rounds": ROUNDS, "eval_every": 8, "checkpoint_every": every, "store": store},
        train={"epochs": None, "steps": 1},
        clients={"models": ["mlp(hidden=(12, 8))", "mlp(hidden=(32, 8))"]},
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs that nobody disturbs, and how many moments they have."""
    folder = tmp_path_factory.mktemp("straight")
    jobs = [killing.start(config(s), folder / s, counts=folder / f"{s}.json") for s in ("memory", "disk")]
    assert [killing.ended(job) for job in jobs] == [0, 0]
    return {s: (folder / s, json.loads((folder / f"{s}.json").read_text())) for s in ("memory", "disk")}


def test_memory_and_disk_end_alike(straight: dict[str, Any]) -> None:
    """Catches a store that changes results, or that leaves other files behind."""
    running.same(straight["memory"][0], straight["disk"][0])
    assert {(k, data is None) for k, _, _, data in running.rows(straight["disk"][0] / "states")} == {
        (0, False),
        (1, True),
        (2, False),
        (3, True),
    }


def moments(straight: dict[str, Any]) -> list[tuple[str, Any, int]]:
    """Seeded: 3 in the first rounds, 9 anywhere later, 8 within the writing of a checkpoint."""
    draws = random.Random(20240601)
    phases = ["start"] * 3 + ["rounds"] * 9 + ["saving"] * 8
    stores = [("memory", "disk")[i % 2] for i in range(MOMENTS)]
    return [(s, p, draws.randrange(1, straight[s][1][p])) for s, p in zip(stores, phases, strict=True)]


def test_a_run_killed_at_twenty_moments_resumes_identically(straight: dict[str, Any], tmp_path: Path) -> None:
    """Catches checkpoints that are not whole, log lines that come twice or never, states of another round."""
    waiting = [(tmp_path / str(i), *moment) for i, moment in enumerate(moments(straight))]
    running_now: list[tuple[Any, Path, str, bool]] = []
    reached = set()
    while waiting or running_now:
        if waiting and len(running_now) < 2:  # two cores
            folder, store, phase, moment = waiting.pop()
            job = killing.start(config(store), folder, phase=phase, moment=moment)
            running_now.append((job, folder, store, False))
            continue
        job, folder, store, resumed = running_now.pop(0)
        if resumed:
            assert killing.ended(job) == 0
            running.same(folder, straight[store][0])
            continue
        assert killing.ended(job) == -signal.SIGKILL
        reached.add(len(running.lines_so_far(folder / "rounds.jsonl")))
        if int(folder.name) % 3 == 0:  # the power failed, too: a line that was being written
            with open(folder / "rounds.jsonl", "ab") as log:
                log.write(b'{"round": 3, "rou')
        running_now.append((killing.start(config(store), folder), folder, store, True))
    assert len(reached) > MOMENTS // 4  # the moments were spread over the run


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_run_may_be_killed_again_and_again(straight: dict[str, Any], tmp_path: Path, store: str) -> None:
    """Catches what only a resumed run gets wrong, such as sums that start from the wrong checkpoint."""
    folder, share = tmp_path / "run", straight[store][1]["rounds"] // 4
    codes = [killing.ended(killing.start(config(store), folder, moment=share)) for _ in range(3)]
    assert codes == [-signal.SIGKILL] * 3
    assert killing.ended(killing.start(config(store), folder)) == 0
    running.same(folder, straight[store][0])


@pytest.mark.parametrize("share", [0.2, 0.45])
def test_ctrl_c_ends_with_a_checkpoint_and_resumes_identically(
    straight: dict[str, Any], tmp_path: Path, share: float
) -> None:
    """Catches a real SIGINT that leaves a half round behind or loses all: here nothing but Ctrl-C saves."""
    folder, moment = tmp_path / "run", int(straight["memory"][1]["rounds"] * share)
    assert killing.ended(killing.start(config(every=99), folder, moment=moment, sent=signal.SIGINT)) == 130
    saved = json.loads((folder / "checkpoint" / "manifest.json").read_text())["manifest"]["round"]
    assert saved == len(running.lines(folder / "rounds.jsonl")) - 1 > 2
    assert not (folder / "summary.json").exists()
    assert killing.ended(killing.start(config(every=99), folder)) == 0
    running.same(folder, straight["memory"][0])


def test_a_directory_is_free_as_soon_as_its_process_is_dead(straight: dict[str, Any], tmp_path: Path) -> None:
    """Catches a lock that outlives its owner; while the owner lives it is refused, by number."""
    folder = tmp_path / "run"
    half = straight["memory"][1]["rounds"] // 2
    job = killing.start(config(), folder, moment=half, sent=signal.SIGSTOP)
    while not (folder / "config.toml").exists():  # until it has come so far; nothing is timed
        time.sleep(0.01)
    with pytest.raises(RunDirError, match=rf"in use by process {job.pid}"):
        resume(folder)
    job.kill()
    assert killing.ended(job) == -signal.SIGKILL
    assert killing.ended(killing.start(config(), folder)) == 0
    running.same(folder, straight["memory"][0])
