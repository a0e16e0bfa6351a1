"""The totals of an exchange's uploads: the algorithm declares a total for each field, and the runtime adds it up.

    got = yield from exchange(cohort, down, gather={"model": Mean("num_examples"), "pairs": each})
    got["model"], got["pairs"][client_id]

Replies are added in order of client id, whatever their order of arrival, and are not kept: a round holds one upload and
one total, whatever the cohort. A field that is not named is dropped, unless a total reads it as a weight. The totals of
`polyfed.blocks.aggregate` are for floating-point tensors and are computed in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from polyfed.base.types import ClientId
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message, compact


class Gather(ABC):
    """The declaration of the total of one upload field. It keeps no state, so that a round can be repeated."""

    @abstractmethod
    def init(self) -> Any:
        """Return the total before the first upload; `add` may write into it."""

    @abstractmethod
    def add(self, total: Any, client: ClientInfo, value: Any, upload: Message) -> Any:
        """Return the total with one more upload.

        Args:
            total: the total of earlier clients.
            client: the sender.
            value: the field; it must not be written to, and only `each` keeps it.
            upload: the whole message, for weights.
        """

    @abstractmethod
    def finish(self, total: Any) -> Any:
        """Return the total in the form that the algorithm gets."""


@dataclass(frozen=True)
class Each(Gather):
    """Keeps every client's value, by client: for algorithms that need all values, at the cost of their memory.

    Args:
        of: a function of the field whose result is kept; None keeps the field itself.
    """

    of: Callable[[Any], Any] | None = None

    def init(self) -> dict[ClientId, Any]:
        """No values."""
        return {}

    def add(self, total: dict[ClientId, Any], client: ClientInfo, value: Any, upload: Message) -> dict[ClientId, Any]:
        """One more; a tensor that is a view of a larger one is copied, or it would keep that alive."""
        total[client.id] = compact(value if self.of is None else self.of(value))
        return total

    def finish(self, total: dict[ClientId, Any]) -> dict[ClientId, Any]:
        """In order of client id."""
        return total


#: Keeps this field of every reply: a mapping from client id to value, in order of client id.
each: Gather = Each()


@dataclass(frozen=True)
class _Several(Gather):
    """Several totals of one field, as a tuple."""

    parts: tuple[Gather, ...]

    def init(self) -> list[Any]:
        """Each part's."""
        return [part.init() for part in self.parts]

    def add(self, total: list[Any], client: ClientInfo, value: Any, upload: Message) -> list[Any]:
        """Each part's."""
        return [part.add(one, client, value, upload) for part, one in zip(self.parts, total, strict=True)]

    def finish(self, total: list[Any]) -> tuple[Any, ...]:
        """Each part's."""
        return tuple(part.finish(one) for part, one in zip(self.parts, total, strict=True))


#: What a field adds up to: one total, or several.
Declared: TypeAlias = Gather | tuple[Gather, ...]


@dataclass(frozen=True)
class Gathered:
    """The result of an exchange.

    Args:
        fields: the totals, by the name of the upload's field.
        clients: the clients whose replies counted, in order of id.
        failed: the clients whose replies did not count, with the reasons.
        seconds: how long clients took, by the simulated clock or, deployed, by their own; infinite for those that took
            longer than the server waited; without a clock of none.
    """

    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    clients: tuple[ClientInfo, ...] = ()
    failed: Mapping[ClientId, str] = field(default_factory=dict[ClientId, str])
    seconds: Mapping[ClientId, float] = field(default_factory=dict[ClientId, float])

    def __getitem__(self, name: str) -> Any:
        """Return the total of the field ``name``."""
        return self.fields[name]

    def __len__(self) -> int:
        """Return how many replies counted."""
        return len(self.clients)


class Fold:
    """The totals of one exchange while replies are added.

    Args:
        gather: the declarations, by field.
    """

    def __init__(self, gather: Mapping[str, Declared]) -> None:
        self._gather = {name: _Several(how) if isinstance(how, tuple) else how for name, how in gather.items()}
        self._totals = {name: how.init() for name, how in self._gather.items()}
        #: The clients whose replies were added.
        self.clients: list[ClientInfo] = []

    def add(self, client: ClientInfo, upload: Message | None) -> None:
        """Add one reply; clients come in ascending order of id.

        Raises:
            TypeError: the upload lacks a declared field.
        """
        assert not self.clients or self.clients[-1].id < client.id, "replies are folded in order of client id"
        for name, how in self._gather.items():
            if not hasattr(upload, name):
                raise TypeError(
                    f"gather names the field {name!r}, which {type(upload).__qualname__} does not have; "
                    "name fields of the upload"
                )
            self._totals[name] = how.add(self._totals[name], client, getattr(upload, name), upload)  # pyright: ignore[reportArgumentType]
        self.clients.append(client)

    def finish(self, failed: Mapping[ClientId, str]) -> Gathered:
        """Return the totals for the algorithm."""
        return Gathered(
            {name: how.finish(self._totals[name]) for name, how in self._gather.items()}, tuple(self.clients), failed
        )
