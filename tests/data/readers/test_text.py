"""AG News, LEAF's layout and tables of texts: texts become tokens, by what the training rows say alone."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import real_data
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError, DataError
from polyfed.cli import app
from polyfed.config import Config
from polyfed.data.client import ClientData
from polyfed.data.conform import conform, schema_of
from polyfed.data.dataset import Dataset
from polyfed.data.doubts import doubts
from polyfed.data.readers import tokenizer
from polyfed.data.readers.new_rows import read_new_leaf
from polyfed.data.schema import Schema
from polyfed.data.sources import file_digests, load_dataset
from polyfed.report.columns import summary

TRAIN = ["the red cat", "the red dog", "a fast\\red \\$car", "the cat [PAD]and\\the dog"]  # with line ends of the files
TEST = ["the zebra, quickly", "the cat"]


def agnews(folder: Path, *, labels: str = "1 2 3 4") -> Path:
    folder.mkdir()
    for file, texts in (("train.csv", TRAIN), ("test.csv", TEST), ("train_extra_joined.csv", ["yellow yellow yellow"])):
        lines = [f'"{k % 4 + 1}","{text.split()[0]}","{" ".join(text.split()[1:])}"' for k, text in enumerate(texts)]
        (folder / file).write_text("\n".join(lines) + "\n")
    (folder / "train_noisy_labels.txt").write_text(labels.replace(" ", "\n") + "\n")
    return folder


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra text)")


def read(tmp_path: Path, name: str = "agnews", **options: Any) -> Any:
    place = tmp_path / "csv"
    return load_dataset(
        name, path=place if place.exists() else agnews(place), cache=tmp_path / "cache",
        **{"vocabulary": 280, "length": 12, **options},
    )  # fmt: skip


def test_title_and_description_become_tokens(package: Any, tmp_path: Path) -> None:
    """Catches a tokenizer that learns from test rows, texts without their titles, and padding that is not 0."""
    data = read(tmp_path, vocabulary=400)  # room for every piece of the training rows, and more
    assert (data.kind, tuple(data.x.shape), data.bucket) == ("tokens", (6, 12), 16)
    assert data.y.tolist() == [0, 1, 2, 3, 0, 1]
    assert data.test_rows.tolist() == [4, 5]
    assert data.classes == ("World", "Sports", "Business", "Sci/Tech")
    (kept,) = (tmp_path / "cache" / "decoded").glob("tokenizer-*.json")
    made = package.Tokenizer.from_file(str(kept))
    vocabulary = made.get_vocab()
    assert "Ġred" in vocabulary
    assert not [piece for piece in vocabulary if "ze" in piece or "qu" in piece]
    assert made.decode([t for t in data.x[2].tolist() if t]) == " a fast red $car"
    whole = [t for t in read(tmp_path, vocabulary=400, length=30).x[3].tolist() if t]
    assert made.decode(whole) == " the cat [pad]and the dog"  # a name of padding in a text is text
    assert {*data.x[:, 0].tolist()} == {1}  # the start, by which RoBERTa classifies
    assert made.decode([t for t in data.x[4].tolist() if t]).startswith(" the zeb")  # cut at 12 tokens
    assert data.x[0].tolist()[-1] == 0
    assert read(tmp_path, vocabulary=400, length=3).x.tolist() == data.x[:, :3].tolist()


def test_sites_agree_on_the_tokenizer(package: Any, tmp_path: Path) -> None:
    """Catches token 300 that is one word at a site and another at the next, whose tokenizer learnt from other rows.

    And tokens that get other numbers as classes do, where classes are no tokens.
    """
    first, length = (schema_of(read(tmp_path, length=length)) for length in (12, 3))
    other = read(tmp_path, vocabulary=270)
    assert first == length
    assert first.digests("s")["form"] != schema_of(other).digests("s")["form"]
    with pytest.raises(DataError, match=r"form 'tokens of .*', where the others have 'tokens of "):
        conform(other, first)
    own = read(tmp_path)
    turned = conform(own, Schema(classes=own.classes[::-1]))
    assert torch.equal(turned.x, own.x)
    assert torch.equal(turned.y, own.num_classes - 1 - own.y)


def test_what_is_kept_needs_no_package(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that other texts, or another vocabulary, would be read from."""
    first = read(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert read(tmp_path).digest == first.digest
    with pytest.raises(DataError, match=r"pip install 'polyfed\[text\]'"):
        read(tmp_path, vocabulary=270)
    monkeypatch.undo()
    assert read(tmp_path, vocabulary=270).digest != first.digest
    assert int(read(tmp_path, vocabulary=270).x.max()) < int(first.x.max()) < 280
    made = tokenizer.learnt(TRAIN, 280, tmp_path)
    (kept,) = tmp_path.glob("tokenizer-*.json")
    kept.write_text("{")
    assert tokenizer.learnt(TRAIN, 280, tmp_path) == made == kept.read_text("utf-8")  # a damaged file is made anew


def test_the_named_variants(package: Any, tmp_path: Path) -> None:
    """Catches labels of people in the test, and further rows that test."""
    place = agnews(tmp_path / "csv", labels="2 2 2 1")
    people = load_dataset("agnews-noisy", path=place, cache=tmp_path, length=8)
    assert people.y.tolist() == [1, 1, 1, 0, 0, 1]
    more = load_dataset("agnews-extra", path=place, cache=tmp_path, length=8)
    assert (len(more), more.test_rows.tolist()) == (7, [5, 6])  # type: ignore[union-attr]
    assert set(file_digests("agnews-noisy", path=place)) == {"train.csv", "test.csv", "train_noisy_labels.txt"}
    (place / "train_noisy_labels.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match="holds 2 labels; expected one from 1 to 4 for each of the 4 rows"):
        load_dataset("agnews-noisy", path=place, cache=tmp_path, length=8)


def test_a_pretrained_tokenizer_whose_padding_is_another_number(package: Any, tmp_path: Path) -> None:
    """Catches <s> of RoBERTa taken for padding; the network puts the two numbers back in place."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "the": 4, "cat": 5}
    made = package.Tokenizer(package.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = package.pre_tokenizers.Whitespace()
    made.post_processor = package.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    made.save(str(tmp_path / "tokenizer.json"))
    data = read(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), length=5)
    assert data.x[5].tolist() == [1, 4, 5, 2, 0]
    assert data.x[0].tolist() == [1, 4, 3, 5, 2]
    assert "tokenizer" in data.files
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        read(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), length=5)
    with pytest.raises(DataError, match=r"data.options.tokenizer: no file"):
        read(tmp_path, tokenizer=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.csv", '"5","a","b"\n', r"row 1 is \['5', 'a', 'b'\]; expected a class from 1 to 4"),
        ("test.csv", '"1","a"\n', "expected a class from 1 to 4, a title and a description"),
        ("test.csv", '"1","a","b', "cannot be read"),
        ("train_noisy_labels.txt", "\xff", "cannot be read"),
        ("tokenizer.json", "\xff", "cannot be read"),
        ("train.csv", "", "is empty"),
        ("test.csv", None, "test.csv not found; 'agnews' has train.csv, test.csv"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    place = agnews(tmp_path / "csv")
    (place / file).unlink() if text is None else (place / file).write_text(text, "latin-1")
    given = {"tokenizer": str(place / file)} if file == "tokenizer.json" else {}
    with pytest.raises(DataError, match=message):
        read(tmp_path, "agnews-noisy" if "noisy" in file else "agnews", **given)


def test_a_tokenizer_that_cannot_encode_a_text_is_an_error_of_the_data(package: Any) -> None:
    """Catches errors of the package, and of numpy, that say nothing of the tokenizer."""
    words = package.models.WordLevel({"a": 0, "[PAD]": 1, "<s>": 2, "</s>": 3})
    made = package.Tokenizer(words)
    with pytest.raises(DataError, match=r"here: cannot encode a text .*needs a token for what it does not know"):
        tokenizer.encoded(["a", "b"], made.to_str(), 4, "here")
    made.post_processor = package.processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    assert tokenizer.encoded(["a"], made.to_str(), 3, "here").tolist() == [[2, 1, 3]]
    with pytest.raises(DataError, match=r"here: puts . tokens around a text, more than length = 1; raise it"):
        tokenizer.encoded(["a"], made.to_str(), 1, "here")


# ------------------------------------------------------------------------------------------------ a table of texts

LETTERS = ("the red cat", "the red dog", "NA", 'a\\b, "c"', "the red cat", "the zebra, quickly")


def letters(folder: Path, texts: tuple[str | None, ...] = LETTERS, **columns: list[Any]) -> None:
    """Write a table of texts as ``t.csv`` and ``t.parquet``; the last row is of the test."""
    places = range(len(texts))
    table: dict[str, list[Any]] = {
        "id": [f"no {k}" for k in places],
        "review": [*texts],
        "stars": ["good" if k % 2 else "bad" for k in places],
        "site": ["NS"[k // 2 % 2] for k in places],
        "late": [int(k == places[-1]) for k in places],
        **columns,
    }
    folder.mkdir(exist_ok=True)
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*table], *zip(*table.values(), strict=True)])
    pq.write_table(pa.table(table), folder / "t.parquet")


def read_letters(folder: Path, kind: str = "csv", **options: Any) -> Dataset:
    given = {"text": "review", "label": "stars", "vocabulary": 400, "length": 12, **options}
    return load_dataset(kind, path=folder / f"t.{kind}", cache=folder / "cache", **given)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_texts_becomes_tokens(kind: str, package: Any, tmp_path: Path) -> None:
    """Catches a tokenizer that learns from test rows, rows that change places, and another column that is read."""
    letters(tmp_path)
    data = read_letters(tmp_path, kind, group="site", test="late", bucket=4)
    learnt = tokenizer.learnt(LETTERS[:5], 400, tmp_path / "elsewhere")  # equal texts count each time
    assert data.tokenizer == learnt
    assert data.x.tolist() == tokenizer.encoded(LETTERS, learnt, 12, "here").tolist()
    assert (data.kind, data.bucket, data.classes, data.y.tolist()) == ("tokens", 4, ("bad", "good"), [0, 1] * 3)
    assert data.test_rows is not None
    assert data.test_rows.tolist() == [5]
    assert [data.group_names[g] for g in data.groups] == [*"NNSSNN"]  # type: ignore[union-attr]
    assert [c.kind for c in data.columns] == ["unused", "text", "label", "group", "test"]
    assert "6 rows, 12 tokens each, text 'review', label 'stars' with 2 classes (bad, good)" in summary(data)
    assert "left out: id" in summary(data)
    pooled = read_letters(tmp_path, kind)  # without test rows of its own, all texts are learnt
    assert pooled.tokenizer == tokenizer.learnt(LETTERS, 400, tmp_path / "elsewhere") != learnt
    assert pooled.bucket == 16


def test_files_of_texts_and_a_file_of_test_rows(package: Any, tmp_path: Path) -> None:
    """Catches the texts of a file of test rows that are learnt, and files that are not the groups of their rows."""
    letters(tmp_path)
    letters(tmp_path / "north")
    (tmp_path / "north" / "t.csv").replace(tmp_path / "new.csv")
    data = read_letters(tmp_path, test="new.csv")
    assert data.tokenizer == tokenizer.learnt(LETTERS, 400, tmp_path / "elsewhere")
    assert data.test_rows is not None
    assert (data.test_rows.tolist(), len(data)) == ([*range(6, 12)], 12)
    (tmp_path / "north" / "t.parquet").unlink()
    for name in ("a", "b"):
        (tmp_path / "north" / f"{name}.csv").write_bytes((tmp_path / "t.csv").read_bytes())
    two = load_dataset("csv", path=tmp_path / "north", cache=tmp_path, text="review", label="stars")
    assert two.group_names == ("a", "b")
    (tmp_path / "north" / "b.csv").write_text("review,stars\nso so,bad\nfine,good\n")
    with pytest.raises(DataError, match=r"expected those of a\.csv: id, review, stars, site, late$"):
        load_dataset("csv", path=tmp_path / "north", cache=tmp_path, text="review", label="stars")


def test_numbers_are_predicted_from_texts(package: Any, tmp_path: Path) -> None:
    """Catches a label of numbers that is read as classes."""
    letters(tmp_path, stars=[1.5, 2, 3, 4.5, 5, 1])
    data = read_letters(tmp_path, task="regression")
    assert (data.y.tolist(), data.kind, data.classes) == ([1.5, 2, 3, 4.5, 5, 1], "tokens", ())


@pytest.mark.parametrize("text", ["", "  ", None])
@pytest.mark.parametrize(("kind", "place"), [("csv", "t.csv, line 4"), ("parquet", "t.parquet, row 3")])
def test_an_empty_text_is_named(kind: str, place: str, text: str | None, tmp_path: Path) -> None:
    letters(tmp_path, ("one", "two", text, "four"))
    with pytest.raises(DataError, match=rf"{place}: the text 'review' is missing .*; fill it or drop the row$"):
        read_letters(tmp_path, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categorical": ["site"]}, "categorical: means nothing beside text = 'review', as no other column is a feat"),
        ({"numeric": ["id"], "missing": [""]}, "(?s)missing: means nothing.*numeric: means nothing"),
        ({"also_missing": ["-"]}, "also_missing: means nothing beside"),
        ({"union": True}, "union: means nothing beside"),
        ({"text": None}, "vocabulary: says how texts become tokens; name the column of texts by the option `text`"),
        ({"text": ["review"]}, "text: got .*; expected the name or number of the column of texts"),
        ({"vocabulary": 257}, "vocabulary: got 257; expected 258 or more"),
        ({"text": "stars"}, "text: column 'stars' is the label too; choose another"),
    ],
)
def test_options_that_do_not_go_with_texts(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    letters(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_letters(tmp_path, **options)
    given = {"text": "review", "label": "stars", "vocabulary": 400, **options}
    if options.get("text") != "stars" and None not in options.values():  # a configuration knows without the file
        with pytest.raises(ConfigError, match=rf"data\.options\.{message.removeprefix('(?s)')[:6]}"):
            Config.parse({"data": {"dataset": "csv", "path": "t.csv", "options": given}})


def test_texts_without_the_option_are_told_of_it(tmp_path: Path) -> None:
    letters(tmp_path, tuple(f"text number {k}" for k in range(30)))
    with pytest.raises(DataError, match=r"column 'review' has 30 different texts .* name its column in `text`"):
        load_dataset("csv", path=tmp_path / "t.csv", label="stars", ignore=["id"])
    with pytest.raises(DataError, match="no column 'body' for option 'text'"):
        read_letters(tmp_path, text="body")


def test_sites_with_tables_of_texts_share_a_tokenizer(package: Any, tmp_path: Path) -> None:
    """Catches sites whose word 300 is another, and a file of a tokenizer that is passed over."""
    letters(tmp_path / "a")
    letters(tmp_path / "b", ("other words", "of another site"))
    agreed = schema_of(first := read_letters(tmp_path / "a"))
    with pytest.raises(DataError, match=r"another tokenizer: give all the same tokenizer\.json by the option"):
        read_letters(tmp_path / "b", agreed=agreed)
    place = tmp_path / "tokenizer.json"
    place.write_text(first.tokenizer, "utf-8")
    second = read_letters(tmp_path / "b", agreed=agreed, tokenizer=str(place))
    assert (second.tokenizer, second.classes) == (first.tokenizer, first.classes)
    assert "tokenizer" in second.files
    with pytest.raises(DataError, match=r"data.options.tokenizer: no file"):
        read_letters(tmp_path / "b", tokenizer="none.json")


# ----------------------------------------------------------------------------------------------------------- LEAF


def leaf(path: Path, data: dict[str, tuple[list[Any], list[Any]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    users = {user: {"x": x, "y": y} for user, (x, y) in data.items()}
    path.write_text(
        json.dumps({"users": [*data], "num_samples": [len(y) for _, y in data.values()], "user_data": users})
    )
    return path


def test_roles_are_clients_and_the_next_character_is_the_class(tmp_path: Path) -> None:
    """Catches characters that only test rows have in the vocabulary, and rows of another role."""
    leaf(tmp_path / "train" / "a.json", {"ROMEO": (["abab", "baba"], ["a", "b"]), "JULIET": (["aacc"], ["a"])})
    leaf(tmp_path / "test" / "b.json", {"JULIET": (["azb"], ["z"])})
    data = load_dataset("leaf", path=tmp_path)
    assert data.classes == ("<unknown>", "a", "b", "c")
    assert data.x.tolist() == [[2, 3, 2, 3], [3, 2, 3, 2], [2, 2, 4, 4], [2, 1, 3, 0]]
    assert data.y.tolist() == [1, 2, 1, 0]
    assert data.test_rows is not None
    assert data.test_rows.tolist() == [3]
    assert [data.group_names[g] for g in data.groups] == ["ROMEO", "ROMEO", "JULIET", "JULIET"]  # type: ignore[union-attr]
    assert {*file_digests("leaf", path=tmp_path)} == {"a.json", "b.json"}


def test_words_and_their_limits(tmp_path: Path) -> None:
    """Catches the first words kept in place of the last, and rare words kept before frequent ones."""
    place = leaf(tmp_path / "w.json", {"u": ([["to", "be"], ["or", "not", "to"]], ["or", "be"])})
    data = load_dataset("leaf", path=place, vocabulary=5, length=2)
    assert data.classes == ("<unknown>", "be", "or", "to")
    assert data.x.tolist() == [[4, 2], [1, 4]]
    assert data.y.tolist() == [2, 1]


@pytest.mark.parametrize("content", ["[]", '{"users": ["u"], "user_data": {"u": {"x": ["a"], "y": []}}}', "{"])
def test_a_file_of_another_layout(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match="not of LEAF's layout"):
        load_dataset("leaf", path=tmp_path)
    leaf(tmp_path / "a.json", {"u": ([[1.0, 2.0]], [3])})
    with pytest.raises(DataError, match=r"user 'u' has x = .*expected for x a text or a list of words"):
        load_dataset("leaf", path=tmp_path)
    (tmp_path / "a.json").unlink()
    with pytest.raises(DataError, match=r"holds no \*.json"):
        load_dataset("leaf", path=tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"users": ["u"], "user_data": {"u": {"x": ["a", "b"], "y": ["c"]}}}, "'u' has 2 entries of x and 1 of y"),
        ({"users": ["w"], "user_data": {}}, "user 'w' has no x and y; expected a json object"),
        (
            {"users": ["u"], "user_data": {"u": {"x": ["a"], "y": [0]}}},
            "y = 0; .*classes .*csv or parquet file, and name their column by its option `text`",
        ),
        ({"users": ["u", "u"], "user_data": {"u": {"x": ["ab"], "y": ["c"]}}}, "user 'u' is named twice in users"),
        ({"users": [], "user_data": {"u": {"x": ["ab"], "y": ["c"]}}}, "user 'u' is not named in users"),
        ({"users": ["u"], "user_data": {"u": {"x": [], "y": []}}}, "has no rows"),
        (
            {"users": ["u"], "num_samples": [9], "user_data": {"u": {"x": ["ab"], "y": ["c"]}}},
            r"num_samples is \[9\], and users have \[1\] rows",
        ),
        ({"users": ["u"], "user_data": {"u": {"x": ["good"], "y": ["positive"]}}}, "y = 'positive'; expected"),
        ({"users": ["u"], "user_data": {"u": {"x": ["ab", ["a"]], "y": ["c", "d"]}}}, "one kind in a file"),
    ],
)
def test_what_a_file_lacks_is_said_in_words(tmp_path: Path, content: Any, says: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=says) as caught:
        load_dataset("leaf", path=tmp_path / "a.json")
    assert "Error" not in str(caught.value)
    with pytest.raises(DataError, match="none: no such file or folder"):
        load_dataset("leaf", path=tmp_path / "none")


def test_characters_and_words_are_not_one_vocabulary(tmp_path: Path) -> None:
    """Catches a folder of both kinds, and characters that are looked up among words, of which they are none."""
    words = leaf(tmp_path / "w" / "a.json", {"u": ([["i", "am"], ["a", "man"]], ["here", "is"])})
    known = load_dataset("leaf", path=words)
    signs = leaf(tmp_path / "c.json", {"u": (["i am", "a man"], ["h", "i"])})
    with pytest.raises(DataError, match=r"c\.json: x has texts of characters; expected lists of words"):
        read_new_leaf(signs, known.classes, 2)
    with pytest.raises(DataError, match=r"a\.json: x has lists of words; expected texts of characters"):
        read_new_leaf(words, load_dataset("leaf", path=signs).classes, 2)
    assert read_new_leaf(words, known.classes, 2).inputs[0].tolist() == known.x.tolist()
    leaf(tmp_path / "w" / "b.json", {"v": (["i am"], ["a"])})
    with pytest.raises(DataError, match=r"a\.json: its texts are lists of words, and those of .*b\.json are not"):
        load_dataset("leaf", path=tmp_path / "w")


def test_tokens_get_the_agreed_numbers_as_classes_do(tmp_path: Path) -> None:
    """Catches sites whose classes are agreed and whose tokens are not, as each numbers them by its own frequencies."""
    here = load_dataset("leaf", path=leaf(tmp_path / "a.json", {"u": (["aab", "aac"], ["a", "b"])}))
    place = leaf(tmp_path / "b.json", {"u": (["bba", "bc"], ["b", "c"])})
    agreed = schema_of(here)
    found = load_dataset("leaf", path=place, agreed=agreed)
    assert load_dataset("leaf", path=place).classes == ("<unknown>", "b", "c", "a")
    assert found.classes == here.classes == ("<unknown>", "a", "b", "c")
    assert found.x.tolist() == [[3, 3, 2], [3, 4, 0]]
    assert found.y.tolist() == [2, 3]
    with pytest.raises(DataError, match="the agreed classes begin with 'a'; expected '<unknown>'"):
        load_dataset("leaf", path=place, agreed=Schema(classes=("a", "b", "c", "<unknown>")))


def test_labels_among_words_are_doubted(tmp_path: Path) -> None:
    labels = load_dataset(
        "leaf", path=leaf(tmp_path / "a.json", {"u": ([["so", "good"], ["so", "bad"]], ["pos", "neg"])})
    )
    assert ["4 of 6 classes never occur as y" in doubt for doubt in doubts(labels)] == [True]
    following = load_dataset("leaf", path=leaf(tmp_path / "b.json", {"u": (["ab", "ba"], ["a", "b"])}))
    assert doubts(following) == []


def test_other_padding_than_0_is_doubted() -> None:
    """Catches a tokenizer's own padding that is read as words, and a word 0 that is passed over."""

    def said(x: list[list[int]]) -> list[str]:
        return doubts(Dataset("t", torch.tensor(x), torch.arange(len(x)) % 2, ("a", "b"), (), (), declared="tokens"))

    assert said([[5, 6, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]]) == []
    (note,) = said([[5, 6, 0, 7], [0, 6, 7, 8], [5, 6, 0, 0]])
    assert note.startswith("2 of 3 rows have a 0 before other tokens")
    (note,) = said([[5, 6, 1, 1], [5, 1, 1, 1], [5, 6, 7, 8]])
    assert note.startswith("2 of 3 rows end in 1, twice or more, and none has a 0")
    assert said([[5, 6, 1, 1], [5, 6, 2, 2], [5, 6, 7, 8]]) == []  # texts that end alike in two rows of three
    assert said([[5], [6]]) == []


# -------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_as_long_as_its_longest_row(tmp_path: Path) -> None:
    """Catches tokens that are cut off, and a batch whose rows or order depend on their lengths."""
    x = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])

    def batch(rows: list[int], bucket: int) -> torch.Tensor:
        data = Dataset("t", x, torch.zeros(4).long(), ("a", "b"), (), (), declared="tokens", bucket=bucket)
        return ClientData(data, torch.arange(4), augment=False).batch(torch.tensor(rows))[0]

    assert batch([0, 1], 1).tolist() == [[1, 2], [3, 0]]
    assert [batch([0, 1], b).shape[1] for b in (0, 2, 4, 16)] == [6, 2, 4, 6]
    assert [batch(some, 3).shape[1] for some in ([2], [1, 2], [3])] == [6, 6, 3]
    place = leaf(tmp_path / "a.json", {"u": (["ab", "a", "ababa"], ["a", "b", "a"])})
    data = ClientData(load_dataset("leaf", path=place, bucket=2), torch.arange(3), augment=False)
    got, y = data.batch(torch.tensor([1, 0]))
    assert got.tolist() == [[2, 0], [2, 3]]
    assert y.tolist() == [2, 1]
    whole = ClientData(load_dataset("leaf", path=place, bucket=0), torch.arange(3), augment=False)
    assert whole.batch(torch.tensor([1, 0]))[0].shape == (2, 5)
    assert whole.dataset.digest != data.dataset.digest


def test_the_commands_take_text(tmp_path: Path) -> None:
    """Catches networks that are checked with images, and a tokenizer's path that starts elsewhere than the file."""
    config = tmp_path / "c.toml"
    config.write_text(
        '[data]\ndataset = "agnews"\noptions = { length = 20, tokenizer = "t.json" }\n[clients]\ncount = 2\n'
        'models = ["text-transformer", "bilstm"]\n[algorithm]\nname = "fedmrl"\nrep_dim = 16\nauxiliary = "bilstm"\n'
    )
    checked = CliRunner().invoke(app, ["validate", str(config)])
    assert checked.exit_code == 0, checked.output
    assert Config.load(config).data.options["tokenizer"] == str(tmp_path / "t.json")
    for wrong in (
        "data.image_size=32",
        "data.options.length=0",
        "data.options.vocabulary=257",
        "data.options.bucket=-1",
    ):
        with pytest.raises(ConfigError):
            Config.load(config, [wrong])
    tables = Config.load(config).to_dict()
    tables["clients"]["models"] = ["roberta(weights='w.safetensors')"]
    assert Config.parse(tables)
    del tables["data"]["options"]["tokenizer"]
    with pytest.raises(ConfigError, match="weights for 50265 tokens, but the tokenizer that is learnt here has 8192"):
        Config.parse(tables)
    tables["data"] |= {"dataset": "csv", "path": "t.csv", "options": {"text": "review"}}
    with pytest.raises(ConfigError, match="weights for 50265 tokens, but the tokenizer that is learnt here has 8192"):
        Config.parse(tables)
    shown = CliRunner().invoke(app, ["validate", str(config), "--set", 'clients.models=["cnn5"]'])
    assert "(20,)" in shown.output


def test_the_real_data(package: Any, tmp_path: Path) -> None:
    """Catches a class that is shifted by one, and a quoted line that ends a row."""
    for file in ("train.csv", "test.csv"):
        lines = (real_data("ag_news_csv") / file).read_text("utf-8").splitlines()[:400]
        (tmp_path / file).write_text("\n".join(lines) + "\n", "utf-8")
    data = load_dataset("agnews", path=tmp_path, cache=tmp_path, vocabulary=300, length=8)
    assert data.x.shape == (800, 8)
    assert data.y[:7].tolist() == [1, 1, 2, 2, 2, 3, 2]  # two of baseball first, then of companies
    assert int(data.x.max()) == 299
