"""Where files are looked for, and what a download may leave behind."""

from __future__ import annotations

import hashlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import pytest
from data_helpers import write_mnist

from polyfed.base.errors import DataError
from polyfed.data import sources
from polyfed.data.catalogue import TEXTS
from polyfed.data.readers import download
from polyfed.data.readers.download import RemoteFile, fetch
from polyfed.data.sources import load_dataset


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which this machine serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def _no_network(url: str, timeout: float) -> None:
    del timeout
    raise urllib.error.URLError(f"no route to {url}")


def test_download_then_no_download(tmp_path: Path, server: tuple[Path, str]) -> None:
    folder, url = server
    (folder / "a.bin").write_bytes(b"content" * 1000)
    file = RemoteFile("a.bin", url + "a.bin", hashlib.md5(b"content" * 1000).hexdigest())
    path = fetch(file, tmp_path / "c")
    assert path.read_bytes() == b"content" * 1000
    assert fetch(file, tmp_path / "c", opener=_no_network) == path
    path.write_bytes(b"damaged")  # found out, and fetched anew
    assert fetch(file, tmp_path / "c").read_bytes() == b"content" * 1000


def test_wrong_checksum_leaves_nothing(tmp_path: Path, server: tuple[Path, str]) -> None:
    folder, url = server
    (folder / "a.bin").write_bytes(b"changed")
    file = RemoteFile("a.bin", url + "a.bin", hashlib.md5(b"original").hexdigest())
    with pytest.raises(DataError, match=f"7 bytes with md5 .* expected md5 {file.digest}"):
        fetch(file, tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_missing_on_the_server_or_unwritable(tmp_path: Path, server: tuple[Path, str]) -> None:
    _, url = server
    with pytest.raises(DataError, match="404"):
        fetch(RemoteFile("b.bin", url + "b.bin", "0"), tmp_path / "c")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch(RemoteFile("b.bin", url, "0"), tmp_path / "file")


def test_mnist_from_the_server(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = server
    write_mnist(folder)
    files = tuple(RemoteFile(p.name, url + p.name, download.digest_of(p)) for p in folder.iterdir())
    monkeypatch.setattr(sources, "OFFICIAL_FILES", MappingProxyType({"mnist": files}))
    assert len(load_dataset("mnist")) == 17
    assert len(list((tmp_path / "cache" / "mnist").iterdir())) == 4
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    assert len(load_dataset("mnist")) == 17


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "uci-har", "agnews"])
def test_without_a_network_one_message_says_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("POLYFED_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    with pytest.raises(DataError) as caught:
        load_dataset(name)
    message = str(caught.value)
    folder = TEXTS.get(name, name)
    for part in (f"{tmp_path}/data/{folder}", f"{tmp_path}/cache/{folder}", "no route to http", "POLYFED_DATA", "path"):
        assert part in message


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    write_mnist(tmp_path / "given", train=10)
    write_mnist(tmp_path / "shared" / "mnist", train=20)
    monkeypatch.setenv("POLYFED_DATA", str(tmp_path / "shared"))
    assert len(load_dataset("mnist", path=tmp_path / "given")) == 15
    assert len(load_dataset("mnist")) == 25
    with pytest.raises(DataError, match="no such file or folder"):
        load_dataset("mnist", path=tmp_path / "none")  # never silently another copy
    monkeypatch.setenv("POLYFED_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataError, match="expected a folder that exists"):
        load_dataset("mnist")


def test_official_sums_are_well_formed() -> None:
    for files in download.OFFICIAL_FILES.values():
        for file in files:
            assert len(bytes.fromhex(file.digest)) == {"md5": 16, "sha256": 32}[file.kind]
            assert file.url.endswith(file.name)
