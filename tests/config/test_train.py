"""Section ``[train]``: schedules, parts, class weights, and what differs by client and network."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from polyfed.base.errors import ConfigError
from polyfed.config import Config


def config(train: dict[str, Any], **sections: Any) -> Config:
    clients = {"count": 4, "models": ["cnn1", "mlp(hidden=(9,))"], "names": ["north", "south", "east", "west"]}
    return Config.parse({"run": {"rounds": 10}, "clients": clients, "train": train, **sections})


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"schedule": "cosin"}, "train.schedule.kind: got 'cosin'; expected 'constant', 'step', 'cosine' or 'warmup'"),
        ({"schedule": "step"}, 'train.schedule.every: kind "step" needs one of every = 30 and milestones = [60, 80]'),
        (
            {"schedule": {"kind": "step", "every": 3, "milestones": [4]}},
            'train.schedule.every: kind "step" needs one of every = 30 and milestones = [60, 80]',
        ),
        ({"schedule": "warmup"}, 'train.schedule.warmup: missing; kind "warmup" needs the number of rounds, such as 5'),
        (
            {"schedule": {"kind": "cosine", "gamma": 0.5}},
            "train.schedule.gamma: got 0.5; it belongs to kind 'step', not to 'cosine'",
        ),
        (
            {"parts": {"G": {"schedule": {"kind": "cosine", "warmup": 10}}}},
            "train.parts.G.schedule.warmup: got 10; expected fewer than the schedule's 10 rounds",
        ),
        (
            {"optimizer": "adamw", "momentum": 0.5},
            'train.momentum: got 0.5; it belongs to optimizer = "sgd", not to "adamw"',
        ),
        (
            {"class_weights": [1.0, 0.0]},
            "train.class_weights: got [1.0, 0.0]; expected numbers above 0: a batch of no weight has no mean",
        ),
        (
            {"class_weights": "equal"},
            "train.class_weights: got 'equal'; expected 'balanced', a list of a number for each class, or a table",
        ),
        ({"label_smoothing": 1.0}, "train.label_smoothing: got 1.0; expected less than 1"),
        (
            {"clients": {"nort": {"lr": 0.1}}},
            "train.clients.nort: unknown client; did you mean 'north'? known: numbers from 0 to 3, and north, south, "
            "east, west",
        ),
        (
            {"clients": {"north": {"lr": 0.1}, "0": {"lr": 0.2}}},
            "train.clients.north: client 0 has two tables, 0 and 'north'; expected one",
        ),
        (
            {"models": {"cnn2": {"lr": 0.1}}},
            "train.models.cnn2: unknown network; did you mean 'cnn1'? clients.models has cnn1, mlp, mlp(hidden=(9,))",
        ),
        ({"clients": {"north": {"lr": -1}}}, "train.clients.north.lr: got -1; expected more than 0"),
        (
            {"momentum": 0.5, "models": {"mlp": {"optimizer": "adam"}}},
            'train.models.mlp.momentum: got 0.5; it belongs to optimizer = "sgd", not to "adam"',
        ),
    ],
)
def test_faults(train: dict[str, Any], told: str) -> None:
    """Catches settings that are passed over, and faults that do not say where and what is expected."""
    with pytest.raises(ConfigError) as caught:
        config(train)
    assert caught.value.faults == (f"config: {told}",)


def test_an_unknown_key_of_a_client_names_the_keys_that_there_are() -> None:
    """Catches the keys of another section in the advice."""
    with pytest.raises(ConfigError, match=r"train\.clients\.north\.lrr: unknown key; did you mean 'lr'\?") as caught:
        config({"clients": {"north": {"lrr": 0.1}}})
    assert "[train.clients.north] has the keys epochs, steps" in str(caught.value)
    assert "models" not in str(caught.value)


def test_a_regression_has_no_classes() -> None:
    """Catches keys of classification that a regression would pass over, in a client's table too."""
    train = {"label_smoothing": 0.1, "clients": {"north": {"class_weights": "balanced"}}}
    table = {"dataset": "csv", "path": "x.csv", "task": "regression"}
    with pytest.raises(ConfigError) as caught:
        config(train, data=table, partition={"kind": "iid"}, algorithm={"name": "fedavg"})
    assert "train.label_smoothing: got 0.1; a regression has no classes" in str(caught.value)
    assert "train.clients.north.class_weights: got 'balanced'; a regression has no classes" in str(caught.value)


def test_all_of_it_reads_back_and_defaults_change_no_hash() -> None:
    """Catches keys of a client that grow into a full section when they are written."""
    train: dict[str, Any] = {
        "lr": 0.1,
        "schedule": {"kind": "cosine", "warmup": 2},
        "parts": {"G": {"lr": 0.2, "schedule": "constant"}},
        "class_weights": {"a b": 2.0},
        "clients": {"north": {"steps": 3}},
        "models": {"mlp(hidden=(9,))": {"class_weights": [1, 2], "schedule": {"kind": "step", "milestones": [3]}}},
    }
    made = config(train)
    again = Config.parse(tomllib.loads(made.to_toml()))
    assert again == made
    assert made.to_dict()["train"]["clients"] == {"north": {"steps": 3}}
    assert again.hash() == made.hash() == made.resolved().hash()
    assert config({"lr": 0.1}).hash() == config({"lr": 0.1, "label_smoothing": 0.0, "parts": {}}).hash()
    assert len({config({**train, "clients": {"north": {"steps": n}}}).hash() for n in (3, 4)}) == 2


def test_weights_are_relative_to_the_file_and_no_part_of_the_architecture(tmp_path: Path) -> None:
    """Catches a file that is looked for where polyfed happens to run, and clients that it makes unlike."""
    (tmp_path / "c.toml").write_text(
        '[clients]\ncount = 3\nmodels = ["cnn1", { name = "cnn1", weights = "w/a.safetensors" }, '
        "\"cnn1(weights='/b.safetensors')\"]\n"
    )
    clients = Config.load(tmp_path / "c.toml").clients
    assert [clients.weights(k) for k in range(3)] == [None, str(tmp_path / "w/a.safetensors"), "/b.safetensors"]
    assert [str(spec) for spec in clients.architectures] == ["cnn1"]
    assert clients.counts == (3,)
    with pytest.raises(ConfigError, match=r"'weights' is 'w\.pt', expected the path of a \.safetensors file"):
        Config.parse({"clients": {"models": [{"name": "cnn1", "weights": "w.pt"}]}})


@pytest.mark.parametrize("count", [1, 2, 4, 7, 11])
def test_clients_are_counted_by_architecture(count: int) -> None:
    """Catches a list of networks that is cut off, and one that goes round a second time."""
    clients = Config.parse({"clients": {"count": count, "models": ["mlp", "cnn1", "mlp", "cnn2"]}}).clients
    each = [clients.model(k) for k in range(count)]
    assert clients.counts == tuple(each.count(spec) for spec in clients.architectures)


def test_a_table_of_a_client_counts_also_where_it_gives_a_default() -> None:
    """Catches runs of unlike clients that share a hash, so that one is taken for the other."""
    base = {"lr": 0.1, "batch_size": 8, "momentum": 0.9}
    tables = [
        {"lr": 0.01},
        {"batch_size": 64},
        {"lr": 0.01, "batch_size": 64},
        {"momentum": 0.0},
        {"schedule": "constant"},
    ]
    for section, name in (("clients", "0"), ("models", "cnn1")):
        found = [config({**base, section: {name: table}}) for table in tables]
        assert len({one.hash() for one in [config(base), *found]}) == len(tables) + 1
        assert [Config.parse(tomllib.loads(one.to_toml())).hash() for one in found] == [one.hash() for one in found]


@pytest.mark.parametrize("table", [{"class_weights": None}, {"schedule": None}, {"parts": {}}])
def test_a_table_of_a_client_takes_nothing_away(table: dict[str, Any]) -> None:
    """Catches a setting that holds in memory and that config.toml cannot say, so that a resumed run is another."""
    with pytest.raises(ConfigError, match=rf"train.clients.0.*got nothing for {next(iter(table))}"):
        config({"class_weights": "balanced", "clients": {"0": table}})


def test_a_network_and_a_client_that_do_not_go_together_are_a_fault() -> None:
    """Catches a momentum that is ignored, as one table gives Adam and another the momentum."""
    tables = {
        "models": {"mlp": {"optimizer": "adam"}},
        "clients": {"south": {"momentum": 0.9}, "north": {"momentum": 0.9}},
    }
    with pytest.raises(ConfigError) as error:
        config(tables)
    (fault,) = error.value.faults
    assert fault.startswith("config: train.clients.south.momentum: got 0.9; it belongs to optimizer")
    assert fault.endswith("(with train.models.mlp)")
