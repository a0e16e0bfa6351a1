"""`polyfed predict` and `export`: new files are read and scaled as those of the training."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from running import config as digits
from trained_runs import HEADER, inputs_of, table_rows, trained, write_csv
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError, DataError, ModelError
from polyfed.cli import app
from polyfed.data.readers.new_rows import read_new_array
from polyfed.simulation.simulate import simulate
from polyfed.trained.load import trained_model
from polyfed.trained.predict import predictions_csv, read_rows_to_predict


def polyfed(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code: int, *words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr


def table(text: str) -> tuple[list[str], list[list[str]]]:
    head, *rows = csv.reader(io.StringIO(text))
    return head, rows


def test_a_table_is_read_by_names_in_any_order(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    rows = table_rows()
    chosen = [rows[row] for row in run.test_rows(1)]
    # Neither id nor outcome, other columns between, another order.
    new = write_csv(tmp_path / "new.csv", [[row[4], "x", row[3], row[1], row[2]] for row in chosen])
    lines = new.read_text().splitlines()
    new.write_text("\n".join(["smoker;note;dose;age;site", *lines[1:]]))
    head, found = table(polyfed("predict", run.folder, new, "--client", "1"))
    assert head == ["class", "score ill", "score well"]
    np.testing.assert_allclose(np.array([line[1:] for line in found], float), run.said(1), atol=1e-6)
    assert [line[0] for line in found] == [("ill", "well")[at] for at in run.said(1).argmax(1)]
    out = tmp_path / "scores.csv"
    polyfed(
        "predict",
        run.folder,
        write_csv(tmp_path / "all2.csv", chosen),
        "--client",
        1,
        "--out",
        out,
        "--keep",
        "id",
        "--keep",
        "age",
    )
    head, found = table(out.read_text())
    assert head[:3] == ["id", "age", "class"]
    assert [line[:2] for line in found] == [row[:2] for row in chosen]


def test_parquet_has_types(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    given = inputs_of(run, 0)
    levels = [["a", "b", "c"], ["0", "1", "2"]]
    texts = [
        [None if code < 0 else known[code] for code in column]
        for known, column in zip(levels, given["categories"].T, strict=True)
    ]
    columns = {"dose": given["numbers"][:, 1], "age": given["numbers"][:, 0], "site": texts[0], "smoker": texts[1]}
    pq.write_table(pa.table(columns), tmp_path / "new.parquet")
    _, found = table(polyfed("predict", run.folder, tmp_path / "new.parquet", "--client", "0"))
    np.testing.assert_allclose(np.array([line[1:] for line in found], float), run.said(0), atol=1e-6)


def test_an_unknown_category_counts_as_missing_and_is_reported(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    row = ["p", "60,5", "a", "1200", "1", ""]
    strange, gone, known = (
        write_csv(tmp_path / f"{len(c)}.csv", [[*row[:2], c, *row[3:]]]) for c in ("zz", "n/a", "a")
    )
    result = CliRunner().invoke(app, ["predict", str(run.folder), str(strange), "--client", "0"])
    assert "site: 1 cell with a category that training did not know, such as 'zz'; taken for missing" in result.stderr
    missing = CliRunner().invoke(app, ["predict", str(run.folder), str(gone), "--client", "0"])
    assert (missing.stderr, missing.stdout) == ("", result.stdout)
    assert polyfed("predict", run.folder, known, "--client", "0") != result.stdout


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    names = [name for name in HEADER if name not in ("dose", "site")]
    new = write_csv(tmp_path / "new.csv", [["1"] * 4], tuple(names))
    text = refused(3, "predict", run.folder, new, "--client", "0")
    assert "lacks the columns 'site', 'dose'" in text
    assert "age, site, dose, smoker" in text
    assert "may have empty cells" in text
    new = write_csv(tmp_path / "new.csv", [["p", "old", "a", "1", "1", ""]])
    text = refused(3, "predict", run.folder, new, "--client", "0")
    assert "new.csv, line 2: got 'old' in column 'age'; expected a number" in text
    new = write_csv(tmp_path / "new.csv", [["p", "6,1", "a", "1", "1", ""]])
    assert "keep: " in refused(2, "predict", run.folder, new, "--client", "0", "--keep", "idd")
    assert "did you mean 'id'" in refused(2, "predict", run.folder, new, "--client", "0", "--keep", "idd")
    assert "expected one table" in refused(3, "predict", run.folder, new, new, "--client", "0")
    assert "there is no such file" in refused(3, "predict", run.folder, tmp_path / "no.csv", "--client", "0")
    assert "another ending" in refused(3, "predict", run.folder, run.folder / "lock", "--client", "0")
    assert "client: got 'x'" in refused(2, "predict", run.folder, new, "--client", "x")


def test_a_table_of_a_single_column(tmp_path: Path) -> None:
    rows = [[row[1] if row[1][:1].isdigit() else "50,0", row[-1]] for row in table_rows()]
    data = {"options": {"delimiter": ";", "decimal": ","}}
    run = trained(
        tmp_path, "table", data={**data, "path": str(write_csv(tmp_path / "two.csv", rows, ("age", "outcome")))}
    )
    new = write_csv(tmp_path / "new.csv", [rows[row][:1] for row in run.test_rows(0)], ("age",))
    _, found = table(polyfed("predict", run.folder, new, "--client", "0"))
    np.testing.assert_allclose(np.array([line[1:] for line in found], float), run.said(0), atol=1e-6)


def test_a_table_without_names_goes_by_place(tmp_path: Path) -> None:
    run = trained(tmp_path, "headerless")
    new = write_csv(tmp_path / "new.csv", [table_rows()[row][1:-1] for row in run.test_rows(0)], None)
    _, found = table(polyfed("predict", run.folder, new, "--client", "0"))
    np.testing.assert_allclose(np.array([line[1:] for line in found], float), run.said(0), atol=1e-6)


def test_a_regression_predicts_in_the_unit_of_its_target(tmp_path: Path) -> None:
    run = trained(tmp_path, "quantity")
    new = write_csv(tmp_path / "new.csv", [table_rows()[row] for row in run.test_rows(0)])
    head, found = table(polyfed("predict", run.folder, new, "--client", "0"))
    assert head == ["prediction"]
    np.testing.assert_allclose(np.array(found, float), run.said(0), rtol=1e-9)
    assert 5e4 < float(found[0][0]) < 5e5


@pytest.mark.parametrize("kind", ["numbers", "floats", "series", "channels-first", "tokens"])
def test_arrays(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind)
    (x,) = inputs_of(run, 0).values()
    np.savez(tmp_path / "new.npz", x=x, y=np.zeros(len(x)))
    np.save(tmp_path / "new.npy", x)
    model = trained_model(run.folder, 0)
    for name in ("new.npz", "new.npy"):
        _, found = table(predictions_csv(model, read_rows_to_predict(run.folder, [tmp_path / name])))
        np.testing.assert_allclose(np.array([line[1:] for line in found], float), run.said(0), atol=1e-6)
    np.save(tmp_path / "new.npy", x[:, 1:] if kind != "floats" else x[:, :, 1:])
    with pytest.raises(DataError, match=r"new.npy: x has shape .*; expected .* of shape \('N', "):
        read_rows_to_predict(run.folder, [tmp_path / "new.npy"])
    with pytest.raises(DataError, match=r"expected one .npz file"):
        read_rows_to_predict(run.folder, [tmp_path / "new.csv"])
    with pytest.raises(DataError, match="which has no columns"):
        read_rows_to_predict(run.folder, [tmp_path / "new.npy"], ["id"])
    np.savez(tmp_path / "new.npz", rows=x)
    with pytest.raises(DataError, match="holds the arrays rows; expected x"):
        read_rows_to_predict(run.folder, [tmp_path / "new.npz"])
    if kind == "tokens":
        np.save(tmp_path / "new.npy", np.where(x == x.max(), 10**6, x))
        with pytest.raises(ModelError, match=r"a prediction of tokens from \d+ to 1000000: its network fails"):
            predictions_csv(model, read_rows_to_predict(run.folder, [tmp_path / "new.npy"]))
    if kind in ("numbers", "floats"):
        np.save(tmp_path / "new.npy", np.full_like(x, np.inf))
        with pytest.raises(DataError, match=r"infinite number|not finite"):
            read_rows_to_predict(run.folder, [tmp_path / "new.npy"])


def test_arrays_of_pictures_are_resized_as_in_training(tmp_path: Path) -> None:
    run = trained(tmp_path, "pictures")
    with np.load(tmp_path / "all.npz") as arrays:
        x = arrays["x"][run.test_rows(0)]
    np.save(tmp_path / "new.npy", x)
    _, found = table(polyfed("predict", run.folder, tmp_path / "new.npy", "--client", "0"))
    np.testing.assert_allclose(np.array([line[1:] for line in found], float), run.said(0), atol=1e-6)
    np.save(tmp_path / "new.npy", x.astype(float))
    with pytest.raises(DataError, match="expected bytes"):
        read_rows_to_predict(run.folder, [tmp_path / "new.npy"])


def test_channels_may_be_last_where_no_layout_was_given(tmp_path: Path) -> None:
    """Catches images of MedMNIST's layout that a model trained on them refuses."""
    first = np.arange(2 * 3 * 5 * 4, dtype=np.uint8).reshape(2, 3, 5, 4)
    np.save(tmp_path / "first.npy", first)
    np.save(tmp_path / "last.npy", first.transpose(0, 2, 3, 1))
    for name in ("first.npy", "last.npy"):
        (found,) = read_new_array(tmp_path / name, "image", (3, 5, 4), torch.uint8).inputs
        assert found.tolist() == first.tolist()
    with pytest.raises(DataError, match="expected bytes"):
        read_new_array(tmp_path / "last.npy", "image", (3, 5, 4), torch.uint8, layout="NCHW")


def test_image_files_and_folders(tmp_path: Path) -> None:
    simulate(digits(run={"rounds": 1}), out=tmp_path / "run")
    model = trained_model(tmp_path / "run", 0)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 16, 16), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{number}.png")
    (tmp_path / "more").mkdir()
    Image.fromarray(pixels[2]).resize((8, 8)).save(tmp_path / "more" / "small.png")
    head, found = table(
        polyfed("predict", tmp_path / "run", tmp_path / "1.png", tmp_path / "0.png", tmp_path / "more", "--client", 0)
    )
    assert head[:3] == ["file", "class", "score 0"]
    assert [Path(line[0]).name for line in found] == ["1.png", "0.png", "small.png"]
    expected = model(torch.from_numpy(pixels[[1, 0]][:, None]))
    np.testing.assert_allclose(np.array([line[2:] for line in found[:2]], float), expected.numpy(), atol=1e-12)
    Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"colour.png has 3 channels of 16x16 pixels; expected 1 channel of 16x16"):
        read_rows_to_predict(tmp_path / "run", [tmp_path / "colour.png"])
    for wrong, text in ((["1.png", "1.png"], "named twice"), (["no.png"], "no such file")):
        with pytest.raises(DataError, match=text):
            read_rows_to_predict(tmp_path / "run", [tmp_path / name for name in wrong])


def test_the_command_export(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    out = tmp_path / "north.pt2"
    assert "local in " in polyfed("export", run.folder, "--client", "1", "--out", out)
    assert "exists already" in refused(9, "export", run.folder, "--client", "1", "--out", out)
    model = torch.export.load(out).module()
    given = [torch.from_numpy(value) for value in inputs_of(run, 1).values()]
    np.testing.assert_allclose(model(*given).numpy(), run.said(1), atol=1e-5)
    polyfed("export", run.folder, "--client", "1", "--format", "safetensors", "--out", tmp_path / "w.safetensors")
    assert "name a client" in refused(4, "export", run.folder, "--out", tmp_path / "no.pt2")
    polyfed("export", run.folder, "--client", "1", "--out", tmp_path / "v.safetensors")  # the ending says the format
    assert (tmp_path / "v.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    assert "ends in pt2, onnx, safetensors" in refused(
        2, "export", run.folder, "--client", "1", "--out", tmp_path / "x"
    )
    assert not (tmp_path / "no.pt2").exists()


def test_a_column_to_keep_must_be_there(tmp_path: Path) -> None:
    run = trained(tmp_path, "table")
    with pytest.raises(ConfigError, match=r"keep: .* has no column 'ID'"):
        read_rows_to_predict(run.folder, [tmp_path / "all.csv"], ["ID"])
