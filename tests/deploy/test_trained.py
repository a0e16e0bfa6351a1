"""A deployed client's own folder makes its model; the server's makes none of a private network."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from deploy_toy import Run, config, with_tables

from polyfed.base.errors import CheckpointError, ConfigError
from polyfed.rounds.federation import deal
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


def test_a_client_that_tells_no_scores_keeps_its_model_too(tmp_path: Path) -> None:
    run = Run(tmp_path, config(), tell=("names",))
    run.serve()
    assert trained_model(folder(tmp_path, run, 1)).predictors[0] == "mix-large"
