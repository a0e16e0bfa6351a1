"""The clients as a deployed server meets them: what is in memory while requests go out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from deploy_memory import Memory
from deploy_toy import Run, config

from polyfed.core.message import Message, encode
from polyfed.deploy.client.node import answer
from polyfed.deploy.server import clients
from polyfed.deploy.wire.transport import Incoming, Outgoing


class Body(bytes):
    """Bytes that are counted as long as they live."""

    alive = most = made = 0

    def __init__(self, *_: bytes) -> None:
        Body.alive, Body.made = Body.alive + 1, Body.made + 1
        Body.most = max(Body.most, Body.alive)

    def __del__(self) -> None:
        Body.alive -= 1


class AtOnce(Memory):
    """Answers a request when it is sent, and keeps no request."""

    def push(self, messages: Sequence[Outgoing]) -> list[str | None]:
        tickets: list[str | None] = []
        for message in messages:
            ticket = f"ticket-{len(self.replies)}"
            self.replies.append(answer(message.header, message.body, self.settings[message.node]))
            self.late[ticket] = Incoming(ticket, *self.replies[-1])
            tickets.append(ticket)
        return tickets


@pytest.mark.parametrize(("algorithm", "made"), [("fedproto", 3), ("fedmrl", 1), ("fedavg", 1)])
def test_no_more_requests_are_in_memory_than_go_out_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, made: int
) -> None:
    """Catches a message for each client, kept encoded until the last has replied; and a broadcast encoded for each."""

    def counted(message: Message) -> bytes:
        return Body(encode(message))

    monkeypatch.setattr(clients, "encode", counted)
    monkeypatch.setattr(clients, "_AT_ONCE", 1)
    for name in ("alive", "most", "made"):
        monkeypatch.setattr(Body, name, 0)
    run = Run(
        tmp_path,
        config(algorithm, "run.rounds=1", "run.eval_every=2", "run.eval_clients=1"),
        ["rounds.start_timeout=60"],
    )
    run.memory = AtOnce(run.memory.settings)
    run.serve()
    assert [row.get("replies") for row in run.rows] == [None, 3]
    tests = 2  # of one client, before the first round and after the last
    kept = {"fedproto": 3, "fedmrl": 2, "fedavg": 1}[algorithm]  # at the end: by client, by network, for all
    assert Body.made == made + tests + kept
    assert (Body.most, Body.alive) == (1, 0)


@pytest.mark.parametrize("told", [True, False])
def test_capacities_follow_the_seconds_that_clients_tell(tmp_path: Path, told: bool) -> None:
    """Catches a deployed run without seconds; and a client that tells none and shrinks all the same."""
    keys = ("algorithm.threshold=adaptive", "algorithm.deadline=1e-6", "algorithm.least_capacity=0.01")
    settings = config("fiarse", "run.rounds=3", "run.eval_every=3", *keys)
    run = Run(tmp_path, settings, ["rounds.start_timeout=60"], tell=None if told else ("scores",))
    run.memory = AtOnce(run.memory.settings)
    run.serve()
    first, second, third = (row["bytes"]["up"] for row in run.rows[1:])
    if told:
        assert second / first == pytest.approx(0.5, abs=0.05)
        assert third / second == pytest.approx(0.5, abs=0.08)
    else:
        assert first == second == third
