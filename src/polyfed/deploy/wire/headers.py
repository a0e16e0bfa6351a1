"""The header of a declared message, which names its round, attempt, phase and client.

A frame is a JSON header and, where something is sent, the bytes of `polyfed.core.message.encode`. Headers are checked
field by field, and no field names a class to build.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from polyfed.base.errors import MessageError
from polyfed.data.schema import Schema
from polyfed.deploy.wire.transport import RequestKind

#: The longest header, in characters, that is read; a configuration and the task take a few kB.
HEADER_LIMIT = 1_000_000

#: (round, attempt, phase) names an exchange of a run: a void round is attempted again, a round has phases.
Key: TypeAlias = tuple[int, int, int]
_Count = Annotated[int, Field(ge=0, le=2**53)]
#: FLOPs, which are NaN in the ledger if they cannot be counted.
_Flops = Annotated[_Count | Literal["unknown"], BeforeValidator(lambda value: value if value == value else "unknown")]
_Key = tuple[_Count, _Count, _Count]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Values = Annotated[dict[str, _Finite | None], Field(max_length=100)]
_H = TypeVar("_H", bound=BaseModel)


class _Header(BaseModel, frozen=True, extra="forbid"):
    polyfed: Literal[2] = 2  # the version of the wire format; a node refuses any other


class Agreement(BaseModel, frozen=True, extra="forbid"):
    """What classes, columns, categories and pixels mean at a client, or at all of them.

    Args:
        digests: a hash of each part; equal hashes are equal parts, also where the names are private.
        meaning: the schema; classes and columns are left out where a client keeps them private.
    """

    digests: Annotated[dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]], Field(min_length=1, max_length=10)]
    meaning: Schema

    def apart(self, other: Agreement) -> tuple[str, ...]:
        """Return the names of the parts that differ."""
        return tuple(
            part
            for part in sorted({*self.digests, *other.digests})
            if self.digests.get(part) != other.digests.get(part)
        )


class TaskFacts(BaseModel, frozen=True, extra="forbid"):
    """The task as the server and all clients know it, without the data and networks that made it.

    Args:
        input_shape: the shape of one example.
        num_classes: the number of classes, L; 1 for a regression.
        tokens: whether examples are tokens, whole numbers that are not standardised.
        architectures: the clients' networks where they are public; empty where they are private.
        capacities: the capacities that occur, descending.
        agreed: what all clients' classes, columns, categories and pixels mean.
    """

    input_shape: Annotated[tuple[Annotated[int, Field(gt=0, le=2**31)], ...], Field(min_length=1, max_length=4)]
    num_classes: Annotated[int, Field(ge=1, le=10**7)]
    tokens: bool = False
    architectures: tuple[str, ...] = ()
    capacities: tuple[float, ...] = (1.0,)
    agreed: Agreement | None = None


class RequestHeader(_Header, frozen=True):
    """The header of a request from the server to a client.

    Args:
        kind: "describe" asks which client the node is, "train" has it train, "evaluate" has it test, and "keep" has it
            keep all that its predictor needs, when the run is over.
        experiment: the name of the run, the same after a resume.
        key: the exchange.
        client: the receiver; None where the server does not know it yet.
        since: the exchange whose private state the client starts from; None means its first state.
        settled: the last exchange of this client in a round that is over and counted; older state is not needed.
        best: the exchange whose private state is the client's own of the best round; it stays beside the latest. None
            if the run keeps none.
        score: whether the client tests just after its training.
        final: whether an evaluation reports the run's result, on test rows; else validation rows count, where the
            client has any.
        config: the tables of the configuration.
        task: the task; None while the server does not know it.
        agreed: what the clients that joined agreed on, in a request to describe; None while there is none.
    """

    kind: RequestKind
    experiment: Annotated[str, Field(pattern=r"^[0-9a-z][0-9a-z-]{0,63}$")]
    key: _Key = (0, 0, 0)
    client: _Count | None = None
    since: _Key | None = None
    settled: _Key | None = None
    best: _Key | None = None
    score: bool = False
    final: bool = False
    config: dict[str, Any] = Field(default_factory=dict)
    task: TaskFacts | None = None
    agreed: Agreement | None = None


class WorkReport(BaseModel, frozen=True, extra="forbid"):
    """Costs of a client's work; see `polyfed.execute.drivers.Work`. FLOPs that a client does not report are unknown."""

    flops: _Flops = "unknown"
    seconds: _Seconds = 0.0
    peak_bytes: _Count = 0
    steps: _Count = 0
    loss: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Counts(BaseModel, frozen=True, extra="forbid"):
    """A client's test, as far as the client reports it.

    Args:
        examples: test examples.
        correct: right answers by predictor, the default first; empty for a regression.
        flops: FLOPs of the forward passes.
        flops_parts: FLOPs before them.
        values: the metrics by predictor, beyond the accuracy.
        sums: what pools the metrics of the default predictor; see `polyfed.metrics.metrics.sent_sums`.
        majority: the metrics of predicting the most frequent training class.
    """

    examples: Annotated[int, Field(gt=0, le=2**53)]
    correct: Annotated[dict[str, _Count], Field(max_length=1000)] = Field(default_factory=dict)
    values: Annotated[dict[str, _Values], Field(max_length=1000)] = Field(default_factory=dict)
    sums: Annotated[dict[str, list[_Finite]], Field(max_length=10)] = Field(default_factory=dict)
    majority: _Values = Field(default_factory=dict)
    flops: _Flops = "unknown"
    flops_parts: _Flops = "unknown"

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Counts:
        if not self.correct and not self.values:
            raise ValueError("got no predictor; expected at least one")
        if max(self.correct.values(), default=0) > self.examples:
            raise ValueError(f"got {max(self.correct.values())} right answers of {self.examples} examples")
        return self


def fields(report: WorkReport | Counts) -> dict[str, Any]:
    """Return the fields of a report, with NaN for FLOPs that the client could not count."""
    every = report.model_dump().items()
    return {name: math.nan if value == "unknown" and name.startswith("flops") else value for name, value in every}


class About(BaseModel, frozen=True, extra="forbid"):
    """A client's description of itself when it joins."""

    client: _Count
    capacity: Annotated[float, Field(gt=0, le=1)]
    architecture: Annotated[str, Field(max_length=1000)]
    input_shape: Annotated[tuple[Annotated[int, Field(gt=0, le=2**31)], ...], Field(min_length=1, max_length=4)]
    num_classes: Annotated[int, Field(ge=1, le=10**7)]
    tokens: bool = False
    agreement: Agreement


class ReplyHeader(_Header, frozen=True):
    """The header of a reply from a client to the server.

    Args:
        kind, experiment, key, client: as in the request.
        error: the class of an exception, without its text, which could disclose private facts; "" if there is none.
        apart: the parts in which the client's data differ from what the others agreed on, if that is the error.
        lost: whether the client no longer had the state that the request starts from.
        work: the costs of the client's work.
        score: the result of the test.
        about: the client's description of itself.
        seconds: seconds that the client spent, by step.
    """

    kind: RequestKind
    experiment: str
    key: _Key
    client: _Count
    error: Annotated[str, Field(max_length=200)] | None = None
    apart: Annotated[tuple[Annotated[str, Field(max_length=100)], ...], Field(max_length=10)] = ()
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
        MessageError: the text is too long, is no JSON, or has a field that is missing, unknown or wrong.
    """
    if len(text) > HEADER_LIMIT:
        raise MessageError(f"got a header of {len(text):,} characters; expected at most {HEADER_LIMIT:,}")
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise MessageError(f"the header of a message is damaged: {where}: {first['msg']}") from error


def digest(request: RequestHeader, body: bytes | bytearray | None) -> str:
    """Return a hash of all that the answer depends on; a repeated request has the same."""
    found = hashlib.sha256(dump(request).encode() + (b"-" if body is None else b"+"))
    found.update(body or b"")  # a body may have a gigabyte, so it is not copied
    return found.hexdigest()
