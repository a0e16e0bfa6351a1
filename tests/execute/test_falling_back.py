"""What cannot be stacked runs one by one, with the reason said once; what an owner froze stays frozen."""

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.base.types import Params
from polyfed.blocks import aggregate
from polyfed.blocks.submodel import above, gates, top_k_threshold
from polyfed.config import Config
from polyfed.core.message import Message, decode, encode
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.models.compatibility import check_layers_fit
from polyfed.models.split import SplitModel
from polyfed.rounds.callbacks import Quiet
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import prepare
from polyfed.rounds.round import play_round
from polyfed.simulation.simulate import resume, simulate
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
    got = simulate(config(model, driver=driver), out=tmp_path / driver, callback=ear)
    alone = simulate(config(model, driver="sequential"), out=tmp_path / "alone")
    assert got["accuracy"]["mean"] == alone["accuracy"]["mean"]
    # Who asked for stacks hears why there are none; "auto" has found out that there is no such way.
    assert ["cannot be stacked" in note for note in ear.notes] == [True] * (driver == "batched")


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_what_an_owner_froze_stays_as_it_was(nets: str, driver: str, tmp_path: Path) -> None:
    """Catches a frozen backbone that is trained all the same; the head beside it must move."""
    federation = prepare(config({"name": f"{nets}:Frozen", "classifier": "head"}, driver=driver))
    model = federation.own(0)
    assert "backbone.weight" not in model.parameter_names
    works = make_driver(driver, Placement(torch.device("cpu")))
    clients = LocalClients(federation, works, Store(tmp_path, federation.algorithm.states, resident=True))
    before: Any = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    after: Any = play_round(federation, before, 1, clients, works).server
    assert torch.equal(before.model["backbone.weight"], after.model["backbone.weight"])
    assert not torch.equal(before.model["head.weight"], after.model["head.weight"])


def test_fedin_refuses_networks_with_nothing_between_the_cuts() -> None:
    """Catches a run that dies in its second round, when the first IN step has nothing to train."""
    make = lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))  # noqa: E731
    model = SplitModel("thin", make, input_shape=(4,), classifier="2", extractor="1")
    with pytest.raises(ModelError, match="'thin' has nothing to train between its cuts"):
        check_layers_fit({"thin": model})


class Broken(Quiet):
    """Fails as a bug in someone's own code would, after round 3."""

    def round_ended(self, row: Any) -> None:
        if row["round"] == 3:
            raise ZeroDivisionError("a bug")


def test_a_bug_in_somebodys_code_costs_no_finished_round(tmp_path: Path) -> None:
    """Catches rounds that only polyfed's own errors and Ctrl-C would save."""
    with pytest.raises(ZeroDivisionError):
        simulate(config("mlp(hidden=(8,))", rounds=5, checkpoint_every=100), out=tmp_path / "run", callback=Broken())
    rounds: list[int] = []

    class Count(Quiet):
        def round_ended(self, row: Any) -> None:
            rounds.append(row["round"])

    resume(tmp_path / "run", callback=Count())
    assert rounds == [4, 5]


def test_what_a_killed_write_left_is_swept(tmp_path: Path) -> None:
    """Catches temporary files that pile up over kills."""
    with pytest.raises(ZeroDivisionError):
        simulate(config("mlp(hidden=(8,))", rounds=5), out=tmp_path / "run", callback=Broken())
    leftover = tmp_path / "run" / "checkpoint" / ".server-round-9.safetensors.77.tmp"
    leftover.write_bytes(b"half")
    resume(tmp_path / "run")
    assert not leftover.exists()


def test_zeros_do_not_fill_a_submodel_beyond_its_capacity() -> None:
    """Catches a threshold of 0 below full capacity: fresh zero-initialised layers would all be kept."""
    params = {"w": torch.cat([torch.zeros(90), torch.ones(10)])}
    mask = above(params, gates(params, ("w",), (top_k_threshold(params, 0.25),)))
    assert int(mask["w"].sum()) == 10


def test_a_mean_of_nothing_or_of_different_models_is_refused() -> None:
    """Catches FedAvg replacing its model by nothing."""
    one = {"a": torch.ones(1)}
    for models in ([], [one, {"b": torch.ones(1)}]):
        with pytest.raises(ValueError, match="expected at least one, all with the same names"):
            aggregate.weighted_mean(models, [1.0] * len(models))
    assert tree.same(aggregate.weighted_mean([one, one], [1, 3]), one)


class Told(Message):
    model: Params
    num_examples: int
    note: str | None
    rates: tuple[float, ...]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("num_examples", "many"),
        ("num_examples", 1.5),
        ("note", 7),
        ("rates", ("a",)),
        ("model", {"a": 1}),
    ],
)
def test_fields_of_another_type_do_not_decode(field: str, value: object) -> None:
    """Catches a reply that decodes and fails in the middle of the server's round."""
    good: dict[str, Any] = {"model": {"w": torch.ones(2)}, "num_examples": 3, "note": None, "rates": (0.5, 1.0)}
    assert isinstance(decode(encode(Told(**good)), Told), Told)
    with pytest.raises(MessageError, match=rf"Told\.{field} came as"):
        decode(encode(Told(**{**good, field: value})), Told)
