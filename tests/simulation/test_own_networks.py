"""Whole runs of users' networks: FLOPs that cannot be counted, frozen weights from a file, and the same deployed."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from deploy_toy import Run, same
from deploy_toy import config as deployable
from safetensors.torch import load_file, save_file
from torch import nn

from polyfed.base.errors import CheckpointError, ModelError
from polyfed.comparison.compare import compare
from polyfed.report.units import flops
from polyfed.rounds.callbacks import Quiet
from polyfed.simulation.simulate import resume, simulate

NETS = """
import torch
from safetensors.torch import load_file
from torch import nn

class Uncounted(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Linear(129, 4)
        self.head = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.head(self.first(torch.fft.rfft(x.flatten(1)).real))

class Frozen(nn.Module):
    def __init__(self, num_classes, weights):
        super().__init__()
        self.first = nn.Linear(256, 8)
        self.first.load_state_dict(load_file(weights))
        self.first.requires_grad_(False)
        self.head = nn.Linear(8, num_classes)
    def forward(self, x, mask=None):
        return self.head(torch.relu(self.first(x.flatten(1))))
"""


class Listener(Quiet):
    """Writes down what it is told, and stops a run after a round."""

    def __init__(self, stop: int | None = None) -> None:
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.stop = stop

    def note(self, text: str) -> None:
        self.notes.append(text)

    def round_ended(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if row["round"] == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    name = f"whole_nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    save_file(nn.Linear(256, 8).state_dict(), tmp_path / "first.safetensors")
    yield name
    sys.modules.pop(name, None)


def uncounted(nets: str, **sections: dict[str, Any]) -> Any:
    return running.config(**{"clients": {"models": [f"{nets}:Uncounted"]}, "algorithm": {"name": "fedavg"}, **sections})


def frozen(nets: str, tmp_path: Path) -> Any:
    model = {"name": f"{nets}:Frozen", "weights": str(tmp_path / "first.safetensors"), "classifier": "head"}
    return running.config(clients={"models": [model]}, algorithm={"name": "fedavg"})


def test_flops_that_cannot_be_counted_are_unknown_in_files_and_tables(nets: str, tmp_path: Path) -> None:
    """Catches a count that ends the run, a zero where a number is not known, and NaN in JSON."""
    ear = Listener()
    summary = simulate(uncounted(nets), out=tmp_path / "run", callbacks=[ear]).summary
    written = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == summary
    assert [summary[key] for key in ("flops", "flops_evaluation", "flops_per_example")] == [None] * 3
    assert flops(summary["flops"]) == "unknown"
    assert summary["by_model"][f"{nets}:Uncounted"]["flops"] is None
    assert [row["flops"] for row in ear.rows if row["round"]] == [None] * 4
    for name in ("rounds.jsonl", "clients.jsonl"):
        rows = [
            json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / name).read_text().splitlines()
        ]
        assert all(row["flops"] is None for row in rows if "flops" in row)
        assert any("flops" in row for row in rows)


def test_a_run_with_unknown_flops_can_be_resumed(nets: str, tmp_path: Path) -> None:
    simulate(uncounted(nets), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        simulate(uncounted(nets), out=tmp_path / "run", callbacks=[Listener(stop=2)])
    resume(tmp_path / "run")
    running.same(tmp_path / "run", tmp_path / "whole")


def test_unknown_flops_are_unknown_in_a_comparison(nets: str, tmp_path: Path) -> None:
    config = uncounted(nets, run={"rounds": 2})
    table = compare(config, ["fedavg", "standalone"], [0], out=tmp_path / "study")
    assert {row[4:6] for row in table.cost_cells()} == {("unknown", "unknown")}
    header, *lines = table.to_csv().splitlines()
    for line in lines:
        cells = dict(zip(header.split(","), line.split(","), strict=False))
        assert cells["training"] == cells["inference"] == ""


def test_a_simulated_clock_needs_flops(nets: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"FLOPs of model '.*:Uncounted' cannot be counted.*remove \[devices\]"):
        simulate(uncounted(nets, devices={"profiles": "cross-silo"}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_frozen_weights_of_a_file_are_kept_through_a_resume(nets: str, tmp_path: Path) -> None:
    """Catches a run that goes on with another backbone, as the checkpoint does not hold it."""
    ear = Listener(stop=2)
    with pytest.raises(KeyboardInterrupt):
        simulate(frozen(nets, tmp_path), out=tmp_path / "run", callbacks=[ear])
    assert any("gets its first input alone, and 'mask' the default" in note for note in ear.notes)
    held = load_file(next((tmp_path / "run" / "checkpoint").glob("*.safetensors")))
    assert sorted(tuple(value.shape) for value in held.values()) == [(10,), (10, 8)]
    kept = (tmp_path / "first.safetensors").read_bytes()
    save_file(nn.Linear(256, 8).state_dict(), tmp_path / "first.safetensors")
    sys.modules.pop(nets)
    from polyfed.models import zoo

    zoo._build.cache_clear()
    with pytest.raises(CheckpointError, match="frozen weights of a network"):
        resume(tmp_path / "run")
    (tmp_path / "first.safetensors").write_bytes(kept)
    zoo._build.cache_clear()
    assert resume(tmp_path / "run").summary["rounds"] == 4


@pytest.mark.parametrize("net", ["Uncounted", "Frozen"])
def test_a_deployed_run_is_the_same(net: str, nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = f', weights = "{tmp_path / "first.safetensors"}"' if net == "Frozen" else ""
    settings = deployable(
        "fedavg", f'clients.models=[{{ name = "{nets}:{net}"{more} }}]', "data.image_size=16", "data.augment=false"
    )
    monkeypatch.setattr("polyfed.algorithms.fedavg.FedAvg.global_nets", lambda *_: {})
    here = simulate(settings, out=tmp_path / "here").summary
    run = Run(tmp_path, settings)
    there = run.serve()
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))
    for key in ("bytes", "flops", "flops_evaluation", "flops_per_example"):
        assert there[key] == here[key]
    assert (here["flops"] is None) is (net == "Uncounted")
    assert torch.tensor(there["accuracy"]["mean"]).isfinite()
