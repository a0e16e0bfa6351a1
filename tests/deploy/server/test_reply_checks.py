"""What a client sends is looked at when it arrives, so that no other client meets it in the next round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_toy import Run, config
from torch import Tensor

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedin import Features, FedIN
from polyfed.algorithms.fiarse import FIARSE
from polyfed.base.errors import MessageError
from polyfed.config import load_algorithm
from polyfed.core.clients import ClientInfo
from polyfed.core.message import decode, encode, flatten, unflatten
from polyfed.deploy.client.local_setup import task_of
from polyfed.deploy.server.reply_checks import check_reply
from polyfed.deploy.wire.frames import Frame
from polyfed.deploy.wire.headers import TaskFacts
from polyfed.deploy.wire.transport import Outgoing

#: A deployed round's check of one client's reply, and what that client received and sent.
Case = tuple[Callable[[Any], None], Any, Any]


def case_of(name: str, folder: Path) -> Case | None:
    """A real upload of the first client; None where none is sent."""
    settings = config(name, "run.rounds=1")
    run = Run(folder, settings)
    algorithm = load_algorithm(name, settings.algorithm.keys)
    seen: list[tuple[Outgoing, Frame]] = []

    def instead(message: Outgoing, go: Callable[[], Frame]) -> Frame:
        frame = go()
        if message.kind == "train" and message.node == 100:
            seen.append((message, frame))
        return frame

    run.memory.instead = instead
    run.serve()
    assert not [row for row in run.events if row["event"] == "failed"], run.events
    message, (_, body) = seen[0]
    if message.body is None or body is None:
        return None
    down, up = decode(message.body, *algorithm.messages), decode(body, *algorithm.messages)
    task = task_of(settings, TaskFacts.model_validate(json.loads(message.header)["task"]))
    info = ClientInfo(0, settings.clients.capacity(0), str(settings.clients.model(0)))
    return lambda sent: check_reply(algorithm, task, info, down, sent), down, up


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case | None]:
    made: dict[str, Case | None] = {}

    def case(name: str) -> Case | None:
        if name not in made:
            made[name] = case_of(name, tmp_path_factory.mktemp(name))
        return made[name]

    return case


def deformed(value: Tensor) -> list[Tensor]:
    """Another shape, another width, another type."""
    wider = [torch.cat([value, value], -1)] if value.dim() else []
    return [value[None], *wider, value.to(torch.float16 if value.is_floating_point() else torch.int8)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_tensor_of_an_upload_may_have_another_shape_or_type(algorithm: str, cases) -> None:
    """Catches an algorithm whose uploads have no counterpart in what it sends, and that does not check them itself."""
    case = cases(algorithm)
    if case is None:
        return  # nothing is sent
    check, _, up = case
    check(up)
    skeleton, kinds = flatten(up)
    tensors = [value for _, value in kinds]
    for place, value in enumerate(tensors):
        for wrong in deformed(value):
            sent = unflatten(skeleton, [*tensors[:place], wrong, *tensors[place + 1 :]], type(up))
            with pytest.raises(MessageError):
                check(sent)


@pytest.mark.parametrize(("algorithm", "field"), [("fedavg", "model"), ("fiarse", "delta"), ("fedin", "layers")])
def test_a_model_of_no_or_of_foreign_tensors_is_refused(algorithm: str, field: str, cases) -> None:
    """Catches a rule of shared names that lets pass what shares none."""
    check, _, up = cases(algorithm)
    for foreign in ({}, {"foreign": torch.zeros(2)}):
        with pytest.raises(MessageError, match=r"counterpart|other names"):
            check(replace(up, **{field: foreign}))


@pytest.mark.parametrize("algorithm", ["fedavg", "fiarse", "fedin"])
def test_a_message_that_goes_the_other_way_is_refused(algorithm: str, cases) -> None:
    """Catches a reply of the broadcast's class, which decodes, and has none of the fields of an upload."""
    check, down, _ = cases(algorithm)
    with pytest.raises(MessageError, match=r"sent a .* back, the kind of message that it received"):
        check(down)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f: replace(f, s_in=f.s_in[:, :2]),  # fewer channels
        lambda f: replace(f, s_out=f.s_out[1:]),  # no longer pairs
        lambda f: replace(f, s_in=f.s_in[:0], s_out=f.s_out[:0]),
        lambda f: replace(f, s_in=f.s_in.repeat(2, 1, 1, 1), s_out=f.s_out.repeat(2, 1)),  # more than feature_batch
        lambda f: replace(f, s_in=torch.tensor(1.0)),
    ],
)
def test_features_that_are_no_pairs_are_refused(wrong: Callable[[Features], Features], cases) -> None:
    check, _, up = cases("fedin")
    with pytest.raises(MessageError, match=r"expected|cannot be checked"):
        check(replace(up, pairs=(wrong(up.pairs[0]),)))


def test_a_bad_pair_is_its_senders_failure_and_nobody_elses(tmp_path: Path) -> None:
    """Catches features that are found to be wrong by the client that gets them in the next round."""
    run = Run(tmp_path, config("fedin"))

    def instead(message: Outgoing, go: Callable[[], Frame]) -> Frame:
        header, body = go()
        if message.kind != "train" or message.node != 100 or json.loads(message.header)["key"][0] != 1:
            return header, body
        assert body is not None
        up: Any = decode(body, *FedIN.messages)
        pair = up.pairs[0]
        return header, encode(replace(up, pairs=(replace(pair, s_out=pair.s_out[:, :-1]),)))

    run.memory.instead = instead
    run.serve()
    failed = [(row["client"], row["round"]) for row in run.events if row["event"] == "failed"]
    assert failed == [(0, 1)]
    assert "s_out has shape" in run.event("failed")["reason"]
    assert [row.get("replies") for row in run.rows] == [None, 2, 3]


def test_a_failure_is_told_in_one_printable_line(tmp_path: Path) -> None:
    """Catches a client's made-up names that command a terminal, or fill a log."""
    run = Run(tmp_path, config("fedavg", "run.rounds=1"))

    def instead(message: Outgoing, go: Callable[[], Frame]) -> Frame:
        header, body = go()
        if message.kind != "train" or message.node != 100:
            return header, body
        assert body is not None
        up: Any = decode(body, *FedAvg.messages)
        return header, encode(replace(up, model={**up.model, "\x1b[2J" + "x" * 10**6: torch.zeros(1)}))

    run.memory.instead = instead
    run.serve()
    reason = run.event("failed")["reason"]
    assert len(reason) <= 500
    assert reason.isprintable()


def test_a_kept_weight_too_many_is_refused(cases) -> None:
    """Catches an upload that another mask was made for."""
    check, _, up = cases("fiarse")
    name = next(name for name, value in up.delta.items() if value.dim() == 1)
    with pytest.raises(MessageError, match="has shape"):
        check(FIARSE.Upload({**up.delta, name: torch.cat([up.delta[name], torch.zeros(1)])}))
