"""Who may be a client: the node whose key was registered for its number, and nobody else learns of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deploy_toy import RULES, Run, config, nodes

from polyfed.deploy.server.loop import create
from polyfed.deploy.settings import Deployment
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import ReplyHeader, RequestHeader


class Registered(Run):
    """A run whose nodes have keys: node 100 + K is that of client K."""

    def __init__(self, folder: Path, *rules: str) -> None:
        super().__init__(folder, config("fedavg"), ["rounds.min_clients=2", "rounds.start_timeout=60", *rules])
        self.nodes = folder / "nodes.json"
        self.bind({100: 0, 101: 1, 102: 2})
        self.folder = folder / "registered"
        deployment = Deployment.load(None, [*RULES, "rounds.min_clients=2", "rounds.start_timeout=60", *rules])
        self.experiment = create(self.folder, self.config, deployment, self.nodes)

    def bind(self, bound: dict[int, int]) -> None:
        self.nodes.write_text(json.dumps({str(node): {"client": client, "key": "x"} for node, client in bound.items()}))

    def sent(self, node: int) -> list[RequestHeader]:
        return [headers.load(RequestHeader, message.header) for message in self.memory.log if message.node == node]


def test_a_node_that_is_not_registered_learns_nothing(tmp_path: Path) -> None:
    """Catches a configuration that goes to any node that asks the engine for work."""
    run = Registered(tmp_path)
    run.bind({100: 0, 101: 1})
    run.serve()
    assert run.sent(102) == []
    refused = run.event("refused")
    assert refused["node"] == "102"
    assert "registered for no client" in refused["reason"]
    assert run.rows[-1]["cohort"] == [0, 1]


def test_a_node_that_claims_another_number_is_refused_and_both_sides_say_why(tmp_path: Path) -> None:
    run = Registered(tmp_path)
    run.memory.settings[101] = nodes(tmp_path)[102].model_copy(update={"state_dir": str(tmp_path / "false")})
    run.memory.online = {100, 101, 102}
    run.serve()
    refused = run.event("refused")
    assert (refused["node"], refused["client"]) == ("101", 1)
    assert "its key is that of client 1, but it says that it is client 2" in refused["reason"]
    (line,) = (tmp_path / "false" / "errors.jsonl").read_text().splitlines()
    assert (
        "knows this node's key as that of client 1, but the node was started as client 2" in json.loads(line)["error"]
    )
    assert run.rows[-1]["cohort"] == [0, 2]


@pytest.mark.parametrize("where", ["header", "about"])
def test_a_reply_that_claims_another_number_is_not_believed(where: str, tmp_path: Path) -> None:
    """Catches a check at the node alone, which an intruder leaves out."""
    run = Registered(tmp_path)

    def instead(message, go):
        header, body = go()
        if message.node == 101 and message.kind == "describe":
            told = json.loads(header)
            (told if where == "header" else told["about"])["client"] = 0
            return json.dumps(told), body
        return header, body

    run.memory.instead = instead
    run.serve()
    assert "says that it is client 0" in run.event("refused")["reason"]
    assert run.rows[-1]["cohort"] == [0, 2]
    assert {m.node for m in run.memory.log if m.kind == "train"} == {100, 102}


def test_a_key_that_is_replaced_while_the_run_goes_on_changes_the_node(tmp_path: Path) -> None:
    run = Registered(tmp_path, 'rounds.on_error="retry"')
    run.memory.settings[201] = run.memory.settings[101]

    def instead(message, go):
        frame = go()
        if message.kind == "train" and message.node == 102 and headers.load(RequestHeader, message.header).key[0] == 1:
            run.bind({100: 0, 201: 1, 102: 2})
            run.memory.online |= {201}
        return frame

    run.memory.instead = instead
    run.serve()
    assert [message.key[0] for message in run.sent(101) if message.kind == "train"] == [1]
    assert run.rows[-1]["round"] == 2
    last = [message for message in run.sent(201) if message.kind in ("train", "evaluate")]
    assert last
    assert all(message.client == 1 for message in run.sent(201))


def test_what_stops_a_client_is_short_at_the_server_and_names_client_and_remedy(tmp_path: Path) -> None:
    """Catches a refusal without the number of the client, and one that says where the text is but not what to do."""
    run = Run(tmp_path, config("fedmrl"), ["rounds.min_clients=1"])
    missing = run.memory.settings[102].model_copy(update={"data": str(tmp_path / "secret-name.csv")})
    nowhere = run.memory.settings[101].model_copy(update={"model": "nowhere_nets:Net"})
    run.memory.settings |= {102: missing, 101: nowhere}
    run.serve()
    reasons = {row["client"]: row["reason"] for row in run.events if row["event"] == "refused"}
    assert reasons[2].startswith("DataError; its text is in the client's log, and on its terminal; correct its data")
    assert reasons[1].startswith("ModelError; ")
    assert "--model" in reasons[1]
    assert "secret-name" not in json.dumps(run.events)
    assert "nowhere_nets" not in json.dumps(run.events)
    assert "nowhere_nets" in (tmp_path / "site-1" / "errors.jsonl").read_text()
    replies = [headers.load(ReplyHeader, header) for header, _ in run.memory.replies]
    assert any(reply.error for reply in replies)
