"""Small deployed runs: three clients with a few digits each, answered in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deploy_memory import Memory
from safetensors.torch import load, load_file

from polyfed.config import Config, load_algorithm
from polyfed.deploy.server.loop import create, serve
from polyfed.deploy.settings import Deployment, NodeSettings
from polyfed.storage import state_files
from polyfed.storage.state_store import Store

#: Networks and keys for each algorithm of the catalogue.
SUITED: dict[str, tuple[str, ...]] = {
    "fedmrl": ('clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]', "algorithm.rep_dim=8"),
    "fedapen": ('clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]', "algorithm.auxiliary=mlp(hidden=(12,))"),
    "fedkd": ('clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]', "algorithm.auxiliary=mlp(hidden=(12,))"),
    "fedmrl-adaptive": (
        'clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]',
        "algorithm.rep_dim=8",
        "algorithm.auxiliary=mlp(hidden=(12,))",
    ),
    "fedmrl-e": (
        'clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]',
        "algorithm.rep_dim=8",
        "algorithm.auxiliary=mlp(hidden=(12,))",
    ),
    "fedmrl-ssl": (
        'clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]',
        "algorithm.rep_dim=8",
        "algorithm.auxiliary=mlp(hidden=(12,))",
    ),
    "fiarse": ('clients.models=["mlp(hidden=(24,))"]', "clients.capacities=[1.0,0.5,0.25]"),
    "fedin": (
        'clients.models=["in-resnet10-small(norm=group, width=4)","in-resnet14-small(norm=group, width=4)"]',
        "algorithm.feature_batch=8",
    ),
    "standalone": ('clients.models=["mlp(hidden=(24,20))", "mlp(hidden=(16,))"]',),
}
ONE = ('clients.models=["mlp(hidden=(24,))"]',)

#: Nobody waits in tests.
RULES = ("rounds.start_timeout=0.2", "rounds.deadline=30", "rounds.poll=0.01")


def config(algorithm: str = "fedmrl", *more: str) -> Config:
    keys = [f"algorithm.name={algorithm}", *SUITED.get(algorithm, ONE)]
    if algorithm == "fedmrl":
        keys.append("algorithm.auxiliary=mlp(hidden=(12,))")
    if algorithm == "fedl2g":
        keys.append("algorithm.warmup=0")  # every round trains; by default the first fifty do not
    base = ["run.rounds=2", "run.eval_every=2", "run.controls=false", "run.threads=1", "run.driver=sequential"]
    shape = ["clients.count=3", "partition.samples_per_client=30", "train.epochs=1", "train.batch_size=8"]
    return Config.load(Path(__file__).with_name("toy.toml"), [*base, *shape, *keys, *more])


def nodes(folder: Path, count: int = 3, **more: Any) -> dict[int, NodeSettings]:
    return {100 + k: NodeSettings(client=k, state_dir=str(folder / f"site-{k}"), **more) for k in range(count)}


class Run:
    """A run directory, its nodes, and what a test wants to know of it."""

    def __init__(self, folder: Path, settings: Config, rules: Sequence[str] = (), **node: Any) -> None:
        self.folder, self.config = folder / "run", settings
        self.memory = Memory(nodes(folder, settings.clients.count, **node))
        self.experiment = create(self.folder, settings, Deployment.load(None, [*RULES, *rules]))

    def serve(self) -> dict[str, Any]:
        return serve(self.folder, self.memory)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rounds.jsonl").read_text().splitlines()]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def event(self, kind: str) -> dict[str, Any]:
        found = [row for row in self.events if row["event"] == kind]
        assert found, f"no {kind!r} in {self.events}"
        return found[0]

    def server(self) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / "checkpoint").glob("server-round-*.safetensors")
        return load_file(path)

    def private(self) -> dict[int, dict[str, torch.Tensor]]:
        """The last state of each client."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for settings in self.memory.settings.values():
            folder = Path(settings.state_dir) / self.experiment / f"client-{settings.client}"
            if (folder / "pointer.json").exists():
                entries = json.loads((folder / "pointer.json").read_text())["entries"]
                found[settings.client] = load_file(folder / max(entries, key=lambda e: e["key"])["state"][0])
        return found


def with_tables(folder: Path, texts: Sequence[str], *more: str) -> tuple[Config, Run]:
    """A run of clients with csv files of their own, and the configuration that simulates it from the same files."""
    (folder / "sites").mkdir()
    for site, text in enumerate(texts):
        (folder / "sites" / f"{site}.csv").write_text(text)
    own = ("data.dataset=csv", f"data.path={folder / 'sites'}", "data.image_size=none", "partition.kind=natural")
    settings = config("fedavg", *own, "partition.samples_per_client=1000", *more)
    run = Run(folder, settings, ["rounds.start_timeout=60"])  # a busy machine reads tables slowly
    run.memory.settings = {
        node: known.model_copy(update={"data": str(folder / "sites" / f"{known.client}.csv")})
        for node, known in run.memory.settings.items()
    }
    return settings, run


def kept(folder: Path, settings: Config) -> dict[int, dict[str, torch.Tensor]]:
    """The private states that a run of this process ended with, as files hold them."""
    states = load_algorithm(settings.algorithm.name, settings.algorithm.keys).states
    store = Store(folder / "states", states, resident=False)
    found = {client: store.get(client) for client in range(settings.clients.count)}
    return {client: load(state_files.dump(state)) for client, state in found.items() if state is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
