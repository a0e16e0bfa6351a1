"""A deployed client's own folder makes its model; the server's makes none of a private network."""

from __future__ import annotations

import json
import stat
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from deploy_toy import Run, config, with_tables

from polyfed.base.errors import CheckpointError, ConfigError, RunDirError
from polyfed.report.results import load_run
from polyfed.rounds.federation import deal
from polyfed.simulation.simulate import simulate
from polyfed.trained.adapt import adapt
from polyfed.trained.export import export
from polyfed.trained.load import trained_model
from polyfed.trained.predict import predicted, read_rows_to_predict


def folder(tmp_path: Path, run: Run, client: int) -> Path:
    return tmp_path / f"site-{client}" / run.experiment / f"client-{client}"


@pytest.mark.parametrize("algorithm", ["fedmrl", "fedapen"])
def test_a_clients_folder_makes_its_predictors(algorithm: str, tmp_path: Path) -> None:
    run = Run(tmp_path, config(algorithm, "run.predictions=true", 'clients.names=["Ulm", "Bonn", "Kiel"]'))
    run.serve()
    dataset, partition = deal(run.config)
    for client in (0, 1):
        own = folder(tmp_path, run, client)
        rows = pq.read_table(own / "predictions.parquet").to_pylist()
        x = dataset.x[torch.tensor(partition.test(client))]
        for name in trained_model(own).predictors:
            said = [[row[f"score {c}"] for c in range(10)] for row in rows if row["predictor"] == name]
            model = trained_model(own, ("Ulm", "Bonn")[client], predictor=name)
            np.testing.assert_allclose(model(x).numpy(), said, atol=1e-6)
        for path in own.glob("*trained*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        export(trained_model(own, client), tmp_path / f"{client}.pt2", "pt2")
    for wrong in (1, "Bonn", "1"):
        with pytest.raises(ConfigError, match="holds the model of client 0 alone"):
            trained_model(folder(tmp_path, run, 0), wrong)
    with pytest.raises(ConfigError, match=r"capacity: got 0\.5"):
        trained_model(folder(tmp_path, run, 0), capacity=0.5)
    with pytest.raises(CheckpointError, match="A deployed server has no data: take the client's own folder"):
        trained_model(run.folder, 0)


def test_a_table_is_read_and_scaled_as_at_the_site(tmp_path: Path) -> None:
    draw, texts = np.random.default_rng(0), list[str]()
    for site in range(3):
        x = draw.normal(size=(40, 2)) * 10**site
        texts.append("a,b,y\n" + "".join(f"{a:.4f},{b:.4f},{('no', 'yes')[int(a > b)]}\n" for a, b in x))
    _, run = with_tables(tmp_path, texts, "run.predictions=true")
    (tmp_path / "sites" / "2.csv").write_text(texts[2].replace(",", ";").replace(".", ","))
    options = {"delimiter": ";", "decimal": ","}  # of this site alone
    known = run.memory.settings[102]
    run.memory.settings[102] = known.model_copy(update={"data_options": options})
    run.serve()
    for site in (0, 2):
        own = folder(tmp_path, run, site)
        rows = pq.read_table(own / "predictions.parquet").to_pylist()
        lines = texts[site].splitlines()[1:]
        new = ["b,a", *(",".join(lines[row["row"]].split(",")[1::-1]) for row in rows)]
        text = "\n".join(new)
        (tmp_path / "new.csv").write_text(text if site == 0 else text.replace(",", ";").replace(".", ","))
        found = predicted(trained_model(own), read_rows_to_predict(own, [tmp_path / "new.csv"]))
        np.testing.assert_allclose(found.numpy(), [[row["score no"], row["score yes"]] for row in rows], atol=1e-6)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedproto", "fiarse", "standalone"])
@pytest.mark.parametrize("tell", [("names",), ()])
def test_every_client_keeps_its_model(algorithm: str, tell: tuple[str, ...], tmp_path: Path) -> None:
    """Catches a client that keeps nothing as it is not among the tested clients, or reports no scores."""
    run = Run(tmp_path, config(algorithm, "run.eval_clients=1"), ["rounds.start_timeout=60"], tell=tell)
    summary = run.serve()
    assert summary["deployed"]["kept"] == [0, 1, 2]
    for client in range(3):
        model = trained_model(tmp_path / f"site-{client}")
        assert (model.about["client"], model.about["round"]) == (client, 2)


def test_the_model_of_the_best_round_is_kept(tmp_path: Path) -> None:
    """Catches a client that keeps the last round's model where the run keeps the best."""
    keys = (
        "run.keep=best",
        "run.monitor=brier",
        'run.metrics=["accuracy","brier"]',
        "run.eval_every=1",
        "run.rounds=8",
    )
    keys += ("data.validation_fraction=0.3", "train.lr=0.15", "clients.count=4", "run.predictions=true")
    run = Run(tmp_path, config("fedmrl", *keys), ["rounds.start_timeout=60"])
    best = run.serve()["selection"]["best"]["round"]
    assert 0 < best < 8, "the test needs another run"
    dataset, partition = deal(run.config)
    model = trained_model(tmp_path / "site-1")
    assert model.about["round"] == best
    rows = pq.read_table(folder(tmp_path, run, 1) / "predictions.parquet").to_pylist()
    said = [[row[f"score {c}"] for c in range(10)] for row in rows if row["predictor"] == "mix-large"]
    np.testing.assert_allclose(model(dataset.x[torch.tensor(partition.test(1))]).numpy(), said, atol=1e-6)


def test_people_can_read_what_a_client_worked_for_from_its_first_round_on(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl"), ["rounds.start_timeout=60"])
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": "mlp(hidden=(9,))"})
    run.memory.instead = lambda message, go: "gone" if message.kind in ("evaluate", "keep") else go()
    run.serve()
    place = folder(tmp_path, run, 1)
    about = json.loads((place / "client.json").read_text())
    assert (about["client"], about["algorithm"], about["experiment"]) == (1, "fedmrl", run.experiment)
    assert (about["model"], about["model_is_private"]) == ("mlp(hidden=(9,))", True)
    assert tomllib.loads((place / "config.toml").read_text())["algorithm"]["rep_dim"] == 8
    assert stat.S_IMODE((place / "client.json").stat().st_mode) == 0o600
    for path in (place, tmp_path / "site-1"):
        with pytest.raises(RunDirError, match=r"no model yet|holds no run"):
            trained_model(path)
    assert json.loads((run.folder / "summary.json").read_text())["deployed"]["kept"] == []
    run.memory.instead = lambda message, go: go()
    run.serve()  # a resume of a run that is over hands out what is missing
    assert trained_model(tmp_path / "site-1").networks["F"].name == "mlp(hidden=(9,))"
    (tmp_path / "site-1" / "other" / "client-1").mkdir(parents=True)
    (tmp_path / "site-1" / "other" / "client-1" / "trained.json").write_text("{}")
    with pytest.raises(RunDirError, match="holds the models of 2 runs"):
        trained_model(tmp_path / "site-1")


def test_a_site_reads_new_rows_by_the_options_of_the_configuration_too(tmp_path: Path) -> None:
    """Catches a code for missing values that training knew, and that a prediction takes for a number."""
    draw, texts = np.random.default_rng(0), list[str]()
    for _ in range(3):
        x = draw.normal(size=(40, 2))
        rows = [f"{a:.4f},{b:.4f},{('no', 'yes')[int(a > b)]}" for a, b in x]
        rows[::7] = [row.replace(row.split(",")[0], "-999", 1) for row in rows[::7]]
        texts.append("\n".join(["a,b,y", *rows, ""]))
    _, run = with_tables(tmp_path, texts, 'data.options={label="y",also_missing=["-999"]}', "run.predictions=true")
    run.serve()
    own = folder(tmp_path, run, 1)
    rows = pq.read_table(own / "predictions.parquet").to_pylist()
    lines = texts[1].splitlines()
    (tmp_path / "new.csv").write_text("\n".join(["a,b", *(lines[1 + row["row"]].rsplit(",", 1)[0] for row in rows)]))
    found = predicted(trained_model(own), read_rows_to_predict(own, [tmp_path / "new.csv"]))
    np.testing.assert_allclose(found.numpy(), [[row["score no"], row["score yes"]] for row in rows], atol=1e-6)
    with pytest.raises(RunDirError, match=r"is a deployed client's.*polyfed\.trained_model"):
        load_run(own)


@pytest.mark.parametrize("tell", [("names",), ()])
def test_a_new_site_adapts_to_the_servers_directory_as_to_a_simulation(tell: tuple[str, ...], tmp_path: Path) -> None:
    draw, texts = np.random.default_rng(0), list[str]()
    for _ in range(4):
        x = draw.normal(size=(40, 2))
        texts.append("a,b,y\n" + "".join(f"{a:.4f},{b:.4f},{('no', 'yes')[int(a > b)]}\n" for a, b in x))
    keys = ("algorithm.name=fml", "algorithm.auxiliary=mlp(hidden=(6,))", 'clients.models=["mlp(hidden=(9,))"]')
    settings, run = with_tables(tmp_path, texts[:3], *keys)
    run.memory.settings = {node: known.model_copy(update={"tell": tell}) for node, known in run.memory.settings.items()}
    run.serve()
    lines = [",".join(line.split(",")[each] for each in (1, 2, 0)) for line in texts[3].splitlines()]
    (tmp_path / "new.csv").write_text("\n".join(lines))
    options = {"label": "y"}
    if not tell:
        with pytest.raises(CheckpointError, match="does not name the classes and columns, as its sites kept them"):
            adapt(run.folder, tmp_path / "new.csv", options=options)
        return
    simulate(settings, out=tmp_path / "here")
    there = adapt(run.folder, tmp_path / "new.csv", options=options)
    assert there == adapt(tmp_path / "here", tmp_path / "new.csv", options=options)
    assert there.rounds == 2
