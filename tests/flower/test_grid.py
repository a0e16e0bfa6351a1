"""The few names of Flower that are used, pinned, and what a frame becomes on its way through them."""

from __future__ import annotations

import ast
import inspect
import threading
import time
import typing
from importlib.metadata import requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.app
import flwr.clientapp
import flwr.serverapp
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from packaging.requirements import Requirement
from packaging.version import Version

import polyfed.flower.grid
from polyfed.deploy.wire.transport import Outgoing
from polyfed.flower.grid import GridTransport, pack, unpack

#: All that polyfed uses of Flower. A new name belongs here and in docs/deploy/flower.md.
USED = {
    "flwr.app": {"Array", "ArrayRecord", "ConfigRecord", "Context", "Message", "MessageType", "RecordDict"},
    "flwr.clientapp": {"ClientApp"},
    "flwr.serverapp": {"Grid", "ServerApp"},
}


def test_the_installed_version_is_one_that_polyfed_asks_for() -> None:
    (asked,) = (Requirement(line) for line in requires("polyfed") or () if line.startswith("flwr"))
    assert Version(version("flwr")) in asked.specifier


def test_these_names_and_no_others_are_imported() -> None:
    found: dict[str, set[str]] = {}
    for path in Path(polyfed.flower.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                found.setdefault(node.module or "", set()).update(name.name for name in node.names)
            assert not (isinstance(node, ast.Import) and any(n.name.startswith("flwr") for n in node.names))
    assert found == USED
    for module in (flwr.app, flwr.clientapp, flwr.serverapp):
        assert USED[module.__name__] <= set(module.__all__)


def test_what_is_called_has_the_arguments_that_it_is_called_with() -> None:
    assert {"get_node_ids", "push_messages", "pull_messages"} <= set(dir(Grid))
    assert (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE) == ("query", "train", "evaluate")
    for app, names in ((ClientApp, ("train", "evaluate", "query")), (ServerApp, ("main",))):
        assert all(callable(getattr(app, name)) for name in names)
    assert {"node_config", "run_config"} <= set(inspect.signature(Context.__init__).parameters)


@pytest.mark.parametrize("body", [None, b"", b"\x00\xff" * 1000, bytes(6_000_000)])
def test_a_frame_comes_back_as_it_was(body: bytes | None) -> None:
    assert unpack(pack("{}", body)) == ("{}", body)


def test_bytes_are_no_array_that_numpy_would_read() -> None:
    records = pack("{}", b"abc")
    with pytest.raises(TypeError, match="serialization"):
        records.array_records["body"]["0"].numpy()


class FakeGrid:
    """What a Grid is to polyfed."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.replies: list[Any] = []
        self.refuse = False

    def get_node_ids(self) -> list[int]:
        return [7, 3]

    def push_messages(self, messages: list[Any]) -> list[str | None]:
        self.sent += messages
        return [] if self.refuse else [f"id-{place}" for place, _ in enumerate(messages)]

    def pull_messages(self, tickets: list[str]) -> list[Any]:
        return self.replies


def received(content: RecordDict | None = None, error: Any = None) -> Any:
    """As a Message looks; a real one can only be made inside a running app."""
    metadata = SimpleNamespace(reply_to_message_id="id-0")
    return SimpleNamespace(metadata=metadata, content=content, error=error, has_error=lambda: error is not None)


def test_a_message_takes_what_it_is_given() -> None:
    names = {"content", "dst_node_id", "message_type", "ttl", "group_id", "reply_to"}
    found = {n for o in typing.get_overloads(Message.__init__) for n in inspect.signature(o).parameters}
    assert names <= (found or set(inspect.signature(Message.__init__).parameters))


def test_requests_become_messages_with_time_to_live_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lambda content, node, kind, **more: SimpleNamespace(content=content, node=node, kind=kind, **more)  # noqa: E731
    monkeypatch.setattr(polyfed.flower.grid, "Message", made)
    grid = FakeGrid()
    transport = GridTransport(grid)  # type: ignore[arg-type]
    assert transport.nodes() == [3, 7]
    assert transport.push([Outgoing(7, "train", "{}", b"abc", "4", 30.0)]) == ["id-0"]
    (message,) = grid.sent
    assert (message.node, message.kind, message.ttl, message.group_id) == (7, "train", 30.0, "4")
    assert unpack(message.content) == ("{}", b"abc")
    grid.refuse = True
    assert transport.push([Outgoing(7, "train", "{}", None, "4", 30.0)]) == [None]
    assert transport.push([]) == []


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (received(error=SimpleNamespace(code=5, reason="node unavailable")), "error 5"),
        (received(RecordDict()), "without header"),
        (received(RecordDict({"polyfed": ConfigRecord({"header": 3})})), "without header"),
        (received(RecordDict({"polyfed": ConfigRecord({"header": "{}"}), "body": ArrayRecord()})), "without header"),
    ],
)
def test_errors_and_foreign_messages_are_told(reply: Any, says: str) -> None:
    grid = FakeGrid()
    grid.replies = [reply]
    (found,) = GridTransport(grid).pull(["id-0"])  # type: ignore[arg-type]
    assert found.ticket == "id-0"
    assert says in found.error


def test_a_reply_becomes_a_frame() -> None:
    grid = FakeGrid()
    grid.replies = [received(pack("{}", b"abc"))]
    (found,) = GridTransport(grid).pull(["id-0"])  # type: ignore[arg-type]
    assert (found.header, found.body, found.error) == ("{}", b"abc", "")


def test_half_a_reply_of_a_killed_node_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a look for several replies at once: Flower waits minutes for the rest of one, all in hand."""
    monkeypatch.setattr(polyfed.flower.grid, "_PATIENCE", 0.1)
    rest, asked = threading.Event(), list[str]()

    def pull_messages(tickets: list[str]) -> list[Any]:
        asked.extend(tickets)
        if "half" in tickets:
            rest.wait(60)
        made = [received(pack(ticket, None)) for ticket in tickets]
        for message, ticket in zip(made, tickets, strict=True):
            message.metadata.reply_to_message_id = ticket
        return made

    grid = FakeGrid()
    grid.pull_messages = pull_messages  # type: ignore[method-assign]
    transport = GridTransport(grid)  # type: ignore[arg-type]
    assert [one.ticket for one in transport.pull(["half", "whole"])] == ["whole"]
    assert transport.pull(["half"]) == []
    rest.set()
    monkeypatch.setattr(polyfed.flower.grid, "_PATIENCE", 60.0)
    assert [one.ticket for one in transport.pull(["other"])] == ["other"]
    end = time.monotonic() + 60
    while not (found := transport.pull(["half"])):
        assert time.monotonic() < end
    assert [one.header for one in found] == ["half"]
    assert asked.count("half") == 1


def test_an_error_of_a_look_is_raised() -> None:
    """Catches a server that is gone, and a thread that dies of it in silence."""

    def pull_messages(tickets: list[str]) -> list[Any]:
        raise ConnectionError("no server")

    grid = FakeGrid()
    grid.pull_messages = pull_messages  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="no server"):
        GridTransport(grid).pull(["id-0"])  # type: ignore[arg-type]


def test_array_takes_bytes_as_they_are() -> None:
    assert Array("uint8", (3,), "polyfed", b"abc").data == b"abc"
