"""The command: what it prints, its exit codes, and that help and lists come without torch."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import polyfed as polyfed_package
from polyfed import __version__
from polyfed.base import errors
from polyfed.base.errors import DivergedError, PolyfedError
from polyfed.comparison import runs
from polyfed.data.catalogue import DATASETS, SHAPES
from polyfed.data.readers.digits import load_digits
from polyfed.rounds.callbacks import Interrupted

with warnings.catch_warnings():
    # typer 0.29 names things that click 8.4 deprecates; here warnings are errors, for a user they are silent.
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from polyfed import cli

TINY = """
[run]
name = "tiny"
rounds = 2
eval_every = 1
threads = 1
[partition]
classes_per_client = 5
samples_per_client = 20
[clients]
count = 3
models = ["mlp(hidden=(8,))"]
[train]
batch_size = 8
lr = 0.05
[algorithm]
name = "fedavg"
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def polyfed(*arguments):
    """The outcome of a command line, in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fresh(*arguments, after=""):
    """The outcome of a command line in a process of its own, which may report on itself ``after``."""
    code = f"import atexit, sys; atexit.register(lambda: {after or None}); from polyfed.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


HEAVY = "sys.stderr.write(repr([m for m in ('torch', 'numpy', 'scipy', 'pydantic', 'rich') if m in sys.modules]))"


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("--version",)])
def test_help_and_version_load_nothing_heavy(arguments):
    done = fresh(*arguments, after=HEAVY)
    assert (done.returncode, done.stderr) == (0, "[]")


@pytest.mark.parametrize("kind", ["algorithms", "datasets", "devices", "models", "partitions"])
def test_lists_are_json_objects_with_name_and_summary_and_come_without_torch(kind):
    done = fresh("list", kind, "--json", after="sys.stderr.write(str('torch' in sys.modules))")
    assert (done.returncode, done.stderr) == (0, "False")
    rows = json.loads(done.stdout)
    assert all(row["name"] and row["summary"] for row in rows)
    text = polyfed("list", kind).output
    assert [line.split()[0] for line in text.splitlines()] == [row["name"] for row in rows]


def test_the_listed_algorithms_are_the_five():
    names = {row["name"] for row in json.loads(polyfed("list", "algorithms", "--json").output)}
    assert names >= {"fedmrl", "fiarse", "fedin", "fedavg", "standalone"}


def test_an_unknown_list_is_a_usage_error():
    assert polyfed("list", "algoritms").exit_code == 2


def test_version():
    assert polyfed("--version").output == f"polyfed {__version__}\n"


def test_help_documents_the_exit_code_of_every_error():
    text = polyfed("--help").output
    codes = {int(code) for code in re.findall(r"^ +(\d+)  \w", text, re.MULTILINE)}
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, PolyfedError)]
    assert codes == {0, cli.INTERRUPTED} | {kind.exit_code for kind in kinds}


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "polyfed", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("polyfed ")


def test_validate(tiny):
    done = polyfed("validate", tiny, "--set", "run.rounds=7")
    assert done.exit_code == 0
    assert "is valid: fedavg on digits, 3 clients (mlp(hidden=(8,))), 7 rounds; not checked" in done.output
    assert done.output.endswith("not checked before a run: the data\n")


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (("clients.capacities=[1.0, 0.25]",), True),
        (("clients.capacities=[1.0, 0.25]", "clients.selection=by-capacity"), False),
        (("clients.capacities=[1.0, 0.25]", "clients.selection=largest"), False),
        (("clients.capacities=[1.0, 0.25]", "algorithm.name=fiarse"), False),
        (("clients.capacities=[1.0, 0.25]", "algorithm.name=heterofl"), False),
        ((), False),
    ],
)
def test_validate_says_that_capacities_are_not_read(tiny, overrides, noted):
    """Catches clients that are thought smaller than they are, and the note where capacities count."""
    done = polyfed("validate", tiny, *(part for text in overrides for part in ("--set", text)))
    assert done.exit_code == 0, done.output
    assert ("note: fedavg reads no capacities: every client holds its whole network" in done.output) == noted
    assert ("note:" in done.output) == noted


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("clients.selection=stratified",), 'draws as "uniform" does: all clients have one capacity'),
        (
            ("algorithm.name=fedmrl-ssl", "algorithm.rep_dim=8", "data.image_size=16", "train.label_smoothing=0.1"),
            "fedmrl-ssl reads no labels in training, so nothing comes of train.label_smoothing",
        ),
    ],
)
def test_validate_says_which_keys_change_nothing(tiny, overrides, text):
    """Catches a draw by strata where there is one, and losses that are thought weighed."""
    done = polyfed("validate", tiny, *(part for one in overrides for part in ("--set", one)))
    assert f"note: {text}" in done.output.replace('clients.selection = "stratified" ', ""), done.output


def test_validate_says_what_clients_of_each_capacity_hold(tiny):
    """Catches sizes of the whole network in place of the smaller one, and sizes where none differ."""
    sizes = (
        "--set",
        "clients.capacities=[0.25, 1.0]",
        "--set",
        "data.image_size=8",
        "--set",
        "algorithm.name=heterofl",
    )
    done = polyfed("validate", tiny, *sizes)
    assert done.output.splitlines()[1:] == [
        f"mlp(hidden=(8,)) at capacity {capacity}: {held} in fp32; {macs} multiply-accumulates for an example"
        for capacity, held, macs in ((1, "610 parameters, 2.44 kB", 592), (0.25, "310 parameters, 1.24 kB", 296))
    ]
    assert len(polyfed("validate", tiny, *sizes, "--set", "algorithm.name=fiarse").output.splitlines()) == 1


def test_validate_asks_the_algorithm_about_the_networks_where_the_shape_is_known(tiny, tmp_path):
    models = ("--set", 'clients.models=["mlp(hidden=(8,))", "cnn5"]')
    for dataset in ("digits", "cifar100"):
        done = polyfed("validate", tiny, "--set", f"data.dataset={dataset}", *models)
        assert (done.exit_code, "fedavg needs one architecture" in done.stderr) == (4, True)
    own = ("--set", "data.dataset=npz", "--set", f"data.path={tmp_path / 'none.npz'}")
    done = polyfed("validate", tiny, *own, *models)
    assert done.exit_code == 0
    assert done.output.endswith("not checked before a run: the data and whether the networks fit them\n")
    small = ("--set", "data.image_size=8", "--set", "clients.models=[cnn5]")
    assert polyfed("validate", tiny, *small).exit_code == 4  # two 5x5 convolutions do not fit 8x8


@pytest.mark.parametrize("side", [None, 12])
def test_the_shape_of_digits_is_known(side):
    data = load_digits(side)
    channels, classes = SHAPES["digits"]
    assert (data.input_shape, data.num_classes) == ((channels, side or 32, side or 32), classes)
    own = {"leaf", "medmnist", "npz", "csv", "parquet", "images", "huggingface", "python"}
    assert set(SHAPES) == set(DATASETS) - {"breast-cancer", *own}


@pytest.fixture
def table(tmp_path):
    """A configuration of a table with a column of each kind."""
    rows = [
        f"{k},{20 + k},{'fm'[k % 2]},{'ill' if k % 3 else 'well'},note,{'north' if k < 20 else 'south'}"
        for k in range(40)
    ]
    rows[3] = rows[3].replace(",23,", ",NA,")
    (tmp_path / "p.csv").write_text("\n".join([",age,sex,dx,remark,site", *rows]) + "\n")
    path = tmp_path / "table.toml"
    options = 'label = "dx"\ngroup = "site"\nignore = ["remark"]'
    path.write_text(
        f'[data]\ndataset = "csv"\npath = "p.csv"\n[data.options]\n{options}\n[partition]\nkind = "natural"\n'
        f'[clients]\ncount = 2\nmodels = ["mlp(hidden=(4,))"]\n[algorithm]\nname = "fedavg"\n'
    )
    return path


def test_data_says_how_every_column_was_read_and_what_each_client_holds(table):
    done = polyfed("data", table)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["age", "number", "1", "20", "to", "59"] in lines
    assert ["sex", "category", "2:", "f,", "m"] in lines
    assert ["dx", "label", "2:", "ill,", "well"] in lines
    assert ["remark", "left", "out,", "as", "asked"] in lines
    assert any(line[-3:] == ["index,", "left", "out"] for line in lines)
    assert [line[:3] for line in lines if line[:1] in (["north"], ["south"])] == [
        ["north", "16", "4"],
        ["south", "16", "4"],
    ]


def test_data_say_how_many_rows_of_each_client_have_no_label(table):
    """Catches rows that are counted for no client, or as a class of the client before."""
    cells = table.with_name("p.csv")
    cells.write_text(cells.read_text().replace(",ill,", ",,"))
    table.write_text(
        table.read_text().replace("[data.options]", '[data.options]\nunlabelled = true\nclasses = ["ill", "well"]')
    )
    done = polyfed("data", table)
    assert done.exit_code == 0, done.output
    assert "label 'dx' with 2 classes (ill, well), group" in done.stdout
    assert "26 rows without a label, 1 missing cell\n" in done.stdout
    for line in (line.split() for line in done.stdout.splitlines()):
        if line[:1] in (["north"], ["south"]):
            train, test, ill, well, gone = line[1:]
            assert (ill, gone, int(train) + int(test), int(well)) == (".", "13", 20, 7)
    done = polyfed("validate", table)
    assert done.exit_code == errors.ConfigError.exit_code
    assert "'fedavg', which learns from labels, but 26 of 40 rows have no label (unlabelled = true)" in done.output


def test_data_prints_what_sites_agree_on_as_a_section_that_a_configuration_takes(table):
    printed = polyfed("data", table, "--agreed").stdout
    table.write_text(table.read_text() + printed)
    assert "agreed" in printed
    assert polyfed("data", table, "--agreed").stdout == printed


def test_validate_reads_files_of_ones_own_and_says_in_a_line_how(table):
    done = polyfed("validate", table)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1] == (
        "data: 40 rows, 1 number, 1 category (sex 2), label 'dx' with 2 classes (ill, well), group 'site' with 2 "
        "names, left out: (no name), remark, 1 missing cell"
    )
    assert "not checked" not in done.stdout
    done = polyfed("validate", table, "--set", 'clients.models=["cnn5"]')
    assert done.exit_code == 4
    assert "the CNNs take images" in done.stderr


def test_validate_lists_every_fault_on_stderr_without_a_traceback(tiny):
    done = polyfed("validate", tiny, "--set", "run.rounds=0", "--set", "algorithm.nme=3")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 2 faults\n")
    assert "--set: run.rounds: got 0" in done.stderr
    assert "algorithm.nme: unknown key" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_its_progress_its_table_and_its_resumption(tiny, tmp_path):
    out = tmp_path / "r"
    controls = ["--set", "run.controls=true", "--set", 'controls={alone={name="standalone"}}']
    done = polyfed("run", tiny, "--out", out, *controls)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"fedavg: 2 rounds, in {out}"
    assert re.fullmatch(
        r"fedavg: round 1/2  accuracy [\d.]+ %  [\d.]+ kB up and down  [\d.]+ s  ETA [\d.]+ s", lines[2]
    )
    assert lines[4].startswith("alone: 2 rounds")
    assert any(re.match(r"fedavg +[\d.]+ % +[\d.]+ % +[\d.]+ kB", line) for line in lines)
    assert any(re.match(r"alone +[\d.]+ % +[\d.]+ % +0 B +0 B", line) for line in lines)
    assert "alone is standalone." in lines
    assert lines[-1] == f"The run lies in {out}"
    summary = json.loads((out / "summary.json").read_text())
    control = json.loads((out / "controls" / "alone" / "summary.json").read_text())
    assert summary["partition_hash"] == control["partition_hash"]
    again = polyfed("resume", out)
    assert again.exit_code == 0
    assert again.stdout.splitlines() == lines[lines.index("") :]  # the same table and notes, and no more rounds
    fewer = polyfed("resume", out, "--rounds", 1)
    assert fewer.exit_code == 2
    assert "--rounds: got 1; the run has 2 rounds" in fewer.stderr
    longer = polyfed("resume", out, "--rounds", 3)
    assert longer.exit_code == 0
    told = longer.stdout.splitlines()
    assert told[0] == f"fedavg: 3 rounds, from round 3, in {out}"
    assert any(line.startswith("alone: 3 rounds, from round 3") for line in told)
    twice = polyfed("run", tiny, "--out", out)
    assert twice.exit_code == 7
    assert "polyfed resume" in twice.stderr


def test_run_without_a_configuration_is_the_main_job_with_its_controls(monkeypatch):
    seen = []

    def simulate(config, *, out=None, **asked):
        seen.append(config)
        raise DivergedError("enough")

    monkeypatch.setattr(runs, "simulate", simulate)
    assert polyfed("run", "--set", "run.rounds=3").exit_code == 8
    assert (seen[0].algorithm.name, seen[0].data.dataset, seen[0].run.rounds) == ("fedmrl", "digits", 3)
    assert len(seen[0].controls) == 2


@pytest.mark.parametrize(
    "kind", [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, PolyfedError)]
)
def test_errors_are_a_message_and_an_exit_code(kind, monkeypatch, tiny):
    def simulate(config, *, out=None, **asked):
        raise kind("what was got and what was expected")

    monkeypatch.setattr(runs, "simulate", simulate)
    done = polyfed("run", tiny)
    assert (done.exit_code, done.stderr) == (kind.exit_code, "error: what was got and what was expected\n")


def test_a_bug_keeps_its_traceback(monkeypatch, tiny):
    def simulate(config, *, out=None, **asked):
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "simulate", simulate)
    assert isinstance(polyfed("run", tiny).exception, ZeroDivisionError)


def test_ctrl_c_says_how_to_go_on_and_exits_130(monkeypatch, tiny, tmp_path):
    def simulate(config, *, out=None, **asked):
        raise Interrupted(tmp_path / "a run")

    monkeypatch.setattr(runs, "simulate", simulate)
    done = polyfed("run", tiny)
    assert done.exit_code == 130
    assert f"continue with: polyfed resume '{tmp_path}/a run'" in done.stderr
    done = polyfed("compare", tiny, "--algorithms", "fedavg:server_lr=1", "--seeds", "4", "--out", tmp_path / "c")
    assert done.exit_code == 2  # fedavg has no such key: told before anything runs
    done = polyfed(
        "compare", tiny, "--algorithms", "fedavg", "--seeds", "4", "--set", "run.rounds=3", "--out", tmp_path
    )
    assert done.exit_code == 130
    command = f"polyfed compare {tiny} --algorithms fedavg --seeds 4 --set run.rounds=3 --out {tmp_path}"
    assert f"continue with: {command}\n" in done.stderr


def test_partition_shows_a_table_and_writes_a_picture(tiny, tmp_path):
    done = polyfed("partition", tiny, "--out", tmp_path / "p")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["client", "train", "test", *"0123456789"]
    for line in lines[1:4]:
        _, train, test, *classes = line.split()
        assert sum(int(n) for n in classes if n != ".") == int(train) + int(test) == 20
        assert sum(n != "." for n in classes) == 5
    assert (tmp_path / "p" / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(r"partition [0-9a-f]{64}", lines[4])
    assert lines[5] == f"picture in {tmp_path / 'p' / 'partition.png'}"


def test_partition_names_the_clients(tiny, tmp_path):
    done = polyfed("partition", tiny, "--set", 'clients.names=["Ulm", "Bonn", "Kiel"]', "--out", tmp_path / "p")
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["Ulm", "Bonn", "Kiel"]


def test_partition_overwrites_nothing_and_builds_no_network(tiny, tmp_path):
    (tmp_path / "partition.png").write_text("mine")
    done = polyfed("partition", tiny, "--out", tmp_path)
    assert (done.exit_code, "exists already" in done.stderr) == (9, True)
    assert (tmp_path / "partition.png").read_text() == "mine"
    mixed = ("--set", 'clients.models=["mlp(hidden=(8,))", "cnn5"]')  # fedavg could not train these together
    assert polyfed("partition", tiny, *mixed, "--out", tmp_path / "p").exit_code == 0


def test_plot_draws_a_complete_run_and_overwrites_nothing(tiny, tmp_path):
    """Catches a picture of another form than its name says, and a command in the closing lines that does not work."""
    done = polyfed("run", tiny, "--out", tmp_path / "r")
    assert done.exit_code == 0, done.output
    (command,) = [line for line in done.stdout.splitlines() if line.startswith("To draw its curves: polyfed ")]
    words = command.split()[5:]
    assert polyfed(*words).stdout == f"picture in {tmp_path / 'r' / 'plot.png'}\n"
    assert (tmp_path / "r" / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = polyfed(*words)
    assert (again.exit_code, "exists already" in again.stderr) == (9, True)
    assert polyfed(*words, "--out", tmp_path / "pictures" / "r.pdf").exit_code == 0
    assert (tmp_path / "pictures" / "r.pdf").read_bytes().startswith(b"%PDF")
    odd = polyfed(*words, "--out", tmp_path / "r.xyz")
    assert (odd.exit_code, "got r.xyz; expected a file that ends in" in odd.stderr) == (2, True)
    assert (polyfed("plot", tmp_path).exit_code, list(tmp_path.glob("*.png"))) == (7, [])


def test_compare_prints_the_table(tiny, tmp_path):
    arguments = ("--algorithms", "fedavg, standalone", "--seeds", "0,1", "--out", tmp_path / "c")
    done = polyfed("compare", tiny, "--set", "run.rounds=1", *arguments)
    assert done.exit_code == 0, done.output
    assert re.search(r"^fedavg +[\d.]+ ± [\d.]+ % .* standalone +-$", done.stdout, re.MULTILINE)
    assert "No test was made" in done.stdout
    assert (tmp_path / "c" / "table.md").exists()
    assert "training time" in done.stdout
    assert "training time is wall clock of all rounds, without evaluation" in done.stdout


def test_commas_in_brackets_are_part_of_an_algorithm(tiny):
    """Catches granularities=[2,4] that is taken for two algorithms."""
    done = polyfed("compare", tiny, "--algorithms", "fedmrl-e:granularities=[2,4],nonsense", "--seeds", "0")
    assert done.exit_code == 2
    assert "nonsense" in done.stderr
    assert "[2" not in done.stderr
    assert "4]" not in done.stderr


def test_compare_prints_where_the_tables_lie_as_run_does_in_full(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    less = ("--set", "run.rounds=1")
    done = polyfed("compare", tiny, *less, "--algorithms", "fedavg", "--seeds", "0", "--out", "c")
    assert done.stdout.splitlines()[-1] == f"The tables lie in {tmp_path / 'c'}"
    assert polyfed("run", tiny, *less, "--out", "r").stdout.splitlines()[-1] == f"The run lies in {tmp_path / 'r'}"


def test_seeds_must_be_numbers(tiny):
    done = polyfed("compare", tiny, "--algorithms", "fedavg", "--seeds", "0,x")
    assert (done.exit_code, "--seeds: got '0,x'" in done.stderr) == (2, True)


def test_ones_own_algorithm_and_model_are_found_in_the_working_directory(tiny, tmp_path):
    (tmp_path / "mine_for_cli.py").write_text(
        "from dataclasses import dataclass\nfrom polyfed.algorithms.fedavg import FedAvg\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(FedAvg):\n    strength: float = 1.0\n"
    )
    (tmp_path / "net_for_cli.py").write_text(
        "from torch import nn\n\ndef net(width: int):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(1024, width), nn.Linear(width, 10))\n"
    )
    overrides = [
        "algorithm.name=mine_for_cli:Mine",
        "algorithm.strength=2",
        "clients.models=[net_for_cli:net(width=3)]",
    ]
    sets = [word for override in overrides for word in ("--set", override)]
    # -P: as for the installed command, the working directory is not on the path of itself.
    command = [sys.executable, "-P", "-c", "from polyfed.cli import main; main()", "validate", str(tiny)]
    environment = {**os.environ, "PYTHONPATH": str(Path(polyfed_package.__file__).parents[1])}
    done = subprocess.run([*command, *sets], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
