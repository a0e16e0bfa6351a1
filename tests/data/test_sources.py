"""Names and options of data sets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from data_helpers import write_mnist

from polyfed.base.errors import ConfigError, DataError
from polyfed.data import sources
from polyfed.data.sources import load_dataset


def test_unknown_names_and_options(tmp_path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")
    with pytest.raises(ConfigError) as caught:
        load_dataset("digits", path=tmp_path, colour=True)
    assert len(caught.value.faults) == 2
    for name in ("npz", "csv"):
        with pytest.raises(ConfigError, match="path"):
            load_dataset(name)
    for size in (3, 2000, 31.5, True):
        with pytest.raises(ConfigError, match="image_size"):
            load_dataset("digits", image_size=size)


def test_the_files_of_a_data_set_are_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files that are left out, a digest of names or dates, and a download only to look."""
    monkeypatch.delenv("POLYFED_DATA", raising=False)
    monkeypatch.setattr(sources, "fetch", None)
    arrays = write_mnist(tmp_path / "mnist")
    found = sources.file_digests("mnist", path=tmp_path / "mnist")
    assert found.keys() == {f"{name}.gz" for name in arrays}
    assert load_dataset("mnist", path=tmp_path / "mnist").files == found
    path = tmp_path / "mnist" / next(iter(found))
    assert found[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sources.file_digests("mnist") == sources.file_digests("cifar10") == {}  # not there yet
    (digest,) = sources.file_digests("digits").values()
    assert load_dataset("digits").files == {"digits.npz": digest}
    (tmp_path / "sites").mkdir()
    for name in ("b", "a"):
        (tmp_path / "sites" / f"{name}.csv").write_text(f"x,y\n{name},0\nc,1\n")
    assert list(load_dataset("csv", path=tmp_path / "sites").files) == ["a.csv", "b.csv"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a digest of other bytes than those that were read."""
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,0\n2,1\n")
    read = sources.load_csv

    def slowly(*arguments, **options):
        found = read(*arguments, **options)
        path.write_text("x,y\n1,0\n3,1\n")
        return found

    monkeypatch.setattr(sources, "load_csv", slowly)
    with pytest.raises(DataError, match="changed while they were read"):
        load_dataset("csv", path=path)
