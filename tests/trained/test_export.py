"""Exports say what the trainer said, read back by the runtimes that they are for, without polyfed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_nets import NOT_ONNX, SUPPORTED
from safetensors import safe_open
from trained_runs import KINDS, inputs_of, trained

from polyfed.base.errors import ConfigError, ModelError
from polyfed.testing.read_back import read_back
from polyfed.trained.export import description, export
from polyfed.trained.load import trained_model


@pytest.mark.parametrize("kind", KINDS)
def test_exports_say_what_the_trainer_said(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind)
    cases = []
    for client, form in ((0, "pt2"), (1, "pt2"), (1, "onnx")):
        file = tmp_path / f"{client}.{form}"
        export(trained_model(run.folder, client), file, form)
        assert [path.name for path in tmp_path.glob(f"{client}.{form}*")] == [file.name], "one file"
        cases.append((file, inputs_of(run, client)))
    cases.append((cases[-1][0], {name: value[:1] for name, value in cases[-1][1].items()}))  # a batch of one
    found = read_back(cases, tmp_path)
    for (output, _), client in zip(found, (0, 1, 1), strict=False):
        np.testing.assert_allclose(output, run.said(client), atol=1e-5, rtol=1e-7)
    np.testing.assert_allclose(found[3][0], run.said(1)[:1], atol=1e-5, rtol=1e-7)
    assert found[1][1] == found[2][1]


def test_the_description_says_what_goes_in_and_out(tmp_path: Path) -> None:
    run = trained(tmp_path, "table", clients={"names": ["north", "south"]})
    about = description(trained_model(run.folder, "south"))
    assert about["inputs"] == [
        {"name": "numbers", "type": "float64", "shape": ["batch", 2], "columns": ["age", "dose"]},
        {
            "name": "categories",
            "type": "int64",
            "shape": ["batch", 2],
            "columns": ["site", "smoker"],
            "categories": [["a", "b", "c"], ["0", "1", "2"]],
        },
    ]
    assert about["output"] == {"name": "probabilities", "type": "float64", "shape": ["batch", 2]}
    assert about["classes"] == ["ill", "well"]
    assert (about["algorithm"], about["predictor"], about["client"], about["name"]) == (
        "standalone",
        "local",
        1,
        "south",
    )
    example = about["example"]
    assert None in example["inputs"]["numbers"][1]
    assert -1 in example["inputs"]["categories"][1]
    assert description(trained_model(run.folder, "south")) == about, "nothing in it is drawn anew"


def test_an_unknown_code_counts_as_missing(tmp_path: Path) -> None:
    model = trained_model(trained(tmp_path, "table").folder, 0)
    numbers = torch.tensor([[60.0, 1200.0]]).double()
    missing, beyond = (model(numbers, torch.tensor([[code, 1]])) for code in (-1, 3))
    torch.testing.assert_close(missing, beyond, rtol=0, atol=0)
    assert not torch.equal(missing, model(numbers, torch.tensor([[0, 1]])))


def test_safetensors_hold_weights_by_name_and_their_description(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    model = trained_model(run.folder, 0)
    export(model, tmp_path / "north.safetensors", "safetensors")
    with safe_open(tmp_path / "north.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["polyfed.json"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert about == description(model)
    assert about["networks"]["model"]["model"] == "mlp(hidden=(7,))"
    assert "Linear" in about["networks"]["model"]["layers"]
    # By hand: preprocessing, then the network.
    given = inputs_of(run, 0)
    sites, smokers = (np.where(code[:, None] < 0, np.nan, np.eye(3)[code]) for code in given["categories"].T)
    x = np.concatenate([given["numbers"][:, :1], sites, given["numbers"][:, 1:], smokers], axis=1)
    mean, inverse = held["preprocessing.mean"].numpy(), held["preprocessing.inverse"].numpy()
    x = torch.tensor((np.where(np.isnan(x), mean, x) - mean) * inverse).float()
    h = (x @ held["fc1.weight"].T + held["fc1.bias"]).relu()
    scores = (h @ held["fc2.weight"].T + held["fc2.bias"]).softmax(1)
    np.testing.assert_allclose(scores.numpy(), run.said(0), atol=1e-5)


@pytest.mark.parametrize("name", SUPPORTED)
def test_layers_that_people_use_can_be_exported(name: str, tmp_path: Path) -> None:
    kind = "series" if name in ("Recurrent", "LongShort", "Attention") else "table"
    run = trained(tmp_path, kind, clients={"models": [f"export_nets:{name}"]})
    for form in ("pt2", "onnx"):
        export(trained_model(run.folder, 0), tmp_path / f"0.{form}", form)
    for output, _ in read_back([(tmp_path / f"0.{form}", inputs_of(run, 0)) for form in ("pt2", "onnx")], tmp_path):
        np.testing.assert_allclose(output, run.said(0), atol=1e-5)


@pytest.mark.parametrize(("name", "reason"), NOT_ONNX.items())
def test_what_has_no_form_in_onnx_is_named(name: str, reason: str, tmp_path: Path) -> None:
    model = trained_model(trained(tmp_path, "table", clients={"models": [f"export_nets:{name}"]}).folder, 0)
    with pytest.raises(ModelError, match=reason) as caught:
        export(model, tmp_path / "0.onnx", "onnx")
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "0.onnx").exists()
    assert torch.isfinite(model(*model.example())).all(), "the model is as it was"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(trained(tmp_path, "table").folder, 0)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript .*pip install 'polyfed\[export\]'"):
        export(model, tmp_path / "0.onnx", "onnx")


def test_an_export_changes_nothing(tmp_path: Path) -> None:
    model = trained_model(trained(tmp_path, "table").folder, 0)
    before, given = {k: v.clone() for k, v in model.state_dict().items()}, model.example()
    expected = model(*given)
    for form in ("pt2", "onnx", "safetensors"):
        export(model, tmp_path / f"0.{form}", form)
    torch.testing.assert_close(model(*given), expected, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
