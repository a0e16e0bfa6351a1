"""Clients in a process of their own: only bytes cross, and private states stay where they are.

What a deployment does, without a network: the other process builds its federation from the configuration, keeps the
private states, and runs the clients' coroutines; this one runs the server's. A frame is a header in JSON and, for
each message, what `encode` wrote. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import polyfed.base.errors
from polyfed.base.errors import PolyfedError
from polyfed.base.types import ClientId
from polyfed.config import Config
from polyfed.core.clients import Cohort
from polyfed.core.gather import Gathered
from polyfed.core.message import decode, encode
from polyfed.core.requests import Exchange
from polyfed.execute.drivers import Work, make_driver
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.gathering import Gathering
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Down, Report, measure
from polyfed.storage.state_store import Store
from polyfed.testing.clients import Unpriced
from polyfed.testing.compare import digest


class Child:
    """A process that serves clients until it is closed; one serves any number of runs, one after another."""

    def __init__(self) -> None:
        self._connection, there = Pipe()
        # The same modules must be importable there, an algorithm beside the tests among them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        code = f"from polyfed.testing.process import serve; serve({there.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[there.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        there.close()

    def ask(self, header: Mapping[str, Any], frames: Sequence[bytes] = ()) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request and wait for the answer.

        Raises:
            PolyfedError: what the other process raised, of the same class.
            RuntimeError: it raised something else, or ended.
        """
        try:
            _send(self._connection, header, frames)
            answer, back = _receive(self._connection)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the clients' process ended (exit code {self._process.wait()})") from error
        if "error" in answer:
            name, text = answer["error"]
            raised = getattr(polyfed.base.errors, name, None)
            raise raised(text) if raised else RuntimeError(f"{name} in the clients' process: {text}")
        return answer, back

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()


class ProcessClients:
    """The clients of a federation, living in a `Child`. A `polyfed.rounds.clients.Clients`.

    Args:
        child: where they live; what lived there before is gone.
        federation: the server's view; the other process makes its own from the configuration.
        placement: device and precision of the clients' work.
        driver: by which they run.
    """

    def __init__(self, child: Child, federation: Federation, placement: Placement, driver: str = "sequential") -> None:
        self.child, self.federation = child, federation
        answer, _ = child.ask(
            {
                "do": "open",
                "config": federation.config.to_dict(),
                "place": [str(placement.device), placement.precision],
                "driver": driver,
                "threads": torch.get_num_threads(),
            }
        )
        if answer["partition"] != federation.partition.hash:
            raise PolyfedError("the clients' process dealt the data differently; does it read the same files?")

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Send each client its bytes and add up what comes back."""
        cohort, down = request.cohort, request.down
        header = {"do": "exchange", "round": cohort.round, "rounds": cohort.rounds, "score": score}
        answer, frames = self._send(header, down)
        known = self.federation.algorithm.messages
        up = {client: decode(frame, *known) for client, frame in zip(answer["told"], frames, strict=True)}
        costs: dict[ClientId, Report] = {}
        for client, work, found in answer["costs"]:
            tested = None if found is None else Score(**found)
            costs[client] = Report(Work(**work), measure(down[client]), measure(up.get(client)), tested)
        with Gathering(request.gather, known, None, costs) as gathering:
            for info in cohort:
                gathering.put(info, up.get(info.id))
            return gathering.settle(costs, {}), costs

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Send each client what it predicts with; bring back counts."""
        answer, _ = self._send({"do": "evaluate", "round": round_}, down)
        return {client: Score(**found) for client, found in answer["scores"]}

    def _send(self, header: Mapping[str, Any], down: Down) -> tuple[dict[str, Any], list[bytes]]:
        told = [client for client, message in down.items() if message is not None]
        frames = [encode(message) for message in down.values() if message is not None]
        return self.child.ask({**header, "clients": list(down), "told": told}, frames)

    def commit(self) -> None:
        """The round is complete there too."""
        self.child.ask({"do": "commit"})

    def digests(self) -> dict[ClientId, str]:
        """A hash of every client's private state."""
        answer, _ = self.child.ask({"do": "digests"})
        return {int(client): value for client, value in answer["digests"].items()}


def serve(descriptor: int) -> None:
    """The other process: answer requests until the connection closes."""
    connection = Connection(descriptor)
    served: _Served | None = None
    while True:
        try:
            header, frames = _receive(connection)
        except EOFError:
            return
        answer: tuple[dict[str, Any], list[bytes]]
        try:
            if header["do"] == "open":
                served = _Served(header)
                answer = {"partition": served.clients.federation.partition.hash}, []
            else:
                assert served is not None, "nothing is open"
                answer = served.answer(header, frames)
        except Exception as error:  # whatever an algorithm raises belongs to the process that asked
            answer = {"error": [type(error).__name__, str(error)]}, []
        _send(connection, *answer)


class _Served:
    """The clients of one run, in the other process."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        torch.set_num_threads(header["threads"])
        self.placement = Placement.of(*header["place"])
        federation = prepare(Config.parse(header["config"]))
        store = Store(Path("never-written"), federation.algorithm.states, resident=True)
        driver = make_driver(header["driver"], self.placement)
        driver.costs = Unpriced(self.placement)
        self.clients = LocalClients(federation, driver, store)

    def answer(self, header: Mapping[str, Any], frames: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        with self.placement.defaults():
            if header["do"] == "commit":
                self.clients.commit()
                return {}, []
            if header["do"] == "digests":
                everyone = range(self.clients.federation.config.clients.count)
                return {"digests": {client: digest(self.clients.private(client)) for client in everyone}}, []
            known = self.clients.federation.algorithm.messages
            came = {client: decode(frame, *known) for client, frame in zip(header["told"], frames, strict=True)}
            down = {client: came.get(client) for client in header["clients"]}
            if header["do"] == "exchange":
                return self._exchange(header, down)
            scores = self.clients.evaluate(header["round"], down)
            return {"scores": [[client, asdict(score)] for client, score in scores.items()]}, []

    def _exchange(self, header: Mapping[str, Any], down: Down) -> tuple[dict[str, Any], list[bytes]]:
        federation = self.clients.federation
        rng = federation.rng.at("unused")  # the cohort's is the server's
        cohort = Cohort(tuple(map(federation.info, down)), header["round"], header["rounds"], rng)
        worked = sorted(self.clients.work(Exchange(cohort, down), score=header["score"]), key=lambda reply: reply[0].id)
        costs = [
            [
                info.id,
                {key: getattr(report.work, key) for key in ("flops", "seconds", "peak_bytes", "steps", "loss")},
                None if report.score is None else asdict(report.score),
            ]
            for info, _, report in worked
        ]
        told = [(info.id, upload) for info, upload, _ in worked if upload is not None]
        return {"costs": costs, "told": [client for client, _ in told]}, [encode(upload) for _, upload in told]


def _send(connection: Any, header: Mapping[str, Any], frames: Sequence[bytes]) -> None:
    connection.send_bytes(json.dumps({**header, "frames": len(frames)}).encode())
    for frame in frames:
        connection.send_bytes(frame)


def _receive(connection: Any) -> tuple[dict[str, Any], list[bytes]]:
    header = json.loads(connection.recv_bytes())
    return header, [connection.recv_bytes() for _ in range(header.pop("frames"))]
