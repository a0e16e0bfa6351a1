"""`polyfed adapt`: a client that was never trained makes its private part from what a run shares."""

from __future__ import annotations

import dataclasses
import json
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import config as digits
from trained_runs import HEADER, OPTIONS, Trained, table_rows, trained, write_csv
from typer.testing import CliRunner

from polyfed import load_run
from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.algorithms.fd import FD
from polyfed.base.errors import CheckpointError, ConfigError, DataError, ModelError, PolyfedError, StorageError
from polyfed.base.rng import Rng
from polyfed.base.types import Parts
from polyfed.cli import app
from polyfed.config import Config, algorithm_class, load_algorithm
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.requests import drive
from polyfed.data.client import ClientData, FederatedData
from polyfed.data.dataset import Dataset
from polyfed.data.partition.partition import Partition
from polyfed.data.sources import load_dataset
from polyfed.execute.drivers import Sequential
from polyfed.execute.placement import Placement
from polyfed.rounds.federation import configured_task, deal_own, plan_of
from polyfed.simulation.simulate import simulate
from polyfed.storage.run_dir import SavedRun
from polyfed.trained.adapt import adapt
from polyfed.trained.load import trained_model
from polyfed.trained.predict import predicted, read_rows_to_predict
from polyfed.trained.preprocessing import Preprocessing
from polyfed.trained.single import SingleClient

TABLE: dict[str, Any] = {**OPTIONS, "categorical": ["smoker"], "ignore": ["id"], "label": "outcome"}
SMALL: dict[str, Any] = {"auxiliary": "mlp(hidden=(6,))", "rep_dim": 4, "warmup": 0}


def keys(name: str) -> dict[str, Any]:
    """``[algorithm]`` of a tiny run."""
    kind: Any = algorithm_class(name)
    fields = {field.name for field in dataclasses.fields(kind)}
    return {"name": name, **{key: value for key, value in SMALL.items() if key in fields}}


def ran(folder: Path, name: str, kind: str = "table", **more: dict[str, Any]) -> Trained:
    """A run of two clients with one network of two layers, for two rounds."""
    sections: dict[str, Any] = {"clients": {"models": ["mlp(hidden=(9, 7))"]}, "run": {"rounds": 2}, **more}
    return trained(folder, kind, algorithm=keys(name), **sections)


def new_rows(folder: Path) -> Path:
    """A table of a new hospital: other rows than the run's, columns in another order, a column less."""
    rows = [row[1:] for row in table_rows(90)[60:]]
    write_csv(folder / "ordered.csv", rows, HEADER[1:])  # the same as the run has it
    return write_csv(folder / "new.csv", [[*row[2:], *row[:2]] for row in rows], (*HEADER[3:], *HEADER[1:3]))


def own_rows(run: Trained, path: Path) -> tuple[Dataset, Partition]:
    """The new client's rows, and the split that a client of its number has."""
    options = {key: value for key, value in TABLE.items() if key != "ignore"}
    dataset = load_dataset("csv", path=path, task=run.config.data.task, **options)
    return dataset, deal_own(run.config, dataset, run.config.clients.count)


def everything(folder: Path) -> dict[Path, bytes]:
    """All that a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts_of(folder: Path) -> Parts:
    """The parts of the model in a folder."""
    return SingleClient.read(folder).parts(folder)


def same(a: Parts, b: Parts) -> bool:
    """Whether parts are equal, bitwise."""
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys() and all(torch.equal(a[part][name], b[part][name]) for name in a[part])
        for part in a
    )


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "fedmrl-ssl"])  # which takes no table
def test_every_algorithm_adapts_a_client_and_keeps_its_model(name: str, tmp_path: Path) -> None:
    """What the folder predicts has the accuracy that was reported, and the run is as it was."""
    # FedTGP's logits of a class without a prototype, as all are in round 0, are -inf, of which there is no AUROC.
    metrics = ["accuracy"] if name == "fedtgp" else ["accuracy", "auroc"]
    run, new = ran(tmp_path, name, run={"rounds": 2, "metrics": metrics}), new_rows(tmp_path)
    before = everything(run.folder)
    found = adapt(run.folder, new, out=tmp_path / "fifth")
    assert everything(run.folder) == before
    dataset, partition = own_rows(run, new)
    assert (found.train_rows, found.test_rows) == (len(partition.train(0)), len(partition.test(0))) == (24, 6)
    assert found.rounds == found.round == 2
    labels = dataset.y[torch.tensor(partition.test(0))]
    for predictor, scores in found.adapted.items():
        model = trained_model(tmp_path / "fifth", predictor=predictor)
        said = predicted(model, read_rows_to_predict(tmp_path / "fifth", [new]))[torch.tensor(partition.test(0))]
        assert scores["accuracy"] == pytest.approx(float((said.argmax(1) == labels).double().mean()))
        assert list(scores) == metrics
    assert list(found.alone) == ["local"]
    most = dataset.y[torch.tensor(partition.train(0))].bincount().argmax()
    assert found.baseline["accuracy"] == pytest.approx(float((labels == most).double().mean()))
    private = not load_algorithm(name, {}).shared_networks
    silent = "sends this client nothing: it trains alone" if name == "standalone" else None
    assert found.note == (
        silent
        if private and silent is None
        else f"{name} {silent or 'has no private network: the adapted model is the server' + chr(39) + 's, as it is'}"
    )
    if not private:
        train = ClientData(dataset, partition.train(0), augment=False)
        assert same(parts_of(tmp_path / "fifth"), server_parts(run, train))


def server_parts(run: Trained, train: ClientData) -> Parts:
    """What a client of the first kind with these rows predicts with, where nothing is private."""
    algorithm = load_algorithm(run.config.algorithm.name, run.config.algorithm.keys)
    about = Preprocessing.read(run.folder)
    task = configured_task(run.config, about.input_shape, about.num_classes)
    info: Any = ClientInfo(0, 1.0, str(run.config.clients.model(0)))
    with closing(SavedRun(run.folder, algorithm.states)) as saved:
        message = algorithm.message_for(saved.server, info)
    models = algorithm.models_at(task, task.build(run.config.clients.model(0)), info.capacity)
    client = LocalClient(info, models, train, plan_of(run.config.train, 1, 2), Rng((0,)))
    return drive(algorithm.predictor_parts(algorithm.init_client(client), message, client), lambda request: None)


def by_hand(run: Trained, path: Path, rounds: int) -> Parts:
    """FedMRL's client rounds one after another, the server's G as the run left it."""
    config, number = run.config.resolved(), run.config.clients.count
    dataset, partition = own_rows(run, path)
    algorithm = load_algorithm("fedmrl", config.algorithm.keys)
    task = configured_task(config, dataset.input_shape, dataset.num_classes)
    spec, root = config.clients.model(0), Rng((config.run.seed,))
    data = FederatedData(dataset, partition, augment=True).train(0)
    with closing(SavedRun(run.folder, algorithm.states)) as saved:
        message = algorithm.message_for(saved.server, ClientInfo(number))
    driver = Sequential(Placement.of("cpu", "fp32"))

    def local(round_: int) -> LocalClient:
        rng = root.at("client", number) if round_ == 0 else root.at("round", round_, "client", number)
        models = algorithm.models(task, task.build(spec))
        plan = plan_of(config.train, 1, config.run.rounds)
        return LocalClient(ClientInfo(number, 1.0, str(spec)), models, data, plan, rng, round_)

    private: Any = algorithm.init_client(local(0))
    for round_ in range(config.run.rounds + 1, config.run.rounds + rounds + 1):
        call: Any = algorithm.client_round(private, message, local(round_))
        private = driver.play({number: call})[number].private
    return drive(algorithm.predictor_parts(private, message, local(1)), driver.perform)


def test_fedmrl_adapts_as_a_loop_by_hand(tmp_path: Path) -> None:
    run, new = ran(tmp_path, "fedmrl"), new_rows(tmp_path)
    adapt(run.folder, new, rounds=3, out=tmp_path / "out")
    assert same(parts_of(tmp_path / "out"), by_hand(run, tmp_path / "ordered.csv", 3))
    assert not same(parts_of(tmp_path / "out"), by_hand(run, tmp_path / "ordered.csv", 2))


def test_alone_is_standalone_on_the_same_rows(tmp_path: Path) -> None:
    """A standalone run sends nothing, so there adapting is training alone; FedMRL's "alone" is the same."""
    metrics = {"rounds": 2, "metrics": ["auroc", "brier"]}
    runs = {name: ran(tmp_path / name, name, run=metrics) for name in ("standalone", "fedmrl")}
    found = {name: adapt(run.folder, new_rows(tmp_path), rounds=4) for name, run in runs.items()}
    assert found["standalone"].adapted == found["standalone"].alone == found["fedmrl"].alone
    assert found["fedmrl"].adapted["mix-large"] != found["fedmrl"].alone["local"]


def test_a_client_receives_what_the_server_would_send_it_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FD's clients predict without a message, and train with the others' means."""
    run, new = ran(tmp_path, "fd"), new_rows(tmp_path)
    seen: list[tuple[int, Any]] = []
    usual = FD.client_round

    def watched(self: FD, private: Any, msg: Any, client: LocalClient) -> Any:
        seen.append((client.round, msg.targets))
        return usual(self, private, msg, client)

    monkeypatch.setattr(FD, "client_round", watched)
    adapt(run.folder, new)
    algorithm = FD()
    with closing(SavedRun(run.folder, algorithm.states)) as saved:
        targets = algorithm.targets(saved.server, ClientInfo(2))  # pyright: ignore[reportArgumentType]
    assert targets
    assert [round_ for round_, _ in seen] == [3, 4]
    assert all(same({"": got}, {"": targets}) for _, got in seen)


def test_rates_follow_their_schedule_from_its_beginning(tmp_path: Path) -> None:
    """The schedule of the run is over, and would leave a new client where it was drawn."""
    train = {"epochs": 1, "batch_size": 8, "lr": 0.05}
    schedules = {"constant": {}, "step": {"schedule": {"kind": "step", "milestones": [1], "gamma": 1e-6}}}
    for name, keys_ in schedules.items():
        run = ran(tmp_path / name, "standalone", train=train | keys_)
        adapt(run.folder, new_rows(tmp_path), rounds=1, out=tmp_path / f"{name}-out")
    assert same(parts_of(tmp_path / "constant-out"), parts_of(tmp_path / "step-out"))


@pytest.mark.parametrize("name", ["fedmrl", "fedmrl-ssl"])
def test_a_client_trains_for_as_many_rounds_as_those_of_the_run(name: str, tmp_path: Path) -> None:
    """Half the clients take part in each of four rounds; what the folder predicts has the reported accuracy."""
    settings = digits(algorithm={"name": name, "auxiliary": "mlp(hidden=(6,))", "rep_dim": 4})
    simulate(settings, out=tmp_path / "run")
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (30, 1, 16, 16), dtype=np.uint8), np.arange(30) % 10
    np.savez(tmp_path / "new.npz", x=x, y=y, classes=np.array([str(c) for c in range(10)]))
    found = adapt(tmp_path / "run", tmp_path / "new.npz", options={"layout": "NCHW"}, out=tmp_path / "fifth")
    assert found.rounds == 2
    dataset = load_dataset("npz", path=tmp_path / "new.npz", layout="NCHW")
    rows = torch.tensor(deal_own(settings, dataset, settings.clients.count).test(0))
    for predictor, scores in found.adapted.items():
        model = trained_model(tmp_path / "fifth", predictor=predictor)
        said = model(*model.preparation.of_rows(dataset.x[rows]))
        assert scores["accuracy"] == pytest.approx(float((said.argmax(1) == dataset.y[rows]).double().mean()))


def test_a_regression_is_in_the_unit_of_its_target(tmp_path: Path) -> None:
    run = ran(tmp_path, "fedmrl", "quantity")
    rows = [[*row[:-1], f"{1.1e5 + 40 * at:.1f}".replace(".", ",")] for at, row in enumerate(table_rows(30))]
    new = write_csv(tmp_path / "new.csv", rows)
    found = adapt(run.folder, new, rounds=6, out=tmp_path / "out")
    _, partition = own_rows_of_numbers(run, new)
    test, train = (np.array([1.1e5 + 40 * at for at in part]) for part in (partition.test(0), partition.train(0)))
    assert found.baseline["rmse"] == pytest.approx(float(np.sqrt(((test - train.mean()) ** 2).mean())))
    said = predicted(trained_model(tmp_path / "out"), read_rows_to_predict(tmp_path / "out", [new])).numpy()[:, 0]
    error = np.sqrt(((said[partition.test(0)] - test) ** 2).mean())
    assert found.adapted["mix-large"]["rmse"] == pytest.approx(float(error), rel=1e-5)
    assert found.alone["local"].keys() == found.baseline.keys() == {"rmse", "mae", "r2"}


def own_rows_of_numbers(run: Trained, path: Path) -> tuple[Dataset, Partition]:
    dataset = load_dataset("csv", path=path, task="regression", **TABLE)
    return dataset, deal_own(run.config, dataset, run.config.clients.count)


def test_rows_without_a_label_adapt_a_client_that_learns_alone_from_the_others(tmp_path: Path) -> None:
    """Catches a client alone that learns -1, and one that the run's algorithm trains on its labelled rows alone."""
    draws = np.random.default_rng(0)
    for name, sites in (("run", ["a", "b"]), ("new", ["c"])):
        rows = 30 * len(sites)
        y = np.where(np.arange(rows) % 3 == 0, np.arange(rows) % 2, -1)
        np.savez(tmp_path / f"{name}.npz", x=draws.standard_normal((rows, 2, 12)), y=y, groups=np.repeat(sites, 30))
    tables: dict[str, Any] = {
        "run": {"rounds": 1, "threads": 1, "driver": "sequential"},
        "data": {"dataset": "npz", "path": str(tmp_path / "run.npz"), "options": {"layout": "NCT", "unlabelled": True}},
        "partition": {"kind": "natural"},
        "clients": {"count": 2, "models": ["mlp(hidden=(9,))"]},
        "algorithm": {"name": "fedmrl-ssl", "auxiliary": "mlp(hidden=(8,))", "rep_dim": 4},
    }
    simulate(Config.parse(tables), out=tmp_path / "run")
    found = adapt(tmp_path / "run", tmp_path / "new.npz")
    assert (found.train_rows, found.test_rows) == (28, 2)
    assert list(found.adapted) == ["probe-large", "probe-small"]
    assert list(found.alone) == ["local"]


def test_columns_of_the_run_that_a_single_client_lacks(tmp_path: Path) -> None:
    """The column that names the hospital, and ignored columns; a column that is there keeps its meaning."""
    rows = [["north" if at % 2 else "south", *row] for at, row in enumerate(table_rows())]
    write_csv(tmp_path / "all.csv", rows, ("hospital", *HEADER))
    data = {"dataset": "csv", "path": str(tmp_path / "all.csv"), "options": {**TABLE, "group": "hospital"}}
    tables: dict[str, Any] = {
        "run": {"rounds": 1, "threads": 1, "driver": "sequential"},
        "clients": {"count": 2, "models": ["mlp(hidden=(9, 7))"]},
        "partition": {"kind": "natural"},
        "data": data,
        "train": {"clients": {"north": {"lr": 0.02}}},
        "algorithm": keys("fml"),
    }
    tables["clients"]["names"] = ["north", "south"]
    simulate(Config.parse(tables), out=tmp_path / "run")
    without = adapt(tmp_path / "run", new_rows(tmp_path))
    column = [["west", *row] for row in table_rows(90)[60:]]
    with_column = write_csv(tmp_path / "west.csv", column, ("hospital", *HEADER))
    assert adapt(tmp_path / "run", with_column) == without
    renamed = write_csv(tmp_path / "renamed.csv", column, ("hospital", *HEADER[:-1], "result"))
    assert adapt(tmp_path / "run", renamed, options={"label": "result"}) == without


@pytest.mark.parametrize(
    ("name", "more", "error", "text"),
    [
        ("fedmrl", {"model": "mlp(hidden=(3,))"}, ModelError, "rep"),
        ("fedproto", {"model": "mlp(hidden=(5,))"}, ModelError, "mlp"),
        ("fedavg", {"model": "mlp(hidden=(5,))"}, ModelError, "fedavg needs one architecture for all clients"),
        ("fedin", {"model": "mlp(hidden=(9, 7, 7))"}, PolyfedError, "mlp"),
        ("fedmrl", {"rounds": 0}, ConfigError, "rounds: got 0; expected at least 1"),
        ("fedmrl", {"capacity": 2.0}, ConfigError, r"capacity: got 2\.0"),
        ("fedmrl", {"options": {"lable": "x"}}, ConfigError, "lable"),
    ],
)
def test_what_cannot_adapt_is_refused_with_the_reason(
    name: str, more: dict[str, Any], error: type[PolyfedError], text: str, tmp_path: Path
) -> None:
    run, new = ran(tmp_path, name, run={"rounds": 1}), new_rows(tmp_path)
    with pytest.raises(error, match=text):
        adapt(run.folder, new, **more, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = ran(tmp_path, "fedmrl", run={"rounds": 1})
    for at, cell, text in (
        (2, "zz", "got 'zz' in column 'site'; the sites agreed on the categories a, b, c"),
        (5, "dead", "dead"),
    ):
        new = write_csv(tmp_path / "new.csv", [[*row[:at], cell, *row[at + 1 :]] for row in table_rows(30)])
        with pytest.raises(DataError, match=text):
            adapt(run.folder, new)
    with pytest.raises(DataError, match=r"expected a \.csv, \.parquet or \.npz file"):
        adapt(run.folder, tmp_path / "new.txt")
    lacking = write_csv(tmp_path / "new.csv", [[row[0], *row[2:]] for row in table_rows(30)], ("id", *HEADER[2:]))
    with pytest.raises(DataError, match="age"):
        adapt(run.folder, lacking)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(StorageError, match="choose another --out"):
        adapt(run.folder, new_rows(tmp_path), out=tmp_path / "out")
    (run.folder / "config.toml").write_text((run.folder / "config.toml").read_text().replace("0.05", "0.06"))
    with pytest.raises(CheckpointError, match="is not the configuration of the checkpoint"):
        adapt(run.folder, new_rows(tmp_path))


def test_the_command_and_the_result_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, new = ran(tmp_path, "fedmrl", run={"rounds": 1}), new_rows(tmp_path)
    monkeypatch.chdir(tmp_path)

    def polyfed(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    text = polyfed("adapt", run.folder, "--data", new, "--rounds", 2, "--option", "ignore=none")
    assert "fedmrl, mlp(hidden=(9, 7)): 24 training rows, 6 test rows, 2 rounds after round 1 of the run" in text
    for word in ("adapted", "single-small", "trained alone", "local", "majority class"):
        assert word in text
    folder = tmp_path / "runs" / "run-new"
    found = load_run(run.folder).adapt(new, rounds=2, out=tmp_path / "other")
    assert same(parts_of(folder), parts_of(tmp_path / "other"))
    told = json.loads((folder / "adapted.json").read_text())
    assert told["adapted"] == found.adapted
    assert (told["rounds"], told["round"], told["train_rows"]) == (2, 1, 24)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert [(one["way"], one["predictor"]) for one in found.records()][-2:] == [("alone", "local"), ("baseline", "")]
    assert polyfed("predict", folder, new).startswith("class,score ill,score well")
    polyfed("export", folder, "--out", tmp_path / "fifth.pt2")
    x = read_rows_to_predict(folder, [new]).inputs
    exported: Any = torch.export.load(tmp_path / "fifth.pt2").module()
    np.testing.assert_allclose(exported(*x).numpy(), found.trained_model()(*x).detach().numpy(), atol=1e-6)
    with pytest.raises(StorageError, match="give adapt a folder"):
        adapt(run.folder, new, rounds=1).trained_model()
