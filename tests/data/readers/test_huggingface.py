"""Folders as ``save_to_disk`` writes them, written here through pyarrow in the same layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import image_file

from polyfed.base.errors import ConfigError, DataError
from polyfed.data.sources import load_dataset

pa = pytest.importorskip("pyarrow")

LABEL = {"names": ["cat", "dog"], "_type": "ClassLabel"}
NUMBER = {"dtype": "float64", "_type": "Value"}
TEXT = {"dtype": "string", "_type": "Value"}
IMAGE = {"_type": "Image"}


def write(folder: Path, columns: dict[str, list[Any]], features: dict[str, Any], shards: int = 1) -> None:
    """A folder of one ``Dataset``."""
    folder.mkdir(parents=True)
    kinds = {"Image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    arrays = {name: pa.array(cells, kinds.get(features[name].get("_type"))) for name, cells in columns.items()}
    table = pa.table(arrays)
    names = [f"data-{k:05d}-of-{shards:05d}.arrow" for k in range(shards)]
    size = -(-table.num_rows // shards)
    for k, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(k * size, size))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features, "splits": None}))
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))


def test_images_and_class_names_of_two_splits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    cells = [{"bytes": image_file(image), "path": None} for image in pixels]
    features = {"image": IMAGE, "label": LABEL}
    write(tmp_path / "own" / "train", {"image": cells[:3], "label": [1, 0, 1]}, features, shards=2)
    write(tmp_path / "own" / "test", {"image": cells[3:], "label": [0, 1]}, features)
    (tmp_path / "own" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = load_dataset("huggingface", path=tmp_path / "own", flip=True)
    assert (found.classes, found.y.tolist(), found.test_rows.tolist()) == (("cat", "dog"), [1, 0, 1, 0, 1], [3, 4])
    assert np.array_equal(found.x.numpy(), pixels.transpose(0, 3, 1, 2))
    assert found.files.keys() == {"own"}
    one = load_dataset("huggingface", path=tmp_path / "own" / "train", image_size=5, channels=1)
    assert (one.input_shape, one.test_rows) == ((1, 5, 5), None)


def test_numbers_with_text_labels_groups_units_and_times(tmp_path: Path) -> None:
    """Catches an empty cell that is 0, an index that is a feature, and labels that are merged."""
    columns = {
        "id": [7, 8, 9],
        "age": [1.0, None, 3.0],
        "well": [True, None, False],
        "dx": ["01", "1", "1"],
        "site": ["b", "a", "b"],
        "patient": [5, 5, 4],
        "day": ["2024-01-03", "2024-01-02", "2024-01-03"],
    }
    features = {"id": {"dtype": "int64", "_type": "Value"}, "age": NUMBER, "well": {"dtype": "bool", "_type": "Value"}}
    features |= dict.fromkeys(("dx", "site", "day"), TEXT) | {"patient": {"dtype": "int32", "_type": "Value"}}
    write(tmp_path / "t", columns, features)
    options = {"label": "dx", "group": "site", "unit": "patient", "time": "day", "ignore": ["id"]}
    found = load_dataset("huggingface", path=tmp_path / "t", **options)
    assert (found.kind, found.classes, found.y.tolist()) == ("features", ("01", "1"), [0, 1, 1])
    assert (found.group_names, found.groups.tolist()) == (("a", "b"), [1, 0, 1])
    assert (found.units.tolist(), found.times.tolist()) == ([1, 1, 0], [1, 0, 1])
    assert np.array_equal(found.x.numpy(), [[1, 1], [np.nan, np.nan], [3, 0]], equal_nan=True)


def test_lists_of_tokens(tmp_path: Path) -> None:
    features = {"ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}, "label": LABEL}
    write(tmp_path / "t", {"ids": [[5, 0], [7, 9]], "label": [0, 1]}, features)
    found = load_dataset("huggingface", path=tmp_path / "t", input="ids", kind="tokens")
    assert (found.kind, found.x.tolist()) == ("tokens", [[5, 0], [7, 9]])
    with pytest.raises(DataError, match="'ids' holds Sequence; expected numbers"):
        load_dataset("huggingface", path=tmp_path / "t")
    write(tmp_path / "ragged", {"ids": [[5, 0], [7]], "label": [0, 1]}, features)
    with pytest.raises(DataError, match="lists of different lengths"):
        load_dataset("huggingface", path=tmp_path / "ragged", input="ids", kind="tokens")


@pytest.mark.parametrize(
    ("columns", "features", "options", "error", "says"),
    [
        ({"a": [1.0], "label": [0]}, {"a": NUMBER, "label": NUMBER}, {}, ConfigError, "0 columns of type ClassLabel"),
        ({"a": [1.0], "y": [0.5]}, {"a": NUMBER, "y": NUMBER}, {"label": "y"}, DataError, "expected classes"),
        ({"a": [1.0], "label": [0]}, {"a": NUMBER, "label": LABEL}, {"group": "z"}, ConfigError, "no column 'z'"),
        ({"a": [1.0], "label": [-1]}, {"a": NUMBER, "label": LABEL}, {}, DataError, "row 0 has the label -1"),
        ({"a": [1.0], "label": [None]}, {"a": NUMBER, "label": LABEL}, {}, DataError, "row 0 has no 'label'"),
        ({"a": ["x"], "label": [0]}, {"a": TEXT, "label": LABEL}, {}, DataError, "'a' holds string"),
        ({"label": [0]}, {"label": LABEL}, {}, DataError, "no column beside the label"),
        ({"a": [None], "label": [0]}, {"a": IMAGE, "label": LABEL}, {}, DataError, "row 0 of 'a' holds no image"),
        ({"a": [{"bytes": b"x", "path": ""}], "label": [0]}, {"a": IMAGE, "label": LABEL}, {}, DataError, "decode"),
    ],
)
def test_faults(tmp_path: Path, columns, features, options, error, says: str) -> None:
    write(tmp_path / "t", columns, features)
    with pytest.raises(error, match=says):
        load_dataset("huggingface", path=tmp_path / "t", **options)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    features = {"a": NUMBER, "label": LABEL}
    with pytest.raises(DataError, match=r"has no state.json"):
        load_dataset("huggingface", path=tmp_path)
    write(tmp_path / "d" / "train", {"a": [1.0, 2.0], "label": [0, 1]}, features)
    with pytest.raises(DataError, match="holds the splits train; expected"):
        load_dataset("huggingface", path=tmp_path / "d")
    other = {**features, "label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    write(tmp_path / "d" / "test", {"a": [1.0, 2.0], "label": [0, 1]}, other)
    with pytest.raises(DataError, match="class names differ"):
        load_dataset("huggingface", path=tmp_path / "d")
    train = tmp_path / "d" / "train"
    state = json.loads((train / "state.json").read_text())
    (train / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        load_dataset("huggingface", path=train)
    (train / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset("huggingface", path=train)
    (train / "state.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        load_dataset("huggingface", path=train)
