"""The law of this library, over the real engine: deployed equals in process."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from deploy_toy import config, kept
from safetensors.torch import load_file

from polyfed.deploy.host.local import Following, Local
from polyfed.deploy.server.loop import create
from polyfed.deploy.settings import Deployment
from polyfed.simulation.simulate import simulate

ALGORITHMS = ("fedmrl", "fiarse", "fedin")
RULES = ("rounds.start_timeout=300", "rounds.deadline=300")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors."""
    assert a.keys() == b.keys()
    off = sum(float((a[name].double() - b[name].double()).pow(2).sum()) for name in a) ** 0.5
    return off / sum(float(value.double().pow(2).sum()) for value in b.values()) ** 0.5


def test_two_rounds_of_three_algorithms_equal_those_in_process(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ALGORITHMS}
    experiments = {name: create(folder, config(name), Deployment.load(None, RULES)) for name, folder in folders.items()}
    with Local(tmp_path / "deployment", 3) as there:
        following = [Following(folder, patience=600) for folder in folders.values()]
        number = there.submit(list(folders.values()))
        for one in following:
            one.until_ended(there.processes.check, timeout=600)
        engine = there.engine_bytes(number)
    assert there.processes.marked() == []
    sent = 0
    for name, folder in folders.items():
        here = simulate(config(name), out=tmp_path / f"{name}-here").summary
        deployed = json.loads((folder / "summary.json").read_text())
        there_, here_ = (
            load_file(path / "checkpoint" / "server-round-2.safetensors")
            for path in (folder, tmp_path / f"{name}-here")
        )
        assert distance(there_, here_) <= 1e-6
        assert deployed["accuracy"]["mean"] == here["accuracy"]["mean"]
        assert deployed["bytes"] == here["bytes"]
        private = kept(tmp_path / f"{name}-here", config(name))
        for client, state in private.items():
            state_dir = (
                tmp_path / "deployment" / "clients" / str(client) / "state" / experiments[name] / f"client-{client}"
            )
            entries = json.loads((state_dir / "pointer.json").read_text())["entries"]
            last = max(entries, key=lambda entry: entry["key"])
            assert distance(load_file(state_dir / last["state"][0]), state) <= 1e-6
        assert len(private) == (3 if name == "fedmrl" else 0)
        sent += deployed["deployed"]["traffic"]["sent"]
    # Flower counts its own envelopes on top of ours; and says "outbound" for what its clients fetched.
    assert sent <= engine["outbound"] <= 1.2 * sent + 1_000_000
