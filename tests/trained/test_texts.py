"""`polyfed predict` of networks of text takes texts: the tokens are those of the training."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyfed.base.errors import ConfigError, DataError
from polyfed.config import Config
from polyfed.data.sources import load_dataset
from polyfed.simulation.simulate import simulate
from polyfed.trained.adapt import adapt
from polyfed.trained.export import description
from polyfed.trained.load import trained_model
from polyfed.trained.predict import predicted, predictions_csv, read_rows_to_predict

TITLES = ["Cats win", "Red dog", 'A "fast" car', "The dog, again"]
NETWORK = "bilstm(vocabulary=280, width=2, state=2)"


def run(folder: Path, dataset: str, path: Path) -> Path:
    """A run of one round on these texts."""
    config = Config.model_validate(
        {
            "algorithm": {"name": "fedavg"},
            "data": {"dataset": dataset, "path": str(path), "options": {"vocabulary": 280}},
            "clients": {"count": 1, "models": [NETWORK]},
            "run": {"rounds": 1, "eval_every": 1, "workers": 1},
        }
    )
    simulate(config, out=folder)
    return folder


def test_news_become_the_tokens_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tokenizer that is not kept, a text without its title, and a line end that is text.

    And a run that was killed before it wrote its config.toml, whose folder cannot be used again.
    """
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra text)")
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))
    place, lines = tmp_path / "ag", [f'{title.replace(chr(34), chr(34) * 2)}","over\\all news"' for title in TITLES]
    place.mkdir()
    for name in ("train.csv", "test.csv"):
        (place / name).write_text("".join(f'"{at + 1}","{line}\n' for at, line in enumerate(lines)))
    folder = run(tmp_path / "run", "agnews", place)
    read = load_dataset("agnews", path=place, vocabulary=280)
    new = tmp_path / "new.csv"
    new.write_text("id,title,description\n" + "".join(f'{at},"{line}\n' for at, line in enumerate(lines)))
    rows = read_rows_to_predict(folder, [new], ["id"])
    assert torch.equal(rows.inputs[0], read.x[:4])
    assert (folder / "tokenizer.json").read_text("utf-8") == read.tokenizer
    model = trained_model(folder)
    assert predictions_csv(model, rows).splitlines()[1].startswith("0,")
    assert description(model)["tokenizer"] == read.tokenizer
    killed = tmp_path / "killed"
    killed.mkdir()
    for file in folder.glob("*.*"):
        if file.name not in ("config.toml", "summary.json"):
            shutil.copy(file, killed)
    assert (run(killed, "agnews", place) / "summary.json").exists()
    new.write_text("text\nRed dog over all news\n")
    assert torch.equal(read_rows_to_predict(folder, [new]).inputs[0], read.x[1:2])
    with pytest.raises(ConfigError, match=r"keep: .*no column 'id'"):
        read_rows_to_predict(folder, [new], ["id"])
    for text, fault in (("body\na\n", "expected title and description, or text"), ("text\na,b\n", "has 2 cells")):
        new.write_text(text)
        with pytest.raises(DataError, match=fault):
            read_rows_to_predict(folder, [new])
    with pytest.raises(DataError, match=r"or one \.csv file of texts"):
        read_rows_to_predict(folder, [tmp_path / "new.txt"])


def test_texts_of_a_table_become_the_tokens_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches predictions by another tokenizer or of another column, and a new client that learns words of its own."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra text)")
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))
    texts = [f"{title} over\\all news, number {k}" for k in range(4) for title in TITLES]

    def write(name: str, **columns: list[str]) -> Path:
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([[*columns], *zip(*columns.values(), strict=True)])
        return tmp_path / name

    write("t.csv", site=[*"NNSS"] * 4, text=texts, topic=["cats", "dogs"] * 8)
    options = {"text": "text", "label": "topic", "group": "site", "vocabulary": 280, "length": 16}
    config = Config.model_validate(
        {
            "algorithm": {"name": "fedmrl", "auxiliary": NETWORK, "rep_dim": 2},
            "data": {"dataset": "csv", "path": str(tmp_path / "t.csv"), "options": options},
            "partition": {"kind": "natural"},
            "clients": {"count": 2, "models": ["text-transformer(vocabulary=280, width=4, heads=1)", NETWORK]},
            "run": {"rounds": 2, "eval_every": 2, "workers": 1},
        }
    )
    folder = simulate(config, out=tmp_path / "run") and tmp_path / "run"
    read = load_dataset("csv", path=tmp_path / "t.csv", **options)
    new = write("new.csv", title=["x", "y"], text=texts[1:3], id=["8", "9"])
    pq.write_table(pa.table({"text": texts[1:3]}), tmp_path / "new.parquet")
    rows = read_rows_to_predict(folder, [new], ["id", "text"])
    assert torch.equal(rows.inputs[0], read.x[1:3])
    assert rows.kept == {"id": ["8", "9"], "text": texts[1:3]}
    for client in (0, 1):
        model = trained_model(folder, client)
        scores = model(read.x[1:3])
        assert torch.equal(predicted(model, rows), scores)
        assert torch.equal(predicted(model, read_rows_to_predict(folder, [tmp_path / "new.parquet"])), scores)
        assert description(model)["tokenizer"] == read.tokenizer == (folder / "tokenizer.json").read_text("utf-8")
    with pytest.raises(ConfigError, match=r"keep: .*no column 'topic'"):
        read_rows_to_predict(folder, [new], ["topic"])
    for content, fault in (("txt\na\n", "lacks the column 'text'"), ("text,id\na,1\n,2\n", "line 3: the text 'text'")):
        new.write_text(content)
        with pytest.raises(DataError, match=fault):
            read_rows_to_predict(folder, [new])
    with pytest.raises(DataError, match=r"expected a \.csv or \.parquet file"):
        read_rows_to_predict(folder, [tmp_path / "new.npz"])
    own = write("own.csv", text=[f"a zebra, {k}" for k in range(8)], topic=["cats", "dogs"] * 4)
    adapt(folder, own, rounds=1, out=tmp_path / "fifth")
    assert (tmp_path / "fifth" / "tokenizer.json").read_text("utf-8") == read.tokenizer


def test_what_follows_a_text_of_leaf(tmp_path: Path) -> None:
    """Catches another vocabulary, and the first characters kept in place of the last."""

    def write(name: str, users: dict[str, dict[str, list[str]]]) -> Path:
        (tmp_path / name).write_text(json.dumps({"users": [*users], "user_data": users}))
        return tmp_path / name

    data = write("a.json", {"u": {"x": ["abc", "bca", "cab", "aab"], "y": ["a", "b", "c", "b"]}})
    folder = run(tmp_path / "run", "leaf", data)
    assert torch.equal(read_rows_to_predict(folder, [data]).inputs[0], load_dataset("leaf", path=data).x)
    rows = read_rows_to_predict(folder, [write("b.json", {"v": {"x": ["zzabz", "c"]}})])
    assert rows.kept == {"user": ["v", "v"]}
    letter = {name: at + 1 for at, name in enumerate(load_dataset("leaf", path=data).classes)}
    assert rows.inputs[0].tolist() == [[letter["a"], letter["b"], 1], [letter["c"], 0, 0]]
    assert len(predictions_csv(trained_model(folder), rows).splitlines()) == 3
    with pytest.raises(DataError, match=r"one \.json file in LEAF's layout"):
        read_rows_to_predict(folder, [tmp_path / "b.csv"])
