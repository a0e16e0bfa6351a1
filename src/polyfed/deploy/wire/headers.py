"""What goes with a declared message: a header that says which round, attempt, phase and client it belongs to.

A frame is a JSON header and, where something is sent, the bytes of `polyfed.core.message.encode`. Headers are checked
field by field; nothing in them names a class to be built.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polyfed.base.errors import MessageError

#: The wire's version; a node refuses another.
VERSION = 1
#: The longest header that is read; a configuration and the task are some kB.
HEADER_LIMIT = 1_000_000

#: (round, attempt, phase): which exchange of a run; attempts at a round that was void, phases of a round.
Key: TypeAlias = tuple[int, int, int]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Key = tuple[_Count, _Count, _Count]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_H = TypeVar("_H", bound=BaseModel)


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    polyfed: Literal[1] = VERSION


class TaskFacts(BaseModel):
    """The task as the server and all clients know it, without the data and networks that made it.

    Args:
        input_shape: of one example.
        num_classes: L.
        architectures: the clients' networks where they are public; empty where they are private.
        capacities: those that occur, descending.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_shape: Annotated[tuple[Annotated[int, Field(gt=0, le=2**31)], ...], Field(min_length=1, max_length=4)]
    num_classes: Annotated[int, Field(ge=2, le=10**7)]
    architectures: tuple[str, ...] = ()
    capacities: tuple[float, ...] = (1.0,)


class RequestHeader(_Header):
    """From the server to a client.

    Args:
        kind: what is asked: who are you, train, or test.
        experiment: the run, the same after a resume.
        key: which exchange.
        client: for whom.
        since: the exchange whose private state the client starts from; None is its first.
        settled: the last exchange of this client in a round that is over and counted; older state is not needed.
        score: have the client tested just after its training.
        config: the configuration's tables.
        task: the task's facts; None while they are not known.
    """

    kind: Literal["describe", "train", "evaluate"]
    experiment: Annotated[str, Field(pattern=r"^[0-9a-z][0-9a-z-]{0,63}$")]
    key: _Key = (0, 0, 0)
    client: _Count | None = None
    since: _Key | None = None
    settled: _Key | None = None
    score: bool = False
    config: dict[str, Any] = Field(default_factory=dict)
    task: TaskFacts | None = None


class WorkReport(BaseModel):
    """Costs of a client's work, as far as it tells them; see `polyfed.execute.drivers.Work`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops: _Count = 0
    seconds: _Seconds = 0.0
    peak_bytes: _Count = 0
    steps: _Count = 0
    loss: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Counts(BaseModel):
    """A client's test: examples, right answers by predictor, the default first, and FLOPs as far as it tells them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: Annotated[int, Field(gt=0, le=2**53)]
    correct: Annotated[dict[str, _Count], Field(min_length=1, max_length=1000)]
    flops: _Count = 0
    flops_parts: _Count = 0

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Counts:
        if max(self.correct.values()) > self.examples:
            raise ValueError(f"more than all {self.examples} answers are right")
        return self


class About(BaseModel):
    """What a client tells of itself when it joins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: _Count
    capacity: Annotated[float, Field(gt=0, le=1)]
    architecture: Annotated[str, Field(max_length=1000)]
    input_shape: Annotated[tuple[Annotated[int, Field(gt=0, le=2**31)], ...], Field(min_length=1, max_length=4)]
    num_classes: Annotated[int, Field(ge=2, le=10**7)]


class ReplyHeader(_Header):
    """From a client to the server.

    Args:
        kind, experiment, key, client: of the request.
        error: what went wrong: the class of the exception, not its text, which could tell of private things.
        lost: the client no longer had the state that the request was to start from.
        work: what it cost.
        score: the test.
        about: who the client is.
        seconds: what the client's own part took, by step.
    """

    kind: Literal["describe", "train", "evaluate"]
    experiment: str
    key: _Key
    client: _Count
    error: Annotated[str, Field(max_length=200)] | None = None
    lost: bool = False
    work: WorkReport | None = None
    score: Counts | None = None
    about: About | None = None
    seconds: Annotated[dict[str, _Seconds], Field(max_length=100)] = Field(default_factory=dict)


def dump(header: _Header) -> str:
    """The JSON text of a header."""
    return header.model_dump_json(exclude_none=True)


def load(cls: type[_H], text: str) -> _H:
    """A header from its JSON text.

    Raises:
        MessageError: it is too long, no JSON, or not what was expected.
    """
    if len(text) > HEADER_LIMIT:
        raise MessageError(f"a header of {len(text):,} characters came; at most {HEADER_LIMIT:,} are read")
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise MessageError(f"the header of a message is damaged: {where}: {first['msg']}") from error


def digest(request: RequestHeader, body: bytes | None) -> str:
    """What a repeated request has in common with the first: everything that the answer depends on."""
    told = hashlib.sha256(dump(request).encode())
    told.update(b"-" if body is None else b"+" + body)
    return told.hexdigest()
