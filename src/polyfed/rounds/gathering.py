"""The replies of one exchange, from their arrival to their totals.

The set of clients whose replies count is fixed first: before the exchange if all clients that are asked count, else at
its end. Replies are folded in order of client id; a reply that comes before its turn waits, encoded, on disk. So a
round needs memory for one upload and the totals, and its result does not depend on the order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from polyfed.base.types import ClientId
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Declared, Fold, Gathered
from polyfed.core.message import Message, decode, encoded
from polyfed.storage.spool import Place, Spool


class Gathering(AbstractContextManager["Gathering"]):
    """Adds up the replies of one exchange; to be used in a ``with`` block, which deletes waiting replies at its end.

    Args:
        gather: the declarations, by field of the upload.
        kinds: the message classes of the algorithm.
        folder: a folder on the disk where replies wait.
        counted: the clients whose replies count; None if they are not known yet.
    """

    def __init__(
        self,
        gather: Mapping[str, Declared],
        kinds: tuple[type[Message], ...],
        folder: Path | None = None,
        counted: Iterable[ClientId] | None = None,
    ) -> None:
        self._fold, self._kinds, self._needed = Fold(gather), kinds, bool(gather)
        self._turns = None if counted is None else deque(sorted(counted))
        self._spool = Spool(folder)
        self._waiting: dict[ClientId, tuple[ClientInfo, Place | None]] = {}

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def put(self, client: ClientInfo, upload: Message | None) -> None:
        """Fold a reply that has come if it is its turn, else store it."""
        if self._turns and self._turns[0] == client.id:
            self._fold.add(client, upload)
            self._turns.popleft()
            self._advance()
        else:
            self._waiting[client.id] = (client, self._spool.put(encoded(upload)) if upload and self._needed else None)

    def settle(self, counted: Iterable[ClientId], failed: Mapping[ClientId, str]) -> Gathered:
        """Fold the remaining replies, when all that count have come, and return the totals.

        Args:
            counted: the clients whose replies count.
            failed: the reasons why the replies of other clients do not count.
        """
        folded = {client.id for client in self._fold.clients}
        self._turns = deque(sorted(client for client in counted if client not in folded))
        self._advance()
        assert not self._turns, f"client {self._turns[0]} counts, but its reply did not come"
        return self._fold.finish(failed)

    def _advance(self) -> None:
        while self._turns and self._turns[0] in self._waiting:
            client, place = self._waiting.pop(self._turns.popleft())
            self._fold.add(client, None if place is None else decode(self._spool.get(place), *self._kinds))
