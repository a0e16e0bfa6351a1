"""One request, one reply: a client's answer to a message, by whatever transport it came.

An error becomes a reply that names its class. The text of the error may disclose private files and layers; it stays
in the client's own log.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyfed.base.errors import ConfigError, MessageError, PolyfedError
from polyfed.base.types import Parts
from polyfed.config import Config
from polyfed.core.message import Message, State, decode, encode
from polyfed.core.requests import Fit, Fitted, drive
from polyfed.deploy.client.local_setup import ApartError, LocalSetup, task_of
from polyfed.deploy.client.state_dir import ClientStateDir, private_folder
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.frames import Frame, pack, unpack
from polyfed.deploy.wire.headers import About, Counts, ReplyHeader, RequestHeader
from polyfed.execute.drivers import Sequential, Work
from polyfed.execute.local_training import bind, tree_to
from polyfed.execute.placement import Placement
from polyfed.metrics.metrics import sent_sums
from polyfed.rounds.federation import check_training, configured_task
from polyfed.rounds.identity import Content
from polyfed.rounds.scoring import Scorer, majority
from polyfed.rounds.unit import worth_a_test
from polyfed.storage import predictions
from polyfed.trained.single import SingleClient

log = logging.getLogger(__name__)


class _Uncounted(Sequential):
    """Trains without measuring the costs, for a client that does not report them."""

    def charge(self, fit: Fit, fitted: Fitted, work: Work) -> None:
        """Note the result of the fit, without its costs."""
        work.steps += fitted.steps
        work.loss = fitted.loss


def answer(
    header: str,
    body: bytes | bytearray | None,
    settings: NodeSettings,
    *,
    wait: Callable[[str], None] | None = None,
    imported: float = 0.0,
) -> Frame:
    """Answer a request. An error becomes an answer, too, unless the header cannot be read.

    Args:
        header: the header of the request.
        body: the bytes of the message; None if the request carries no message. Training writes into a bytearray.
        settings: the client's settings.
        wait: called with ``"received"``, ``"trained"`` and ``"kept"`` at these steps; tests stop the work there.
        imported: seconds that this process took to import torch.

    Raises:
        MessageError: the header cannot be read, so there is no request to answer.
    """
    request = headers.load(RequestHeader, header)
    try:
        return _Node(request, body, settings, wait or (lambda moment: None), imported).answer()
    except Exception as error:
        # Any exception, also from the client's own code: its text goes to the client's log alone.
        log.error("client %d, %s %s: %s", settings.client, request.kind, request.key, traceback.format_exc())
        _write_log(settings, request, error)
        name = type(error).__name__ if isinstance(error, (PolyfedError, MemoryError)) else "Error"
        apart = error.parts if isinstance(error, ApartError) else ()
        return _reply(request, settings, error=f"{name}; its text is in the client's log", apart=apart), None


def _reply(request: RequestHeader, settings: NodeSettings, **fields: Any) -> str:
    """Return the header of a reply to ``request``."""
    header = ReplyHeader(
        kind=request.kind, experiment=request.experiment, key=request.key, client=settings.client, **fields
    )
    return headers.dump(header)


def _write_log(settings: NodeSettings, request: RequestHeader, error: Exception) -> None:
    try:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "experiment": request.experiment,
            "kind": request.kind,
            "key": request.key,
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
        folder = private_folder(Path(settings.state_dir).expanduser())
        with open(folder / "errors.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except Exception:  # such as a full disk; the reply still reports the error
        log.exception("client %d: could not write errors.jsonl", settings.client)


class _Node:
    def __init__(
        self,
        request: RequestHeader,
        body: bytes | bytearray | None,
        settings: NodeSettings,
        wait: Callable[[str], None],
        imported: float,
    ) -> None:
        self.request, self.body, self.settings, self.wait = request, body, settings, wait
        self.seconds = {"import": imported} if imported else {}  # by step of the work

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        """Add the seconds of the block to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def answer(self) -> Frame:
        request, settings = self.request, self.settings
        if request.client not in (None, settings.client):
            if request.kind == "describe":
                raise ConfigError(
                    f"the server knows this node's key as that of client {request.client}, but the node was started as "
                    f"client {settings.client}; start it with --client {request.client}, or with the key of client "
                    f"{settings.client}"
                )
            raise MessageError(f"got a request for client {request.client}; expected client {settings.client}")
        with self._timed("config"):
            self.config = Config.parse(request.config, source="the server's configuration")
        if threads := settings.threads or self.config.run.threads:
            torch.set_num_threads(threads)
        self.placement = Placement.of(settings.device or self.config.run.device, self.config.run.precision)
        if request.kind == "describe":
            return self._describe()
        with self.placement.defaults():
            return {"train": self._train, "evaluate": self._evaluate, "keep": self._keep}[request.kind]()

    def _frame(self, **fields: Any) -> str:
        seconds = self.seconds if self.settings.tells_costs else {}  # seconds hint at the network's size
        return _reply(self.request, self.settings, seconds=seconds, **fields)

    def _describe(self) -> Frame:
        salt = self.request.experiment
        setup = LocalSetup.agreeing(self.settings, self.config, self.request.agreed, salt)
        shape, classes = setup.dataset.input_shape, setup.dataset.num_classes
        # Reports networks that cannot work, and keys of [train] that do not fit them or the data, before round 1.
        setup.check_labels()
        setup.check_columns()
        dtype, columns = setup.dataset.input_dtype, setup.dataset.feature_columns
        own, models = setup.networks(configured_task(self.config, shape, classes, dtype, columns))
        setup.check(own)
        if self.settings.data is None or self.request.agreed is not None:  # else other sites may have more classes
            check_training(self.config, setup.algorithm, models, setup.data.train(setup.place))
        about = About(
            client=setup.info.id,
            capacity=setup.info.capacity,
            architecture=setup.info.architecture,
            input_shape=shape,
            num_classes=classes,
            tokens=setup.dataset.kind == "tokens",
            agreement=setup.agreement(salt),
        )
        return self._frame(about=about), None

    def _prepare(self) -> None:
        if self.request.task is None:
            raise MessageError(f"a {self.request.kind} request came without the task; expected the field 'task'")
        with self._timed("data"):
            self.setup = LocalSetup.fitting(self.settings, self.config, self.request.task, self.request.experiment)
        columns = self.setup.dataset.feature_columns
        self.task = replace(task_of(self.config, self.request.task), columns=columns)
        self.algorithm = self.setup.algorithm
        self.state_dir = ClientStateDir(
            Path(self.settings.state_dir).expanduser(),
            self.request.experiment,
            self.settings.client,
            self.algorithm.states,
        )
        # These digests of data and code stay with the client.
        weights = () if self.setup.weights is None else (self.setup.weights,)
        self.state_dir.bind(Content.of(self.config, self.setup.dataset.files, self.settings.model, weights))
        self.state_dir.record(self.config.to_toml(), self.setup.about(self.request.experiment))

    def _message(self) -> Message | None:
        with self._timed("decode"):
            limit = int(self.settings.max_message * 1e6)
            return None if self.body is None else decode(self.body, *self.algorithm.messages, limit=limit)

    def _state(self) -> tuple[State, bool]:
        with self._timed("load"):
            state, lost = self.state_dir.state(self.request.since)
        if state is None:
            with self._timed("init"):
                state = self.algorithm.init_client(self.setup.local(self.task, 0))
        return state, lost

    def _train(self) -> Frame:
        self._prepare()
        request, client = self.request, self.settings.client
        with self.state_dir.held():
            asked = headers.digest(request, self.body)
            if (before := self.state_dir.answered(request.key, asked)) is not None:
                log.info("client %d: exchange %s was answered before; the stored reply is sent", client, request.key)
                return unpack(before)
            message = self._message()
            private, lost = self._state()
            self.wait("received")
            with self._timed("work"):
                driver = Sequential(self.placement) if self.settings.tells_costs else _Uncounted(self.placement)
                local = self.setup.local(self.task, request.key[0])
                outcome = driver.play({client: self.algorithm.client_round(private, message, local)})[client]
            self.wait("trained")
            tested = request.score and self.settings.tells_scores and worth_a_test(outcome, message)
            score = self._score(outcome.trained) if tested and self.algorithm.fit_predicts else None
            with self._timed("encode"):
                upload = None if outcome.upload is None else encode(outcome.upload)
            work = outcome.work
            told = headers.WorkReport(
                loss=work.loss if self.settings.tells_scores else None,
                **{
                    name: getattr(work, name)
                    for name in ("flops", "seconds", "peak_bytes", "steps")
                    if self.settings.tells_costs
                },
            )
            header = self._frame(lost=lost, work=told, score=score)
            with self._timed("save"):
                reply = pack(header, upload)
                self.state_dir.keep(request.key, request.settled, asked, outcome.private, reply, best=request.best)
            self.wait("kept")
            return self._frame(lost=lost, work=told, score=score), upload

    def _evaluate(self) -> Frame:
        if not self.settings.tells_scores:
            return self._frame(), None
        self._prepare()
        message = self._message()
        if self.request.best != self.state_dir.best:
            with self.state_dir.held():
                self.state_dir.mark(self.request.best)
        parts, work, lost = self._parts(message)
        return self._frame(lost=lost, score=self._score(parts, work.flops, final=self.request.final)), None

    def _parts(self, message: Message | None) -> tuple[Parts, Work, bool]:
        """Return the parts with which the client predicts, the work that they take, and whether its state was lost."""
        private, lost = self._state()
        local = self.setup.local(self.task, self.request.key[0])
        driver, work = Sequential(self.placement), Work()
        parts = drive(
            self.algorithm.predictor_parts(private, message, local), lambda request: driver.perform(request, work)
        )
        return parts, work, lost

    def _keep(self) -> Frame:
        """Keep what the client predicts with, so that it needs neither the server nor its data for that."""
        self._prepare()
        message = self._message()
        with self.state_dir.held():
            parts, _, lost = self._parts(message)
            with self._timed("save"):
                SingleClient.keep(
                    self.state_dir.folder,
                    self.config,
                    self.task,
                    self.setup.preprocessing,
                    self.setup.data.stats(self.setup.place),
                    parts,
                    client=self.settings.client,
                    round_=self.request.key[0],
                    model=self.setup.spec,
                    capacity=self.setup.info.capacity,
                )
        return self._frame(lost=lost), None

    def _score(self, parts: Parts, spent: float = 0, *, final: bool = False) -> Counts:
        with self._timed("score"):
            setup, run = self.setup, self.config.run
            scorer = Scorer(self.algorithm, self.placement, Sequential(self.placement).costs, self.config)
            nets = bind(self.setup.local(self.task, self.request.key[0]).models, tree_to(parts, self.placement))
            scorer.keep = final and run.predictions
            found = scorer.score(nets, setup.data.evaluated(setup.place, final=final))
            if final:
                rows = setup.partition.train(setup.place), setup.partition.test(setup.place)
                train, told_y = (setup.dataset.y[torch.tensor(some)] for some in rows)
                found.majority = majority(train, told_y, setup.dataset.num_classes, self.config.metrics)
            if found.rows:  # they stay with the client
                path = self.state_dir.folder / predictions.NAME
                held = {self.settings.client: (setup.partition.test(setup.place), found.rows)}
                predictions.write(path, held, setup.dataset.classes, self.config.clients.names or (), mode=0o600)
            told: dict[str, Any] = {"flops": found.flops, "flops_parts": spent} if self.settings.tells_costs else {}
            sums = sent_sums(found.tallies)
            return Counts(
                examples=found.examples,
                correct=found.correct,
                values=found.values,
                sums=sums,
                majority=found.majority,
                **told,
            )
