"""A client's answers: what state they leave, once each, and to nobody else."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deploy_toy import Run, config, nodes, same
from requests_to_nodes import kept, train

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.base.errors import CheckpointError
from polyfed.core.message import decode, encode
from polyfed.deploy.client.node import answer
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import ReplyHeader


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("moment", ["received", "trained"])
def test_an_exception_before_the_end_leaves_the_state_of_before(moment: str, tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    before = kept(settings)

    def stop(now: str) -> None:
        if now == moment:
            raise StoppedError

    told = {"since": (1, 1, 1), "settled": (1, 1, 1)}
    header, body = answer(*train(settings, 2, **told), settings, wait=stop)
    assert headers.load(ReplyHeader, header).error == "Error; its text is in the client's log"
    assert body is None
    assert kept(settings).keys() == before.keys()
    assert same(kept(settings)[1, 1, 1], before[1, 1, 1])


@pytest.mark.parametrize(("moment", "after"), [("received", False), ("trained", False), ("kept", True)])
def test_a_kill_leaves_the_state_of_before_or_of_after_and_never_less(moment: str, after: bool, tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    header, body = train(settings, 2, since=(1, 1, 1), settled=(1, 1, 1))
    (tmp_path / "header").write_text(header)
    (tmp_path / "body").write_bytes(body)
    (tmp_path / "node.toml").write_text(settings.to_toml())
    code = f"""
import os, signal
from pathlib import Path
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.base.errors import CheckpointError
from polyfed.deploy.client.node import answer
from polyfed.deploy.settings import NodeSettings
def stop(now):
    if now == {moment!r}:
        os.kill(os.getpid(), signal.SIGKILL)
here = Path({str(tmp_path)!r})
answer((here / "header").read_text(), (here / "body").read_bytes(), NodeSettings.load(here / "node.toml"), wait=stop)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert ((2, 1, 1) in kept(settings)) is after
    assert (1, 1, 1) in kept(settings)
    again, up = answer(header, body, settings)
    assert headers.load(ReplyHeader, again).error is None
    other = NodeSettings(client=0, state_dir=str(tmp_path / "other"))
    answer(*train(other, 1), other)
    _, expected = answer(header, body, other)
    assert up == expected
    assert same(kept(settings)[2, 1, 1], kept(other)[2, 1, 1])


def test_a_repeated_request_is_answered_once(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    asked = train(settings, 1)
    moments: list[str] = []
    first = answer(*asked, settings, wait=moments.append)
    second = answer(*asked, settings, wait=moments.append)
    assert moments.count("trained") == 1
    assert first[1] == second[1]


def test_another_message_under_the_same_key_is_no_repetition(tmp_path: Path) -> None:
    """Catches a server that was resumed without its last round, and is given the answer to its earlier message."""
    settings = nodes(tmp_path)[100]
    header, body = train(settings, 1)
    moments: list[str] = []
    first = answer(header, body, settings, wait=moments.append)
    G = {name: 0.5 * value for name, value in decode(body, FedMRL.Broadcast).G.items()}  # noqa: N806
    second = answer(header, encode(FedMRL.Broadcast(G)), settings, wait=moments.append)
    assert moments.count("trained") == 2
    assert first[1] != second[1]


def test_a_void_round_is_trained_from_the_state_that_counts(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    answer(*train(settings, 1), settings)
    answer(*train(settings, 2, since=(1, 1, 1), settled=(1, 1, 1)), settings)
    _, third = answer(*train(settings, 3, since=(1, 1, 1), settled=(1, 1, 1)), settings)
    assert set(kept(settings)) == {(1, 1, 1), (3, 1, 1)}
    _, fourth = answer(*train(settings, 4, since=(3, 1, 1), settled=(3, 1, 1)), settings)
    assert third != fourth
    assert set(kept(settings)) == {(3, 1, 1), (4, 1, 1)}


def test_a_state_that_was_lost_is_told(tmp_path: Path) -> None:
    settings = nodes(tmp_path)[100]
    header, _ = answer(*train(settings, 5, since=(4, 1, 1), settled=(4, 1, 1)), settings)
    assert headers.load(ReplyHeader, header).lost is True


def test_a_request_for_another_client_is_refused(tmp_path: Path) -> None:
    settings = nodes(tmp_path)
    header, body = train(settings[100], 1)
    told, _ = answer(header, body, settings[101])
    assert (headers.load(ReplyHeader, told).error or "").startswith("MessageError")


def test_a_client_that_tells_nothing_sends_the_declared_message_alone(tmp_path: Path) -> None:
    settings = nodes(tmp_path, tell=())[100]
    header, body = answer(*train(settings, 1, score=True), settings)
    told = headers.load(ReplyHeader, header)
    assert body is not None
    assert told.score is None
    assert told.work == headers.WorkReport()
    assert told.seconds == {}, "the time of the work is the size of the network"
    run = Run(tmp_path / "whole", config(), tell=())
    assert run.serve()["accuracy"] == {"best": None}


def test_own_data_are_read_where_they_lie(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for client in range(3):  # the third has no row of the last class
        y = generator.integers(0, 3 if client < 2 else 2, 60)
        x = generator.normal(size=(60, 5)) + 3 * y[:, None]
        np.savez(tmp_path / f"hospital-{client}.npz", x=x.astype(np.float32), y=y)
    run = Run(tmp_path, config("fedmrl", 'clients.models=["mlp(hidden=(8,))"]'))
    run.memory.settings = {
        node: settings.model_copy(update={"data": str(tmp_path / f"hospital-{settings.client}.npz")})
        for node, settings in run.memory.settings.items()
    }
    summary = run.serve()
    assert summary["accuracy"]["clients"] == 3
    assert [row.get("replies") for row in run.rows] == [None, 3, 3]


def test_an_algorithm_that_must_know_the_network_refuses_a_private_one(tmp_path: Path) -> None:
    from polyfed.base.errors import ModelError

    run = Run(tmp_path, config("fedavg"))
    run.memory.settings[101] = run.memory.settings[101].model_copy(update={"model": "mlp(hidden=(24,))"})
    with pytest.raises(ModelError, match="private networks"):
        run.serve()


def own_rows(path: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    y = np.arange(60) % 3
    np.savez(path, x=(generator.normal(size=(60, 5)) + 3 * y[:, None]).astype(np.float32), y=y)
    return path


def test_a_client_does_not_go_on_with_other_data_and_tells_only_itself_which(tmp_path: Path) -> None:
    """Catches a site whose file was replaced in the middle of a run; and a refusal of a file that was only touched."""
    path = own_rows(tmp_path / "ward.npz")
    settings = NodeSettings(client=0, state_dir=str(tmp_path / "site"), data=str(path))
    answer(*train(settings, 1), settings)
    asked = train(settings, 2, since=(1, 1, 1), settled=(1, 1, 1))
    own_rows(path, seed=1)
    header, _ = answer(*asked, settings)
    assert headers.load(ReplyHeader, header).error == "CheckpointError; its text is in the client's log"
    log = (tmp_path / "site" / "errors.jsonl").read_text()
    assert "begun with another content: data file ward.npz changed" in log
    own_rows(path)
    os.utime(path, (1, 1))
    header, _ = answer(*asked, settings)
    assert headers.load(ReplyHeader, header).error is None


def test_digests_of_a_clients_data_stay_with_the_client(tmp_path: Path) -> None:
    """Catches a digest by which a server could tell that two clients, or one and a public file, have the same rows."""
    run = Run(tmp_path, config("fedmrl", 'clients.models=["mlp(hidden=(8,))"]'))
    digests: list[bytes] = []
    for node, settings in run.memory.settings.items():
        path = own_rows(tmp_path / f"{node}.npz", seed=node)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest().encode())
        run.memory.settings[node] = settings.model_copy(update={"data": str(path)})
    run.serve()
    sent = b"".join(header.encode() + (body or b"") for header, body in run.memory.replies)
    at_server = b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    for digest, settings in zip(digests, run.memory.settings.values(), strict=True):
        content = Path(settings.state_dir) / run.experiment / f"client-{settings.client}" / "content.json"
        assert digest in content.read_bytes()
        assert stat.S_IMODE(content.stat().st_mode) == 0o600
        for place in (sent, at_server):
            assert place
            for part in (digest[:16], digest[-16:]):
                assert part not in place


def test_a_server_does_not_go_on_with_other_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, config("fedmrl"))
    run.serve()
    monkeypatch.setattr(FedMRL, "numbers", 2)
    with pytest.raises(CheckpointError, match="fedmrl:FedMRL changed from 1 to 2"):
        run.serve()
