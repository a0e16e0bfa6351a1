"""A key belongs to one client number: it is bound when it is registered, and stays so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from polyfed.base.errors import ConfigError
from polyfed.deploy.host import keys
from polyfed.deploy.server.registry import bound_nodes


class Server:
    """Registers each key once, as the engine does."""

    def __init__(self) -> None:
        self.known: dict[bytes, str] = {}

    def __call__(self, key: Path) -> str | None:
        data = key.read_bytes()
        if data in self.known:
            return None
        self.known[data] = str(2**63 + len(self.known))  # Flower's numbers need 64 bits
        return self.known[data]


def made(folder: Path, *clients: int) -> Path:
    for client in clients:
        keys.node_key(folder / f"client-{client}")
    return folder


def test_each_key_is_bound_to_its_client_also_after_a_restart(tmp_path: Path) -> None:
    folder, file, server = made(tmp_path / "keys", 0, 10), tmp_path / "nodes.json", Server()
    first = keys.bind_nodes(folder, file, server)
    assert first == {0: str(2**63), 10: str(2**63 + 1)}
    assert bound_nodes(file) == {2**63: 0, 2**63 + 1: 10}
    assert keys.bind_nodes(folder, file, server) == first
    made(folder, 2)
    assert keys.bind_nodes(folder, file, server) == {**first, 2: str(2**63 + 2)}


def test_a_key_that_was_replaced_is_bound_no_longer(tmp_path: Path) -> None:
    """Catches a node that goes on as a client after its key was taken out of the folder."""
    folder, file, server = made(tmp_path / "keys", 0), tmp_path / "nodes.json", Server()
    keys.bind_nodes(folder, file, server)
    shutil.rmtree(folder)
    keys.bind_nodes(made(folder, 0), file, server)
    assert bound_nodes(file) == {2**63 + 1: 0}


def test_a_key_does_not_change_its_client(tmp_path: Path) -> None:
    folder, file, server = made(tmp_path / "keys", 0), tmp_path / "nodes.json", Server()
    keys.bind_nodes(folder, file, server)
    before = file.read_bytes()
    (folder / "client-0.pub").rename(folder / "client-1.pub")
    with pytest.raises(ConfigError, match="was registered for client 0; a key belongs to one client"):
        keys.bind_nodes(folder, file, server)
    assert file.read_bytes() == before


def test_a_key_for_two_clients_or_for_none_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "keys", 0)
    text = (folder / "client-0.pub").read_text().strip()
    (folder / "client-1.pub").write_text(f"{text} another comment\n")
    (folder / "hospital.pub").write_text("ssh x\n")
    with pytest.raises(ConfigError) as caught:
        keys.public_keys(folder)
    assert len(caught.value.faults) == 2
    assert "client-1.pub: is the key of client-0.pub too" in str(caught.value)
    assert "hospital.pub: names no client" in str(caught.value)


def test_a_server_that_knows_a_key_without_its_client_is_an_error_that_says_so(tmp_path: Path) -> None:
    folder, file, server = made(tmp_path / "keys", 0), tmp_path / "nodes.json", Server()
    keys.bind_nodes(folder, file, server)
    file.unlink()
    with pytest.raises(ConfigError, match=r"remove its superlink\.db"):
        keys.bind_nodes(folder, file, server)


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"client": 0}}', '{"1": 0}', json.dumps({"1": {"key": "x"}})])
def test_a_damaged_file_of_nodes_is_an_error(text: str, tmp_path: Path) -> None:
    """Catches a server that trusts every node when it cannot read whom to trust."""
    (tmp_path / "nodes.json").write_text(text)
    with pytest.raises(ConfigError, match="polyfed deploy server"):
        bound_nodes(tmp_path / "nodes.json")
