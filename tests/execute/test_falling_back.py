"""What cannot be stacked runs one by one, with the reason said once; what an owner froze stays frozen."""

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from polyfed.config import Config
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.rounds.callbacks import Quiet
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.simulation.simulate import simulate
from polyfed.storage.state_store import Store

NETS = '''
import torch
from torch import nn

class Leaf(nn.Module):
    """Branches on values, inside a submodule that no cut touches."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 8)
    def forward(self, x):
        h = self.fc(x.flatten(1))
        return torch.relu(h) if h.mean() > 0 else torch.tanh(h)

class Branching(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.leaf = Leaf()
        self.head = nn.Linear(8, num_classes)
    def forward(self, x):
        return self.head(self.leaf(x))

class Frozen(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone = nn.Linear(64, 8)
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(8, num_classes)
    def forward(self, x):
        return self.head(torch.relu(self.backbone(x.flatten(1))))
'''


class Listener(Quiet):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    name = f"falling_nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def config(model: object, algorithm: object = "fedavg", **run: Any) -> Config:
    return Config.parse(
        {
            "run": {"rounds": 2, "eval_every": 2, "threads": 1, **run},
            "data": {"image_size": 8, "augment": False},
            "partition": {"kind": "iid", "samples_per_client": 20},
            "clients": {"count": 3, "models": [model]},
            "train": {"lr": 0.1, "batch_size": 8},
            "algorithm": {"name": algorithm},
        }
    )


@pytest.mark.parametrize("driver", ["auto", "batched"])
def test_a_module_that_branches_on_values_runs_alone_and_says_why_once(nets: str, driver: str, tmp_path: Path) -> None:
    """Catches vmap's traceback instead of a fallback, and a fallback that nobody hears of."""
    model = {"name": f"{nets}:Branching", "classifier": "head"}
    ear = Listener()
    got = simulate(config(model, driver=driver), out=tmp_path / driver, callbacks=[ear]).summary
    alone = simulate(config(model, driver="sequential"), out=tmp_path / "alone").summary
    assert got["accuracy"]["mean"] == alone["accuracy"]["mean"]
    # Also under "auto", which stacks by a rule that has not looked into the network.
    assert ["cannot be stacked" in note for note in ear.notes] == [True]


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_what_an_owner_froze_stays_as_it_was(nets: str, driver: str, tmp_path: Path) -> None:
    """Catches a frozen backbone that is trained all the same; the head beside it must move."""
    federation = prepare(config({"name": f"{nets}:Frozen", "classifier": "head"}, driver=driver))
    model = federation.own(0)
    assert "backbone.weight" not in model.parameter_names
    works = make_driver(driver, Placement(torch.device("cpu")))
    clients = LocalClients(federation, works, Store(tmp_path, federation.algorithm.states, resident=True))
    before: Any = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    backbone = model.constants["backbone.weight"].clone()
    after: Any = play_round(federation, before, draw_cohort(federation, 1), clients, works).server
    assert torch.equal(backbone, model.constants["backbone.weight"])
    assert torch.equal(backbone, model._module.get_parameter("backbone.weight"))
    assert not torch.equal(before.model["head.weight"], after.model["head.weight"])
