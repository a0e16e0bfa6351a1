"""Reading a configuration: what is accepted, what is refused, and that everything wrong is told at once."""

import subprocess
import sys

import pytest
from faults import only, refused
from pydantic import ValidationError

from polyfed.base.errors import ConfigError
from polyfed.config import Config


def test_the_main_job_that_comes_with_polyfed():
    config = Config.load()
    assert (config.algorithm.name, config.data.dataset, config.clients.count) == ("fedmrl", "digits", 10)
    assert [str(config.clients.model(client)) for client in (0, 4, 5)] == ["cnn1", "cnn5", "cnn1"]
    assert config.run.controls
    assert {(s.name, s.keys.get("share")) for s in config.controls.values()} == {
        ("fedmrl", False),
        ("standalone", None),
    }
    assert config.check() == []


def test_all_faults_are_told_at_once_each_with_file_key_value_and_what_was_expected(tmp_path):
    faults = refused(
        """
        rounds = 3
        [run]
        rouns = 5
        seed = -1
        lr = 0.1
        device = "gpu"
        [data]
        dataset = "cifar"
        [partition]
        kind = "iid"
        alpha = 0.5
        [clients]
        models = ["cnn9", "cnn1", {name = "resnet18", nrm = "group"}]
        participation = 1.5
        [train]
        epochs = 2
        steps = 3
        lr = "0.1"
        [algorithm]
        rep_dm = 50
        weights = [1]
        share = "no"
        [algorithms.fiarse]
        gate = "x"
        [controls.a]
        name = "standalon"
        [trian]
        x = 1
        """,
        tmp_path,
        ["clients.count=0", "run"],
    )
    expected = {
        "a.toml: rounds: unknown": "did you mean 'run.rounds'?",
        "a.toml: run.rouns: unknown": "did you mean 'rounds'?",
        "a.toml: run.seed: got -1": "expected at least 0",
        "a.toml: run.lr: unknown": "did you mean 'train.lr'?",
        "a.toml: run.device: got 'gpu'": "'cuda:1'",
        "a.toml: data.dataset: unknown data set 'cifar'": "did you mean 'cifar10'? known: digits",
        "a.toml: partition.alpha: got 0.5": "kind 'dirichlet', 'balanced-dirichlet' and 'resampled', not to 'iid'",
        "a.toml: clients.models[0]: unknown model 'cnn9'": "cnn5",
        "a.toml: clients.models[2]: model 'resnet18' has no option 'nrm'": "did you mean 'norm'?",
        "a.toml: clients.participation: got 1.5": "expected at most 1",
        "a.toml: train.steps: got 3 beside epochs = 2": "one of the two",
        "a.toml: train.lr: got '0.1'": "expected a number",
        "a.toml: algorithm.rep_dm: unknown key": "did you mean 'rep_dim'?",
        "a.toml: algorithm.weights: got [1]": "expected a list of 2",
        "a.toml: algorithm.share: got 'no'": "expected true or false",
        "a.toml: algorithms.fiarse.gate: got 'x'": "'biased', 'released' or 'frozen'",
        "a.toml: controls.a.name: unknown algorithm 'standalon'": "did you mean 'standalone'?",
        "a.toml: trian: unknown section": "did you mean 'train'?",
        "--set: clients.count: got 0": "expected more than 0",
        "--set 'run': expected section.key=value": "run.rounds=5",
    }
    for what, hint in expected.items():
        found = [fault for fault in faults if what in fault]
        assert len(found) == 1, (what, faults)
        assert hint in found[0]
    assert len(faults) == len(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[run]\nrounds = true", ("run.rounds: got true", "a whole number")),
        ("[run]\nrounds = 2.5", ("run.rounds: got 2.5", "a whole number")),
        ("[run]\ntargets = [0.5, 80]", ("run.targets[1]: got 80", "at most 1")),
        ("[run]\neval_clients = 11", ("run.eval_clients: got 11", "clients.count, 10")),
        ('[run]\nname = "a/b"', ("run.name: got 'a/b'", "no slash")),
        ('[run]\nprecision = "fp16"', ("run.precision: got 'fp16'", "'fp32', 'bf16' or 'fp64'")),
        ("run = 3", ("run: got 3", "a table")),
        ("[data]\ntest_fraction = 1.0", ("data.test_fraction: got 1.0", "less than 1")),
        ('[data]\ndataset = "csv"', ("data.path: missing", "'csv'")),
        ('[data]\npath = "x"', ("data.path", "takes no path")),
        ("[data.options]\nlabl = 3", ("data.options.labl: unknown option", "'digits'", "has none")),
        (
            '[data]\ndataset = "csv"\npath = "x.csv"\n[data.options]\ndelimiter = 5',
            ("data.options.delimiter: got 5; expected one character",),
        ),
        (
            '[data]\ndataset = "csv"\npath = "x.csv"\n[data.options]\nmissing = "?"',
            ("data.options.missing: got '?'; expected a list",),
        ),
        (
            '[data]\ndataset = "csv"\npath = "x.csv"\n[data.options]\nheader = "no"',
            ("data.options.header: got 'no'; expected true or false",),
        ),
        (
            '[data]\ndataset = "npz"\npath = "x.npz"\n[data.options]\nflip = "no"',
            ("data.options.flip: got 'no'; expected true or false",),
        ),
        (
            '[data]\ndataset = "csv"\npath = "x.csv"\n[data.options]\nlabl = 3',
            ("data.options.labl", "did you mean 'label'?"),
        ),
        ('[partition]\nkind = "clases"', ("unknown partition 'clases'", "did you mean 'classes'?")),
        ('[partition]\nkind = "natural"\ngroups = "all"', ("partition.groups: got 'all'", "'largest'")),
        ("[clients]\nmodels = []", ("clients.models: got []", "at least 1")),
        ('[clients]\nmodels = "cnn1"', ("clients.models: got 'cnn1'", "a list")),
        ("[clients]\ncapacities = [0.5, 0]", ("clients.capacities[1]: got 0", "more than 0")),
        (
            '[clients]\nmodels = ["no_such_module:Net"]',
            ("clients.models[0]", "no module 'no_such_module'", "on PYTHONPATH"),
        ),
        ("[train]\nlr = nan", ("train.lr", "a finite number")),
        ('[train]\noptimizer = "adam"\nmomentum = 0.9', ("train.momentum: got 0.9", '"adam"')),
        ('[algorithm]\nname = "fedmlr"', ("algorithm.name", "did you mean 'fedmrl'?", "fiarse")),
        ('[algorithm]\nname = "no.such:A"', ("algorithm.name", "no module 'no'")),
        (
            '[algorithm]\nname = "json:loads"',
            ("algorithm.name", "expected a subclass of polyfed.core.algorithm.Algorithm", "a function"),
        ),
        ('[algorithm]\nname = "json:Nothing"', ("algorithm.name", "json has no 'Nothing'", "none")),
        (
            '[algorithm]\nname = "polyfed.core.algorithm:Algorithm"',
            ("algorithm.name", "does not define", "client_round"),
        ),
    ],
)
def test_one_fault(text, parts, tmp_path):
    only(refused(text, tmp_path), "a.toml: ", *parts)


def test_a_mistaken_kind_does_not_make_its_keys_look_wrong(tmp_path):
    only(refused('[partition]\nkind = "dirichlett"\nalpha = 0.5', tmp_path), "did you mean 'dirichlet'?")


def test_a_syntax_error_names_line_and_column(tmp_path):
    only(refused("[run]\nrounds = = 3", tmp_path), "a.toml", "not valid TOML", "line 2, column 10")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("csv", 'got csv without quotes; a text needs quotes: "csv"'),
        ("/data/a.csv # all", 'got /data/a.csv without quotes; a text needs quotes: "/data/a.csv"'),
        ("True", "got True; expected true"),
    ],
)
def test_a_text_without_quotes_is_named(value, told, tmp_path):
    only(refused(f"[data]\ndataset = {value}", tmp_path), "line 2, column 11", told)


def test_files_that_are_none(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for path, what in (
        *((tmp_path / "no", "no such file"), (tmp_path, "a folder"), (tmp_path / "b.toml", "UTF-8")),
        ("uci-har", r'the name of a data set; .* \[data\] has dataset = "uci-har"'),
    ):
        with pytest.raises(ConfigError, match=what):
            Config.load(path)


def test_overrides_win_over_the_file_and_none_takes_a_key_away(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[run]\nrounds = 7\n[partition]\nclasses_per_client = 3\n")
    config = Config.load(path, ["run.rounds=5", "partition.classes_per_client=none", "algorithm.name=fedavg"])
    assert (config.run.rounds, config.partition.classes_per_client, config.algorithm.name) == (5, 2, "fedavg")


def test_an_override_below_a_value_is_refused(tmp_path):
    only(refused("[run]\nrounds = 3", tmp_path, ["run.rounds.x=1"]), "run.rounds.x", "not a table")


def test_a_relative_path_is_relative_to_its_file_or_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.toml"
    path.write_text('[data]\ndataset = "npz"\npath = "x.npz"\n')
    monkeypatch.chdir(tmp_path)
    assert Config.load(path).data.path == str(tmp_path / "sub" / "x.npz")
    assert Config.load(path, ["data.path=y.npz"]).data.path == str(tmp_path / "y.npz")


def test_defaults_depend_on_the_kind_of_partition():
    assert Config.parse({"partition": {"kind": "dirichlet"}}).partition.alpha == 0.5
    assert Config.parse({}).partition.classes_per_client == 2
    assert Config.parse({"partition": {"kind": "iid"}}).partition.classes_per_client is None


def test_epochs_are_one_unless_steps_are_given():
    assert Config.parse({}).train.epochs == 1
    assert Config.parse({"train": {"steps": 5}}).train.epochs is None


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError):
        Config.load().run.rounds = 3


@pytest.mark.parametrize("resolved", [False, True])
def test_toml_reads_back(resolved, tmp_path):
    tables = {
        "run": {"name": 'a "quoted" näme\x7f', "targets": [0.5, 0.9], "seed": 4},
        "data": {"dataset": "csv", "path": "/x.csv", "options": {"label": 3, "missing": ["?", "NA"]}},
        "partition": {"kind": "natural", "groups": "largest"},
        "clients": {"models": ["cnn1", {"name": "resnet18", "norm": "group"}, "mlp(hidden=(64, 32))"]},
        "train": {"steps": 5, "lr": 1e-05},
        "algorithm": {"name": "fedmrl", "weights": [1, 2.5], "share": False},
        "algorithms": {"fiarse": {"gate": "frozen"}, "x.y": {"name": "fedavg"}},
        "controls": {"alone": {"name": "standalone"}},
    }
    config = Config.parse(tables)
    config = config.resolved() if resolved else config
    path = tmp_path / "b.toml"
    path.write_text(config.to_toml())
    assert Config.load(path) == config
    assert Config.parse(config.to_dict()) == config


def test_resolving_fills_in_threads_seed_and_the_algorithm(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    tables = {"run": {"seed": 7}, "clients": {"count": 1}, "algorithm": {"name": "Fed_MRL", "rep_dim": 50}}
    config = Config.parse(tables).resolved()
    assert (config.run.threads, config.partition.seed, config.algorithm.name) == (3, 7, "fedmrl")
    assert config.algorithm.keys["rep_dim"] == 50
    assert config.algorithm.keys["projector"] == "linear"
    assert config.resolved() == config


def test_the_hash_is_of_what_determines_the_numbers():
    base = Config.load()
    same = [
        base.resolved(),
        base.replace("run", name="other", threads=7, checkpoint_every=3, store="disk", controls=False),
        base.replace("algorithm", auxiliary="cnn5"),
        base.with_algorithm("fedmrl"),
        base.replace("partition", seed=base.run.seed),
    ]
    assert {config.hash() for config in same} == {base.hash()}
    other = [
        base.replace("run", seed=1),
        base.replace("run", rounds=3),
        base.replace("run", precision="fp64"),
        base.replace("train", lr=0.01),
        base.replace("algorithm", share=False),
        base.replace("partition", seed=5),
        base.replace("clients", models=["cnn1"]),
        base.with_algorithm("standalone"),
    ]
    assert len({config.hash() for config in (base, *other)}) == len(other) + 1


def test_the_hash_names_a_users_own_file_but_not_where_a_public_data_set_lies():
    own = [Config.parse({"data": {"dataset": "npz", "path": path}}).hash() for path in ("/a", "/b")]
    public = [Config.parse({"data": {"dataset": "mnist", "path": path}}).hash() for path in ("/a", "/b")]
    assert own[0] != own[1]
    assert public[0] == public[1]


def test_the_package_loads_neither_torch_nor_numpy():
    code = "import sys, polyfed.config; print([m for m in ('torch', 'numpy', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_faults_of_devices_are_told_together(tmp_path):
    faults = refused(
        """
        [clients]
        count = 4
        participation = 0.5
        selection = "by-speed"
        [devices]
        profiles = "cross-devices"
        dedline = 3
        start_hour = 24
        dropout = 0.1
        min_replies = 3
        """,
        tmp_path,
    )
    for key, *parts in (
        ("clients.selection", "by-speed", "'by-capacity'"),
        ("devices.profiles", "did you mean 'cross-device'?", ".csv"),
        ("devices.dedline", "did you mean 'deadline'?", "[devices] has the keys profiles,"),
        ("devices.start_hour", "less than 24"),
        ("devices.dropout", "without devices.deadline"),
        ("devices.min_replies", "at most"),
    ):
        found = [fault for fault in faults if f": {key}: " in fault]
        assert len(found) == 1, (key, faults)
        assert all(part in found[0] for part in parts), found
    assert len(faults) == 6
    only(refused('[clients]\nselection = "available"', tmp_path), "clients.selection", "[devices]")
    text = '[clients]\nselection = "by-size"\n[partition]\nkind = "resampled"\nsamples_per_client = 10'
    only(refused(text, tmp_path), "clients.selection", "uniform")
