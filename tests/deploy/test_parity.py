"""Deployed is the same computation: server, private states and scores equal the in-process sequential run bitwise."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_toy import Run, config, kept, same, with_tables
from safetensors.torch import load_file, save_file

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.algorithms.standalone import Standalone
from polyfed.base.errors import ConfigError
from polyfed.base.rng import Rng
from polyfed.config import algorithm_class, load_algorithm
from polyfed.core.requests import exchange
from polyfed.deploy.client.local_setup import LocalSetup
from polyfed.deploy.client.state_dir import ClientStateDir
from polyfed.deploy.server.loop import go_on
from polyfed.models.zoo import build
from polyfed.rounds.federation import prepare
from polyfed.simulation.simulate import simulate
from polyfed.storage import state_files
from polyfed.storage.run_dir import SavedRun


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_rounds_deployed_equal_two_rounds_in_process(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(algorithm)
    # The server of a deployment has no data to test models of its own on.
    monkeypatch.setattr(algorithm_class(algorithm), "global_nets", lambda *_: {})
    here = simulate(settings, out=tmp_path / "here").summary
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


@pytest.mark.parametrize(
    "more",
    [(), ("data.validation_fraction=0.3",), ("data.validation_fraction=0.3", "run.eval_every=1", "run.patience=2")],
    ids=["tests", "validates", "validates and tests"],
)
def test_sites_with_their_own_files_split_and_train_as_in_process(more: tuple[str, ...], tmp_path: Path) -> None:
    """Catches draws of a split that depend on who else there is, or on the numbers of rows among all."""
    generator = np.random.default_rng(0)
    texts: list[str] = []
    for site in range(3):
        y = np.r_[0, 1, 2, generator.integers(0, 3, 30 + 11 * site)]
        rows = [
            f"{1.7e9 + value:.2f},{value + label:.4f},{label}\n"
            for value, label in zip(generator.normal(size=len(y)), y, strict=True)
        ]
        texts.append("a,b,y\n" + "".join(rows))
    settings, run = with_tables(tmp_path, texts, *more)
    here, there = simulate(settings, out=tmp_path / "here").summary, run.serve()
    assert there["accuracy"]["mean"] == here["accuracy"]["mean"]
    assert there.get("selection") == here.get("selection")
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))


def tables(seed: int = 0) -> list[str]:
    """Three sites with patients, visits, categories and missing values; the second has its columns in another order.

    The third site's patients have names beside numbers, so that the order of all patients is not that of each site's.
    """
    draws = np.random.default_rng(seed)
    texts: list[str] = []
    for site in range(3):
        columns = ["age", "ward", "visit", "patient", "flag", "dx"]
        if site == 1:
            columns = ["dx", "patient", "ward", "age", "flag", "visit"]
        rows = [",".join(columns)]
        for k in range(60 + 13 * site):
            ill = k % 3 == 0
            cells = {
                "age": "" if draws.random() < 0.1 else f"{40 + 20 * ill + 9 * draws.normal():.2f}",
                "ward": "" if draws.random() < 0.1 else str(draws.choice(["north", "south", "west"])),
                "visit": f"2024-{draws.integers(1, 13):02d}-{draws.integers(1, 29):02d}",
                "patient": f"{'P' if site == 2 and k % 2 else ''}{draws.integers(5, 25)}",
                "flag": str(int(draws.random() < 0.2 + 0.1 * site)),
                "dx": "ill" if ill else "well",
            }
            rows.append(",".join(cells[name] for name in columns))
        texts.append("\n".join(rows) + "\n")
    return texts


_AGREED = (
    'data.agreed.classes=["well","ill"]',
    'data.agreed.columns=[{name="ward",categories=["west","south","north","east"]},{name="age"}]',
)
_ROLES = 'label="dx", unit="patient", time="visit"'


@pytest.mark.parametrize(
    "keys",
    [
        ("data.split=pooled",),
        ("data.split=groups",),
        ("data.split=time",),
        ("data.split=pooled", *_AGREED),
        ("data.split=pooled", "partition.samples_per_client=35"),
        ("data.split=time", "partition.samples_per_client=35", "data.validation_fraction=0.3"),
        ("data.split=pooled", "data.validation_fraction=0.3"),
        ("data.split=groups", "data.validation_fraction=0.3", *_AGREED),
        ("data.split=official", "partition.samples_per_client=35"),
        ("data.split=pooled", "partition.seed=7", "data.test_fraction=0.4", "run.seed=3"),
    ],
)
def test_a_table_is_split_and_trained_on_as_in_process(keys: tuple[str, ...], tmp_path: Path) -> None:
    """Catches any difference between a site's own file and the part of a client in a simulation of all files."""
    flag = 'test="flag"' if "data.split=official" in keys else 'ignore=["flag"]'
    settings, run = with_tables(tmp_path, tables(), f"data.options={{{_ROLES}, {flag}}}", *keys)
    here, there = simulate(settings, out=tmp_path / "here").summary, run.serve()
    simulated = prepare(settings).partition
    assert not [row for row in run.events if row["event"] == "refused"]
    starts = np.cumsum([0, *(len(text.splitlines()) - 1 for text in tables())])
    for known in run.memory.settings.values():
        site = known.client
        own = LocalSetup.of(known, run.config)
        for which in ("train", "test"):
            rows, expected = getattr(own.partition, which)(0), getattr(simulated, which)(site)
            assert rows.tolist() == (expected - starts[site]).tolist()
    for key in ("mean", "predictors", "before_aggregation", "best"):
        assert there["accuracy"][key] == here["accuracy"][key]
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))


def test_a_part_of_the_clients_is_drawn_as_in_process(tmp_path: Path) -> None:
    settings = config("fedavg", "clients.count=5", "clients.participation=0.4")
    simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    run.serve()
    rows = [json.loads(line) for line in (tmp_path / "here" / "rounds.jsonl").read_text().splitlines()]
    assert [row.get("cohort") for row in run.rows] == [row.get("cohort") for row in rows]
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))


def test_clients_that_rest_go_on_from_what_they_kept_as_in_process(tmp_path: Path) -> None:
    """Catches a server that knows the states of the last round's clients only, and a client that takes an older one."""
    settings = config("fedproto", "clients.count=4", "clients.participation=0.5", "run.rounds=6", "run.eval_every=6")
    here = simulate(settings, out=tmp_path / "here").summary
    run = Run(tmp_path, settings)
    there = run.serve()
    cohorts = [row["cohort"] for row in run.rows if "cohort" in row]
    returned = ((set(a) - set(b)) & set(c) for a, b, c in zip(cohorts, cohorts[1:], cohorts[2:], strict=False))
    assert any(returned)  # of those who rest for a round
    private = kept(tmp_path / "here", settings)
    deployed = {client: state for client, state in run.private().items() if state}
    assert deployed.keys() == private.keys()
    assert all(same(deployed[client], private[client]) for client in private)
    assert there["accuracy"]["mean"] == here["accuracy"]["mean"]


@pytest.mark.parametrize("augment", ["true", "false"])
def test_images_are_augmented_as_in_process(augment: str, tmp_path: Path) -> None:
    """Catches a client that shifts its images although the server's configuration says not to, or the reverse."""
    settings = config("fedavg", f"data.augment={augment}")
    simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    run.serve()
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))


def test_a_second_exchange_of_a_round_starts_from_the_first_as_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second exchange that starts from the state of before the round."""

    def twice(self: Standalone, server: Any, cohort: Any) -> Any:
        for _ in range(2):
            yield from exchange(cohort, None)
        return server

    monkeypatch.setattr(Standalone, "server_round", twice)
    settings = config("standalone")
    simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    run.serve()
    private, deployed = kept(tmp_path / "here", settings), run.private()
    assert deployed.keys() == private.keys()
    assert all(same(deployed[client], private[client]) for client in private)


def test_a_client_that_says_its_own_capacity_holds_so_much(tmp_path: Path) -> None:
    """Catches a client's own capacity passed over: the server sends it what the configuration says."""
    run = Run(tmp_path, config("fiarse", "clients.capacities=[1.0]"))
    node, settings = next(iter(run.memory.settings.items()))
    run.memory.settings[node] = settings.model_copy(update={"capacity": 0.25})
    run.serve()
    lines = (run.folder / "clients.jsonl").read_text().splitlines()
    found = {row["client"]: row for row in map(json.loads, lines) if "bytes_down" in row}
    assert [found[client]["capacity"] for client in range(3)] == [0.25, 1.0, 1.0]
    assert found[0]["bytes_up"] < 0.5 * found[1]["bytes_up"] == 0.5 * found[2]["bytes_up"]


def test_settings_of_single_clients_and_rounds_are_those_in_process(tmp_path: Path) -> None:
    """Catches a deployed client that trains at another rate, by other weights, or by its neighbour's settings."""
    settings = config(
        "fedavg",
        "train.schedule={kind='cosine', warmup=1}",
        "train.parts.model.schedule={kind='step', every=1, gamma=0.5}",
        "train.class_weights=balanced",
        "train.label_smoothing=0.1",
        "train.optimizer=adamw",
        "train.clients.1.batch_size=3",
    )
    simulate(settings, out=tmp_path / "here")
    run = Run(tmp_path, settings)
    run.serve()
    assert same(run.server(), load_file(tmp_path / "here" / "checkpoint" / "server-round-2.safetensors"))


def _best(tmp_path: Path, here: Path, run: Run, settings: Any) -> None:
    """Assert that server and clients keep of the best round what a simulation keeps of it."""
    states = load_algorithm(settings.algorithm.name, settings.algorithm.keys).states
    with (
        closing(SavedRun(here, states, "best")) as simulated,
        closing(SavedRun(run.folder, states, "best")) as deployed,
    ):
        assert deployed.round == simulated.round
        assert state_files.dump(deployed.server) == state_files.dump(simulated.server)
        for node in run.memory.settings.values():
            folder = ClientStateDir(Path(node.state_dir), run.experiment, node.client, states)
            expected = simulated.private(node.client)
            found, lost = folder.state(folder.best)
            assert not lost
            assert (found is None) == (expected is None)
            assert expected is None or state_files.dump(found) == state_files.dump(expected)
            assert len(folder.entries) <= 3  # the latest, the one before, and that of the best round


BEST = (
    "run.keep=best",
    "run.monitor=brier",
    'run.metrics=["accuracy","brier"]',
    "run.eval_every=1",
    "data.validation_fraction=0.3",
    "clients.count=4",
    "train.lr=0.15",
)


@pytest.mark.parametrize("participation", [0.5, 1.0])
@pytest.mark.parametrize("algorithm", ["fedmrl", "lg-fedavg"])
def test_clients_validate_and_keep_their_states_of_the_best_round_as_in_process(
    algorithm: str, participation: float, tmp_path: Path
) -> None:
    """Catches a best state that the next round removes, one of another round, and tests of validation rows."""
    settings = config(algorithm, *BEST, "run.rounds=8", f"clients.participation={participation}")
    here = simulate(settings, out=tmp_path / "here").summary
    run = Run(tmp_path, settings)
    there = run.serve()
    assert there["selection"] == here["selection"]
    assert 0 < here["selection"]["best"]["round"] < 8, "the test needs another run"
    for key in ("accuracy", "metrics", "majority", "flops_evaluation"):
        assert json.loads(json.dumps(there[key])) == json.loads(json.dumps(here[key])), key
    _best(tmp_path, tmp_path / "here", run, settings)
    logs = [(folder / "tests.jsonl").read_text().splitlines() for folder in (tmp_path / "here", run.folder)]
    names = ("kept", "round", "client", "correct", "metrics", "majority")
    one, other = ([{name: row[name] for name in names} for row in map(json.loads, log)] for log in logs)
    assert one == other


def test_a_killed_server_and_lost_replies_lose_no_best_state(tmp_path: Path) -> None:
    """Catches a server that forgets after a restart whose states are the best, so that clients drop them."""
    settings = config("fedmrl", *BEST, "run.rounds=8", "clients.participation=0.5")
    here = simulate(settings, out=tmp_path / "here").summary
    run = Run(tmp_path, settings)
    for stop in (3, 5, 7):  # after each of these rounds' training the server dies once
        dead: list[int] = []

        def instead(message: Any, go: Any, stop: int = stop, dead: list[int] = dead) -> Any:
            frame = go()
            if message.kind == "evaluate" and message.group == str(stop) and not dead:
                dead.append(stop)
                raise KeyboardInterrupt
            return frame

        run.memory.instead = instead
        with pytest.raises(KeyboardInterrupt):
            run.serve()
    there = run.serve()
    assert there["selection"] == here["selection"]
    _best(tmp_path, tmp_path / "here", run, settings)


def test_a_deployed_run_ends_early_and_goes_on_as_in_process(tmp_path: Path) -> None:
    """Catches patience that a restart gives back, and a deployed run that does not go on after its end."""
    settings = config("fedavg", *BEST[1:], "run.rounds=8", "run.patience=1", "run.min_delta=5")
    here = simulate(settings, out=tmp_path / "here").summary
    run = Run(tmp_path, settings)
    there = run.serve()
    assert there["selection"] == here["selection"]
    assert here["selection"]["stopped"]["round"] == 1
    assert run.event("stopped")["round"] == 1
    assert run.serve()["selection"] == here["selection"]


def test_a_deployed_run_that_goes_on_equals_one_that_ran_through(tmp_path: Path) -> None:
    """Catches clients that refuse another number of rounds, and the shorter run's last evaluation in the results."""
    more = ("run.eval_every=4", "clients.participation=0.67", "algorithm.energy=[0.5,0.9]")
    short = Run(tmp_path / "a", config("fedkd", "run.rounds=3", *more))
    short.serve()
    go_on(short.folder, 6)
    found = short.serve()
    through = Run(tmp_path / "b", config("fedkd", "run.rounds=6", *more, "algorithm.horizon=3"))
    expected = through.serve()
    assert same(short.server(), through.server())
    private = short.private(), through.private()
    assert private[0].keys() == private[1].keys()
    assert all(same(private[0][client], private[1][client]) for client in private[0])
    for key in ("accuracy", "majority", "bytes", "flops", "flops_evaluation", "rounds", "config_hash"):
        assert found[key] == expected[key], key
    rows = [
        [{k: v for k, v in r.items() if k in ("round", "rounds", "accuracy", "cohort")} for r in run.rows]
        for run in (short, through)
    ]
    assert rows[0] == rows[1]
    with pytest.raises(ConfigError, match="got 5; the run has 6 rounds"):
        go_on(short.folder, 5)


def test_a_run_whose_networks_start_with_weights_goes_on(tmp_path: Path) -> None:
    """Catches a server that binds itself to a client's file of weights when a run goes on, and refuses it then."""
    model = build("mlp(hidden=(9,))", input_shape=(1, 32, 32), num_classes=10)
    save_file({name: value.clone() for name, value in model.init(Rng((0,))).items()}, tmp_path / "w.safetensors")
    models = f"clients.models=[{{name='mlp', hidden=[9], weights='{tmp_path}/w.safetensors'}}]"
    run = Run(tmp_path, config("standalone", models))
    run.serve()
    go_on(run.folder, 3)
    assert run.serve()["rounds"] == 3


def test_flops_that_clients_keep_to_themselves_are_unknown(tmp_path: Path) -> None:
    """Catches a total that is too low as clients with private networks count as 0."""
    run = Run(tmp_path, config("fedmrl"))
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": "mlp(hidden=(9,))"})
    run.serve()
    found = json.loads((run.folder / "summary.json").read_text())
    assert (found["flops"], found["flops_evaluation"], found["flops_per_example"]) == (None, None, None)
    assert (found["by_model"][""]["flops"], found["by_model"]["mlp(hidden=(24, 20))"]["flops"] > 0) == (None, True)
    assert [row["flops"] for row in run.rows[1:]] == [None, None]
