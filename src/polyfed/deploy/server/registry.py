"""The connected clients: the node of each client, and what the server may know of the client."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyfed.base.errors import ConfigError, MessageError
from polyfed.base.types import ClientId
from polyfed.config import Config
from polyfed.deploy.server.reply_checks import in_short
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import About, Agreement, ReplyHeader, RequestHeader, TaskFacts
from polyfed.deploy.wire.transport import Outgoing, Transport

#: Receives every event that is worth a line: its kind and its particulars.
Events = Callable[..., None]

_AGAIN = 60.0  # seconds after which a node that was refused is asked again
_TTL = 300.0  # seconds within which a node must describe itself, before it is asked again


class ClientRegistry:
    """The clients that are connected; a node that is new is asked which client it is.

    Args:
        transport: carries messages to the nodes.
        config: the configuration of the experiment.
        experiment: the name of the run.
        tell: receives an event for each client that joins, leaves or is refused.
        nodes: the file that names the client of each registered node; a node that is not in it is sent nothing. None
            trusts every node, which only loopback permits.
    """

    def __init__(
        self, transport: Transport, config: Config, experiment: str, tell: Events, *, nodes: Path | None = None
    ) -> None:
        self.transport, self.config, self.experiment, self.tell = transport, config, experiment, tell
        self.nodes = nodes
        self.task: TaskFacts | None = None
        self.agreed: Agreement | None = None  # the first client's, if [data.agreed] does not give all of it
        self.node: dict[ClientId, int] = {}  # the node of each client, connected or not
        self.about: dict[ClientId, About] = {}
        #: Ticket -> the node, when it was asked, and the agreement that it was asked to fit.
        self._asked: dict[str, tuple[int, float, Agreement | None]] = {}
        self._refused: dict[int, float] = {}  # node -> when it may be asked again
        self._online: set[int] = set()

    @property
    def present(self) -> list[ClientId]:
        """The clients that are connected now, ascending."""
        return sorted(client for client, node in self.node.items() if node in self._online)

    def refresh(self) -> None:
        """Update the list of connected nodes, ask new nodes which client they are, and read their replies."""
        online = set(self.transport.nodes())
        bound = None if self.nodes is None else bound_nodes(self.nodes)
        if bound is not None:  # a key may have been replaced since
            self.node = {client: node for client, node in self.node.items() if bound.get(node) == client}
        for client, node in self.node.items():
            if node in self._online and node not in online:
                self.tell("left", client=client)
            elif node in online and node not in self._online and client in self.about:
                self.tell("joined", client=client, again=True)
        self._online = online
        self._hear(bound)
        waiting = {node for node, asked, _ in self._asked.values() if time.monotonic() - asked < _TTL}
        self._refused = {node: until for node, until in self._refused.items() if node in online}
        refused = {node for node, until in self._refused.items() if time.monotonic() < until}
        new = sorted(online - {*self.node.values(), *waiting, *refused})
        if bound is not None:
            for node in (node for node in new if node not in bound):
                reason = (
                    "its key is registered for no client, so it learns nothing of the run; if it is a client's, put "
                    "its public key into keys/client-K.pub and start `polyfed deploy server` again"
                )
                self._refuse(node, reason)
            new = [node for node in new if node in bound]
        if new:
            told = [
                Outgoing(node, "describe", headers.dump(self._question((bound or {}).get(node))), None, "join", _TTL)
                for node in new
            ]
            tickets = zip(self.transport.push(told), new, strict=True)
            self._asked |= {
                ticket: (node, time.monotonic(), self.agreed) for ticket, node in tickets if ticket is not None
            }

    def _question(self, client: ClientId | None) -> RequestHeader:
        """Return the request that asks a node which client it is; ``client`` is the owner of its key, if it has one."""
        return RequestHeader(
            kind="describe",
            experiment=self.experiment,
            client=client,
            config=self.config.to_dict(),
            agreed=self.agreed,
        )

    def _hear(self, bound: Mapping[int, ClientId] | None) -> None:
        for reply in self.transport.pull(list(self._asked)) if self._asked else ():
            node, _, asked = self._asked.pop(reply.ticket, (0, 0.0, None))
            if reply.error:
                self.tell("refused", node=str(node), reason=reply.error)
                continue  # the next refresh asks the node again
            try:
                answer = headers.load(ReplyHeader, reply.header)
            except MessageError as error:
                self._refuse(node, str(error))
            else:
                owner = answer.client if bound is None else bound.get(node)
                if owner != answer.client or (answer.about is not None and answer.about.client != owner):
                    self._refuse(node, _impostor(owner, answer), client=owner)
                elif answer.apart:
                    self._refuse(node, _apart(answer.apart), client=answer.client)
                elif answer.error and asked != self.agreed:
                    pass  # such as a site with one class; it can read its data now that the others agreed
                elif answer.error or answer.about is None:
                    reason = in_short(answer.error) if answer.error else "the reply does not describe the client"
                    self._refuse(node, reason, client=answer.client)
                else:
                    self._enter(node, answer.about, asked)

    def _refuse(self, node: int, reason: str, **more: Any) -> None:
        self._refused[node] = time.monotonic() + _AGAIN  # somebody may have mended the cause by then
        self.tell("refused", node=str(node), reason=reason, **more)

    def _enter(self, node: int, about: About, asked: Agreement | None) -> None:
        client, before = about.client, self.node.get(about.client, node)
        reason = self._misfit(about)
        apart = () if self.agreed is None else about.agreement.apart(self.agreed)
        if reason:
            self._refuse(node, reason, client=client)
        elif apart and asked != self.agreed:
            pass  # it was asked before there was an agreement; the next refresh asks it to fit that
        elif apart:
            self._refuse(node, _apart(apart), client=client)
        else:
            if before != node:
                self._refused[before] = math.inf  # a client has one node: the last that described itself as it
            if self.agreed is None:
                self.agreed = about.agreement
                self._refused = {k: until for k, until in self._refused.items() if until == math.inf}  # may fit now
            self.node[client], self.about[client] = node, about
            self.tell("joined", client=client, again=before != node)

    def _misfit(self, about: About) -> str:
        """Return why a client cannot take part; "" if it can."""
        if about.client >= self.config.clients.count:
            return f"its number is {about.client}; clients.count is {self.config.clients.count}"
        task = self.task
        if task is None:
            others = [other for other in self.about.values() if other.client != about.client]
            # Tables with other columns have other shapes, too; what differs there is told by the agreement.
            if others and about.tokens != others[0].tokens:
                return f"its examples are {'' if about.tokens else 'not '}tokens, unlike those of the others"
            if others and len(about.input_shape) > 1 and about.input_shape != others[0].input_shape:
                return f"its examples have shape {about.input_shape}; expected {others[0].input_shape}, as others have"
        elif (about.input_shape, about.num_classes, about.tokens) != (task.input_shape, task.num_classes, task.tokens):
            return (
                f"its data have shape {about.input_shape} in {about.num_classes} classes{' of tokens' * about.tokens}; "
                f"the task has {task.input_shape} in {task.num_classes}{' of tokens' * task.tokens}"
            )
        elif task.architectures and about.architecture not in task.architectures:
            return (
                "its network is private or not in the task; the run began with public networks only; "
                "give the client a network of the configuration"
            )
        return ""

    def facts(self) -> TaskFacts:
        """Return the task of the connected clients."""
        about = [self.about[client] for client in self.present]
        count = self.config.clients.count
        public = dict.fromkeys(map(str, self.config.clients.architectures))
        capacities = {*self.config.clients.capacities[:count], *(one.capacity for one in about)}
        return TaskFacts(
            input_shape=about[0].input_shape,
            num_classes=about[0].num_classes,
            tokens=about[0].tokens,
            architectures=tuple(public) if all(one.architecture for one in about) else (),
            capacities=tuple(sorted(capacities, reverse=True)),
            agreed=self.agreed,
        )


def bound_nodes(path: Path) -> dict[int, ClientId]:
    """Return the client of each registered node.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        return {int(node): int(entry["client"]) for node, entry in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it names the client of each key, and "
            "`polyfed deploy server` writes it: start the server again"
        ) from error


def _impostor(owner: ClientId | None, answer: ReplyHeader) -> str:
    claimed = answer.client if answer.about is None or answer.client != owner else answer.about.client
    return (
        f"its key is that of client {owner}, but it says that it is client {claimed}; start it with --client {owner}, "
        f"or with the key of client {claimed}"
    )


def _apart(parts: tuple[str, ...]) -> str:
    """Return why a client whose data mean something else cannot take part."""
    return (
        f"its {', '.join(parts)} differ from those that the first client proposed or [data.agreed] gives; the client's "
        "log says in what"
    )
