"""UCI HAR: its zip file, a zip file in a zip file, and the unpacked folder; what is refused; the real data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import real_data
from typer.testing import CliRunner

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.rng import Rng
from polyfed.cli import app
from polyfed.data.client import FederatedData
from polyfed.data.partition.make import make_partition
from polyfed.data.readers.har import SIGNALS
from polyfed.data.sources import file_digests, load_dataset

ROOT = "UCI HAR Dataset"
SUBJECTS = {"train": [1, 1, 1, 30, 30, 3], "test": [2, 2]}
LABELS = {"train": [5, 1, 2, 6, 6, 3], "test": [5, 1]}


def value(part: str, row: int, channel: int, step: int) -> float:
    """A number that says where it stands."""
    return (10_000 * (part == "test") + 1000 * row + channel) + step / 1000


def texts() -> dict[str, str]:
    """The text files of eight windows of four subjects, as UCI writes numbers."""
    found = {f"{ROOT}/README.txt": "another file"}
    for part, labels in LABELS.items():
        found[f"{ROOT}/{part}/subject_{part}.txt"] = "".join(f"{s}\n" for s in SUBJECTS[part])
        found[f"{ROOT}/{part}/y_{part}.txt"] = "".join(f"{y}\n" for y in labels)
        for channel, signal in enumerate(SIGNALS):
            found[f"{ROOT}/{part}/Inertial Signals/{signal}_{part}.txt"] = "".join(
                "".join(f"  {value(part, row, channel, step):.7e}" for step in range(128)) + "\n"
                for row in range(len(labels))
            )
    return found


def zipped(files: dict[str, str] | dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def unpack(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def as_zip(folder: Path) -> Path:
    (folder / "any name.zip").write_bytes(zipped(texts()))
    return folder / "any name.zip"


def as_folder_with_zip(folder: Path) -> Path:
    return as_zip(folder).parent


def as_zip_in_zip(folder: Path) -> Path:
    """UCI's own download; and what another system adds to an archive."""
    inner = zipped(
        {**texts(), f"__MACOSX/{ROOT}/train/._y_train.txt": "x", f"__MACOSX/{ROOT}/train/y_train.txt": 6 * "1\n"}
    )
    outer = {"UCI HAR Dataset.zip": inner, "UCI HAR Dataset.names": b"about"}
    (folder / "human.zip").write_bytes(zipped(outer))
    return folder


def as_unpacked(folder: Path) -> Path:
    return unpack(folder, texts())


def as_inner_folder(folder: Path) -> Path:
    return as_unpacked(folder) / ROOT


@pytest.mark.parametrize("place", [as_zip, as_folder_with_zip, as_zip_in_zip, as_unpacked, as_inner_folder])
def test_each_layout_gives_the_same(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    """Catches channels and steps that change places, parts or files that are mixed up, and classes that are shifted."""
    dataset = load_dataset("uci-har", path=place(tmp_path))
    assert dataset.x.dtype == torch.float32
    expected = [
        [[value(part, row, channel, step) for step in range(128)] for channel in range(9)]
        for part, labels in LABELS.items()
        for row in range(len(labels))
    ]
    assert torch.equal(dataset.x, torch.tensor(expected))
    assert dataset.y.tolist() == [4, 0, 1, 5, 5, 2, 4, 0]
    assert dataset.classes[3:5] == ("sitting", "standing")
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [6, 7]
    assert dataset.groups is not None
    assert [dataset.group_names[g] for g in dataset.groups] == ["1", "1", "1", "30", "30", "3", "2", "2"]
    assert (dataset.kind, dataset.channels_first, dataset.input_shape) == ("series", True, (9, 128))


def test_it_is_found_kept_and_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that is not used, or used for other files."""
    place = as_unpacked(tmp_path / "uci-har")
    monkeypatch.setenv("POLYFED_DATA", str(tmp_path))
    first = load_dataset("uci-har")
    assert len(file_digests("uci-har")) == 22
    assert first.files == file_digests("uci-har")
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 1
    monkeypatch.setattr("polyfed.data.readers.har.read_har", None)
    assert load_dataset("uci-har").digest == first.digest
    monkeypatch.undo()
    monkeypatch.setenv("POLYFED_CACHE", str(tmp_path / "cache"))
    (place / ROOT / "test" / "y_test.txt").write_text("5\n2\n\n")
    assert load_dataset("uci-har", path=place).y.tolist()[-1] == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train/y_train.txt", lambda t: t.replace("5", "7"), "line 1 of train/y_train.txt is 7; expected .* 1 to 6"),
        ("train/y_train.txt", lambda t: t.replace("5", "2.5"), r"line 1 of train/y_train.txt is 2\.5"),
        ("test/subject_test.txt", lambda t: t.replace("2", "31"), "line 1 of test/subject_test.txt is 31; .* 1 to 30"),
        ("test/subject_test.txt", lambda _: "2\n", "subject_test.txt has 1 lines but y_test.txt has 2"),
        ("train/Inertial Signals/body_gyro_y_train.txt", lambda t: t[:-5], "ends inside a line; it is truncated"),
        ("train/Inertial Signals/body_gyro_y_train.txt", lambda t: t[: 3 * len(t) // 6], "has 3 lines but .* has 6"),
        ("train/Inertial Signals/body_acc_x_train.txt", lambda t: t[:-17] + "\n", "no table of numbers"),
        ("train/Inertial Signals/body_acc_x_train.txt", lambda t: t.replace("e+00", "?"), "no table of numbers"),
        ("test/Inertial Signals/total_acc_z_test.txt", lambda _: "", "is empty"),
        ("test/Inertial Signals/total_acc_z_test.txt", lambda _: "1 2 3\n4 5 6\n", "3 numbers in a line; expected 128"),
        ("test/Inertial Signals/total_acc_z_test.txt", lambda _: 2 * (128 * "nan " + "\n"), "line, not all finite"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, change: Callable[[str], str], message: str) -> None:
    files = texts()
    files[f"{ROOT}/{name}"] = change(files[f"{ROOT}/{name}"])
    with pytest.raises(DataError, match=message):
        load_dataset("uci-har", path=unpack(tmp_path, files))


def test_another_layout_or_archive_is_refused(tmp_path: Path) -> None:
    """Catches a traceback, and a half-read data set."""

    def refused(message: str, content: bytes | None = None) -> None:
        if content is not None:
            (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_dataset("uci-har", path=tmp_path)

    refused("holds no zip files and no folders train/ and test/")
    without = {name: text for name, text in texts().items() if "Inertial" not in name}
    refused(r"train/Inertial Signals/body_acc_x_train.txt and 17 more not found; .*561 features", zipped(without))
    refused("subject_train.txt and 21 more not found", zipped({"x.npy": "1"}))
    whole = zipped(texts())
    refused("a.zip: cannot be read as a zip file .* truncated", whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[2000:2010] = b"8888888888"
    refused("a.zip: cannot be read as a zip file .*CRC.* it is damaged or another", bytes(damaged))
    refused("a zip file .* it is damaged or another", zipped({"b.zip": b"no archive"}))
    refused("a zip file .* it is damaged or another", b"no archive")
    (tmp_path / "c.zip").write_bytes(whole)
    refused("holds 2 zip files")
    with pytest.raises(DataError, match=r"subject_test.txt and 10 more not found"):
        load_dataset("uci-har", path=unpack(tmp_path / "d", {n: t for n, t in texts().items() if "/train/" in n}))
    with pytest.raises(ConfigError, match="'uci-har' has no images"):
        load_dataset("uci-har", path=tmp_path / "c.zip", image_size=32)


def test_subjects_are_clients_and_official_test_subjects_are_unseen(tmp_path: Path) -> None:
    """Catches a client of two subjects, a subject that trains and tests, and an error that leads nowhere."""
    dataset = load_dataset("uci-har", path=as_zip(tmp_path))
    home = make_partition(dataset, kind="natural", num_clients=2, rng=Rng((0,)), groups="largest", min_samples=1)
    assert home.about["group_names"] == ["1", "2"]
    assert [sorted({*home.train(k), *home.test(k)}) for k in (0, 1)] == [[0, 1, 2], [6, 7]]
    unseen = make_partition(dataset, kind="iid", num_clients=1, rng=Rng((0,)), split="official")
    assert unseen.train_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert unseen.test_rows.tolist() == [6, 7]
    with pytest.raises(DataError, match=r"belong to groups without training rows.*data.split = \"pooled\""):
        make_partition(dataset, kind="natural", num_clients=None, rng=Rng((0,)), split="official")
    data = FederatedData(dataset, home, augment=False)
    x, _ = data.train(0).batch(torch.arange(len(data.train(0))))
    assert torch.allclose(x.mean((0, 2)), torch.zeros(9), atol=1e-4)  # by its own training rows, channel by channel
    assert torch.allclose(x.std((0, 2), correction=0), torch.ones(9), atol=1e-4)


def test_the_command_shows_it(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'[data]\ndataset = "uci-har"\npath = "{as_zip(tmp_path)}"\n[partition]\nkind = "natural"\nmin_samples = 1\n'
        'groups = "largest"\n[clients]\ncount = 2\nmodels = ["in-resnet10-1d(width=4)"]\n[algorithm]\nname = "fedavg"\n'
    )
    shown = CliRunner().invoke(app, ["data", str(config)])
    assert shown.exit_code == 0, shown.output
    assert "uci-har: 8 rows, series of 128 steps of 9 channels, 6 classes: walking" in shown.output
    checked = CliRunner().invoke(app, ["validate", str(config)])
    assert checked.exit_code == 0, checked.output
    wrong = CliRunner().invoke(app, ["validate", str(config), "--set", "data.image_size=32"])
    assert "has no images" in wrong.output
    wrong = CliRunner().invoke(app, ["validate", str(config), "--set", 'clients.models=["cnn5"]'])
    assert "(9, 128)" in wrong.output


def test_the_real_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches channels and time that are mixed: gravity then leaves the channel total_acc_x."""
    monkeypatch.setenv("POLYFED_DATA", str(real_data("uci-har").parent))
    dataset = load_dataset("uci-har", cache=tmp_path)
    assert dataset.x.shape == (7352 + 2947, 9, 128)
    means = dict(zip(SIGNALS, dataset.x.double().mean((0, 2)).tolist(), strict=True))
    assert means["total_acc_x"] == pytest.approx(0.81, abs=0.01)
    assert all(abs(mean) < 0.05 for signal, mean in means.items() if "total" not in signal)
    steps = dataset.x.diff(dim=2).abs().mean(), dataset.x.diff(dim=1).abs().mean()
    assert steps[0] < steps[1] / 3  # neighbouring steps are alike, neighbouring channels are not
    assert dataset.group_names == tuple(map(str, range(1, 31)))
    assert dataset.test_rows is not None
    assert dataset.groups is not None
    tested = np.unique(dataset.groups[dataset.test_rows]) + 1
    assert tested.tolist() == [2, 4, 9, 10, 12, 13, 18, 20, 24]
    table = load_dataset("uci-har", cache=tmp_path, statistics=True)
    assert table.kind == "features"
    assert len(table.feature_columns) == 45
    at = [name for name, _ in table.feature_columns].index("total_acc_x mean")
    assert torch.allclose(table.x[:, at], dataset.x[:, 6].mean(1), atol=1e-6)
    assert torch.equal(table.x[:, at + 3], dataset.x[:, 6].amax(1))
    assert table.y.equal(dataset.y)
    assert np.bincount(dataset.y).tolist() == [1722, 1544, 1406, 1777, 1906, 1944]


def test_a_folder_that_was_not_unpacked_is_refused(tmp_path: Path) -> None:
    """Catches a traceback where the right folders are there, and nothing in them."""
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="not found"):
        load_dataset("uci-har", path=tmp_path)
