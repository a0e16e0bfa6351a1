"""Rounds that survive: the loop of a deployed run, with neither data nor the clients' networks at the server.

The rounds are those of `polyfed.simulation.simulate`, with the same ledger, logs and checkpoints. Three things differ:
clients come and go, a round may be void, and every round ends with a checkpoint. Events such as a client that joins
or fails stand in events.jsonl, and in the line of their round in rounds.jsonl.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from polyfed.base import files
from polyfed.base.errors import ConfigError, PolyfedError, RunDirError
from polyfed.base.memory import map_large_blocks
from polyfed.base.types import ClientId
from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo
from polyfed.core.message import State
from polyfed.deploy.client.local_setup import task_of
from polyfed.deploy.server.clients import RemoteClients
from polyfed.deploy.server.registry import ClientRegistry
from polyfed.deploy.settings import Deployment
from polyfed.deploy.wire.headers import TaskFacts
from polyfed.deploy.wire.transport import Transport
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement, threads
from polyfed.parallel.pool import process_peak
from polyfed.rounds.clients import TooFewRepliesError
from polyfed.rounds.evaluation import Evaluation, Evaluator, messages_for
from polyfed.rounds.federation import ServerView, configured_info
from polyfed.rounds.identity import Content
from polyfed.rounds.ledger import Ledger
from polyfed.rounds.loop import RoundLoop
from polyfed.rounds.round import Played, play_round
from polyfed.rounds.selection import draw_connected
from polyfed.simulation.simulate import environment, extend
from polyfed.storage.run_dir import RunDir
from polyfed.storage.state_store import Store

log = logging.getLogger(__name__)

#: The values of clients.selection that a deployed run takes.
_DRAWS = '"uniform" (among the connected clients), "by-capacity" or "stratified"'


class TooFewClientsError(PolyfedError):
    """Too few clients connected, or too many rounds in a row were void."""


@dataclass(frozen=True)
class DeployedView(ServerView):
    """What the server knows of a deployed federation: no data, no partition, no private network."""

    config: Config
    algorithm: Algorithm
    registry: ClientRegistry

    @cached_property
    def task(self) -> Task:
        """The task as the clients describe it."""
        assert self.registry.task is not None, "the clients have not described the task yet"
        return task_of(self.config, self.registry.task)

    @property
    def class_names(self) -> Sequence[str]:
        """The names that the clients agreed on, if they are not private."""
        agreed = self.registry.agreed
        return () if agreed is None else agreed.meaning.classes

    def info(self, client: ClientId) -> ClientInfo:
        """What the server knows of a client, connected or not."""
        about, task = self.registry.about.get(client), self.registry.task
        if about is not None:
            return ClientInfo(client, about.capacity, about.architecture)
        known = configured_info(self.config, client)
        return replace(known, architecture="") if task is not None and not task.architectures else known


@dataclass
class Journal:
    """Events beside the rounds: written to events.jsonl at once, and to the line of their round."""

    path: Path
    pending: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def __call__(self, event: str, **facts: Any) -> None:
        """Note an event."""
        row = {"event": event, **facts}
        self.pending.append(row)
        self.counts[event] = self.counts.get(event, 0) + 1
        log.info("%s", told(row))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **row}) + "\n")

    def take(self) -> list[dict[str, Any]]:
        """The events since the last round."""
        rows, self.pending = self.pending, []
        return rows


def told(row: dict[str, Any]) -> str:
    """Return an event as a line of text."""
    return f"{row['event']}: " + "  ".join(
        f"{key} {value}" for key, value in row.items() if key not in ("event", "time") and value is not False
    )


def create(folder: Path, config: Config, deployment: Deployment, nodes: Path | None = None) -> str:
    """Make the directory of a deployed run and return the name of the experiment.

    Args:
        folder: the run directory.
        config: the configuration.
        deployment: the settings of the deployment.
        nodes: the file that names the client of each registered node; None where nodes have no keys.

    Raises:
        RunDirError: the directory already holds a run.
        ConfigError: the configuration sets keys that only a simulation has, or the deployment waits for more clients
            than the configuration has.
    """
    config = config.resolved()
    if (deployment.rounds.min_clients or 0) > config.clients.count:
        raise ConfigError(
            f"rounds.min_clients: got {deployment.rounds.min_clients}; expected at most clients.count = "
            f"{config.clients.count}, as the run could not begin"
        )
    if config.run.gradient_clients is not None:
        raise ConfigError("run.gradient_clients is for simulated runs; to deploy, remove it")
    if config.run.keep_rounds:
        raise ConfigError("run.keep_rounds is for simulated runs; to deploy, remove it")
    if config.devices is not None:
        raise ConfigError(
            "[devices] is for simulated runs: a deployed run has real clocks; to deploy, remove the section"
            " (--set devices=none), and set deadline, oversample and min_replies in [rounds] of deploy.toml"
        )
    if config.clients.selection == "by-size":
        raise ConfigError(
            'clients.selection: got "by-size", but a deployed server does not know how many examples a client has; '
            f"expected {_DRAWS}"
        )
    if config.clients.selection == "largest":
        raise ConfigError(
            'clients.selection: got "largest", which is for simulated runs: a round would ask nobody while no client '
            f"of the largest capacity is connected; expected {_DRAWS}"
        )
    if (folder / "config.toml").exists():
        raise RunDirError(f"{folder} already holds a run; to continue it, run `polyfed deploy resume {folder}`")
    folder.mkdir(parents=True, exist_ok=True)
    experiment = f"{config.hash()[:12]}-{secrets.token_hex(4)}"  # a new run never meets the states of an old one
    files.write_json(folder / "environment.json", environment(config))
    files.write(folder / "deploy.toml", deployment.to_toml().encode())
    about = {"experiment": experiment}
    if nodes is not None:
        about["nodes"] = str(nodes.absolute())
    files.write_json(folder / "deployed.json", about)
    _content(config).write(folder)
    files.write(folder / "config.toml", config.to_toml().encode())
    return experiment


def go_on(folder: Path, rounds: int) -> None:
    """Give a deployed run more rounds, so that serving it again goes on after its end.

    Args:
        folder: the run directory that `create` made.
        rounds: the number of rounds at whose end the run is to be; the present number changes nothing.

    Raises:
        ConfigError: the run has more rounds already, or its numbers depend on their number.
        RunDirInUseError: a server is playing the run.
    """
    with closing(RunDir(folder)):
        before = Config.load(folder / "config.toml")
        config = before.extended(rounds)
        if config.run.rounds != before.run.rounds:
            _content(config).write(folder)
            extend(folder, config)


def serve(folder: Path, transport: Transport) -> dict[str, Any]:
    """Run a deployed run from its start or from its checkpoint; return the content of summary.json.

    Args:
        folder: the run directory that `create` made.
        transport: carries messages to the clients.

    Raises:
        PolyfedError: too few clients or replies, or a failure that ends the run under ``on_error = "abort"``.
    """
    if not (folder / "deployed.json").exists():
        raise RunDirError(
            f"{folder} holds no deployed run: it has no deployed.json; give the --out of a `polyfed deploy` command"
        )
    about = json.loads((folder / "deployed.json").read_text())
    deployment = Deployment.load(folder / "deploy.toml")
    status = Status(folder / "status.json")
    with closing(RunDir(folder)) as run_dir:
        try:
            summary = _Served(run_dir, about, deployment, transport, status).run()
            status("finished")
            return summary
        except BaseException as error:
            status("failed", error=f"{type(error).__name__}: {error}")
            raise


def _content(config: Config) -> Content:
    """What the server's run is bound to; each client binds itself to its own data and weights."""
    return Content.of(config, {}, weights=())


@dataclass(frozen=True)
class Status:
    """status.json: the current state of the run, for `polyfed deploy status`."""

    path: Path

    def __call__(self, state: str, **facts: Any) -> None:
        """Replace the file."""
        files.write_json(self.path, {"state": state, "pid": os.getpid(), "time": time.time(), **facts})


class _Served(RoundLoop):
    """The rounds of a deployment."""

    def __init__(
        self, run_dir: RunDir, about: dict[str, str], deployment: Deployment, transport: Transport, status: Status
    ) -> None:
        experiment, nodes = about["experiment"], about.get("nodes")
        self.rules, self.status = deployment.rounds, status
        config = Config.load(run_dir.path / "config.toml")
        _content(config).check(run_dir.path)
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        self.journal = Journal(run_dir.path / "events.jsonl")
        self.registry = ClientRegistry(
            transport, config, experiment, self.journal, nodes=None if nodes is None else Path(nodes)
        )
        self.remote = self.clients = RemoteClients(
            transport, self.registry, config, algorithm, experiment, self.rules, self.journal, run_dir.path
        )
        super().__init__(
            DeployedView(config, algorithm, self.registry),
            run_dir,
            Store(run_dir.path / "states", algorithm.states, resident=True),  # stays empty: states are the clients'
            make_driver("sequential", Placement.of(config.run.device, config.run.precision)),
            lambda rounds: f"{config.lasting(rounds).hash()[:16]}-{experiment}",
        )
        self.evaluator = Evaluator(self.view, self.driver)
        self.void = 0
        self.absent: list[ClientId] = []  # not connected when the run began

    def run(self) -> dict[str, Any]:
        """Play the run to its end and return its summary."""
        map_large_blocks()
        with threads(self.view.config.run.server_threads), self.driver.placement.defaults():
            progress = self.restore() or {}
            if progress:
                self.registry.task = TaskFacts.model_validate(progress["task"])
                self.registry.agreed = self.registry.task.agreed
                self.remote.settled = {int(k): (key[0], key[1], key[2]) for k, key in progress["settled"].items()}
                self.remote.best = {int(k): (key[0], key[1], key[2]) for k, key in progress.get("best", {}).items()}
                self.journal("resumed", round=self.round)
            self._gather()
            self.absent = progress.get("absent", []) if progress else self._missing()
            self.registry.task = self.registry.task or self.registry.facts()
            self.view.algorithm.check(self.view.task)
            self.ledger = Ledger(self.view, progress.get("ledger"))
            self.rounds()
            tests = self.tests()
            kept = self._hand_over()
        summary = {
            **self.ledger.summary(str(self.run_dir.path), len(self.remote.settled), "deployed", tests),
            "deployed": {
                "experiment": self.remote.experiment,
                "traffic": asdict(self.remote.traffic),
                "events": self.journal.counts,
                "kept": kept,
                "missing": {"begin": self.absent, "end": self._missing()},
            },
        }
        files.write_json(self.run_dir.path / "summary.json", summary)
        return summary

    def _hand_over(self) -> list[ClientId]:
        """Have every connected client keep the model of the round that the run keeps; return those that did."""
        self.registry.refresh()
        round_, server, states = self.round, self.server, nullcontext()
        if self.pinned is not None and self.pinned != self.round:
            round_, server = self.run_dir.best(self.view.algorithm.states)
            states = self.at_best(round_)
        with states:
            return self.remote.hand_over(round_, messages_for(self.view, server, self.registry.present))

    # ---------------------------------------------------------------------------------------------- rounds

    def play(self, round_: int) -> Played | None:
        """Play a round, in as many attempts as the rules allow; None if it is void.

        Raises:
            TooFewClientsError: too many attempts in a row were void.
        """
        for attempt in itertools.count(1):
            self.status("running", round=round_, rounds=self.view.config.run.rounds, attempt=attempt)
            self._await(self.rules.min_replies, self.rules.deadline)
            played = self._attempt(round_, attempt)
            self.void = self.void + 1 if played is None else 0
            if self.void >= self.rules.max_void:
                self.run_dir.append("rounds.jsonl", [{"round": round_, "void": True, "events": self.journal.take()}])
                raise TooFewClientsError(
                    f"round {round_}: {self.void} attempts in a row were void; {self.journal.path} has the reasons; "
                    f"remove the cause, then continue with `polyfed deploy resume {self.run_dir.path}`"
                )
            if played is not None or self.rules.on_error != "retry":
                return played

    def _attempt(self, round_: int, attempt: int) -> Played | None:
        """One attempt at a round; None if it is void."""
        cohort = draw_connected(self.view, round_, self.remote.drawable(), self.rules.oversample)
        self.remote.begin(attempt, self.view.config.clients.wanted if self.rules.oversample else None)
        try:
            return play_round(self.view, self.server, cohort, self.clients, self.driver, score=self.due(round_))
        except Exception as error:  # too few replies, or replies that the algorithm cannot put together
            if not isinstance(error, PolyfedError):
                log.error("%s", traceback.format_exc())
            if self.rules.on_error == "abort":
                raise
            if isinstance(error, TooFewRepliesError):
                self.server = self.view.algorithm.void_round(self.server, cohort, error.seconds)
            self.journal("void", round=round_, attempt=attempt, reason=f"{type(error).__name__}: {error}")
            return None

    def chosen(self, round_: int) -> list[ClientId]:
        """The sampled clients that are connected."""
        present = set(self.registry.present)
        return [client for client in super().chosen(round_) if client in present]

    def evaluate(self, server: State, round_: int, played: Played | None) -> Evaluation | None:
        """Evaluate; None if no client reported a score."""
        found = super().evaluate(server, round_, played)
        return found if found is not None and found.scores else None

    def test(self, server: State, round_: int) -> Evaluation | None:
        """Test; None if no client reported a score."""
        found = super().test(server, round_)
        return found if found is not None and found.scores else None

    def at_best(self, round_: int) -> AbstractContextManager[None]:
        """The states that the clients keep of the best round."""
        return self.remote.at_best()

    def facts(self, played: Played | None) -> dict[str, Any]:
        """The clients that replied, the seconds that each took, and the events beside the round."""
        events: dict[str, Any] = {"events": self.journal.take()}
        if played is None:
            return {"void": True, **events} if self.round else events
        return {
            "replies": len(self.remote.kept),
            "client_seconds": {str(k): self.remote.seconds.get(k, {}) for k in self.remote.kept},
            **events,
        }

    def ended(self, row: dict[str, Any]) -> None:
        """Forget the late requests whose time has run out; note the best round, and the end of the run."""
        self.remote.sweep()
        if self.pinned == self.round:
            self.remote.best = dict(self.remote.settled)
        if self.ledger.stopped:
            self.journal("stopped", **self.ledger.stopped)

    def checkpoint_due(self, round_: int) -> bool:
        """True after every round, so that the clients' states belong to the round that the server resumes from."""
        return True

    def progress(self) -> dict[str, Any]:
        """The ledger, the task, and the exchange that left each client's state."""
        assert self.registry.task is not None
        self.ledger.peaked(process_peak())
        return {
            "ledger": self.ledger.progress,
            "settled": {str(client): key for client, key in self.remote.settled.items()},
            **({} if self.pinned is None else {"best": {str(k): key for k, key in self.remote.best.items()}}),
            "task": self.registry.task.model_dump(mode="json"),
            "absent": self.absent,
        }

    # ---------------------------------------------------------------------------------------------- clients

    def _gather(self) -> None:
        """Wait until ``min_clients`` clients are connected; a run that goes on needs ``min_replies`` of them.

        Raises:
            TooFewClientsError: too few clients connected within ``start_timeout``.
        """
        needed = self.rules.min_clients or self.view.config.clients.count
        self.status("waiting", needed=needed)
        complete, there = self._await(needed, self.rules.start_timeout), len(self.registry.present)
        begun = self.registry.task is not None
        if there < (self.rules.min_replies if begun else needed):
            raise TooFewClientsError(
                f"{there} of {needed} clients connected within rounds.start_timeout = {self.rules.start_timeout:g} s; "
                f"missing: {', '.join(map(self._title, self._missing()))}; check that their nodes run, and read "
                f"{self.journal.path} for refusals; "
                + (
                    f"rounds.min_replies = {self.rules.min_replies} is the least"
                    if begun
                    else f"to begin with fewer clients, set rounds.min_clients in {self.run_dir.path / 'deploy.toml'}"
                    " and resume, or give --rule rounds.min_clients=N to a new run"
                )
            )
        if not complete:
            self.journal("incomplete", there=there, expected=needed, missing=self._missing())

    def _missing(self) -> list[ClientId]:
        """Return the clients of the configuration that are not connected."""
        return sorted(set(range(self.view.config.clients.count)) - set(self.registry.present))

    def _title(self, client: ClientId) -> str:
        """Return a client's number, and its name if the configuration has names."""
        names = self.view.config.clients.names
        return f"client {client}" + (f" ({names[client]})" if names else "")

    def _await(self, needed: int, seconds: float) -> bool:
        end = time.monotonic() + seconds
        self.registry.refresh()
        while len(self.registry.present) < needed and time.monotonic() <= end:
            time.sleep(max(self.rules.poll, 0.01))
            self.registry.refresh()
        return len(self.registry.present) >= needed
