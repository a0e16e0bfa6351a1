"""Deployed is the same computation: server, private states and scores equal the in-process sequential run bitwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deploy_toy import Run, config, kept, same
from safetensors.torch import load_file

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.config import algorithm_class
from polyfed.simulation.simulate import simulate


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_rounds_deployed_equal_two_rounds_in_process(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(algorithm)
    # The server of a deployment has no data to test models of its own on.
    monkeypatch.setattr(algorithm_class(algorithm), "global_nets", lambda *_: {})
    here = simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    there = run.serve()
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))
    private = kept(tmp_path / "here", settings)
    deployed = {client: state for client, state in run.private().items() if state}
    assert deployed.keys() == private.keys()
    assert all(same(deployed[client], private[client]) for client in private)
    for key in ("mean", "predictors", "before_aggregation", "best"):
        assert there["accuracy"][key] == here["accuracy"][key]
    assert there["bytes"] == here["bytes"]
    assert there["flops"] == here["flops"]
    assert there["flops_evaluation"] == here["flops_evaluation"]


def test_a_part_of_the_clients_is_drawn_as_in_process(tmp_path: Path) -> None:
    settings = config("fedavg", "clients.count=5", "clients.participation=0.4")
    simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    run.serve()
    rows = [json.loads(line) for line in (tmp_path / "here" / "rounds.jsonl").read_text().splitlines()]
    assert [row.get("cohort") for row in run.rows] == [row.get("cohort") for row in rows]
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))


@pytest.mark.parametrize("augment", ["true", "false"])
def test_images_are_augmented_as_in_process(augment: str, tmp_path: Path) -> None:
    """Catches a client that shifts its images although the server's configuration says not to, or the reverse."""
    settings = config("fedavg", f"data.augment={augment}")
    simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    run.serve()
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))
