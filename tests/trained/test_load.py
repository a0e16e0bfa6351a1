"""A trained model says what the trainer said, for every kind of input, without the data."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import config as digits
from running import lines
from trained_runs import KINDS, Trained, inputs_of, trained

from polyfed.base.errors import CheckpointError, ConfigError, ModelError, RunDirError
from polyfed.base.types import Params
from polyfed.core.message import Message
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage.state_store import Store
from polyfed.trained.adapt import adapt
from polyfed.trained.assemble import Assembled, AssembledParts
from polyfed.trained.load import trained_model
from polyfed.trained.model import TrainedModel


class Update(Message):
    model: Params


def arrays(run: Trained, client: int) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in inputs_of(run, client).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_what_the_trainer_said(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind)
    given = {client: arrays(run, client) for client in (0, 1)}
    for path in tmp_path.glob("all.*"):
        path.unlink()  # nothing needs the data later
    for client, inputs in given.items():
        model = trained_model(run.folder, client)
        with torch.no_grad():
            found = model(*inputs)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), run.said(client), atol=1e-6, rtol=1e-9)
        one = model(*(value[:1] for value in inputs))
        np.testing.assert_allclose(one.numpy(), found.numpy()[:1], atol=1e-6, rtol=1e-9)


def test_all_four_predictors_of_fedmrl(tmp_path: Path) -> None:
    auxiliary = {"name": "fedmrl", "auxiliary": "mlp(hidden=(6,))", "rep_dim": 4}
    run = trained(tmp_path, "table", algorithm=auxiliary)
    names = trained_model(run.folder, 0).predictors
    assert names == ("mix-large", "single-large", "mix-small", "single-small")
    for name in names:
        model = trained_model(run.folder, 1, predictor=name)
        np.testing.assert_allclose(model(*arrays(run, 1)).numpy(), run.said(1, name), atol=1e-6)
    with pytest.raises(ConfigError, match="predictor: got 'mix-larg'; did you mean 'mix-large'"):
        trained_model(run.folder, 0, predictor="mix-larg")
    with pytest.raises(ModelError, match="the server of fedmrl has no model of its own; name a client"):
        trained_model(run.folder)
    with pytest.raises(ConfigError, match="fedmrl has no submodels of one model"):
        trained_model(run.folder, 0, capacity=0.5)


def test_what_takes_the_clients_data_is_kept(tmp_path: Path) -> None:
    keys = {"name": "fedapen", "auxiliary": "mlp(hidden=(6,))", "lr_lambda": 0.5, "holdout": 0.3}
    run = trained(tmp_path, "table", algorithm=keys, clients={"participation": 0.5})
    (tmp_path / "all.csv").rename(tmp_path / "gone.csv")
    weights = set()
    for client in (0, 1):
        model = trained_model(run.folder, client)
        weights.add(float(model.named_tensors()["lambda.weight"]))
        (tmp_path / "gone.csv").rename(tmp_path / "all.csv")
        inputs = arrays(run, client)
        (tmp_path / "all.csv").rename(tmp_path / "gone.csv")
        np.testing.assert_allclose(model(*inputs).numpy(), run.said(client), atol=1e-6)
    assert len(weights) == 2
    store = Store(run.folder / "assembled", (Assembled,), resident=False)
    own = {
        client: [
            f"{part}.{name}"
            for part, params in store.get(client).parts.items()
            for name, value in params.items()
            if isinstance(value, torch.Tensor)
        ]
        for client in (0, 1)
    }
    (trainee,) = lines(run.folder / "rounds.jsonl")[1]["cohort"]
    assert own[trainee] == ["lambda.weight"]  # its weights are in its state and in the server's
    assert len(own[1 - trainee]) > 1  # it has no state
    shutil.rmtree(run.folder / "assembled")
    with pytest.raises(CheckpointError, match=r"fedapen needs a client's data to predict .*resume the run"):
        trained_model(run.folder, 0)


def test_what_takes_the_clients_data_is_kept_of_the_best_round(tmp_path: Path) -> None:
    """Catches parts of the last round beside the states of the best, and class weights that need the data."""
    run = trained(
        tmp_path,
        "table",
        algorithm={"name": "fedapen", "auxiliary": "mlp(hidden=(6,))", "lr_lambda": 0.5, "holdout": 0.3},
        run={"rounds": 6, "eval_every": 1, "keep": "best", "monitor": "brier", "metrics": ["accuracy", "brier"]},
        data={"validation_fraction": 0.4},
        train={"lr": 3.0, "class_weights": "balanced"},
    )
    best = json.loads((run.folder / "summary.json").read_text())["selection"]["best"]["round"]
    assert best < 6, "the test needs another run"
    for client in (0, 1):
        model = trained_model(run.folder, client)
        assert model.about["round"] == best
        np.testing.assert_allclose(model(*arrays(run, client)).numpy(), run.said(client), atol=1e-6)


def test_parts_of_another_round_are_not_taken(tmp_path: Path) -> None:
    keys = {"name": "fedapen", "auxiliary": "mlp(hidden=(6,))"}
    one = trained(tmp_path / "one", "table", algorithm=keys)
    two = trained(tmp_path / "two", "table", algorithm=keys, run={"rounds": 2})
    shutil.rmtree(two.folder / "assembled")
    shutil.copytree(one.folder / "assembled", two.folder / "assembled")
    with pytest.raises(CheckpointError, match="has not kept"):
        trained_model(two.folder, 0)


@pytest.mark.parametrize("weights", [{}, {"class_weights": "balanced"}])
def test_no_file_is_kept_where_no_data_are_needed(weights: dict[str, str], tmp_path: Path) -> None:
    algorithm = {"name": "fedmrl", "auxiliary": "mlp(hidden=(6,))", "rep_dim": 4}
    run = trained(tmp_path, "table", algorithm=algorithm, train=weights)
    assert not (run.folder / "assembled").exists()


def test_the_servers_model_sees_rows_as_all_clients_together_do(tmp_path: Path) -> None:
    run = trained(tmp_path, "table", algorithm={"name": "fedavg"}, clients={"models": ["mlp(hidden=(7,))"]})
    whole = json.loads((run.folder / "summary.json").read_text())["accuracy"]["global"]["global"]
    model, right, count = trained_model(run.folder), 0, 0
    lines = [line.split(";")[-1] for line in (tmp_path / "all.csv").read_text().split()][1:]
    for client in (0, 1):
        found = model(*arrays(run, client)).argmax(1)
        labels = [model.classes.index(lines[row]) for row in run.test_rows(client)]
        right, count = right + int((found == torch.tensor(labels)).sum()), count + len(labels)
    assert right / count == pytest.approx(whole)
    own = trained_model(run.folder, 0)
    assert not torch.equal(own.preparation.mean, model.preparation.mean)
    with pytest.raises(ConfigError, match="'x'; the server has global"):
        trained_model(run.folder, predictor="x")


def test_any_size_of_fiarse(tmp_path: Path) -> None:
    simulate(
        digits(
            run={"rounds": 1, "predictions": True},
            clients={"capacities": [1.0, 0.25]},
            algorithm={"name": "fiarse", "unseen_capacities": [0.5]},
        ),
        out=tmp_path / "run",
    )
    x = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    by_name = {c: trained_model(tmp_path / "run", predictor=f"capacity {c:g}")(x) for c in (1.0, 0.5, 0.25)}
    for capacity, expected in by_name.items():
        torch.testing.assert_close(trained_model(tmp_path / "run", capacity=capacity)(x), expected)
    assert len({float(value[0, 0]) for value in by_name.values()}) == 3
    torch.testing.assert_close(trained_model(tmp_path / "run", 1)(x), by_name[0.25])
    torch.testing.assert_close(trained_model(tmp_path / "run", 1, capacity=0.5)(x), by_name[0.5])
    other = trained_model(tmp_path / "run", capacity=0.1)(x)
    assert not torch.allclose(other, by_name[0.25])
    for capacity in (0.0, 1.5):
        with pytest.raises(ConfigError, match="expected a number above 0 and at most 1"):
            trained_model(tmp_path / "run", capacity=capacity)


def test_clients_have_names_and_numbers(tmp_path: Path) -> None:
    run = trained(tmp_path, "table", clients={"names": ["north", "0"]})
    for given, client in (("north", 0), (0, 0), ("1", 1), ("0", 1), (1, 1)):  # a name goes before a number in digits
        assert trained_model(run.folder, given).about["client"] == client
    for given in ("south", 2, "-1"):
        with pytest.raises(ConfigError, match="expected a number from 0 to 1, or one of the names north, 0"):
            trained_model(run.folder, given if isinstance(given, str) else str(given))
    with pytest.raises(ConfigError, match="client: got '2'; expected a number from 0 to 1"):
        trained_model(run.folder, 2)


def test_tensors_have_the_names_of_the_network(tmp_path: Path) -> None:
    alone = trained_model(trained(tmp_path / "alone", "table").folder, 0)
    names = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "preprocessing.mean", "preprocessing.inverse"}
    assert set(alone.named_tensors()) == names
    keys = {"name": "fml", "auxiliary": "mlp(hidden=(6,))"}
    both = trained_model(trained(tmp_path / "both", "table", algorithm=keys).folder, 0)
    assert {"F.fc1.weight", "G.fc2.bias"} < set(both.named_tensors())


def test_a_model_is_a_module_like_any_other(tmp_path: Path) -> None:
    run = trained(tmp_path, "table", algorithm={"name": "fml", "auxiliary": "mlp(hidden=(6,))"})
    model, inputs = trained_model(run.folder, 0), arrays(run, 0)
    expected = model(*inputs)
    assert not model.train().training
    torch.testing.assert_close(model(*inputs), expected)
    assert not expected.requires_grad
    model.requires_grad_()
    model(*inputs).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("parts.F"))


def test_a_run_in_progress_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    with (run.folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunDirError, match="a run is in progress"):
            trained_model(run.folder, 0)
    with (run.folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # several may read
        trained_model(run.folder, 0)


def test_what_is_no_whole_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run"):
        trained_model(tmp_path, 0)
    run = trained(tmp_path, "table")
    text = (run.folder / "config.toml").read_text()
    (run.folder / "config.toml").write_text(text.replace("lr = 0.05", "lr = 0.06"))
    with pytest.raises(CheckpointError, match="not the configuration of the checkpoint"):
        trained_model(run.folder, 0)
    (run.folder / "config.toml").write_text(text)
    shutil.move(run.folder / "preprocessing.json", tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"has no preprocessing.json.*polyfed resume"):
        trained_model(run.folder, 0)
    resume(run.folder)
    assert (run.folder / "preprocessing.json").read_text() == (tmp_path / "there").read_text()
    (run.folder / "checkpoint" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        trained_model(run.folder, 0)


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"name": "heterofl"}, 0.6),
        ({"name": "fedrolex"}, None),
        ({"name": "fedrolex", "calibrate": True}, 0.6),
        ({"name": "depthfl"}, None),
        ({"name": "fjord", "widths": [0.25, 0.5]}, 0.01),
        ({"name": "scalefl", "exits": 2}, 0.3),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_any_size_of_a_network_with_batchnorm(keys: dict[str, Any], refused: float | None, tmp_path: Path) -> None:
    """Catches statistics that only the capacities of the run have, and an error of Python where there are none."""
    run = tmp_path / "run"
    capacities = [0.5, 0.25]
    simulate(
        digits(
            run={"rounds": 1}, algorithm=keys,
            clients={"capacities": capacities, "models": ["resnet8(width=4, norm=batch)"], "participation": 1.0},
        ),
        out=run,
    )  # fmt: skip
    x = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=x.repeat(4, 1, 1, 1).numpy(), y=np.arange(20) % 10, classes=np.arange(10).astype(str))
    torch.testing.assert_close(trained_model(run, capacity=0.25)(x), trained_model(run, 1)(x))
    for capacity in (0.3,) if refused != 0.3 else capacities:
        assert trained_model(run, capacity=capacity)(x).isfinite().all()
        assert adapt(run, rows, capacity=capacity, options={"layout": "NCHW"}).adapted
    if refused is not None:
        text = f"capacity {refused:g}"
        with pytest.raises(ModelError, match=text):
            trained_model(run, capacity=refused)
        with pytest.raises(ModelError, match=text):
            adapt(run, rows, capacity=refused, options={"layout": "NCHW"})


@pytest.mark.parametrize(
    ("keys", "largest", "refused"),
    [
        ({"name": "fiarse"}, "capacity 1", {}),
        (
            {"name": "fiarse-neuron"},
            "capacity 1",
            {0.0001: r"capacity 0\.0001 .* give at least that in clients\.capacities"},
        ),
        ({"name": "heterofl"}, "capacity 1", {}),
        ({"name": "fedrolex"}, "capacity 1", {}),
        (
            {"name": "scalefl", "exits": 2},
            "capacity 1",
            {c: f"nothing for capacity {c:g}; expected one of its clients': 1, 0.25" for c in (0.3, 0.0001)},
        ),
        (
            {"name": "fjord"},
            "width 1",
            {
                0.0001: r"capacity 0\.0001: the smallest width 0\.2 needs 0\.04; "
                r"add a width of at most 0\.01 to algorithm\.widths"
            },
        ),
        ({"name": "depthfl"}, "depth 3", {}),
    ],
    ids=lambda value: value.get("name", "") if isinstance(value, dict) else "",
)
def test_the_servers_largest_model_and_any_capacity(
    keys: dict[str, Any], largest: str, refused: dict[float, str], tmp_path: Path
) -> None:
    """Catches the smallest network as the server's own, and an error that names neither the capacity nor a way out."""
    run = tmp_path / "run"
    simulate(
        digits(
            run={"rounds": 1}, algorithm=keys,
            clients={"capacities": [1.0, 0.25], "models": ["resnet8(width=4, norm=batch)"], "participation": 1.0},
        ),
        out=run,
    )  # fmt: skip
    whole = trained_model(run)
    assert whole.about["server_model"] == largest

    def held(model: TrainedModel) -> int:
        return sum(int(value.count_nonzero()) for value in model.named_tensors().values())

    x = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(trained_model(run, capacity=1.0)(x), whole(x))
    for capacity in (0.25, 0.3, 0.0001):
        if capacity in refused:
            with pytest.raises(ModelError, match=refused[capacity]):
                trained_model(run, capacity=capacity)
        else:
            assert held(trained_model(run, capacity=capacity)) < held(whole)


def test_of_unlike_networks_the_server_exports_the_largest(tmp_path: Path) -> None:
    """Catches the first network of the configuration, which may be the smallest."""
    models = [f"in-resnet{depth}-small(width=4)" for depth in (10, 18, 14)]
    simulate(
        digits(
            run={"rounds": 1},
            algorithm={"name": "fedavg", "average": "layer"},
            clients={"models": models, "participation": 1.0},
        ),
        out=tmp_path / "run",
    )
    assert trained_model(tmp_path / "run").about["server_model"] == models[1]
    assert trained_model(tmp_path / "run", predictor=models[0]).about["server_model"] == models[0]


def test_kept_parts_do_not_fit_a_message_with_fewer_tensors(tmp_path: Path) -> None:
    """Catches an error of Python where a message lacks tensors that the kept parts have."""
    kept, whole = AssembledParts(tmp_path), Update({"a": torch.zeros(2), "b": torch.ones(2)})
    kept.begin()
    kept.put(0, 1, {"model": whole.model}, None, whole)
    kept.end(1)
    assert kept.get(0, 1, None, Update({"a": torch.zeros(2)})) is None
    found = kept.get(0, 1, None, whole)
    assert found is not None
    assert torch.equal(found["model"]["b"], torch.ones(2))
