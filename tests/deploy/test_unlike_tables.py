"""Sites whose tables have unlike columns: private networks read their own, what is shared reads the common ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_toy import Run, kept, same, with_tables

from polyfed import simulate
from polyfed.algorithms.fml import FML
from polyfed.base.errors import ConfigError, DataError, ModelError
from polyfed.config import Config, load_algorithm
from polyfed.data.readers.new_rows import NewRows, read_new_table
from polyfed.deploy.client.local_setup import LocalSetup
from polyfed.models.catalogue import ModelSpec
from polyfed.rounds.federation import columns_read, input_networks, prepare, unread_columns
from polyfed.trained.load import trained_model
from polyfed.trained.predict import read_rows_to_predict

#: The columns of each site; all have age and sex.
SITES = ("age,bmi,sex,ill", "sex,ward,lab a,age,lab b,ill", "ill,age,sex")
AGREED = (
    'data.agreed.columns=[{name="age"},{name="sex",categories=["f","m"]},{name="bmi"},{name="lab a"},{name="lab b"},'
    '{name="ward",categories=["a","b","c"]}]'
)
MODELS = (
    "clients.models=[\"mlp(hidden=(6,), columns=('age','sex','bmi'))\", "
    "\"mlp(hidden=(5,4), columns=('age','sex','lab *','ward'))\", \"mlp(hidden=(7,), columns=('sex','age'))\"]"
)
FEDMRL = ("algorithm.name=fedmrl", "algorithm.auxiliary=mlp(hidden=(4,), columns=('age','sex'))", "algorithm.rep_dim=3")


def tables() -> list[str]:
    draws, texts = np.random.default_rng(0), list[str]()
    for header in SITES:
        lines = [header]
        for row in range(24):
            cells = {"sex": "fm"[draws.integers(2)], "ward": "abc"[draws.integers(3)], "ill": "yn"[row % 2]}
            values = (cells.get(name, f"{draws.normal():.3f}") for name in header.split(","))
            lines.append(",".join(values))
        texts.append("\n".join(lines) + "\n")
    return texts


def study(folder: Path, *more: str) -> tuple[Config, Run]:
    return with_tables(folder, tables(), 'data.options={label="ill", union=true}', AGREED, *more)


def test_a_deployment_of_unlike_tables_computes_what_the_simulation_does(tmp_path: Path) -> None:
    """Catches columns at other positions than agreed, a private network with the others' columns, and a missing cell
    that is no missing cell at the site alone."""
    settings, run = study(tmp_path, MODELS, *FEDMRL, "run.rounds=1", "run.eval_every=1")
    run.serve()
    simulate(settings, out=tmp_path / "simulated")
    private, known = run.private(), kept(tmp_path / "simulated", settings)
    assert all(same(private[client], known[client]) for client in range(3))
    first = [tuple(private[client]["0"].shape) for client in range(3)]
    assert first == [(6, 4), (5, 8), (7, 3)]  # sex is two numbers, ward three
    # New rows of a site have its own columns alone.
    (tmp_path / "new.csv").write_text("bmi,sex,age\n0.5,m,1.0\n0.5,f,\n")
    folder = tmp_path / "simulated"
    model = trained_model(folder, client=0)
    rows = read_rows_to_predict(folder, [tmp_path / "new.csv"], reads=model.reads)
    found = model(*rows.inputs)
    assert found.shape == (2, 2)
    assert bool(found.isfinite().all())
    assert not torch.equal(found[0], found[1])
    assert model.reads == ("age", "sex", "bmi")
    small, large = ModelSpec.parse("mlp(columns=('age',))"), settings.clients.model(1)
    server = input_networks(FML(auxiliary=str(small)), (large,), server=True)
    assert [columns_read(spec, (("age", 1), ("sex", 2))) for spec in server] == [["age"]]


def test_new_rows_have_the_columns_that_the_networks_read(tmp_path: Path) -> None:
    """Catches a misspelt column that is taken for missing, and a note on a column that is not read."""
    columns, new = {"age": None, "sex": ("f", "m"), "lab a": None, "ward": ("a", "b")}, tmp_path / "new.csv"

    def read(text: str, *keep: str) -> NewRows:
        new.write_text(text)
        return read_new_table(new, columns, {"union": True}, keep=keep, reads=("age", "sex"))

    rows = read("ward,sex,age,lab a\nz,m,3,high\n", "ward")
    assert (rows.unknown, rows.kept["ward"]) == ({}, ["z"])
    torch.testing.assert_close(rows.inputs[0], torch.tensor([[3.0, torch.nan]]).double(), equal_nan=True)
    assert rows.inputs[1].tolist() == [[1, -1]]
    for text in ("sex,AGE\nm,3\n", "id\n7\n"):
        with pytest.raises(DataError, match=r"lacks the columns? .*'age'.*model reads: age, sex; the file has"):
            read(text)
    with pytest.raises(ConfigError, match=r"no column 'nope'; it has sex, age$"):
        read("sex,age\nm,3\n", "nope")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (
            (MODELS, *FEDMRL[:1], "algorithm.auxiliary=mlp(hidden=(4,))", FEDMRL[2]),
            "client 0: .*reads 'lab a', 'lab b', 'ward'",
        ),
        (('clients.models=["mlp(hidden=(4,))"]',), "client 0: network 'mlp.*reads 'lab a', 'lab b', 'ward'"),
        (("clients.models=[\"mlp(columns=('age','bim'))\"]",), "names 'bim', which is no column; did you mean 'bmi'"),
    ],
)
def test_a_network_cannot_read_what_a_client_lacks(tmp_path: Path, keys: tuple[str, ...], fault: str) -> None:
    """Catches a shared network that is trained on columns that most clients lack, as if these were zeros."""
    settings, _ = study(tmp_path, *keys)
    with pytest.raises(ModelError, match=fault):
        prepare(settings)


def test_own_networks_read_what_they_choose() -> None:
    """Catches a class of the user's own, that is refused for a column without values."""
    rows, columns = torch.tensor([[1.0, float("nan")]]), (("age", 1), ("bmi", 1))
    algorithm = load_algorithm("standalone", {})
    assert "reads 'bmi'" in (unread_columns(algorithm, ModelSpec.parse("mlp"), rows, columns) or "")
    for own in ("nets:Net", "nets:Net(columns=('age',))"):
        assert unread_columns(algorithm, ModelSpec.parse(own), rows, columns) is None


def test_the_common_columns_are_enough_for_any_algorithm(tmp_path: Path) -> None:
    """Catches a site whose network reads what only other sites have, and a common network that nobody may have."""
    settings, run = study(tmp_path, "clients.models=[\"mlp(hidden=(4,), columns=('age','sex'))\"]")
    prepare(settings)
    wider = settings.replace("clients", models=["mlp(hidden=(4,), columns=('age','sex','lab a'))"])
    LocalSetup.of(run.memory.settings[101], wider).check_columns()
    with pytest.raises(ModelError, match="reads 'lab a', of which its training rows have no value"):
        LocalSetup.of(run.memory.settings[100], wider).check_columns()
