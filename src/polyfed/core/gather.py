"""What the uploads of an exchange add up to: declared by the algorithm, field by field, and added up by who runs it.

    got = yield from exchange(cohort, down, gather={"model": Mean("num_examples"), "pairs": each})
    got["model"], got["pairs"][client_id]

Replies are added in order of client id, however they come in, and none of them is kept: a round holds one upload and
one sum, whatever the cohort. A field that is not named is dropped, unless a sum reads it as a weight. The sums of
`polyfed.blocks.aggregate` are of floating-point tensors and run in float64.
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
    """How one field of all uploads adds up. A declaration: it keeps nothing itself, so that a round can be repeated."""

    @abstractmethod
    def init(self) -> Any:
        """The total before the first upload; `add` may write into it."""

    @abstractmethod
    def add(self, total: Any, client: ClientInfo, value: Any, upload: Message) -> Any:
        """The total with one more upload.

        Args:
            total: of the clients before.
            client: who sent it.
            value: the field; not to be written, and not to be kept but by `each`.
            upload: the whole message, for weights.
        """

    @abstractmethod
    def finish(self, total: Any) -> Any:
        """What the algorithm gets."""


@dataclass(frozen=True)
class Each(Gather):
    """Every client's own value, by client: for those who need them all, at the price of keeping them all.

    Args:
        of: what is kept, made of the field; None is the field itself.
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
    """What an exchange brought back.

    Args:
        fields: by the name of the upload's field, what its declaration made of all of them.
        clients: whose replies counted, in order of id.
        failed: who was asked and did not count, and why.
    """

    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    clients: tuple[ClientInfo, ...] = ()
    failed: Mapping[ClientId, str] = field(default_factory=dict[ClientId, str])

    def __getitem__(self, name: str) -> Any:
        """The total of the field ``name``."""
        return self.fields[name]

    def __len__(self) -> int:
        """How many replies counted."""
        return len(self.clients)


class Fold:
    """The totals of one exchange while they grow.

    Args:
        gather: the declarations, by field.
    """

    def __init__(self, gather: Mapping[str, Declared]) -> None:
        self._gather = {name: _Several(how) if isinstance(how, tuple) else how for name, how in gather.items()}
        self._totals = {name: how.init() for name, how in self._gather.items()}
        #: Whose replies were added.
        self.clients: list[ClientInfo] = []

    def add(self, client: ClientInfo, upload: Message | None) -> None:
        """Add one reply; clients come in ascending order of id.

        Raises:
            TypeError: the upload lacks a field that is declared.
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
        """The totals, for the algorithm."""
        fields = {name: how.finish(self._totals[name]) for name, how in self._gather.items()}
        return Gathered(fields, tuple(self.clients), failed)
