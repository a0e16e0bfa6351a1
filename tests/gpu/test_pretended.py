"""What can be known of a GPU without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from small import config

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.execute import drivers
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.simulation.simulate import simulate
from polyfed.storage.state_store import Store


def test_no_algorithm_leaves_a_tensor_on_the_cpu() -> None:
    # In a process of its own: the name of the device that is not there cannot be taken back.
    command = [sys.executable, "-W", "ignore", str(Path(small.__file__).with_name("pretend.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tried = [line.split()[0] for line in done.stdout.splitlines()]
    assert (done.returncode, tried) == (0, list(ALGORITHMS)), done.stderr[-3000:]


def test_a_full_gpu_is_not_taken_for_a_network_that_cannot_be_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drivers, "run_stacked", full)
    federation = prepare(config().resolved())
    algorithm, works = federation.algorithm, drivers.make_driver("batched", Placement.of("cpu", "fp32"))
    clients = LocalClients(federation, works, Store(Path("never-written"), algorithm.states, resident=True))
    server = algorithm.init_server(federation.task, federation.rng.at("server"))
    with pytest.raises(torch.OutOfMemoryError):
        play_round(federation, server, draw_cohort(federation, 1), clients, works)


@pytest.mark.parametrize("before", [True, False])
def test_convolutions_are_single_precision_and_repeatable_while_a_run_lasts(before: bool) -> None:
    cudnn = torch.backends.cudnn
    was = cudnn.allow_tf32, cudnn.deterministic
    try:
        cudnn.allow_tf32, cudnn.deterministic = before, before
        with Placement.of("cpu", "fp32").defaults():
            assert not cudnn.allow_tf32
            assert cudnn.deterministic
        assert (cudnn.allow_tf32, cudnn.deterministic) == (before, before)
    finally:
        cudnn.allow_tf32, cudnn.deterministic = was


def test_workers_that_start_afresh_do_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("polyfed.parallel.pool", "polyfed.parallel.setup"):
        monkeypatch.setattr(f"{module}.can_fork", lambda: False)
    found = [simulate(config(run={"workers": count}), out=tmp_path / str(count)).summary for count in (1, 2)]
    kept = [sorted((tmp_path / str(count) / "checkpoint").glob("*.safetensors")) for count in (1, 2)]
    assert [path.read_bytes() for path in kept[0]] == [path.read_bytes() for path in kept[1]]
    assert found[0]["accuracy"] == found[1]["accuracy"]
