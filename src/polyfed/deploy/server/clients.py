"""The clients as the server of a deployment meets them: requests go out, and what comes back in time counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from polyfed.base.errors import MessageError, PolyfedError
from polyfed.base.types import ClientId
from polyfed.config import Config
from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import ClientInfo, Cohort, Replies, Reply
from polyfed.core.message import Message, decode, encode
from polyfed.deploy.client.local_setup import task_of
from polyfed.deploy.server.registry import ClientRegistry, Events
from polyfed.deploy.server.reply_checks import check_reply
from polyfed.deploy.settings import Rounds
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import Key, ReplyHeader, RequestHeader
from polyfed.deploy.wire.transport import Incoming, Outgoing, RequestKind, Transport
from polyfed.execute.drivers import Work
from polyfed.rounds.clients import Down, Report, TooFewRepliesError, measure
from polyfed.rounds.scoring import Score


class ClientFailedError(PolyfedError):
    """A client failed and ``rounds.on_error`` is "abort"."""


@dataclass
class Traffic:
    """All bytes handed to the engine and received from it: messages, headers, and requests of every kind."""

    sent: int = 0
    received: int = 0
    messages: int = 0


@dataclass
class _Good:
    """Replies to one kind of request, as they come in."""

    answers: dict[ClientId, tuple[ReplyHeader, Message | None, int]] = field(
        default_factory=dict[ClientId, tuple[ReplyHeader, Message | None, int]]
    )
    failed: dict[ClientId, str] = field(default_factory=dict[ClientId, str])


class RemoteClients:
    """Clients on other machines. A `polyfed.rounds.clients.Clients`.

    Args:
        transport: to their nodes.
        registry: who is there.
        config: the experiment's.
        algorithm: whose messages travel.
        experiment: which run.
        rounds: what a round survives.
        tell: told of every failure.
    """

    def __init__(
        self,
        transport: Transport,
        registry: ClientRegistry,
        config: Config,
        algorithm: Algorithm,
        experiment: str,
        rounds: Rounds,
        tell: Events,
    ) -> None:
        self.transport, self.registry, self.config, self.algorithm = transport, registry, config, algorithm
        self.experiment, self.rounds, self.tell = experiment, rounds, tell
        #: The last exchange of each client in a round that counted: what its private state is of.
        self.settled: dict[ClientId, Key] = {}
        self.traffic = Traffic()
        #: Seconds of the client's own part of its last exchange, by step.
        self.seconds: dict[ClientId, dict[str, float]] = {}
        self.attempt = 1
        self.wanted: int | None = None  # replies after which an over-sampled round is full
        self._phase = 0
        self._kept: dict[ClientId, Key] = {}
        #: The clients whose replies counted in the last round.
        self.kept: list[ClientId] = []
        self._late: dict[str, tuple[ClientId, Key, float]] = {}  # tickets that nobody waits for any more

    # ---------------------------------------------------------------------------------------------- Clients

    def begin(self, attempt: int, wanted: int | None) -> None:
        """A round, or another attempt at it, begins."""
        self.attempt, self.wanted = attempt, wanted
        self._phase = 0
        self._kept.clear()

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Send each client its message, wait until all, enough, or no more can answer.

        Raises:
            TooFewRepliesError: fewer than ``min_replies`` answered well.
            ClientFailedError: one failed, and that ends the run.
        """
        self._phase += 1
        key = (cohort.round, self.attempt, self._phase)
        infos = {client.id: client for client in cohort}
        found = self._ask("train", key, down, infos, score=score, enough=self.wanted)
        if len(found.answers) < self.rounds.min_replies:
            raise TooFewRepliesError(
                f"round {cohort.round}: {len(found.answers)} of {len(down)} clients answered; "
                f"rounds.min_replies is {self.rounds.min_replies}"
            )
        replies: list[Reply] = []
        reports: dict[ClientId, Report] = {}
        for client in sorted(found.answers):
            answer, message, _ = found.answers[client]
            self._kept[client] = key
            replies.append(Reply(infos[client], message))
            work = Work(**answer.work.model_dump()) if answer.work else Work()
            tested = Score(**answer.score.model_dump()) if answer.score else None
            reports[client] = Report(work, measure(down[client]), measure(message), tested)
        return Replies(tuple(replies), found.failed), reports

    def commit(self) -> None:
        """The round counts: what its clients kept is their state."""
        self.settled |= self._kept
        self.kept = sorted(self._kept)
        self._kept.clear()

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Send each client what it needs to predict; bring back counts of those that answer and tell them."""
        key = (round_, self.attempt, 0)
        found = self._ask("evaluate", key, down, {}, score=False, enough=None)
        scores = {
            client: Score(**answer.score.model_dump())
            for client, (answer, _, _) in sorted(found.answers.items())
            if answer.score is not None
        }
        # Which predictors there are, the networks at the clients know: what most of them say.
        named = Counter(tuple(score.correct) for score in scores.values()).most_common(1)
        for client, score in list(scores.items()):
            if tuple(score.correct) != named[0][0]:
                del scores[client]
                reason = "its predictors are not those of most clients"
                self.tell("failed", client=client, kind="evaluate", round=round_, reason=reason, again=False)
        return scores

    # ---------------------------------------------------------------------------------------------- asking

    def _ask(
        self,
        kind: RequestKind,
        key: Key,
        down: Down,
        infos: Mapping[ClientId, ClientInfo],
        *,
        score: bool,
        enough: int | None,
    ) -> _Good:
        found = _Good()
        encoded: dict[int, bytes] = {}  # a broadcast is one object for all: it is encoded once
        waiting: dict[str, ClientId] = {}
        retried: set[ClientId] = set()
        end = time.monotonic() + self.rounds.deadline

        def send(clients: list[ClientId]) -> None:
            told = [self._request(kind, key, client, down[client], score, encoded, end) for client in clients]
            for client, ticket in zip(clients, self.transport.push(told), strict=True):
                if ticket is None:
                    fail(client, "the engine did not take the message")
                else:
                    waiting[ticket] = client

        def fail(client: ClientId, reason: str) -> None:
            # It may quote what a client made up: no terminal's commands, no megabytes of a name.
            reason = "".join(c if c.isprintable() else "?" for c in reason[:500])
            left = end - time.monotonic()
            again = self.rounds.on_error == "retry" and client not in retried and left > 0 and kind == "train"
            self.tell("failed", client=client, kind=kind, round=key[0], reason=reason, again=again)
            if self.rounds.on_error == "abort" and kind == "train":
                raise ClientFailedError(f'client {client}, round {key[0]}: {reason}; rounds.on_error is "abort"')
            if again:
                retried.add(client)
                self.registry.refresh()
                if client in self.registry.present:
                    send([client])
                    return
            found.failed[client] = reason

        absent = [client for client in down if client not in self.registry.node]
        for client in absent:
            fail(client, "it is not connected")
        send([client for client in down if client not in absent])
        while waiting and time.monotonic() < end:
            if enough is not None and len(found.answers) >= enough:
                break
            arrived = self.transport.pull([*waiting, *self._late])
            for reply in arrived:
                if reply.ticket in self._late:
                    self._told_late(reply)
                    continue
                client = waiting.pop(reply.ticket, None)
                if client is None:
                    continue
                if enough is not None and len(found.answers) >= enough:
                    self.tell("surplus", client=client, round=key[0])
                    continue
                try:
                    found.answers[client] = self._read(reply, kind, key, client, down[client], infos.get(client))
                except MessageError as error:
                    fail(client, str(error))
            if not arrived:
                time.sleep(self.rounds.poll)
        full = enough is not None and len(found.answers) >= enough
        for ticket, client in waiting.items():
            self._late[ticket] = (client, key, time.monotonic() + self.rounds.deadline)
            if full:
                self.tell("surplus", client=client, round=key[0])
            else:
                reason = f"no reply within {self.rounds.deadline:g} s"
                found.failed[client] = reason
                self.tell("failed", client=client, kind=kind, round=key[0], reason=reason, again=False)
        return found

    def _request(
        self,
        kind: RequestKind,
        key: Key,
        client: ClientId,
        message: Message | None,
        score: bool,
        encoded: dict[int, bytes],
        end: float,
    ) -> Outgoing:
        if message is not None and id(message) not in encoded:
            encoded[id(message)] = encode(message)
        body = None if message is None else encoded[id(message)]
        settled = self.settled.get(client)
        request = RequestHeader(
            kind=kind,
            experiment=self.experiment,
            key=key,
            client=client,
            since=self._kept.get(client, settled),
            settled=settled,
            score=score,
            config=self.config.to_dict(),
            task=self.registry.task,
        )
        header = headers.dump(request)
        self.traffic.sent += len(header) + len(body or b"")
        self.traffic.messages += 1
        left = max(1.0, end - time.monotonic())
        return Outgoing(self.registry.node[client], kind, header, body, f"{key[0]}", left)

    def _read(
        self,
        reply: Incoming,
        kind: RequestKind,
        key: Key,
        client: ClientId,
        down: Message | None,
        info: ClientInfo | None,
    ) -> tuple[ReplyHeader, Message | None, int]:
        """A reply, if it may be used.

        Raises:
            MessageError: the engine reports an error, the client does, or what came must not be used; says which.
        """
        if reply.error:
            raise MessageError(reply.error)
        count = len(reply.header) + len(reply.body or b"")
        self.traffic.received += count
        answer = headers.load(ReplyHeader, reply.header)
        if (answer.kind, answer.experiment, answer.key, answer.client) != (kind, self.experiment, key, client):
            raise MessageError(f"an answer to {answer.kind} {answer.key} of client {answer.client} came instead")
        if answer.error:
            raise MessageError(answer.error)
        message = None
        if reply.body is not None:
            message = decode(reply.body, *self.algorithm.messages, limit=int(self.rounds.max_message * 1e6))
        if info is not None:
            assert self.registry.task is not None, "the task is known before anything is sent"
            check_reply(self.algorithm, task_of(self.config, self.registry.task), info, down, message)
        if answer.lost:
            self.tell("lost-state", client=client, round=key[0])
        self.seconds[client] = answer.seconds
        return answer, message, count

    def _told_late(self, reply: Incoming) -> None:
        client, key, _ = self._late.pop(reply.ticket)
        if not reply.error:
            self.tell("late", client=client, round=key[0], reason="a reply came after its round; it is not used")

    def sweep(self) -> None:
        """Forget the requests that nobody will answer any more."""
        now = time.monotonic()
        self._late = {ticket: entry for ticket, entry in self._late.items() if entry[2] > now}


def info_of(registry: ClientRegistry, config: Config, client: ClientId) -> ClientInfo:
    """What the server knows of a client, connected or not."""
    about = registry.about.get(client)
    if about is None:
        private = registry.task is not None and not registry.task.architectures
        known = ClientInfo(client, config.clients.capacity(client), str(config.clients.model(client)))
        return replace(known, architecture="") if private else known
    return ClientInfo(client, about.capacity, about.architecture)
