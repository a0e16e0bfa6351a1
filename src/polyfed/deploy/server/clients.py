"""The clients as the server of a deployment sees them: it sends requests, and counts the replies that come in time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from polyfed.base.errors import MessageError, PolyfedError
from polyfed.base.types import ClientId
from polyfed.config import Config
from polyfed.core.algorithm import Algorithm
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Gathered
from polyfed.core.message import Message, Size, decode, encode
from polyfed.core.requests import Exchange
from polyfed.deploy.client.local_setup import task_of
from polyfed.deploy.server.registry import ClientRegistry, Events
from polyfed.deploy.server.reply_checks import check_reply, in_short
from polyfed.deploy.settings import Rounds
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import Counts, Key, ReplyHeader, RequestHeader
from polyfed.deploy.wire.transport import Incoming, Outgoing, RequestKind, Transport
from polyfed.execute.drivers import Work
from polyfed.metrics.catalogue import beyond_accuracy
from polyfed.metrics.metrics import COMPUTED, read_sums
from polyfed.rounds.clients import TooFewRepliesError
from polyfed.rounds.gathering import Gathering
from polyfed.rounds.scoring import Score
from polyfed.rounds.unit import Down, Report, measure


class ClientFailedError(PolyfedError):
    """A client failed and ``rounds.on_error`` is "abort"."""


@dataclass
class Traffic:
    """All bytes handed to the engine and received from it: messages, headers, and requests of every kind."""

    sent: int = 0
    received: int = 0
    messages: int = 0


#: Bytes of replies that the server takes from the engine in one call.
_AT_ONCE = 20_000_000


@dataclass
class _Good:
    """Good replies to one kind of request, without the messages."""

    answers: dict[ClientId, ReplyHeader] = field(default_factory=dict[ClientId, ReplyHeader])
    scores: dict[ClientId, Score] = field(default_factory=dict[ClientId, Score])
    sizes: dict[ClientId, Size] = field(default_factory=dict[ClientId, Size])
    failed: dict[ClientId, str] = field(default_factory=dict[ClientId, str])
    late: set[ClientId] = field(default_factory=set[ClientId])


class RemoteClients:
    """Clients on other machines. A `polyfed.rounds.clients.Clients`.

    Args:
        transport: carries messages to the clients' nodes.
        registry: the clients that are connected.
        config: the configuration of the experiment.
        algorithm: the algorithm that defines the messages.
        experiment: the name of the run.
        rounds: the rules by which a round ends or is void.
        tell: receives every failure as an event.
        scratch: a folder on the disk where replies wait for their turn.
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
        scratch: Path | None = None,
    ) -> None:
        self.transport, self.registry, self.config, self.algorithm = transport, registry, config, algorithm
        self.experiment, self.rounds, self.tell, self.scratch = experiment, rounds, tell, scratch
        #: The last exchange of each client in a round that counted: the exchange that left its private state.
        self.settled: dict[ClientId, Key] = {}
        #: As ``settled``, at the end of the best round; empty if the run keeps none.
        self.best: dict[ClientId, Key] = {}
        self._earlier: Mapping[ClientId, Key] | None = None  # the states to evaluate in place of the latest
        self.traffic = Traffic()
        #: Seconds that each client itself spent on its last exchange, by step.
        self.seconds: dict[ClientId, dict[str, float]] = {}
        self.attempt = 1
        self.wanted: int | None = None  # replies after which an over-sampled round is full
        self._phase = 0
        self._kept: dict[ClientId, Key] = {}
        #: The clients whose replies counted in the last round.
        self.kept: list[ClientId] = []
        #: The clients for which a round waited in vain until its deadline; see `drawable`.
        self.given_up: set[ClientId] = set()
        self._late: dict[str, tuple[ClientId, Key, float]] = {}  # tickets that the server no longer waits for

    # ---------------------------------------------------------------------------------------------- Clients

    def begin(self, attempt: int, wanted: int | None) -> None:
        """Begin a round, or another attempt at it."""
        self.attempt, self.wanted = attempt, wanted
        self._phase = 0
        self._kept.clear()

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Send each client its message, wait until enough have answered or time is up, and add up the replies.

        Raises:
            TooFewRepliesError: fewer than ``min_replies`` answered well.
            ClientFailedError: a client failed, and ``rounds.on_error`` ends the run.
        """
        self._phase += 1
        key = (request.cohort.round, self.attempt, self._phase)
        with Gathering(request.gather, self.algorithm.messages, self.scratch) as gathering:
            infos = {client.id: client for client in request.cohort}
            found = self._ask("train", key, request.down, infos, gathering, score=score, enough=self.wanted)
            took = {client: sum(answer.seconds.values()) for client, answer in found.answers.items() if answer.seconds}
            took = dict(sorted({**took, **dict.fromkeys(found.late, math.inf)}.items()))
            if len(found.answers) < self.rounds.min_replies:
                raise TooFewRepliesError(
                    f"round {key[0]}: {len(found.answers)} of {len(request.down)} clients answered; "
                    f"rounds.min_replies is {self.rounds.min_replies}",
                    took,
                )
            gathered = gathering.settle(found.answers, found.failed)
        answers = dict(sorted(found.answers.items()))
        self._kept |= dict.fromkeys(answers, key)
        return replace(gathered, seconds=took), {
            client: Report(
                Work(**headers.fields(answer.work or headers.WorkReport())),
                measure(request.down[client]),
                found.sizes[client],
                found.scores.get(client),
            )
            for client, answer in answers.items()
        }

    def drawable(self) -> list[ClientId]:
        """Return the clients among which a round draws, ascending.

        They are those that are connected; under ``on_error = "retry"`` also those that were, until a round has waited
        for them in vain.
        """
        present = set(self.registry.present)
        self.given_up -= present
        known = self.registry.node.keys() - self.given_up if self.rounds.on_error == "retry" else set[ClientId]()
        return sorted(present | known)

    def commit(self) -> None:
        """Count the round: the states that its clients kept become their private states."""
        self.settled |= self._kept
        self.kept = sorted(self._kept)
        self._kept.clear()

    @contextmanager
    def at_best(self) -> Generator[None]:
        """Within the block clients are evaluated with their states of the best round."""
        self._earlier = self.best
        try:
            yield
        finally:
            self._earlier = None

    def evaluate(self, round_: int, down: Down, *, final: bool = False) -> dict[ClientId, Score]:
        """Send each client the message from which it predicts; return the counts of the clients that report them."""
        found = self._ask("evaluate", (round_, self.attempt, 0), down, {}, None, score=False, enough=None, final=final)
        scores = dict(sorted(found.scores.items()))
        # Only the clients' networks know which predictors there are: the names that most clients report count.
        named = Counter(tuple(score.predictors) for score in scores.values()).most_common(1)
        reason = "it reports other predictors than most clients"
        for client in [client for client, score in scores.items() if tuple(score.predictors) != named[0][0]]:
            del scores[client]
            self.tell("failed", client=client, kind="evaluate", round=round_, reason=reason, again=False)
        return scores

    def hand_over(self, round_: int, down: Down) -> list[ClientId]:
        """Send each client the message from which it predicts when the run is over, and have it keep its predictor.

        Returns:
            The clients that kept it, ascending.
        """
        found = self._ask("keep", (round_, self.attempt, 0), down, {}, None, score=False, enough=None)
        return sorted(found.answers)

    # ---------------------------------------------------------------------------------------------- asking

    def _ask(
        self,
        kind: RequestKind,
        key: Key,
        down: Down,
        infos: Mapping[ClientId, ClientInfo],
        gathering: Gathering | None,
        *,
        score: bool,
        enough: int | None,
        final: bool = False,
    ) -> _Good:
        found = _Good()
        largest = max((measure(message).total for message in down.values()), default=0)
        left = Counter(map(id, down.values()))  # clients to which each message is still to be sent
        encoded: dict[int, bytes] = {}  # a broadcast is one object: encoded once, and kept until the last client
        waiting: dict[str, ClientId] = {}
        retried: set[ClientId] = set()
        lost: set[ClientId] = set()  # clients that are not connected, and are sent the message when they are again
        waits = self.rounds.on_error == "retry" and kind == "train"
        end = time.monotonic() + self.rounds.deadline
        look = 0.0  # when to look next for clients that left or came back

        def body(message: Message | None) -> bytes | None:
            if message is None:
                return None
            left[id(message)] -= 1
            made = encoded.pop(id(message), None) or encode(message)
            if left[id(message)] > 0:
                encoded[id(message)] = made
            return made

        def send(clients: list[ClientId]) -> None:
            few = max(1, _AT_ONCE // max(1, largest))  # bounds the copies of a message in memory
            for some in (clients[k : k + few] for k in range(0, len(clients), few)):
                requests = [self._request(kind, key, client, body(down[client]), score, end, final) for client in some]
                for client, ticket in zip(some, self.transport.push(requests), strict=True):
                    if ticket is None:
                        fail(client, "the engine did not take the message")
                    else:
                        waiting[ticket] = client
                del requests

        def fail(client: ClientId, reason: str) -> None:
            # The reason may quote text that a client made up: no commands to the terminal, no name of megabytes.
            reason = "".join(c if c.isprintable() else "?" for c in reason[:500])
            if waits:
                self.registry.refresh()
            away = waits and client not in self.registry.present
            again = waits and (away or client not in retried) and time.monotonic() < end
            self.tell("failed", client=client, kind=kind, round=key[0], reason=reason, again=again)
            if self.rounds.on_error == "abort" and kind == "train":
                raise ClientFailedError(f'client {client}, round {key[0]}: {reason}; rounds.on_error is "abort"')
            if not again:
                found.failed[client] = reason
            elif away:
                lost.add(client)
            else:
                retried.add(client)
                send([client])  # noqa: F821 - it is deleted below, when nobody fails any more

        def tend() -> None:
            """Note the clients that left while the server waits for them, and ask those that came back."""
            self.registry.refresh()
            present = set(self.registry.present)
            for client in sorted({*waiting.values()} - present - lost):
                lost.add(client)
                reason = "it is no longer connected; the round waits for it"
                self.tell("failed", client=client, kind=kind, round=key[0], reason=reason, again=True)
            back = sorted(lost & present)
            lost.difference_update(back)
            send(back)  # noqa: F821 - as above

        there = {*self.registry.present} if waits else self.registry.node.keys()
        absent = [client for client in down if client not in there]
        for client in absent:
            fail(client, "it is not connected")
        place = {key: number for number, key in enumerate(left)}  # clients of one message, one after the other
        send(sorted((client for client in down if client not in absent), key=lambda client: place[id(down[client])]))
        while (waiting or lost) and time.monotonic() < end and (enough is None or len(found.answers) < enough):
            if waits and time.monotonic() >= look:
                tend()
                look = time.monotonic() + 5 * self.rounds.poll  # it asks the engine for its nodes
            tickets = [*waiting, *self._late]
            few = max(1, _AT_ONCE // max(1, largest))  # bounds the replies in memory
            arrived = False
            for reply in (
                one for k in range(0, len(tickets), few) for one in self.transport.pull(tickets[k : k + few])
            ):
                arrived = True
                largest = max(largest, len(reply.body or b""))
                client = waiting.pop(reply.ticket, None)
                if client is None:
                    late = self._late.pop(reply.ticket, None)
                    if late is not None and not reply.error:
                        reason = "a reply came after its round; it is not used"
                        self.tell("late", client=late[0], round=late[1][0], reason=reason)
                    continue
                if enough is not None and len(found.answers) >= enough:
                    self.tell("surplus", client=client, round=key[0])
                    continue
                try:
                    answer, tested, message = self._read(reply, kind, key, client, down[client], infos.get(client))
                except MessageError as error:
                    # One that left and came back was asked twice: the engine reports the loss of the first message.
                    if client not in lost and client not in waiting.values():
                        fail(client, str(error))
                else:
                    lost.discard(client)
                    for ticket in [ticket for ticket, other in waiting.items() if other == client]:
                        del waiting[ticket]
                    if gathering is not None:
                        gathering.put(infos[client], message)
                    found.answers[client], found.sizes[client] = answer, measure(message)
                    if tested is not None:
                        found.scores[client] = tested
                    del reply, message
            if not arrived:
                time.sleep(self.rounds.poll)
        full = enough is not None and len(found.answers) >= enough
        for ticket, client in waiting.items():
            self._late[ticket] = (client, key, time.monotonic() + self.rounds.deadline)
        for client in sorted({*waiting.values(), *lost}):
            if full:
                self.tell("surplus", client=client, round=key[0])
            else:
                how = "it was not connected at the deadline, after" if client in lost else "no reply within"
                found.failed[client] = f"{how} {self.rounds.deadline:g} s"
                found.late |= {client} - lost
                self.tell("failed", client=client, kind=kind, round=key[0], reason=found.failed[client], again=False)
        self.given_up |= lost
        del send  # `fail` calls it, and it `fail`: the cycle would keep all messages until the garbage collector comes
        return found

    def _request(
        self,
        kind: RequestKind,
        key: Key,
        client: ClientId,
        body: bytes | None,
        score: bool,
        end: float,
        final: bool,
    ) -> Outgoing:
        settled = self.settled.get(client)
        latest = self._kept.get(client, settled)
        header = headers.dump(
            RequestHeader(
                kind=kind,
                experiment=self.experiment,
                key=key,
                client=client,
                since=latest if self._earlier is None else self._earlier.get(client),
                settled=settled,
                best=self.best.get(client),
                score=score,
                final=final,
                config=self.config.to_dict(),
                task=self.registry.task,
            )
        )
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
    ) -> tuple[ReplyHeader, Score | None, Message | None]:
        """Decode and check a reply; return its header, score and message.

        Raises:
            MessageError: the engine or the client reports an error, or the reply fails a check; the text says which.
        """
        if reply.error:
            raise MessageError(reply.error)
        self.traffic.received += len(reply.header) + len(reply.body or b"")
        answer = headers.load(ReplyHeader, reply.header)
        if (answer.kind, answer.experiment, answer.key, answer.client) != (kind, self.experiment, key, client):
            raise MessageError(
                f"the reply belongs to request {answer.kind} {answer.key} of client {answer.client}; "
                f"expected {kind} {key} of client {client}"
            )
        if answer.error:
            raise MessageError(in_short(answer.error))
        tested = None if answer.score is None else self._score(answer.score)
        limit = int(self.rounds.max_message * 1e6)
        message = None if reply.body is None else decode(reply.body, *self.algorithm.messages, limit=limit)
        if info is not None:
            assert self.registry.task is not None, "the task is known before anything is sent"
            check_reply(self.algorithm, task_of(self.config, self.registry.task), info, down, message)
        if answer.lost:
            self.tell("lost-state", client=client, round=key[0])
        self.seconds[client] = answer.seconds
        return answer, tested, message

    def _score(self, counts: Counts) -> Score:
        """Return the score that a client reports.

        Raises:
            MessageError: it has other metrics than the run, or sums that are none of its metrics'.
        """
        assert self.registry.task is not None, "the task is known before anything is sent"
        wanted = beyond_accuracy(self.config.metrics)
        kinds = {COMPUTED[name].tally.__name__ for name in wanted}
        if counts.sums.keys() != kinds or any(tuple(values) != wanted for values in counts.values.values()):
            raise MessageError(
                f"it reports the metrics {', '.join(next(iter(counts.values.values()), ()))}; expected "
                f"{', '.join(wanted) or 'none'} beyond the accuracy"
            )
        classes = self.config.data.task == "classification"
        predictors = counts.correct if classes else counts.values
        if not predictors or (wanted and list(predictors) != list(counts.values)) or (counts.correct and not classes):
            raise MessageError(
                f"it reports right answers of {list(counts.correct)} and metrics of {list(counts.values)}; expected "
                f"{'those of the same predictors' if classes else 'metrics alone'}"
            )
        try:
            outputs = self.registry.task.num_classes
            sums = {kind: read_sums(kind, numbers, outputs) for kind, numbers in counts.sums.items()}
        except ValueError as error:
            raise MessageError(str(error)) from error
        reported = headers.fields(counts)
        del reported["sums"]
        if reported["majority"] and set(reported["majority"]) != set(self.config.metrics):
            raise MessageError("it reports other metrics of the majority class than the run has")
        return Score(**reported, tallies=sums)

    def sweep(self) -> None:
        """Forget the late requests whose time has run out."""
        self._late = {ticket: entry for ticket, entry in self._late.items() if entry[2] > time.monotonic()}
