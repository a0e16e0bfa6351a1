"""What is different on a GPU: where tensors are, what is resident there, that the CPU's numbers come out.

Double precision is compared within 1e-9 of the largest number of a tensor: kernels differ in the order of their sums,
a unit in the last place of 1e-16 each, which three rounds of training enlarge. Nothing here asks a GPU for equal bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import config
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.base import tree
from polyfed.core.message import State, assemble, decode, disassemble, encode, flatten
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.metrics.catalogue import TaskKind, of_task
from polyfed.parallel.clients import resident
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import state_files
from polyfed.storage.state_store import Store

pytestmark = pytest.mark.gpu

CPU = Placement.of("cpu", "fp64")
KEYS = {"fedmrl": {"rep_dim": 9}}


def played(placement: Placement, driver: str, **sections: Any) -> list[State]:
    """The states of server and clients after two rounds."""
    federation = resident(prepare(config(**sections).resolved()), placement)
    algorithm, works = federation.algorithm, make_driver(driver, placement)
    clients = LocalClients(federation, works, Store(Path("never-written"), algorithm.states, resident=True))
    with placement.defaults():
        server: Any = algorithm.init_server(federation.task, federation.rng.at("server"))
        for round_ in (1, 2):
            server = play_round(federation, server, draw_cohort(federation, round_), clients, works).server
            clients.commit()
        return [server, *(clients.private(client) for client in range(federation.config.clients.count))]


def numbers(states: list[State]) -> list[Tensor]:
    return [tensor for state in states for _, tensor in flatten(state)[1] if tensor.numel()]


def assert_close(found: list[State], expected: list[State], tolerance: float) -> None:
    assert len(numbers(found)) == len(numbers(expected)) > 0
    for a, b in zip(numbers(found), numbers(expected), strict=True):
        assert a.device.type == "cpu"
        assert a.dtype == b.dtype
        apart = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)
        assert float(apart) <= tolerance


def test_a_batch_is_where_it_is_computed_with(fp32: Placement) -> None:
    federation = prepare(config())
    x, y = fp32.batch(federation.data.train(0), torch.arange(4))
    assert {x.device.type, y.device.type} == {fp32.device.type}
    assert x.dtype == torch.float32


def test_what_is_resident_gives_the_batches_of_what_is_not(fp32: Placement) -> None:
    far = prepare(config())
    near = resident(far, fp32)
    assert near.dataset.x.device.type == fp32.device.type
    rows = torch.tensor([3, 1, 7])
    batches = [
        fp32.batch(federation.data.train(1), rows, torch.Generator().manual_seed(0)) for federation in (far, near)
    ]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    assert near.data.train(1).labels.device.type == "cpu"  # algorithms put what they count beside states


def test_pixels_are_the_bits_of_the_cpu(fp32: Placement) -> None:
    """Catches a division by a number, which a GPU takes for a product with its inverse."""
    data = prepare(config()).data.train(0)
    rows = torch.arange(len(data))
    for generator in (None, torch.Generator()):
        here, there = (
            placement.batch(data, rows, generator and generator.manual_seed(0))[0]
            for placement in (Placement.of("cpu", "fp32"), fp32)
        )
        assert torch.equal(there.cpu(), here)


def test_single_precision_is_not_cut_to_a_tenth_of_it(fp32: Placement) -> None:
    draws = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 32, 16, 16, generator=draws), torch.randn(32, 32, 3, 3, generator=draws)
    exact = functional.conv2d(x.double(), w.double())
    with fp32.defaults():
        found = functional.conv2d(fp32.put(x), fp32.put(w)).cpu()
    # 288 products in float32; in TensorFloat-32 it is about 1e-3.
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("algorithm", ["fedmrl", "fedproto", "heterofl"])
def test_training_there_is_training_here(fp64: Placement, driver: str, algorithm: str) -> None:
    sections = {
        "clients": {"models": ["mlp(hidden=(24, 20))", "resnet8(width=5)"]},
        "algorithm": {"name": algorithm, **KEYS.get(algorithm, {})},
    }
    if algorithm == "heterofl":
        sections["clients"] = {"models": ["resnet8(width=5)"], "capacities": [1.0, 0.3]}
    assert_close(played(fp64, driver, **sections), played(CPU, "sequential", **sections), 1e-9)


def test_a_message_leaves_the_gpu_whole(fp32: Placement) -> None:
    there = {"fc.weight": torch.arange(6.0).reshape(2, 3).t(), "steps": torch.tensor(7)}
    here = {name: fp32.put(value) for name, value in there.items()}
    message = FedMRL.Broadcast(here)
    for back in (decode(encode(message), FedMRL.Broadcast), assemble(disassemble(message), FedMRL.Broadcast)):
        assert tree.same(back.G, there)
    state = FedMRL.Server({name: value.contiguous() for name, value in here.items()})  # as states are
    assert tree.same(state_files.unpack(state_files.dump(state), FedMRL.Server).G, there)


class _Stop(Quiet):
    """Ctrl-C at the end of the first round."""

    def round_ended(self, row: Any) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt


def accuracies(folder: Path) -> list[float]:
    """Of the last evaluation, by client."""
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    return [row["accuracy"] for row in rows if row["round"] == 3 and row.get("accuracy") is not None]


def test_a_resumed_run_ends_as_one_that_was_left_alone(device: str, tmp_path: Path) -> None:
    asked = config(run={"device": device, "precision": "fp64", "driver": "batched"})
    whole = simulate(asked, out=tmp_path / "whole").summary
    with pytest.raises(Interrupted):
        simulate(asked, out=tmp_path / "stopped", callbacks=[_Stop()])
    stopped = resume(tmp_path / "stopped").summary
    assert len(accuracies(tmp_path / "whole")) == 6
    assert accuracies(tmp_path / "stopped") == accuracies(tmp_path / "whole")
    assert stopped["bytes"] == whole["bytes"]
    assert stopped["flops"] == whole["flops"]


def test_workers_beside_a_gpu_do_what_one_process_does(device: str, tmp_path: Path) -> None:
    found = {
        workers: simulate(
            config(run={"device": device, "precision": "fp64", "workers": workers}), out=tmp_path / str(workers)
        ).summary
        for workers in (1, 2)
    }
    assert accuracies(tmp_path / "2") == accuracies(tmp_path / "1")
    assert found[1]["bytes"] == found[2]["bytes"]


def noise(path: Path, y: NDArray[Any]) -> str:
    """A file of grey images with these labels."""
    x = np.random.default_rng(0).integers(0, 256, (len(y), 1, 16, 16), dtype=np.uint8)
    classes = {"classes": np.array([str(c) for c in range(10)])} if y.dtype == np.int64 else {}
    np.savez(path, x=x, y=y, **classes)
    return str(path)


def metrics(folder: Path, **sections: Mapping[str, Any]) -> list[float]:
    """All metrics of all evaluations of a run, by client."""
    simulate(config(**sections), out=folder, progress=False)
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    return [value for row in rows for value in row.get("metrics", {}).values() if value is not None]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_metric_is_that_of_the_cpu(device: str, task: TaskKind, tmp_path: Path) -> None:
    """Catches a tally that mixes up rows there, and class weights or smoothing that stay behind."""
    sections: dict[str, dict[str, Any]] = {"train": {"class_weights": "balanced", "label_smoothing": 0.1, "clip": 1.0}}
    if task == "regression":
        path = noise(tmp_path / "all.npz", np.arange(240) % 10 + 0.5)
        data = {"dataset": "npz", "path": path, "options": {"layout": "NCHW"}, "task": task}
        sections = {
            "data": {**data, "target_offset": 4.5, "target_scale": 3.0},
            "partition": {"kind": "iid", "alpha": None},
            "clients": {"models": ["resnet8(width=5)"]},
            "algorithm": {"name": "fedavg"},
        }
    run = {"precision": "fp64", "metrics": list(of_task(task))}
    here = metrics(tmp_path / "here", **sections, run=run)
    assert len(here) >= 36
    assert metrics(tmp_path / "there", **sections, run={**run, "device": device}) == pytest.approx(here, rel=1e-6)


def test_a_trained_model_says_there_what_it_says_here(fp32: Placement, tmp_path: Path) -> None:
    run = simulate(config(run={"device": str(fp32.device), "rounds": 1}), out=tmp_path / "run", progress=False)
    x, _ = prepare(config()).data.train(0).batch(torch.arange(5), dtype=torch.float32)
    model = run.model(0)
    here = model(x)
    there = model.to(fp32.device)(fp32.put(x))
    assert there.device.type == fp32.device.type
    assert torch.allclose(there.cpu(), here, rtol=1e-4, atol=1e-5)


def test_a_client_adapts_there_as_here(device: str, tmp_path: Path) -> None:
    run = simulate(
        config(run={"precision": "fp64", "rounds": 1, "eval_every": 1}), out=tmp_path / "run", progress=False
    )
    new = noise(tmp_path / "new.npz", np.arange(30) % 10)
    found = [run.adapt(new, options={"layout": "NCHW"}, device=where) for where in ("cpu", device)]
    for way in ("adapted", "alone"):
        here, there = (getattr(each, way) for each in found)
        assert here.keys() == there.keys()
        assert all(there[name] == pytest.approx(here[name], rel=1e-6) for name in here)
