"""Rounds that survive: whatever a client does, the round ends, it is told, and the training goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deploy_toy import Run, config, same

from polyfed.base.errors import ConfigError
from polyfed.blocks.aggregate import MeanByName
from polyfed.core.message import Message, decode, encode
from polyfed.deploy.server.clients import ClientFailedError
from polyfed.deploy.server.loop import TooFewClientsError
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire.frames import Frame
from polyfed.deploy.wire.headers import Counts
from polyfed.deploy.wire.transport import Incoming, Outgoing

Go = Callable[[], Frame]


def round_of(message: Outgoing) -> int:
    return json.loads(message.header)["key"][0]


def in_round(number: int, node: int, then: Callable[[Outgoing, Go], Frame | str | None]):
    """``then`` for one node's training of one round; all else is answered."""

    def instead(message: Outgoing, go: Go) -> Frame | str | None:
        hit = message.kind == "train" and message.node == node and round_of(message) == number
        return then(message, go) if hit else go()

    return instead


def changed(run: Run, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]):
    """A reply whose tensors were changed on the way."""
    from polyfed.algorithms.fedavg import FedAvg

    def then(message: Outgoing, go: Go) -> Frame:
        header, body = go()
        assert body is not None
        upload: Message = decode(body, *FedAvg.messages)
        return header, encode(FedAvg.Upload(change(dict(upload.model)), upload.num_examples))  # type: ignore[attr-defined]

    return then


def test_an_error_of_the_engine_is_told_and_the_round_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"))
    run.memory.instead = in_round(1, 101, lambda message, go: "Flower reports error 5: node unavailable")
    run.serve()
    told = run.event("failed")
    assert told["client"] == 1
    assert "error 5" in told["reason"]
    assert [row.get("replies") for row in run.rows] == [None, 2, 3]
    assert run.rows[1]["events"][0]["event"] == "failed"


def test_a_client_that_raises_keeps_its_state_and_its_secrets(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl"))
    straight = Run(tmp_path / "straight", config("fedmrl", "run.rounds=1"))
    straight.serve()

    def broken(message: Outgoing, go: Go) -> Frame:
        header = json.loads(message.header)
        header["config"]["train"]["lr"] = 1e30  # diverges: raises in mid-training
        from polyfed.deploy.client.node import answer

        return answer(json.dumps(header), message.body, run.memory.settings[message.node])

    run.memory.instead = in_round(2, 101, broken)
    run.serve()
    assert run.event("failed")["reason"].startswith("DivergedError")
    assert "lower train.lr" in run.event("failed")["reason"]
    assert "not finite" not in json.dumps(run.events)  # the text could name layers
    assert "not finite" in (Path(run.memory.settings[101].state_dir) / "errors.jsonl").read_text()
    assert same(run.private()[1], straight.private()[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: {**w, "fc1.weight": w["fc1.weight"] * float("nan")}, "not finite"),
        (lambda w: {**w, "fc1.weight": w["fc1.weight"][:, :3]}, "shape"),
        (lambda w: {**w, "fc1.weight": w["fc1.weight"].double()}, "float64"),
        (lambda w: {name: v for name, v in w.items() if name != "fc1.bias"}, "other names"),
    ],
)
def test_wrong_numbers_shapes_types_and_names_are_not_aggregated(change, reason: str, tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"))
    run.memory.instead = in_round(1, 100, changed(run, change))
    run.serve()
    assert reason in run.event("failed")["reason"]
    assert [row.get("replies") for row in run.rows] == [None, 2, 3]
    assert all(bool(torch.isfinite(value).all()) for value in run.server().values())


@pytest.mark.parametrize("body", [b"", b"not a message", b"PLYF\x01\0\0\0" + b"\xff" * 20, b"\x80\x04\x95"])
def test_bytes_that_do_not_decode_are_a_told_failure(body: bytes, tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"))
    run.memory.instead = in_round(1, 100, lambda message, go: (go()[0], body))
    run.serve()
    assert run.event("failed")["client"] == 0


@pytest.mark.parametrize("header", ["", "{}", "[1]", '{"kind": "train", "more": 1}', "x" * 2_000_000])
def test_a_damaged_header_is_a_told_failure(header: str, tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"))
    run.memory.instead = in_round(1, 100, lambda message, go: (header, None))
    run.serve()
    assert "header" in run.event("failed")["reason"]


@pytest.mark.parametrize("correct", [{"weird": 1}, {"global": 1, "more": 1}, {"global": 10**9}])
def test_a_test_that_cannot_be_is_not_counted(correct: dict[str, int], tmp_path: Path) -> None:
    """Catches an accuracy above 1, and a name that no other client tells, which ended the run with a KeyError."""
    run = Run(tmp_path, config("fedavg"))

    def instead(message: Outgoing, go: Go) -> Frame:
        header, body = go()
        if message.kind != "evaluate" or message.node != 100:
            return header, body
        told = json.loads(header)
        told["score"]["correct"] = correct
        return json.dumps(told), body

    run.memory.instead = instead
    accuracy = run.serve()["accuracy"]
    assert accuracy["clients"] == 2
    assert 0 <= accuracy["mean"] <= 1
    assert {row["client"] for row in run.events if row["event"] == "failed"} == {0}


@pytest.mark.parametrize("correct", [{"a": 6, "b": 3}, {"a": 3, "b": 6}])
def test_no_predictor_is_right_more_often_than_it_is_asked(correct: dict[str, int]) -> None:
    """Catches a check of one predictor only."""
    Counts(examples=6, correct=correct)
    with pytest.raises(ValueError, match="got 6 right answers of 5 examples"):
        Counts(examples=5, correct=correct)


def test_an_answer_to_another_round_is_not_used(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"))
    kept: list[Frame] = []

    def instead(message: Outgoing, go: Go) -> Frame:
        frame = go()
        if message.kind == "train" and message.node == 100:
            kept.append(frame)
            return kept[0]
        return frame

    run.memory.instead = instead
    run.serve()
    assert "the reply belongs to request " in run.event("failed")["reason"]


def test_messages_above_the_limit_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg", "run.rounds=3"), ["rounds.max_message=0.001"])
    with pytest.raises(TooFewClientsError, match="3 attempts in a row were void"):
        run.serve()
    assert "limit" in run.event("failed")["reason"]


def test_silence_ends_with_the_deadline_and_a_late_reply_is_not_used(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"), ["rounds.deadline=0.5"])

    def silent(message: Outgoing, go: Go) -> None:
        ticket = f"ticket-{run.memory.log.index(message) + 1}"
        run.memory.late[ticket] = Incoming(ticket, *go())
        return None

    calls = [0]
    pull = run.memory.pull

    def slow(tickets):
        calls[0] += 1
        late = dict(run.memory.late) if round_of(run.memory.log[-1]) == 1 else {}
        for ticket in late:
            del run.memory.late[ticket]
        found = pull(tickets)
        run.memory.late |= late
        return found

    run.memory.pull = slow  # type: ignore[method-assign]
    run.memory.instead = in_round(1, 102, silent)
    run.serve()
    assert "no reply within" in run.event("failed")["reason"]
    assert run.event("late")["client"] == 2
    assert [row.get("replies") for row in run.rows] == [None, 2, 3]


def test_too_few_replies_make_a_round_void_and_leave_all_states(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl", "run.rounds=3"), ["rounds.min_replies=2"])
    only = Run(tmp_path / "without", config("fedmrl", "run.rounds=1"))
    only.serve()
    before = only.server()

    def instead(message: Outgoing, go: Go) -> Frame | str:
        return "gone" if message.kind == "train" and message.node != 100 and round_of(message) == 2 else go()

    seen: list[bool] = []

    def callback(message: Outgoing, go: Go) -> Frame | str | None:
        if message.kind == "train" and round_of(message) == 3 and not seen:
            seen.append(same(run.server(), before))
        return instead(message, go)

    run.memory.instead = callback
    run.serve()
    assert seen == [True]
    assert run.rows[2]["void"] is True
    assert run.event("void")["reason"].startswith("TooFewRepliesError")
    # Client 0 did train in the void round; what it kept then does not count.
    third = [json.loads(m.header) for m in run.memory.log if m.kind == "train" and round_of(m) == 3]
    assert all(header["since"] == [1, 1, 1] for header in third)


def test_capacities_follow_the_seconds_of_void_rounds(tmp_path: Path) -> None:
    """Catches a void round that teaches nothing: where all clients are too slow, so would every later one be."""
    keys = ("algorithm.threshold=adaptive", "algorithm.deadline=1e-6", "algorithm.least_capacity=0.01")
    run = Run(tmp_path, config("fiarse", "run.rounds=2", "run.eval_every=2", *keys), ["rounds.min_replies=2"])

    def instead(message: Outgoing, go: Go) -> Frame | str:
        return "gone" if message.kind == "train" and message.node != 100 and round_of(message) == 1 else go()

    run.memory.instead = instead
    run.serve()
    assert [row.get("void") for row in run.rows] == [None, True, None]
    sent = {(round_of(m), m.node): len(m.body) for m in run.memory.log if m.kind == "train"}
    assert sent[2, 100] < 0.75 * sent[1, 100]  # it answered, and too slowly
    assert sent[2, 101] == sent[1, 101]  # it told nothing


def test_retry_plays_a_void_round_again_and_gets_the_same_numbers(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", config("fedmrl"))
    straight.serve()
    run = Run(tmp_path, config("fedmrl"), ["rounds.min_replies=3", 'rounds.on_error="retry"'])
    failed: list[int] = []

    def twice(message: Outgoing, go: Go) -> Frame | str:
        failed.append(1)
        return "gone" if len(failed) <= 2 else go()  # the first message and its retry

    run.memory.instead = in_round(1, 101, twice)
    run.serve()
    assert run.event("void")["attempt"] == 1
    assert same(run.server(), straight.server())
    assert all(same(run.private()[k], straight.private()[k]) for k in range(3))


def test_a_lost_reply_is_asked_for_again_and_answered_without_training(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", config("fiarse"))
    straight.serve()
    run = Run(tmp_path, config("fiarse"), ['rounds.on_error="retry"'])
    lost: list[Frame] = []

    def lose(message: Outgoing, go: Go) -> Frame | str:
        frame = go()
        lost.append(frame)
        return "the reply was lost" if len(lost) == 1 else frame

    run.memory.instead = in_round(1, 102, lose)
    run.serve()
    first, second = (json.loads(header) for header, _ in lost)
    assert first["work"] == second["work"]  # seconds and all: it was kept, not computed
    assert lost[0][1] == lost[1][1]
    assert run.event("failed")["again"] is True
    assert same(run.server(), straight.server())  # with the mask that this round gave to whom


def test_abort_ends_the_run_at_the_first_failure(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"), ['rounds.on_error="abort"'])
    run.memory.instead = in_round(2, 101, lambda message, go: "gone")
    with pytest.raises(ClientFailedError, match="client 1, round 2: gone"):
        run.serve()
    assert json.loads((run.folder / "status.json").read_text())["state"] == "failed"


def test_an_over_sampled_round_ends_when_enough_have_answered(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg", "clients.participation=0.67"), ["rounds.oversample=0.5"])
    run.serve()
    assert [row.get("replies") for row in run.rows] == [None, 2, 2]
    assert run.event("surplus")["round"] == 1


def test_a_client_may_join_late_leave_and_come_back_elsewhere(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedmrl", "run.rounds=6"), ["rounds.min_clients=2"])
    run.memory.online = {100, 101}

    def instead(message: Outgoing, go: Go) -> Frame | str:
        if message.kind == "train" and round_of(message) == 1:
            run.memory.online |= {102}
        if message.kind == "train" and round_of(message) == 3:  # client 1's node dies, and starts anew
            run.memory.settings[201] = run.memory.settings[101]
            run.memory.online = {100, 102, 201}
        return go()

    run.memory.instead = instead
    run.serve()
    assert run.rows[1]["cohort"] == [0, 1]
    assert run.rows[-1]["cohort"] == [0, 1, 2]
    joined = [(row["client"], row["again"]) for row in run.events if row["event"] == "joined"]
    assert (2, False) in joined
    assert (1, True) in joined
    last = [json.loads(m.header) for m in run.memory.log if m.kind == "train" and m.node == 201]
    assert last[0]["since"] is not None  # its private state was where it left it
    assert not [row for row in run.events if row["event"] == "lost-state"]
    # Who is not there is not asked to be tested.
    assert not [
        row for row in run.events if row["event"] == "failed" and (row["kind"], row["client"]) == ("evaluate", 2)
    ]


def test_replies_that_cannot_be_put_together_make_the_round_void(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path, config("fedavg"))
    real, calls = MeanByName.finish, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("sizes differ")
        return real(*arguments)

    monkeypatch.setattr(MeanByName, "finish", broken)
    run.serve()
    assert "RuntimeError: sizes differ" in run.event("void")["reason"]
    assert [row.get("void") for row in run.rows] == [None, True, None]


def test_nobody_answers_stops_the_run_and_resume_goes_on(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", config("fedmrl"))
    straight.serve()
    run = Run(tmp_path, config("fedmrl"), ['rounds.on_error="retry"'])
    run.memory.instead = lambda message, go: "gone" if message.kind == "train" and round_of(message) == 2 else go()
    with pytest.raises(TooFewClientsError, match="polyfed deploy resume"):
        run.serve()
    run.memory.instead = lambda message, go: go()
    run.serve()
    assert same(run.server(), straight.server())
    assert all(same(run.private()[k], straight.private()[k]) for k in range(3))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_killed_server_goes_on_at_the_round_that_was_due(kind: str, tmp_path: Path) -> None:
    settings = config("fedmrl", "run.rounds=3", "run.eval_every=1")
    straight = Run(tmp_path / "straight", settings)
    expected = straight.serve()
    run = Run(tmp_path, settings)

    def killed(message: Outgoing, go: Go) -> Frame:
        if message.kind == kind and message.node == 102 and round_of(message) == 2:
            go()
            raise KeyboardInterrupt
        return go()

    run.memory.instead = killed
    with pytest.raises(KeyboardInterrupt):
        run.serve()
    run.memory.instead = lambda message, go: go()
    found = run.serve()
    assert run.event("resumed")["round"] == 1
    assert [row["round"] for row in run.rows] == [0, 1, 2, 3]
    assert same(run.server(), straight.server())
    assert all(same(run.private()[k], straight.private()[k]) for k in range(3))
    assert found["accuracy"]["mean"] == expected["accuracy"]["mean"]


def test_too_few_clients_at_the_start_is_an_error_that_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"), ["rounds.min_replies=3"])
    run.memory.online = {100}
    with pytest.raises(TooFewClientsError, match="1 of 3 clients"):
        run.serve()


def test_a_run_begins_with_all_clients_unless_fewer_are_permitted(tmp_path: Path) -> None:
    """Catches a run that begins without a hospital because one reply is enough for a round."""
    run = Run(tmp_path, config("fedavg", 'clients.names=["Ulm", "Bonn", "Jena"]'))
    run.memory.online = {100, 102}
    with pytest.raises(TooFewClientsError, match=r"2 of 3 clients.*missing: client 1 \(Bonn\).*rounds\.min_clients"):
        run.serve()
    assert run.rows == []
    path = run.folder / "deploy.toml"
    path.write_text(path.read_text().replace("[rounds]", "[rounds]\nmin_clients = 2"))
    found = run.serve()
    assert run.rows[-1]["cohort"] == [0, 2]
    assert found["deployed"]["missing"] == {"begin": [1], "end": [1]}


def test_a_run_that_goes_on_needs_as_many_clients_as_a_round(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg", "run.rounds=3"), ["rounds.min_replies=2"])

    def killed(message: Outgoing, go: Go) -> Frame:
        if round_of(message) == 2:
            raise KeyboardInterrupt
        return go()

    run.memory.instead = killed
    with pytest.raises(KeyboardInterrupt):
        run.serve()
    run.memory.instead = lambda message, go: go()
    run.memory.online = {100}
    with pytest.raises(TooFewClientsError, match=r"1 of 3 clients.*missing: client 1, client 2.*min_replies = 2"):
        run.serve()
    run.memory.online = {100, 102}
    found = run.serve()
    assert run.event("incomplete")["missing"] == [1]
    assert found["deployed"]["missing"] == {"begin": [], "end": [1]}


def test_more_clients_than_there_are_cannot_be_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.min_clients: got 4; expected at most clients\.count = 3"):
        Run(tmp_path, config("fedavg"), ["rounds.min_clients=4"])


def test_a_client_that_is_mended_is_asked_again_and_takes_part(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("polyfed.deploy.server.registry._AGAIN", 0.0)
    run = Run(tmp_path, config("fedmrl", "run.rounds=6"), ["rounds.min_clients=2"])
    good = run.memory.settings[102]
    run.memory.settings[102] = good.model_copy(update={"data": str(tmp_path / "missing.csv")})

    def instead(message: Outgoing, go: Go) -> Frame:
        if message.kind == "train" and round_of(message) == 2:
            run.memory.settings[102] = good
        return go()

    run.memory.instead = instead
    run.serve()
    assert run.event("refused")["reason"].startswith("DataError")
    assert run.rows[1]["cohort"] == [0, 1]
    assert run.rows[-1]["cohort"] == [0, 1, 2]


def test_a_client_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = Run(tmp_path, config("fedavg"))
    run.memory.settings[104] = NodeSettings(client=7, state_dir=str(tmp_path / "site-7"))
    run.memory.online.add(104)
    run.serve()
    assert run.event("refused")["reason"]
    assert run.rows[-1]["cohort"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("devices.dropout=0.0", "real clocks"),
        ("run.keep_rounds=[1]", "for simulated runs"),
        ('clients.selection="by-size"', 'examples .* "by-capacity" or "stratified"'),
        ('clients.selection="largest"', 'while no client .* "by-capacity" or "stratified"'),
    ],
)
def test_what_only_a_simulation_can_do_is_refused(key: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        Run(tmp_path, config("fedavg", key))
    assert not (tmp_path / "run").exists()


def test_clients_are_drawn_by_capacity(tmp_path: Path) -> None:
    keys = ("run.rounds=6", "clients.participation=0.4", "clients.capacities=[1.0,0.001,0.001]")
    run = Run(tmp_path, config("fedavg", *keys, 'clients.selection="by-capacity"'))
    run.serve()
    assert [row["cohort"] for row in run.rows[1:]] == [[0]] * 6


def leaving(run: Run, node: int, number: int, looks: int | None, *, before: bool):
    """One node leaves in a round, before or after it trained, and is back after so many looks; None: never."""
    left, asked = [0], list[int]()

    def nodes() -> list[int]:
        if left[0]:
            left[0] += 1
            if looks is not None and left[0] > looks:
                run.memory.online.add(node)
        return sorted(run.memory.online)

    def gone(message: Outgoing, go: Go) -> Frame | None:
        asked.append(round_of(message))
        if len(asked) > 1:
            return go()
        if not before:
            go()
        left[0] = 1
        run.memory.online.discard(node)
        return None  # the message is lost with the node

    run.memory.nodes = nodes  # type: ignore[method-assign]
    run.memory.instead = in_round(number, node, gone)
    return asked


@pytest.mark.parametrize("before", [True, False])
def test_retry_waits_for_a_client_that_comes_back_before_the_deadline(before: bool, tmp_path: Path) -> None:
    """Catches a round that goes on at once without a client that left, and one that waits and never asks it again."""
    straight = Run(tmp_path / "straight", config("fedmrl"))
    straight.serve()
    run = Run(tmp_path, config("fedmrl"), ['rounds.on_error="retry"'])
    asked = leaving(run, 101, 1, looks=4, before=before)
    run.serve()
    assert asked == [1, 1]
    failed = run.event("failed")
    assert (failed["client"], failed["again"]) == (1, True)
    assert "no longer connected" in failed["reason"]
    assert [row.get("replies") for row in run.rows] == [None, 3, 3]
    assert same(run.server(), straight.server())
    assert all(same(run.private()[k], straight.private()[k]) for k in range(3))


@pytest.mark.parametrize(("least", "void"), [(1, False), (3, True)])
def test_a_client_that_does_not_come_back_is_given_up_at_the_deadline(least: int, void: bool, tmp_path: Path) -> None:
    """Catches a lost client for which every later round waits, and one that makes a round void before its deadline."""
    rules = [f"rounds.min_replies={least}", "rounds.deadline=0.5", 'rounds.on_error="retry"', "rounds.max_void=2"]
    run = Run(tmp_path, config("fedavg"), rules)
    leaving(run, 101, 1, looks=None, before=True)
    if void:
        with pytest.raises(TooFewClientsError, match="2 attempts in a row were void"):
            run.serve()
        assert "2 of 3 clients answered" in run.event("void")["reason"]
    else:
        run.serve()
        assert [row.get("cohort") for row in run.rows] == [None, [0, 1, 2], [0, 2]]
        assert [row.get("replies") for row in run.rows] == [None, 2, 2]
    reasons = [row["reason"] for row in run.events if row["event"] == "failed"]
    assert reasons[:2] == [
        "it is no longer connected; the round waits for it",
        "it was not connected at the deadline, after 0.5 s",
    ]


def test_retry_draws_a_client_that_left_between_rounds_and_waits_for_it(tmp_path: Path) -> None:
    """Catches a cohort without the client that left just before it was drawn."""
    run = Run(tmp_path, config("fedavg"), ['rounds.on_error="retry"'])
    looks = [0]

    def nodes() -> list[int]:
        if looks[0]:
            looks[0] += 1
            if looks[0] > 4:
                run.memory.online.add(102)
        return sorted(run.memory.online)

    def instead(message: Outgoing, go: Go) -> Frame:
        frame = go()
        if message.kind == "train" and round_of(message) == 1 and message.node == 102:
            run.memory.online.discard(102)
            looks[0] = 1
        return frame

    run.memory.nodes = nodes  # type: ignore[method-assign]
    run.memory.instead = instead
    run.serve()
    assert [row.get("cohort") for row in run.rows] == [None, [0, 1, 2], [0, 1, 2]]
    assert [row.get("replies") for row in run.rows] == [None, 3, 3]
