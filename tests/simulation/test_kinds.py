"""Runs on every kind of data: series, tokens, floating-point images, image files, and data given from Python."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import image_file
from sequence_nets import series, tokens

from polyfed import Config, federated_data, resume, simulate
from polyfed.base.errors import CheckpointError, ConfigError, DataError, ModelError
from polyfed.data.dataset import Dataset
from polyfed.parallel import setup
from polyfed.rounds.callbacks import Interrupted, Quiet

CUTS = {"classifier": "head", "extractor": "front"}
SERIES, TOKENS = {"name": "sequence_nets:Series", **CUTS}, {"name": "sequence_nets:Tokens", **CUTS}
AUXILIARY = {"series": "sequence_nets:Series(classifier=head)", "tokens": "sequence_nets:Tokens(classifier=head)"}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedmrl": {"rep_dim": 4},
    "fedproto": {},
    "fedgen": {},
    "fedin": {},
    "fedl2g": {"warmup": 1},
}


def config(name: str = "fedavg", models: Any = "mlp(hidden=(8,))", **sections: dict[str, Any]) -> Config:
    tables: dict[str, dict[str, Any]] = {
        "run": {"rounds": 2, "eval_every": 2, "threads": 1, "workers": 1},
        "data": {"dataset": "python"},
        "partition": {"kind": "natural"},
        "clients": {"count": 3, "models": [models]},
        "train": {"epochs": 2, "lr": 0.3, "batch_size": 8},
        "algorithm": {"name": name, **ALGORITHMS.get(name, {})},
    }
    for section, keys in sections.items():
        tables[section] = {**tables.get(section, {}), **keys}
    return Config.parse(tables)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("make", "model"), [(series, SERIES), (tokens, TOKENS)])
def test_series_and_tokens_train_alone_and_stacked(algorithm: str, make: Any, model: Any, tmp_path: Path) -> None:
    """Catches tokens that become floats on some path, and a stack that standardises by another client's channels."""
    data = make()
    keys = {"auxiliary": AUXILIARY[data.kind]} if algorithm == "fedmrl" else {}
    found, losses = {}, {}
    for driver in ("sequential", "batched"):
        told = config(algorithm, model, run={"driver": driver, "precision": "fp64"}, algorithm=keys)
        out = tmp_path / driver
        found[driver] = simulate(told, dataset=data, out=out).summary
        rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        losses[driver] = [row["loss"] for row in rows if row.get("loss") is not None]
    assert losses["sequential"]
    assert losses["batched"] == pytest.approx(losses["sequential"], rel=1e-9)
    assert found["batched"]["accuracy"] == found["sequential"]["accuracy"]
    assert found["sequential"]["flops"] > 0


@pytest.mark.parametrize(("make", "model"), [(series, SERIES), (tokens, TOKENS)])
def test_series_and_tokens_are_learnt(make: Any, model: Any, tmp_path: Path) -> None:
    """Catches inputs that are scrambled, and channels whose scale hides the others."""
    told = config("fedavg", model, run={"rounds": 12, "eval_every": 12}, train={"lr": 0.5})
    assert simulate(told, dataset=make(), out=tmp_path / "run").summary["accuracy"]["mean"] > 0.9


@pytest.mark.parametrize("net", ["Packed", "Masked"])
def test_networks_that_read_the_padding_train(net: str, tmp_path: Path) -> None:
    """Catches a refusal for rows of padding that no client has, and a stack that cannot read lengths."""
    told = config("fedavg", f"sequence_nets:{net}", run={"rounds": 12, "eval_every": 12}, train={"lr": 0.5})
    assert simulate(told, dataset=tokens(), out=tmp_path / "run").accuracy > 0.8


def test_state_that_only_the_data_show_is_refused_before_a_run(tmp_path: Path) -> None:
    """Catches a leak by tokens that no test of a new network draws."""
    with pytest.raises(ModelError, match="changes 'top' in its forward"):
        simulate(config("fedavg", "sequence_nets:TopKept"), dataset=tokens(), out=tmp_path / "run")


def test_a_series_with_channels_first(tmp_path: Path) -> None:
    data = series()
    first = replace(data, x=data.x.transpose(1, 2).contiguous(), channels_first=True)
    one = simulate(config("fedavg", SERIES), dataset=data, out=tmp_path / "a").summary
    other = simulate(config("fedavg", {**SERIES, "first": True}), dataset=first, out=tmp_path / "b").summary
    assert one["accuracy"]["mean"] == other["accuracy"]["mean"]


def table() -> Dataset:
    """Ten numbers a row."""
    draw = np.random.default_rng(0)
    return federated_data([(draw.normal(size=(20, 10)), np.arange(20) % 2) for _ in range(3)])


@pytest.mark.parametrize(
    ("make", "model", "keys", "says"),
    [
        (tokens, "mlp", {}, "model 'mlp' fails on an input .* and type int64"),
        (tokens, {**TOKENS, "vocabulary": 19}, {}, "fails on tokens from 0 to 19.*needs more than 19 rows"),
        (table, TOKENS, {}, "fails on an input .* and type float32"),
        (
            tokens,
            TOKENS,
            {"name": "fedmrl", "rep_dim": 4, "auxiliary": "mlp"},
            "auxiliary.*model 'mlp.*' fails on an input .* and type int64",
        ),
        (series, "cnn5", {}, "the CNNs take images"),
        (series, "mlp", {"name": "fml", "auxiliary": "gru-1d"}, r"'gru-1d' .*the data are \(T, C\) \(12, 3\)"),
        (series, "in-resnet10-1d", {}, r"the data are \(T, C\) \(12, 3\): .*layout = \"NCT\""),
    ],
)
def test_a_network_that_does_not_take_the_data_is_refused_before_a_file_is_written(
    make: Any, model: Any, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """Catches an IndexError in the first round, and a network that multiplies tokens as numbers."""
    with pytest.raises(ModelError, match=says):
        simulate(config("fedavg", model, algorithm=keys), dataset=make(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def images(clients: int = 3, rows: int = 24) -> Dataset:
    """Scans of any range, bright on the left or on the right."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(clients):
        y = draw.integers(0, 2, rows)
        x = draw.normal(-700, 50, (rows, 1, 16, 16)).astype(np.float32)
        for k in range(rows):
            x[k, 0, :, slice(0, 8) if y[k] else slice(8, 16)] += 200
        made.append((x, y))
    return federated_data(made, name="scans")


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_floating_images_are_learnt(driver: str, tmp_path: Path) -> None:
    told = config("fedavg", "mlp(hidden=(16,))", run={"rounds": 5, "eval_every": 5, "driver": driver})
    assert simulate(told, dataset=images(), out=tmp_path / "run").summary["accuracy"]["mean"] > 0.9


def test_image_files_by_client_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for client in ("a", "b"):
        for name, level in (("dark", 60), ("light", 180)):
            folder = tmp_path / "shots" / client / name
            folder.mkdir(parents=True)
            for k in range(12):
                pixels = (draw.integers(-40, 40, (16, 16)) + level).astype(np.uint8)
                (folder / f"{k}.png").write_bytes(image_file(pixels))
    told = config(
        "fedmrl",
        "cnn5",
        run={"rounds": 1, "eval_every": 1},
        data={"dataset": "images", "path": str(tmp_path / "shots")},
        clients={"count": 2},
        train={"lr": 0.05},
    )
    found = simulate(told, out=tmp_path / "run").summary
    assert found["accuracy"]["mean"] > 0
    assert json.loads((tmp_path / "run" / "content.json").read_text())["data"].keys() == {"shots"}


# ------------------------------------------------------------------------------------------------------ from Python


class Stop(Quiet):
    """Presses Ctrl-C after round 1."""

    def round_ended(self, row: Any) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt


def test_a_run_on_data_of_a_program_is_resumed_with_the_same_data_alone(tmp_path: Path) -> None:
    """Catches a run that goes on with other data, or with none."""
    told, data = config("fedavg", SERIES, run={"checkpoint_every": 1}), series()
    whole = simulate(told, dataset=data, out=tmp_path / "whole").summary
    with pytest.raises(Interrupted):
        simulate(told, dataset=data, out=tmp_path / "run", callbacks=[Stop()])
    with pytest.raises(ConfigError, match=r"resume such a run in Python, with .*resume\(folder, dataset=...\)"):
        resume(tmp_path / "run")
    changed = data.x.clone()
    changed[-1, -1, -1] += 1
    with pytest.raises(CheckpointError, match="data file waves changed"):
        resume(tmp_path / "run", dataset=replace(data, x=changed))
    assert resume(tmp_path / "run", dataset=series()).summary["accuracy"] == whole["accuracy"]


def test_the_configuration_says_that_the_data_come_from_a_program() -> None:
    with pytest.raises(ConfigError, match=r"got Dataset for data.dataset = 'digits'; .*data.dataset = \"python\""):
        simulate(config(data={"dataset": "digits"}), dataset=series())
    with pytest.raises(ConfigError, match=r"got list for data.dataset = 'python'; expected a Dataset"):
        simulate(config(), dataset=[(np.zeros((4, 2)), np.zeros(4))])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="start and resume such a run in Python"):
        simulate(config())
    with pytest.raises(ConfigError) as caught:
        config(data={"path": "x.npz", "image_size": 8})
    assert "given by a program" in str(caught.value)


def test_workers_have_the_data_of_a_program_by_a_fork_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches workers that look for the data in a file, and a refusal only when they have started."""
    told = config("fedavg", SERIES, run={"workers": 2})
    one = simulate(config("fedavg", SERIES), dataset=series(), out=tmp_path / "one").summary
    if setup.can_fork():
        assert simulate(told, dataset=series(), out=tmp_path / "two").summary["accuracy"] == one["accuracy"]
    monkeypatch.setattr(setup, "can_fork", lambda: False)
    with pytest.raises(ConfigError, match=r"run.workers: got 2; .* by a fork alone"):
        simulate(told, dataset=series(), out=tmp_path / "three")
    tables = config("fedavg", SERIES).to_dict()
    del tables["run"]["workers"]
    free = Config.parse(tables)
    assert simulate(free, dataset=series(), out=tmp_path / "four").summary["accuracy"] == one["accuracy"]


def test_splits_by_unit_and_time_in_a_run(tmp_path: Path) -> None:
    """Catches a split that a run does not pass on, also to the validation part."""
    draw = np.random.default_rng(0)
    parts = [
        {
            "x": draw.normal(size=(60, 4)),
            "y": np.arange(60) % 2,
            "unit": np.arange(60) // 6,
            "time": np.arange(60)[::-1],
        }
        for _ in range(3)
    ]
    data = federated_data(parts)
    for split in ("groups", "time"):
        for fraction in (0.0, 0.3):
            out = tmp_path / f"{split}-{fraction}"
            simulate(config(data={"split": split, "validation_fraction": fraction}), dataset=data, out=out)
            with np.load(out / "partition.npz") as stored:
                for k in range(3):
                    train, test = (
                        stored[f"{p}_rows"][slice(*stored[f"{p}_offsets"][k : k + 2])] for p in ("train", "test")
                    )
                    if split == "groups":
                        assert not set(data.units[train]) & set(data.units[test])
                    else:
                        assert data.times[train].max() < data.times[test].min()
    with pytest.raises(DataError, match="its groups are the clients themselves"):
        simulate(config(data={"split": "groups"}), dataset=replace(data, units=None), out=tmp_path / "none")


def test_the_start_of_a_run_names_classes_that_are_hardly_tested(tmp_path: Path) -> None:
    class Listener(Quiet):
        notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    y = np.array([0, 1] * 30 + [2] * 3)
    data = federated_data([(np.random.default_rng(0).normal(size=(63, 4)), y)] * 3, classes=("well", "ill", "rare"))
    simulate(config(), dataset=data, out=tmp_path / "run", callbacks=[Listener()])
    (note,) = Listener.notes
    assert note.startswith("hardly tested: class 'rare' (")
    assert torch.is_tensor(data.y)
