"""Rounds that survive: the loop of a deployed run, with neither data nor the clients' networks at the server.

The same rounds as `polyfed.simulation.simulate`, with the same ledger, logs and checkpoints; what differs is that
clients come and go, that a round may be void, and that every round is checkpointed. What happened beside the rounds
stands in events.jsonl, and in the line of its round in rounds.jsonl.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from polyfed.base import files
from polyfed.base.errors import ConfigError, PolyfedError, RunDirError
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.config import Config, load_algorithm
from polyfed.config.sections import oversampled
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.message import Nothing, State
from polyfed.deploy.client.local_setup import task_of
from polyfed.deploy.server.clients import ClientFailedError, RemoteClients, info_of
from polyfed.deploy.server.registry import ClientRegistry
from polyfed.deploy.settings import Deployment
from polyfed.deploy.wire.headers import TaskFacts
from polyfed.deploy.wire.transport import Transport
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.parallel.pool import process_peak
from polyfed.rounds.evaluation import Evaluation, Evaluator
from polyfed.rounds.federation import Federation
from polyfed.rounds.identity import Content
from polyfed.rounds.ledger import Ledger, client_rows
from polyfed.rounds.round import Played, play_round
from polyfed.rounds.sampling import Weighted
from polyfed.simulation.simulate import environment
from polyfed.storage.run_dir import RunDir
from polyfed.storage.state_store import Store

log = logging.getLogger(__name__)


class TooFewClientsError(PolyfedError):
    """Too few clients connected, or too many rounds in a row were void."""


@dataclass(frozen=True)
class View:
    """What the server knows of a federation: no data, no partition, no private network. Stands in for `Federation`."""

    config: Config
    algorithm: Algorithm
    registry: ClientRegistry

    @cached_property
    def task(self) -> Task:
        """As the clients describe it."""
        assert self.registry.task is not None, "the clients have not told the task yet"
        return task_of(self.config, self.registry.task)

    @cached_property
    def rng(self) -> Rng:
        """The root of all randomness."""
        return Rng((self.config.run.seed,))

    @property
    def partition(self) -> Any:
        """Nobody here knows whose rows are whose."""
        return SimpleNamespace(hash="deployed")

    def info(self, client: ClientId) -> ClientInfo:
        """What the server knows of a client."""
        return info_of(self.registry, self.config, client)


class _RemoteEvaluator(Evaluator):
    """Tests by the clients that are there; the server has no test data of its own."""

    def __init__(self, view: View, placement: Placement, costs: Any) -> None:
        super().__init__(cast(Federation, view), placement, costs)
        self.registry = view.registry

    def _sample(self, round_: int) -> list[int]:
        present = set(self.registry.present)
        return [client for client in super()._sample(round_) if client in present]

    def _whole(self, server: Any, clients: Sequence[ClientId]) -> tuple[dict[str, tuple[float, float]], int]:
        return {}, 0


class Journal:
    """What happened beside the rounds: into events.jsonl at once, and into the line of the round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}

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
    """An event as a line."""
    rest = "  ".join(
        f"{key} {value}" for key, value in row.items() if key not in ("event", "time") and value is not False
    )
    return f"{row['event']}: {rest}"


def create(folder: Path, config: Config, deployment: Deployment) -> str:
    """Make the directory of a deployed run; returns the name of the experiment.

    Raises:
        RunDirError: it holds a run already.
        ConfigError: keys that only a simulation has.
    """
    config = config.resolved()
    if config.run.gradient_clients is not None or config.data.validation_fraction:
        raise ConfigError(
            "run.gradient_clients and data.validation_fraction are for simulated runs; take them out to deploy"
        )
    if config.devices is not None:
        raise ConfigError(
            "[devices] are for simulated runs: a deployed one has real clocks; take the section out to deploy"
            " (--set devices=none), and say deadline, oversample and min_replies in [rounds] of deploy.toml"
        )
    if config.clients.selection == "by-size":
        raise ConfigError(
            'clients.selection: got "by-size"; a deployed server knows no numbers of examples; expected '
            '"uniform" (among those that are connected) or "by-capacity"'
        )
    if (folder / "config.toml").exists():
        raise RunDirError(f"{folder} already holds a run; go on with `polyfed deploy resume {folder}`")
    folder.mkdir(parents=True, exist_ok=True)
    experiment = f"{config.hash()[:12]}-{secrets.token_hex(4)}"  # a new run never meets the states of an old one
    files.write_json(folder / "environment.json", environment(config))
    files.write(folder / "deploy.toml", deployment.to_toml().encode())
    files.write_json(folder / "deployed.json", {"experiment": experiment})
    Content.of(config, {}).write(folder)  # each client binds itself to its data
    files.write(folder / "config.toml", config.to_toml().encode())
    return experiment


def serve(folder: Path, transport: Transport) -> dict[str, Any]:
    """Play a deployed run from its start, or go on from its checkpoint; returns summary.json.

    Args:
        folder: made by `create`.
        transport: to the clients.

    Raises:
        PolyfedError: too few clients or replies, or a failure that ``on_error = "abort"`` turns into an end.
    """
    if not (folder / "deployed.json").exists():
        raise RunDirError(f"{folder} holds no deployed run: there is no deployed.json in it")
    experiment = json.loads((folder / "deployed.json").read_text())["experiment"]
    deployment = Deployment.load(folder / "deploy.toml")
    run_dir = RunDir(folder)
    status = Status(folder / "status.json")
    try:
        summary = _Served(run_dir, experiment, deployment, transport, status).play()
        status("finished")
        return summary
    except BaseException as error:
        status("failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        run_dir.close()


class Status:
    """status.json: what the run is doing, for `polyfed deploy status`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, state: str, **facts: Any) -> None:
        """Replace it."""
        files.write_json(self.path, {"state": state, "pid": os.getpid(), "time": time.time(), **facts})


class _Served:
    def __init__(
        self, run_dir: RunDir, experiment: str, deployment: Deployment, transport: Transport, status: Status
    ) -> None:
        self.run_dir, self.rules, self.status = run_dir, deployment.rounds, status
        config = Config.load(run_dir.file("config.toml"))
        Content.of(config, {}).check(run_dir.path)
        algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
        self.journal = Journal(run_dir.file("events.jsonl"))
        self.registry = ClientRegistry(transport, config, experiment, self.journal, fixed=deployment.server.node_keys)
        self.view = View(config, algorithm, self.registry)
        self.clients = RemoteClients(
            transport, self.registry, config, algorithm, experiment, self.rules, self.journal, run_dir.path
        )
        self.placement = Placement.of(config.run.device, config.run.precision)
        self.driver = make_driver(config.run.driver, self.placement)
        self.store = Store(run_dir.states, algorithm.states, resident=True)  # stays empty: states are the clients'
        self.identity = f"{config.hash()[:16]}-{experiment}"
        self.round, self.void = 0, 0
        self.server: State = Nothing()

    def play(self) -> dict[str, Any]:
        config, algorithm = self.view.config, self.view.algorithm
        torch.set_num_threads(config.run.threads or torch.get_num_threads())
        with self.placement.defaults():
            found = self.run_dir.restore(self.store, algorithm.states, self.identity)
            progress: dict[str, Any] = {}
            if found is not None:
                self.round, self.server, progress = found
                self.registry.task = TaskFacts.model_validate(progress["task"])
                self.clients.settled = {int(k): (key[0], key[1], key[2]) for k, key in progress["settled"].items()}
                self.journal("resumed", round=self.round)
            self._gather()
            if self.registry.task is None:
                self.registry.task = self.registry.facts()
            algorithm.check(self.view.task)
            self.ledger = Ledger(cast(Federation, self.view), progress.get("ledger"))
            self.evaluator = _RemoteEvaluator(self.view, self.placement, self.driver.costs)
            if found is None:
                self.server = algorithm.init_server(self.view.task, self.view.rng.at("server"))
                self._record(None, 0.0)
                self._save()
            for round_ in range(self.round + 1, config.run.rounds + 1):
                self._play(round_)
        summary = self.ledger.summary(str(self.run_dir.path), len(self.clients.settled))
        summary["deployed"] = {
            "experiment": self.clients.experiment,
            "traffic": asdict(self.clients.traffic),
            "events": self.journal.counts,
        }
        files.write_json(self.run_dir.file("summary.json"), summary)
        return summary

    # ---------------------------------------------------------------------------------------------- rounds

    def _play(self, round_: int) -> None:
        started, attempt = time.perf_counter(), 0
        while True:
            attempt += 1
            self.status("running", round=round_, rounds=self.view.config.run.rounds, attempt=attempt)
            self._await(self.rules.min_replies, self.rules.deadline)
            played = self._attempt(round_, attempt)
            if played is not None:
                self.void = 0
                self.clients.commit()
                self.server = played.server
                break
            self.void += 1
            if self.void >= self.rules.max_void:
                self.run_dir.append("rounds.jsonl", [{"round": round_, "void": True, "events": self.journal.take()}])
                raise TooFewClientsError(
                    f"round {round_}: {self.void} attempts in a row were void (see {self.journal.path}); when the "
                    f"cause is removed, go on with `polyfed deploy resume {self.run_dir.path}`"
                )
            if self.rules.on_error != "retry":
                break
        self.round = round_
        self._record(played, time.perf_counter() - started)
        self._save()
        self.clients.sweep()

    def _attempt(self, round_: int, attempt: int) -> Played | None:
        """One attempt at a round; None if it is void."""
        cohort, wanted = self._cohort(round_)
        self.clients.begin(attempt, wanted)
        try:
            return play_round(
                cast(Federation, self.view),
                self.server,
                round_,
                self.clients,
                self.driver,
                score=self._due(round_),
                cohort=cohort,
            )
        except ClientFailedError:
            raise
        except Exception as error:  # too few replies, or replies that the algorithm cannot put together
            if not isinstance(error, PolyfedError):
                log.error("%s", traceback.format_exc())
            if self.rules.on_error == "abort":
                raise
            self.journal("void", round=round_, attempt=attempt, reason=f"{type(error).__name__}: {error}")
            return None

    def _cohort(self, round_: int) -> tuple[Cohort, int | None]:
        """Who is asked, and how many answers are enough; as `draw_cohort` where everyone is there."""
        config = self.view.config
        rng = self.view.rng.at("round", round_)
        wanted = config.clients.wanted
        present = self.registry.present
        count = min(len(present), oversampled(wanted, self.rules.oversample))
        draws = rng.at("cohort").numpy()
        if count == len(present):
            chosen = present
        elif config.clients.selection == "by-capacity":
            weighted = Weighted([self.view.info(client).capacity for client in present])
            chosen = [present[i] for i in weighted.draw(draws, count)]
        else:
            chosen = sorted(int(k) for k in draws.choice(present, count, replace=False))
        cohort = Cohort(tuple(map(self.view.info, chosen)), round_, config.run.rounds, rng.at("server"))
        return cohort, wanted if self.rules.oversample else None

    # ---------------------------------------------------------------------------------------------- clients

    def _gather(self) -> None:
        """Wait until the clients of the start are there.

        Raises:
            TooFewClientsError: they did not come in time, and not even ``min_replies`` did.
        """
        needed = self.rules.min_clients or self.view.config.clients.count
        self.status("waiting", needed=needed)
        if self._await(needed, self.rules.start_timeout):
            return
        there = len(self.registry.present)
        if there < self.rules.min_replies:
            raise TooFewClientsError(
                f"{there} of {needed} clients connected within {self.rules.start_timeout:g} s, and rounds.min_replies "
                f"is {self.rules.min_replies}; are their nodes running, and is {self.journal.path} telling a reason?"
            )
        self.journal("incomplete", there=there, expected=needed)

    def _await(self, needed: int, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while True:
            self.registry.refresh()
            if len(self.registry.present) >= needed:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(max(self.rules.poll, 0.01))

    # ---------------------------------------------------------------------------------------------- records

    def _due(self, round_: int) -> bool:
        run = self.view.config.run
        return round_ % run.eval_every == 0 or round_ == run.rounds

    def _record(self, played: Played | None, seconds: float) -> None:
        run = self.view.config.run
        row: dict[str, Any] = {"round": self.round, "rounds": run.rounds}
        if played is not None:
            row |= self.ledger.round(played, seconds)
            row["replies"] = len(self.clients.kept)
            row["client_seconds"] = {str(k): self.clients.seconds.get(k, {}) for k in sorted(self.clients.kept)}
        elif self.round:
            row["void"] = True
        found: Evaluation | None = None
        if self._due(self.round):
            found = self.evaluator.evaluate(self.server, self.clients, self.round, played.reports if played else None)
            if found.scores:
                row |= self.ledger.evaluation(self.round, found)
            else:
                found = None
        row["totals"] = self.ledger.totals()
        row["events"] = self.journal.take()
        self.run_dir.append("rounds.jsonl", [row])
        self.run_dir.append("clients.jsonl", client_rows(cast(Federation, self.view), self.round, played, found))

    def _save(self) -> None:
        assert self.registry.task is not None
        self.ledger.peaked(process_peak())
        progress = {
            "ledger": self.ledger.progress,
            "settled": {str(client): key for client, key in self.clients.settled.items()},
            "task": self.registry.task.model_dump(mode="json"),
        }
        self.run_dir.save(self.round, self.server, self.store, progress, self.identity)
