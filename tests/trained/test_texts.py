"""`polyfed predict` of networks of text takes texts: the tokens are those of the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polyfed.base.errors import ConfigError, DataError
from polyfed.config import Config
from polyfed.data.sources import load_dataset
from polyfed.simulation.simulate import simulate
from polyfed.trained.export import description
from polyfed.trained.load import trained_model
from polyfed.trained.predict import predictions_csv, read_rows_to_predict

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
    """Catches a tokenizer that is not kept, a text without its title, and a line end that is text."""
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
