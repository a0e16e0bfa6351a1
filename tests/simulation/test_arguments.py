"""Runs whose algorithm, networks and data a program gives as objects."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import polyfed
from polyfed import Config, simulate
from polyfed.base.errors import CheckpointError, ConfigError
from polyfed.base.rng import Rng
from polyfed.models.zoo import build
from polyfed.parallel import setup
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation.arguments import arranged

MLP = "mlp(hidden=(8,))"


def tables(**sections: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "run": {"rounds": 2, "eval_every": 1, "checkpoint_every": 1, "threads": 1, "driver": "sequential"},
        "data": {"image_size": 16},
        "partition": {"samples_per_client": 16},
        "clients": {"count": 4},
        "train": {"batch_size": 8, "lr": 0.05},
    }
    for name, keys in sections.items():
        made[name] = {**made.get(name, {}), **keys}
    return made


def network(width: int = 8, *, module: str = "notebook") -> type[nn.Module]:
    """A class that no module file holds."""

    class Net(nn.Module):
        def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
            super().__init__()
            self.first = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], width)
            self.head = nn.Linear(width, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.first(x.flatten(1))))

    Net.__module__ = module
    return Net


class Stop(Quiet):
    """Presses Ctrl-C after round 1."""

    def round_ended(self, row: Any) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt


class Ear(Quiet):
    """Keeps the notes, and how many rounds were over when each came."""

    def __init__(self) -> None:
        self.notes: list[tuple[int, str]] = []
        self.rounds = 0

    def round_ended(self, row: Any) -> None:
        self.rounds += 1

    def note(self, text: str) -> None:
        self.notes.append((self.rounds, text))


FLAT = """
from torch import nn

class Flat(nn.Sequential):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.flat = nn.Flatten()
        self.first = nn.Linear(input_shape[1] * input_shape[2], 8)
        self.head = nn.Linear(8, num_classes)
"""


def test_objects_with_names_are_written_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of objects that is another run than that of the names, and one that cannot be resumed."""
    (tmp_path / "flat_net.py").write_text(FLAT)
    monkeypatch.syspath_prepend(tmp_path)
    flat = import_module("flat_net")
    objects = simulate(
        tables(),
        algorithm=polyfed.FedMRL(auxiliary="cnn5", rep_dim=4),
        models=[MLP, {"name": flat.Flat, "classifier": "head"}],
        out=tmp_path / "objects",
    )
    names = simulate(
        tables(
            algorithm={"name": "fedmrl", "auxiliary": "cnn5", "rep_dim": 4},
            clients={"models": [MLP, {"name": "flat_net:Flat", "classifier": "head"}]},
        ),
        out=tmp_path / "names",
    )
    assert objects.config == names.config
    running.same(tmp_path / "objects", tmp_path / "names")
    assert "python" not in (tmp_path / "objects" / "config.toml").read_text()


@pytest.mark.parametrize("algorithm", ["lg-fedavg", polyfed.LGFedAvg, polyfed.LGFedAvg()])
def test_an_algorithm_is_a_name_a_class_or_an_instance(algorithm: Any) -> None:
    given = tables(algorithm={"name": "fedmrl", "rep_dim": 4})
    assert arranged(given, algorithm=algorithm)[0].algorithm.name == "lg-fedavg"


def test_an_instance_has_its_own_values_and_a_name_keeps_those_of_the_configuration() -> None:
    """Catches keys of [algorithm] that leak into an object which says otherwise."""
    given = tables(algorithm={"name": "fedmrl", "rep_dim": 4, "lr_private": 0.5}, clients={"models": [MLP]})
    kept = arranged(given, algorithm="fedmrl")[0].resolved().algorithm.keys
    assert (kept["rep_dim"], kept["lr_private"]) == (4, 0.5)
    own = arranged(given, algorithm=polyfed.FedMRL(rep_dim=3))[0].resolved().algorithm.keys
    assert own["rep_dim"] == 3
    assert "lr_private" not in own


def test_a_configuration_is_an_object_tables_or_a_path(tmp_path: Path) -> None:
    config = Config.parse(tables(algorithm={"name": "fedavg"}))
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    for source in (config, tables(algorithm={"name": "fedavg"}), path, str(path)):
        assert arranged(source, models=[MLP])[0] == config.replace("clients", models=[MLP])
    assert arranged(config)[0] is config


def mine(module: str = "notebook", **fields: Any) -> Any:
    """An algorithm that no module file holds."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(polyfed.FedAvg):  # type: ignore[name-defined, misc]
        chosen: Callable[[], float] = float
        amount: float = 1.0

        def init_server(self, task: Any, rng: Any) -> Any:
            state = super().init_server(task, rng)
            scale = self.amount + self.chosen()
            return type(state)({name: scale * value for name, value in state.model.items()})

    Mine.__module__ = module
    return Mine(**fields)


def server(folder: Path) -> dict[str, Tensor]:
    from polyfed.storage import state_files

    (path,) = (folder / "checkpoint").glob("server-*.safetensors")
    manifest = json.loads((folder / "checkpoint" / "manifest.json").read_text())["manifest"]
    return state_files.load(path, manifest["server"][1], *polyfed.FedAvg.states).model


def test_an_algorithm_of_a_notebook_runs_with_values_that_toml_cannot_write(tmp_path: Path) -> None:
    """Catches an instance that is made anew without the values which its configuration cannot hold."""
    found = {}
    for amount in (0.0, 1.0):
        algorithm = mine(chosen=lambda amount=amount: amount, amount=1.0)
        simulate(tables(run={"rounds": 1}), algorithm=algorithm, models=[MLP], out=tmp_path / str(amount))
        found[amount] = server(tmp_path / str(amount))
        stored = polyfed.load_run(tmp_path / str(amount)).config.algorithm
        assert stored.name.startswith("python:Mine")
        assert stored.keys["amount"] == 1.0
        assert "chosen" not in stored.keys
    name = next(iter(found[0.0]))
    assert found[1.0][name].norm() > 1.3 * found[0.0][name].norm()


def test_a_run_of_notebook_objects_says_so_before_it_starts_and_is_resumed_here_only(tmp_path: Path) -> None:
    """Catches a run that goes on elsewhere with another class of the same name, and one that says nothing."""
    ear, net = Ear(), network()
    whole = simulate(tables(), algorithm="fedavg", models=[net], callbacks=[ear], out=tmp_path / "whole")
    (first, text), *_ = [note for note in ear.notes if "resume" in note[1]]
    assert first == 0
    assert text.startswith("only this Python process can resume the run, since no module file holds Net")
    with pytest.raises(Interrupted):
        simulate(tables(), algorithm="fedavg", models=[net], callbacks=[Stop()], out=tmp_path / "run")
    words = [sys.executable, "-m", "polyfed", "resume", str(tmp_path / "run")]
    elsewhere = subprocess.run(words, capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 2
    assert "a program gave this object, whose name only the Python process of that program knows" in elsewhere.stderr
    assert polyfed.resume(tmp_path / "run").metrics == whole.metrics
    running.same(tmp_path / "whole", tmp_path / "run")


def test_the_content_of_a_run_tells_two_objects_of_one_name_apart(tmp_path: Path) -> None:
    """Catches the run of one class that is resumed or reused for another."""
    with pytest.raises(Interrupted):
        simulate(tables(), algorithm="fedavg", models=[network()], callbacks=[Stop()], out=tmp_path / "run")
    content = json.loads((tmp_path / "run" / "content.json").read_text())
    ((name, token),) = [item for item in content["source"].items() if item[0].startswith("python:")]
    assert len(token) == 32
    content["source"][name] = "0" * 32  # as another process would have it
    (tmp_path / "run" / "content.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"module {name} changed"):
        polyfed.resume(tmp_path / "run")


def test_a_class_gives_new_weights_and_a_module_its_own(tmp_path: Path) -> None:
    """Catches weights of a module that are lost, or that a later change of the module reaches."""
    module = network()((1, 16, 16), 10)
    with torch.no_grad():
        module.first.bias.fill_(7.0)
    before = module.first.bias.clone()
    ear = Ear()
    given = tables(run={"rounds": 1}, train={"lr": 1e-9})
    simulate(given, algorithm="fedavg", models=[module], callbacks=[ear], out=tmp_path / "module")
    assert torch.allclose(server(tmp_path / "module")["first.bias"], torch.tensor(7.0))
    assert torch.equal(module.first.bias, before)
    assert "Net was given as a module: clients that have it begin with its weights" in [text for _, text in ear.notes]
    with torch.no_grad():
        module.first.bias.fill_(3.0)
    config = polyfed.load_run(tmp_path / "module").config
    simulate(config, out=tmp_path / "again")
    assert torch.allclose(server(tmp_path / "again")["first.bias"], torch.tensor(7.0))
    simulate(given, algorithm="fedavg", models=[module], out=tmp_path / "changed")
    assert torch.allclose(server(tmp_path / "changed")["first.bias"], torch.tensor(3.0))
    simulate(given, algorithm="fedavg", models=[network()], out=tmp_path / "class")
    assert server(tmp_path / "class")["first.bias"].abs().max() < 1


def test_a_function_builds_networks_and_workers_have_them(tmp_path: Path) -> None:
    """Catches a worker process that does not know the network, and one that trains another."""
    net = network()

    def build(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return net(input_shape, num_classes)

    models = [build, lambda: net((1, 16, 16), 10)]
    for workers in (1, 2):
        given = tables(run={"workers": workers})
        simulate(given, algorithm="standalone", models=models, out=tmp_path / str(workers))
    running.same(tmp_path / "1", tmp_path / "2")


def test_workers_that_are_no_forks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "can_fork", lambda: False)
    given = tables(run={"workers": 2})
    with pytest.raises(ConfigError, match=r"run.workers: got 2; networks of a program reach worker processes"):
        simulate(given, algorithm="fedavg", models=[network()], out=tmp_path / "a")
    with pytest.raises(ConfigError, match=r"run.workers: got 2; the algorithm of a program"):
        simulate(given, algorithm=mine(), models=[MLP], out=tmp_path / "b")
    result = simulate(tables(), algorithm="fedavg", models=[network()], out=tmp_path / "c")
    assert result.summary["rounds"] == 2


def hospitals(**more: Any) -> Any:
    draw = np.random.default_rng(0)
    return polyfed.federated_data({name: (draw.normal(size=(24, 4)), np.arange(24) % 2) for name in "abc"}, **more)


def test_a_data_set_with_clients_is_dealt_to_these(tmp_path: Path) -> None:
    """Catches hospitals whose patients are dealt by class, as the default partition would."""
    result = simulate({"run": {"rounds": 1}}, algorithm="fedavg", dataset=hospitals(), models=[MLP], out=tmp_path / "a")
    assert result.clients["name"] == ["a", "b", "c"]
    assert (result.config.partition.kind, result.config.data.dataset) == ("natural", "python")


def test_what_a_configuration_says_of_the_partition_holds(tmp_path: Path) -> None:
    given = {"run": {"rounds": 1}, "partition": {"kind": "iid"}, "clients": {"count": 2}}
    config, data = arranged(given, dataset=hospitals(), models=[MLP])
    assert (config.partition.kind, config.clients.count) == ("iid", 2)
    assert data is not None
    named = arranged({"data": {"dataset": "python"}}, dataset=hospitals())[0]
    assert (named.partition.kind, named.clients.count) == ("classes", 10)  # as before there was anything to follow
    assert arranged(given, dataset="mnist")[0].data.dataset == "mnist"


def test_a_data_set_that_was_read_is_given_as_it_is(tmp_path: Path) -> None:
    """Catches other rows, or other classes, than those of the name."""
    data = polyfed.load_dataset("digits", image_size=16)
    plain = {name: keys for name, keys in tables().items() if name != "data"}
    one = simulate(plain, algorithm="fedavg", dataset=data, models=[MLP], out=tmp_path / "object")
    other = simulate(tables(), algorithm="fedavg", models=[MLP], out=tmp_path / "name")
    assert one.rounds["accuracy.mean"] == other.rounds["accuracy.mean"]


def test_a_regression_that_was_read_is_one(tmp_path: Path) -> None:
    """Catches targets whose configured offset and scale are left out."""
    path = tmp_path / "stays.csv"
    rows = "".join(f"{20 + i % 40},{3000 + 10 * (i % 40)},{'ab'[i % 2]}\n" for i in range(80))
    path.write_text(f"age,days,ward\n{rows}")
    data = polyfed.load_dataset("csv", path=path, task="regression", label="days", group="ward")
    told = {"target_offset": 3200.0, "target_scale": 100.0}
    given = {"run": {"rounds": 2, "threads": 1}, "train": {"lr": 0.05, "batch_size": 8}}
    algorithm, models = "fedavg", [MLP]
    one = simulate({**given, "data": told}, algorithm=algorithm, dataset=data, models=models, out=tmp_path / "object")
    source = {"dataset": "csv", "path": str(path), "task": "regression", "options": {"label": "days", "group": "ward"}}
    named = {**given, "data": {**source, **told}, "partition": {"kind": "natural"}, "clients": {"count": 2}}
    other = simulate(named, algorithm=algorithm, models=models, out=tmp_path / "name")
    assert one.accuracy is None
    assert one.metrics == other.metrics
    with pytest.raises(ConfigError, match=r"dataset: got a regression for data.task = 'classification'"):
        simulate({"data": {"task": "classification"}}, dataset=data, out=tmp_path / "no")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"config": 3}, "config: got int; expected a Config, a dictionary of its tables, or the path of a file"),
        ({"models": "cnn5"}, r"models: got 'cnn5'; expected a list of networks"),
        ({"models": []}, r"models: got \[\]; expected a list"),
        ({"models": [3]}, r"clients\.models\[0\]: got 3 as a model"),
        ({"algorithm": 3}, "algorithm: got int; expected a name, or an instance of a subclass of polyfed.Algorithm"),
        ({"algorithm": nn.Linear}, "algorithm: got Linear; expected a name"),
        ({"algorithm": "fedavgg"}, "fedavgg"),
        (
            {"callbacks": Quiet()},
            "callbacks: got Quiet; expected a list of objects with the methods started",
        ),
        ({"callbacks": [print]}, "callbacks: got builtin_function_or_method; expected a list"),
        ({"config": {"clients": 3}, "models": ["cnn5"]}, "clients"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_refused(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        simulate(**{"config": tables(), "out": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_all_callbacks_hear_and_progress_is_printed_unless_told_not_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ears = [Ear(), Ear()]
    simulate(tables(), algorithm="fedavg", models=[MLP], callbacks=ears, progress=False, out=tmp_path / "quiet")
    assert [ear.rounds for ear in ears] == [3, 3]
    assert capsys.readouterr().out == ""
    simulate(tables(), algorithm="fedavg", models=[MLP], out=tmp_path / "shown")
    assert f"fedavg: 2 rounds, in {tmp_path / 'shown'}\n" in capsys.readouterr().out


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a loop in a notebook that stops at its second run."""
    monkeypatch.chdir(tmp_path)
    given = tables(run={"rounds": 1})
    results = [simulate(given, algorithm="standalone", models=[MLP], progress=False) for _ in range(3)]
    assert len({result.run_dir for result in results}) == 3


def test_relative_paths_of_a_dictionary_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches paths that start at the run directory when the run is read again, so that it is taken for another."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    np.savez("own.npz", x=draw.normal(size=(40, 3)), y=np.arange(40) % 2)
    spec = {"name": "mlp", "hidden": [4]}
    given = tables(data={"dataset": "npz", "path": "own.npz"}, partition={"kind": "iid"})
    del given["data"]["image_size"]
    save_file(build("mlp(hidden=(4,))", input_shape=(3,), num_classes=2).init(Rng((1,))), "w.safetensors")
    given["clients"] = {"count": 2, "models": [{**spec, "weights": "w.safetensors"}]}
    given["algorithm"] = {"name": "standalone"}
    for config in (given, Config.parse(given)):
        result = simulate(config, progress=False)
        monkeypatch.chdir("/")  # a run is read, or resumed, from anywhere
        assert result.model(client=0).classes == ("0", "1")
        assert polyfed.resume(result.run_dir, rounds=3, progress=False).summary["rounds"] == 3
        monkeypatch.chdir(tmp_path)
    absolute = Config.parse(given | {"data": {**given["data"], "path": str(tmp_path / "own.npz")}})
    assert absolute.anchored(Path("/elsewhere")).data.path == str(tmp_path / "own.npz")


@pytest.mark.parametrize(
    ("name", "capacities", "noted", "listed"),
    [("fedavg", [1.0, 0.25], True, True), ("heterofl", [1.0, 0.25], False, True), ("heterofl", [0.5], False, False)],
)
def test_a_run_says_that_capacities_are_not_read_and_lists_unlike_ones(
    name: str, capacities: list[float], noted: bool, listed: bool, tmp_path: Path
) -> None:
    """Catches capacities without effect and without a word, and a closing table in which unlike clients look alike."""
    ear, clients = Ear(), {"capacities": capacities, "models": ["mlp(hidden=(12, 8))"]}
    algorithm = {"name": name}
    result = simulate(
        running.config(run={"rounds": 1}, algorithm=algorithm, clients=clients), out=tmp_path / "run", callbacks=[ear]
    )
    text = "fedavg reads no capacities: every client holds its whole network; see clients.capacities"
    assert [note for note in ear.notes if "capacities" in note[1]] == ([(0, text)] if noted else [])
    rows = [line.split("(12, 8))")[1].split() for line in str(result).splitlines() if "mlp(hidden" in line]
    assert len(rows) == 4
    assert ("capacity" in str(result)) == listed
    if listed:
        assert [row[0] for row in rows] == ["1", "0.25"] * 2
